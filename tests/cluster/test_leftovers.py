"""What workers leave behind whose logs go to an object store; Ray ends them without asking."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline.workspace import files

SCRIPT = """
import sys
from pipeline.cluster.engine import opened
from pipeline.cluster.logs import Logs
from pipeline.workspace import files

with opened("ray", logs=Logs(files.at(sys.argv[1]) / "logs")) as engine:
    assert list(engine.in_order(print, [("said", number) for number in range(4)])) == [None] * 4
"""


@pytest.mark.cluster
def test_workers_leave_no_folder_for_logs_that_lie_in_an_object_store(bucket: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t", ignore_cleanup_errors=True) as temporary:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, bucket],
            capture_output=True,
            text=True,
            check=False,
            env={**environment, "TMPDIR": temporary, "RAY_TMPDIR": temporary},
        )
        assert done.returncode == 0, done.stderr
        assert [path.name for path in Path(temporary).iterdir() if "ood-pipeline" in path.name] == []
    lines = (files.at(bucket) / "logs" / "workers.log").read_text("utf-8").splitlines()
    assert sorted(line.rpartition(": ")[2] for line in lines) == [f"said {number}" for number in range(4)]
    assert [file.name for file in (files.at(bucket) / "logs").glob("*")] == ["workers.log"]
