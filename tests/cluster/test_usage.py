"""What work costs, measured in the process that does it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.cluster import usage

SCRIPT = "from pipeline.cluster import usage; print(usage.peak_memory())"


def test_the_peak_of_a_process_is_not_that_of_the_one_that_started_it() -> None:
    room = np.ones(2**26)  # 512 MiB
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert 2**22 < int(found.stdout) < room.nbytes


def test_a_system_that_does_not_tell_the_peak_of_a_process_costs_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_: "Name: python")
    assert usage.peak_memory() > 2**22


def test_blocks_that_overlap_as_those_of_two_threads_end_each_by_itself() -> None:
    first, second = usage.collect(), usage.collect()
    one, other = first.__enter__(), second.__enter__()
    second.__exit__(None, None, None)
    usage.report({"cpu_seconds": 1.0})
    first.__exit__(None, None, None)
    assert (one.tasks, other.tasks) == (1, 0)
