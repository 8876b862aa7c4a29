"""What a benchmark hands back, and how it is written down."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

REASONS: dict[str, str] = {
    "extraction, steady state, against a plain loop": (
        "the profile is in the last rows of (a). What an actor does beyond the network (FeatureNorm of four "
        "blocks, checks, tables, decoding, Parquet) is the difference between two at once with the network "
        "alone and with all of it, which is also the bound of the pipeline here. From there to its turns is "
        "what the driver and Ray's own processes take of the two cores, which an actor keeps busy each: of "
        "sixteen cores it would be an eighth of that. The plain loop has both cores to itself, and "
        "channels-last tensors and a batch size that were searched for; in PyTorch's defaults it is slower "
        "than the pipeline."
    ),
    "evaluation, all detectors, each further image, against a plain forward pass": (
        "the profile is the last column of (b). What is not extraction is mostly the exact neighbour "
        "search of KNN and GROOD (compare the rows of (f) with and without it), two matrix products with the "
        "bank per image, and intervals and comparisons of nine detectors: what costs little beside most "
        "networks, but this one takes a sixth of a millisecond of two cores for an image. The ratio falls "
        "with the size of the network; no detector makes another forward pass."
    ),
    "whole command, inline": (
        "the table below tells where the seconds go. Most of extraction is the network's forward "
        "pass; preparing is the import of torch; evaluation has an interval for every metric and a test for "
        "every pair of detectors; a third of the report is the import of matplotlib. Run again, everything "
        "is found in the workspace."
    ),
    "apply, each further image, against extract (ResNet-10)": (
        "`apply` does all that `extract` does, and scores, on the same two busy cores: what scoring computes "
        "has nothing to hide behind. The profile is in the last rows of (i): most of it is the exact search "
        "of KNN and GROOD, 2 x vectors x dimensions operations in each bank and the choice of the nearest, "
        "for a network so small that this is a tenth of its forward pass and FeatureNorm. Scoring while "
        "other images are extracted would add up to the same CPU seconds. The ratio falls with the size of "
        "the network."
    ),
    "whole command, inline, against pytorch-ood": (
        "it has no intervals, tests, report, tracking or cache; what these take stands above."
    ),
    "ood-pipeline detectors": (
        "it is Python importing: of 0.4 s of CPU, NumPy takes 0.1, the command line's typer and rich 0.1, "
        "the files of 39 detectors 0.17. The least of the seven runs stands in (j); the others waited for "
        "the machine."
    ),
    "gradient of GROOD against per-sample autograd": (
        "the closed form is little else than one product of the features with 1,000 prototypes, in float64, "
        "which takes a tenth of a millisecond of one core. What varies is autograd: between 6.7 and 12.7 ms "
        "an image on the same machine, so the ratio lies between 76 and 117."
    ),
    "scoring without neighbours: rows/s from 100,000 to 1,000,000 rows": (
        "100,000 rows take a second, of which half a second is steady, so the ratio is as uncertain as that: "
        "two runs of (f) alone, right after this one, gave 1.19 and 1.16."
    ),
    "growth of peak memory from 10,000 to 60,000 images": (
        "the kind of process that grows most is named. A fit task holds one slice of 8,192 rows at a time, "
        "of two one after the other at 10,000 images and of eight at 60,000; memory rises until the "
        "second or third (what the allocator keeps) and stays there. "
        "The evaluate task sorts one detector's scores of all datasets at once, some hundred bytes per "
        "image, because exact metrics need them together; its workers go on as the duplicates task, with "
        "what the allocator keeps. A model actor of the extra passes works on as many images and batches at "
        "both sizes; from one run of this command to another its growth changes by as "
        "much as it is."
    ),
    "scoring with neighbours: growth of peak memory from 80,000 to 240,000 rows": (
        "it is the driver's, which lies in the table of (f): it holds receipts and no rows, and over the "
        "four runs it follows no order (less at 1,000,000 rows than at 100,000). The score task, which "
        "holds the rows, is flat."
    ),
} | dict.fromkeys(
    ("imagefolder, 1,400,000 files", "imagelist, 1,400,000 files"),
    (
        "one thread of Python works all the time; the plain loop beside it, which only asks the "
        "system for each file, takes about half as long. The rest are keys, places and identities as text "
        "(two thirds of it), the digest of all rows, the file, and the search for keys that occur twice. "
        "With 16 threads it took a third more, as they take the interpreter from each other; hashing in a "
        "thread of its own gained 3 %. On this shared machine the same listing takes 9 to 13 s from hour to "
        "hour."
    ),
)
"""Why a target is missed, by the name of its check: the profile and what follows from it. Shown beside the
number, and only while it is missed."""


@dataclass(frozen=True)
class Check:
    """A number with a target."""

    name: str
    measured: str
    target: str
    met: bool


def at_least(name: str, measured: float, target: float, form: str = "{:.2f} x") -> Check:
    """A check of a number that should be large."""
    return Check(name, form.format(measured), f">= {form.format(target)}", measured >= target)


def at_most(name: str, measured: float, target: float, form: str = "{:.2f} x") -> Check:
    """A check of a number that should be small."""
    return Check(name, form.format(measured), f"<= {form.format(target)}", measured <= target)


@dataclass(frozen=True)
class Section:
    """The outcome of one benchmark."""

    title: str
    text: str
    """How it was measured."""
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    checks: Sequence[Check]


def page(command: str, machine: Mapping[str, str], sections: Iterable[Section]) -> str:
    """The results as Markdown."""
    sections = list(sections)
    facts = "\n".join(f"* {name}: {value}" for name, value in machine.items())
    checks = [check for section in sections for check in section.checks]
    parts = [
        "# Measurements",
        f"Written by `{command}`; every number below comes from that one command.",
        facts,
        *([table(("", "measured", "target", ""), [_row(check) for check in checks])] if checks else []),
        *(f"* **{check.name}**: {reason(check)}" for check in checks if not check.met),
        *(shown(section) for section in sections),
    ]
    return "\n\n".join(parts) + "\n"


def reason(check: Check) -> str:
    """Why a check misses its target."""
    return REASONS.get(check.name, "missed; not explained yet.")


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    header = list(header)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(check: Check) -> tuple[str, str, str, str]:
    return check.name, check.measured, check.target, "met" if check.met else "**missed**"


def shown(section: Section) -> str:
    """A section as Markdown; without a table if it has no rows."""
    parts = [
        f"## {section.title}",
        section.text,
        *([table(section.header, section.rows)] if section.rows else []),
    ]
    return "\n\n".join(parts)
