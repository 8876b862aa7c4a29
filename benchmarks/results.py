"""What a benchmark hands back, and how it is written down."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

REASONS: dict[str, str] = {
    "extraction, steady state, against a plain loop": (
        "against the plain loop in PyTorch's own defaults (see the rows below it) the pipeline is "
        "ahead; it is behind one that also uses channels-last tensors of 256 images and an "
        "allocator that keeps freed memory. Of the two, the pipeline has the allocator; its batches "
        "of 128, FeatureNorm of four blocks, the decoding of single rows and Parquet are the "
        "difference."
    ),
    "evaluation, all detectors, each further image, against a plain forward pass": (
        "half of the difference is scoring, and nearly all of that the exact neighbour search of "
        "KNN and GROOD (without them scoring is some 20 times as fast, see (f)); the network of "
        "this benchmark is so small that a forward pass costs as little as a search in 2,000 rows."
    ),
    "growth of peak memory from 10,000 to 60,000 images": (
        "only the evaluate task grows by more: it sorts one detector's scores of all datasets at "
        "once, a few hundred bytes per image, and exact metrics need them together."
    ),
    "gradient of GROOD against per-sample autograd": (
        "about nine tenths of the closed form's time is one float64 matrix product of features and "
        "prototypes (distances are logits here, and float32 loses the small ones); autograd with a "
        "graph per image makes the same product in float32."
    ),
}
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
        table(("", "measured", "target", ""), [_row(check) for check in checks]),
        *(f"* **{check.name}**: {reason(check)}" for check in checks if not check.met),
        *(_section(section) for section in sections),
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


def _section(section: Section) -> str:
    return f"## {section.title}\n\n{section.text}\n\n{table(section.header, section.rows)}"
