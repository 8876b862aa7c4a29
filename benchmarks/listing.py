"""Listing at the size of ImageNet, from folders and from a text file: seconds and memory of the manifest.

    python benchmarks/listing.py --output benchmarks/listing.md
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
from results import Section, at_most, page

FORMATS = ("imagefolder", "imagelist")
SHAPE = 1000, 1400
"""Folders, and files in each."""

TIMES = 3

TARGET = 10.0
"""Seconds for so many of a local disk on two cores, in the cache of the system."""

LINKS = 60_000
"""Names that a file is given; ext4 allows 65,000."""

_TIMED = """\
import os, re, sys
from pathlib import Path
{imports}
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
name, path, root, out = sys.argv[1:]
before, start = peak(), os.times()
{lists}
end, most = os.times(), peak()
cpu = end.user - start.user + end.system - start.system
print(rows, end.elapsed - start.elapsed, cpu, (most - before) / 1024)
"""
"""VmHWM is the process's own peak; that of getrusage begins with that of the process that started it."""

_LISTS = _TIMED.format(
    imports="from pipeline.config.schema import Dataset\nfrom pipeline.data.manifest import compile_manifest",
    lists="""\
dataset = Dataset(name="set", role="train", format=name, path=path, root=root or None)
rows = compile_manifest(dataset, Path(out)).rows""",
)

_PLAIN = _TIMED.format(
    imports="",
    lists="""\
if name == "imagefolder":
    rows = 0
    for folder in sorted(os.listdir(path)):
        with os.scandir(os.path.join(path, folder)) as entries:
            rows += sum(entry.stat().st_size >= 0 for entry in entries)
else:
    with open(path) as lines:
        rows = sum(os.stat(os.path.join(root, line.split()[0])).st_size >= 0 for line in lines)""",
)
"""The least that it takes in one thread of Python: the system is asked for every file, nothing is kept."""


def main() -> None:
    """Make the tree, list it a few times, each in a process of its own, and write a page."""
    options = _options()
    facts = machine.describe()
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    count, runs = options.folders * options.files, dict[str, list[tuple[float, ...]]]()
    with TemporaryDirectory(prefix="ood-benchmark-") as scratch:
        place = _store(options) if options.far else _tree(Path(scratch, "tree"), options)
        with place as (root, environment):
            listed = Path(scratch, "list.txt")
            listed.write_text("".join(_lines(options)))
            for name in FORMATS * options.times:
                paths = (root, "") if name == "imagefolder" else (str(listed), root)
                for what, script in {name: _LISTS, f"{name}, plain": _PLAIN}.items():
                    if options.far and script == _PLAIN:
                        continue
                    given = name, *paths, str(Path(scratch, "manifests"))
                    found = _listed(script, given, environment, count)
                    print(f"  {what}: {found[0]:.1f} s", flush=True)
                    runs.setdefault(what, []).append(found)
    written = page(_command(options), facts, [_section(options, runs)])
    print(f"\n{written}")
    if options.output:
        options.output.write_text(written)


def _section(options: argparse.Namespace, runs: dict[str, list[tuple[float, ...]]]) -> Section:
    """All listings, and the target of a local disk at the size of ImageNet."""
    count = options.folders * options.files
    where = f"an object store whose answers take {options.far} s" if options.far else "a local disk"
    whole = not options.far and (options.folders, options.files) == SHAPE
    return Section(
        title=f"{count:,} files in {options.folders:,} folders of {where}",
        text="From the dataset in a config to the manifest on the disk: all keys, labels, sizes and time "
        "stamps, and their digest. `imagefolder` walks the tree; `imagelist` reads a text file of all its "
        "paths and labels, class after class, and asks for each. In turns, each in a process of its own; "
        "memory is what listing adds to it. A local tree has just been made, and is in the system's cache. "
        "Plain: a loop of Python that asks the system for each file (`os.scandir` or the lines of the list, "
        "and `stat`) and keeps nothing.",
        header=("", "seconds", "CPU seconds", "MiB of memory added"),
        rows=[
            (f"{name}, turn {turn}", *(f"{value:.1f}" for value in run))
            for name, found in runs.items()
            for turn, run in enumerate(found, 1)
        ],
        checks=[
            at_most(f"{name}, {count:,} files", median(run[0] for run in found), TARGET, "{:.1f} s")
            for name, found in runs.items()
            if whole and name in FORMATS
        ],
    )


def _command(options: argparse.Namespace) -> str:
    """The command as others can repeat it."""
    shape = () if (options.folders, options.files) == SHAPE else (options.folders, options.files)
    said = [f"--{name} {value}" for name, value in zip(("folders", "files"), shape, strict=False)]
    said += [f"--times {options.times}"] if options.times != TIMES else []
    said += [f"--far {options.far}"] if options.far else []
    return " ".join(["python benchmarks/listing.py", *said])


def _lines(options: argparse.Namespace) -> Iterator[str]:
    """The list: every file, as the tree or the store calls it."""
    for folder in range(options.folders):
        for number in range(options.files):
            name = f"{folder:04d}/{number:06d}.JPEG" if options.far else _name(folder, number)
            yield f"{name} {folder}\n"


def _name(folder: int, number: int) -> str:
    """Path of a file in the tree, as in ImageNet."""
    return f"n{folder:08d}/n{folder:08d}_{number * 37}.JPEG"


@contextmanager
def _tree(root: Path, options: argparse.Namespace) -> Iterator[tuple[str, dict[str, str]]]:
    print(f"makes {options.folders * options.files:,} files", flush=True)
    for folder in range(options.folders):
        (root / _name(folder, 0)).parent.mkdir(parents=True)
        for number in range(options.files):
            path = f"{root}/{_name(folder, number)}"
            if number % LINKS == 0:
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


def _listed(
    script: str, given: tuple[str, ...], environment: dict[str, str], count: int
) -> tuple[float, ...]:
    """Seconds, CPU seconds and MiB that listing takes; the latter beyond what importing everything took."""
    command = [sys.executable, "-c", script, *given]
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
    parser.add_argument(
        "--times", type=_count, default=TIMES, help="that it is listed (default: %(default)s)"
    )
    parser.add_argument("--far", type=float, metavar="SECONDS", help="until an object store answers")
    parser.add_argument("--output", type=Path, help="where to write the page")
    return parser.parse_args()


if __name__ == "__main__":
    main()
