"""Measures the pipeline on a machine with an NVIDIA GPU and writes `gpu.md`. See README.md."""

from __future__ import annotations

import argparse
import os
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import gpu_decoding
import gpu_evaluation
import gpu_extraction
import gpu_search
import machine
import results
import torch
from gpu_bench import Bench

NETWORKS = ("resnet50", "vit_b_16")
BENCHMARKS: dict[str, dict[str, Callable[[Bench], results.Section]]] = {
    "a": {name: partial(gpu_extraction.measure, name=name) for name in NETWORKS},
    "b": {"decoding": gpu_decoding.measure},
    "c": {"search": gpu_search.measure},
    "d": {"evaluation": gpu_evaluation.measure},
    "e": {name: partial(gpu_extraction.measure, name=name, precision="bf16") for name in NETWORKS},
}
RESULTS = Path(__file__).with_name("gpu.md")


def main() -> None:
    """Run the benchmarks that are asked for; the page is written anew after each."""
    options = _options()
    facts, began, sections = machine.describe() | machine.gpu(), time.perf_counter(), []
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    with TemporaryDirectory(prefix="ood-gpu-", dir=options.scratch) as scratch:
        bench = Bench(Path(scratch), options.quick, options.images)
        for letter in options.only:
            for name, measure in BENCHMARKS[letter].items():
                started = time.perf_counter()
                if started - began > options.budget:
                    print(f"({letter}) {name}: left out, the time is up", flush=True)
                    continue
                print(f"({letter}) {name}", flush=True)
                sections.append(_measured(f"({letter}) {name}", measure, bench))
                print(results.shown(sections[-1]), flush=True)
                print(f"({letter}) {name} took {time.perf_counter() - started:.0f} s", flush=True)
                options.output.write_text(_page(_command(options), facts, sections))
    print(f"written to {options.output}")


def _measured(what: str, measure: Callable[[Bench], results.Section], bench: Bench) -> results.Section:
    """The section of a benchmark; one that fails says so on its page and does not stop the others."""
    try:
        return measure(bench)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        return results.Section(f"{what}: failed", f"{type(error).__name__}: {error}", (), [], [])


def _page(command: str, facts: Mapping[str, str], sections: list[results.Section]) -> str:
    parts = [
        "# Measurements on a GPU",
        f"Written by `{command}`; every number below comes from that one command.",
        "\n".join(f"* {name}: {value}" for name, value in facts.items()),
        *map(results.shown, sections),
    ]
    return "\n\n".join(parts) + "\n"


def _command(options: argparse.Namespace) -> str:
    """The command as others can repeat it: without this machine's paths."""
    some = [] if len(options.only) == len(BENCHMARKS) else ["--only", ",".join(options.only)]
    quick = ["--quick"] if options.quick else []
    return " ".join(["python benchmarks/gpu.py", *some, *quick, "--images", str(options.images)])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="".join(BENCHMARKS), help="some of them, in this order, e.g. c,a")
    parser.add_argument(
        "--quick", action="store_true", help="toy sizes, to try the script; without a GPU, too"
    )
    parser.add_argument(
        "--images", type=int, default=30_000, help="images of the evaluation (default: 30000)"
    )
    parser.add_argument(
        "--budget", type=float, default=450, help="seconds after which none is begun any more (default: 450)"
    )
    parser.add_argument("--scratch", type=Path, help="folder with 20 GB of room (default: the system's)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write (default: gpu.md)")
    options = parser.parse_args()
    options.only = [letter for letter in options.only if letter != ","]
    if unknown := set(options.only) - set(BENCHMARKS):
        parser.error(f"--only: no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    if not options.quick and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --quick tries the script without one")
    os.environ.pop("RAY_ADDRESS", None)
    return options


if __name__ == "__main__":
    main()
