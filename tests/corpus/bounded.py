"""Decodes every file of a folder and prints a line of JSON for each: name, CPU seconds, MiB at most.

    python -m tests.corpus.bounded FOLDER SIDE

Ends with the first file that gives neither pixels nor an error with a reason.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path

from pipeline.config.schema import Transform
from pipeline.data.decode import decode


def measured(path: Path, transform: Transform) -> tuple[float, float]:
    """CPU seconds, and MiB beyond what the process held before."""
    content = path.read_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, started = _peak(), time.process_time()
    with suppress(ValueError):
        decode(content, None, transform)
    return time.process_time() - started, _peak() - before


def _peak() -> float:
    """Most MiB that the process held."""
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1024


def main(folder: str, side: str) -> None:
    """Measure every file."""
    number = int(side)
    transform = Transform(resize=number, crop=number, mean=(0.5,), std=(0.5,), channels=1)
    for path in sorted(Path(folder).iterdir()):
        print(json.dumps([path.name, *measured(path, transform)]), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
