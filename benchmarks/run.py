"""Measures the pipeline against its targets and writes `results.md`. See README.md."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import applying
import decoding
import evaluation
import extraction
import fashion
import footprint
import gradients
import machine
import results
import scoring
import startup
import streaming
from session import Session

BENCHMARKS: dict[str, Callable[[Session], results.Section]] = {
    "a": extraction.measure,
    "b": evaluation.measure,
    "c": gradients.measure,
    "d": evaluation.measure_warm,
    "e": footprint.measure,
    "f": scoring.measure,
    "g": decoding.measure,
    "h": streaming.measure,
    "i": applying.measure,
    "j": startup.measure,
}
RESULTS = Path(__file__).with_name("results.md")


def main() -> None:
    """Run the benchmarks that are asked for."""
    options = _options()
    facts = machine.describe()
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    sections = []
    with TemporaryDirectory(prefix="ood-benchmark-") as scratch:
        session = Session(options.fashion_mnist, Path(scratch), options.quick, options.large)
        for letter in options.only:
            print(f"({letter}) {BENCHMARKS[letter].__module__}", flush=True)
            started = time.perf_counter()
            sections.append(BENCHMARKS[letter](session))
            print(f"({letter}) took {time.perf_counter() - started:.0f} s", flush=True)
    page = results.page(_command(options), facts, sections)
    print(f"\n{page}")
    if options.output:
        options.output.write_text(page)
        print(f"written to {options.output}")


def _command(options: argparse.Namespace) -> str:
    """The command as others can repeat it: without this machine's paths."""
    some = [] if len(options.only) == len(BENCHMARKS) else ["--only", ",".join(options.only)]
    flags = [f"--{flag}" for flag in ("quick", "large") if getattr(options, flag)]
    return " ".join(["python benchmarks/run.py", *some, *flags])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--fashion-mnist",
        type=Path,
        metavar="DIR",
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="folder of the gzipped IDX files (default: %(default)s)",
    )
    parser.add_argument("--only", default="".join(BENCHMARKS), help="some of them, e.g. a,c")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the benchmarks themselves")
    parser.add_argument("--large", action="store_true", help="(f) with neighbours at 1,000,000 rows, too")
    parser.add_argument(
        "--output",
        type=Path,
        help="where to write; by default results.md, and nowhere with --only or --quick",
    )
    options = parser.parse_args()
    options.only = [letter for letter in options.only if letter != ","]
    if unknown := set(options.only) - set(BENCHMARKS):
        parser.error(f"--only: no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    for name in (fashion.IMAGES, fashion.LABELS):
        if not (options.fashion_mnist / name).is_file():
            parser.error(
                f"--fashion-mnist: no {name} in {options.fashion_mnist}; README.md says how to get it"
            )
    if options.output is None and len(options.only) == len(BENCHMARKS) and not options.quick:
        options.output = RESULTS
    return options


if __name__ == "__main__":
    main()
