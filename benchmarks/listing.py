"""Listing of image folders at the size of ImageNet: seconds and memory of compiling the manifest.

    python benchmarks/listing.py
    python benchmarks/listing.py --folders 100000 --files 1   # a folder for each patient

Makes the tree in a temporary folder, of hard links to one file for each class, and removes it. `--far` asks
an object store for the same tree instead, whose every answer (a page of 1,000 names) takes so many seconds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import machine
from results import at_most, table

SHAPE = 1000, 1400
"""Folders, and files in each."""

TARGET = 10.0
"""Seconds for so many of a local disk on two cores, in the cache of the system."""

LINKS = 60_000
"""Names that a file is given; ext4 allows 65,000."""

_LISTS = """\
import os, resource, sys
from pathlib import Path
from pipeline.config.schema import Dataset
from pipeline.data.manifest import compile_manifest

dataset = Dataset(name="set", role="train", format="imagefolder", path=sys.argv[1])
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, os.times()
rows = compile_manifest(dataset, Path(sys.argv[2])).rows
end, peak = os.times(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cpu = end.user - start.user + end.system - start.system
print(rows, end.elapsed - start.elapsed, cpu, (peak - before) / 1024)
"""


def main() -> None:
    """Make the tree, list it a few times, each in a process of its own, and print what it took."""
    options = _options()
    facts = machine.describe()
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    count = options.folders * options.files
    with TemporaryDirectory(prefix="ood-benchmark-") as scratch:
        place = _store(options) if options.far else _tree(Path(scratch, "tree"), options)
        with place as (path, environment):
            runs = [
                _listed(path, Path(scratch, "manifests"), environment, count) for _ in range(options.times)
            ]
    names = ("listing", "seconds", "CPU seconds", "MiB of memory it added")
    print(
        table(
            names, [(str(number), *(f"{value:.1f}" for value in run)) for number, run in enumerate(runs, 1)]
        )
    )
    name, middle = f"{count:,} files in {options.folders:,} folders, median", median(run[0] for run in runs)
    check = at_most(name, middle, TARGET, "{:.1f} s")
    whole = not options.far and (options.folders, options.files) == SHAPE
    judged = f", target {check.target}: {'met' if check.met else 'missed'}" if whole else ""
    print(f"{name}: {check.measured}{judged}")


@contextmanager
def _tree(root: Path, options: argparse.Namespace) -> Iterator[tuple[str, dict[str, str]]]:
    print(f"makes {options.folders * options.files:,} files", flush=True)
    for number in range(options.folders):
        folder = root / f"n{number:08d}"
        folder.mkdir(parents=True)
        for each in range(options.files):
            path = f"{folder}/{folder.name}_{each * 37}.JPEG"
            if each % LINKS == 0:
                first = Path(path)
                first.write_bytes(b"x" * 100)
            else:
                os.link(first, path)
    yield str(root), {}


@contextmanager
def _store(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, str]]]:
    script = Path(__file__).with_name("far_store.py")
    command = [sys.executable, str(script), str(options.folders), str(options.files), str(options.far)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin and server.stdout
        port = server.stdout.readline().strip()
        if not port:
            raise SystemExit(f"{script.name} did not start.")
        address = f"http://127.0.0.1:{port}"
        named = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "eu-central-1"}
        try:
            yield "s3://bucket/set", {"AWS_ENDPOINT_URL": address, **named}
        finally:
            server.stdin.close()


def _listed(path: str, out: Path, environment: dict[str, str], count: int) -> tuple[float, ...]:
    """Seconds, CPU seconds and MiB that listing takes; the latter beyond what importing everything took."""
    command = [sys.executable, "-c", _LISTS, path, str(out)]
    done = subprocess.run(
        command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True, timeout=3600
    )
    rows, *found = map(float, done.stdout.split())
    assert rows == count, f"{rows:.0f} of {count} files"
    return tuple(found)


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folders", type=_count, default=SHAPE[0])
    parser.add_argument(
        "--files", type=_count, default=SHAPE[1], help="in each folder (default: %(default)s)"
    )
    parser.add_argument("--times", type=_count, default=3, help="that it is listed (default: %(default)s)")
    parser.add_argument("--far", type=float, metavar="SECONDS", help="until an object store answers")
    return parser.parse_args()


if __name__ == "__main__":
    main()
