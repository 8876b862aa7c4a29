"""Peak memory in the benchmarks: no stage is too short for it, and each task of the pipeline has a kind."""

from __future__ import annotations

import os
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
TASKS = sorted(
    {
        name
        for path in (ROOT / "pipeline" / "stages").glob("*.py")
        for name in re.findall(r"engine\.in_order\(\s*(\w+)", path.read_text("utf-8"))
    }
)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("memory")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_block_that_ends_before_the_first_sample_still_has_a_peak(memory: ModuleType) -> None:
    with memory.Watch(os.getpid(), period=60) as watch:
        pass
    unshared, resident = watch.peaks[memory.DRIVER]
    assert 0 < unshared <= resident


@pytest.mark.parametrize("name", TASKS)
def test_a_task_of_a_stage_is_of_one_kind(memory: ModuleType, name: str) -> None:
    assert [bool(re.search(kind, f"ray::{name} ")) for kind in memory.KINDS].count(True) == 1
