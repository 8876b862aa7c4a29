"""Calls in MLflow's process: results and errors come back, interrupts do not end it, and nothing is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.results.mlflow import apart, tracking
from pipeline.results.mlflow.apart import Apart


@pytest.fixture(scope="module")
def process() -> Iterator[Apart]:
    with Apart() as process:
        yield process


def test_what_a_function_gives_and_raises_comes_back(process: Apart) -> None:
    assert process.submit(os.path.join, "a", "b").result() == "a/b"
    with pytest.raises(UserError, match=r"^no good$"):
        process.submit(refuse, "no good").result()
    assert process.submit(os.getpid).result() != os.getpid()


def refuse(text: str) -> None:
    raise UserError(text)


def test_a_call_is_made_where_the_caller_is_and_with_its_environment(
    process: Apart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "anna")
    assert process.submit(os.getcwd).result() == str(tmp_path)
    assert process.submit(os.getenv, "MLFLOW_TRACKING_USERNAME").result() == "anna"
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    assert process.submit(os.getenv, "MLFLOW_TRACKING_USERNAME").result() is None


def test_what_is_printed_and_an_interrupt_disturb_nothing(
    process: Apart, capfd: pytest.CaptureFixture
) -> None:
    process.submit(print, "a line of a library").result()
    there = process.submit(os.getpid).result()
    for each in (signal.SIGINT, signal.SIGTERM):
        os.kill(there, each)
    assert process.submit(os.getpid).result() == there
    assert capfd.readouterr().out == ""


QUIET = """
import sys
from pipeline.results.mlflow.apart import Apart
from tests.results.test_apart import facts
with Apart() as process:
    print(process.submit(facts).result(), "mlflow" in sys.modules)
"""


def facts() -> tuple[bool, bool]:
    from mlflow.telemetry.client import get_telemetry_client

    return "mlflow" in sys.modules, get_telemetry_client() is None


def test_mlflow_is_imported_there_alone_without_telemetry_and_without_code_that_lies_about(
    tmp_path: Path,
) -> None:
    for name in ("signal", "enum"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(f'{__name__} of the folder was run')")
    (tmp_path / "sitecustomize.py").write_text("print('printed by what Python starts with')")
    automatic = {"CI", "PYTEST_CURRENT_TEST", "PYTEST_VERSION"}  # MLflow tells nothing there anyway
    environment = {name: value for name, value in os.environ.items() if name not in automatic}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path / "first")])
    (tmp_path / "first").mkdir()
    (tmp_path / "sitecustomize.py").rename(tmp_path / "first" / "sitecustomize.py")
    done = subprocess.run(
        [sys.executable, "-P", "-c", QUIET], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "(True, True) False", done.stderr


def test_a_folder_that_is_gone_hinders_no_call(
    process: Apart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert process.submit(os.getcwd).result() == "/"


def test_a_process_that_dies_is_told_and_the_next_call_says_the_same() -> None:
    with Apart() as process:
        dying = process.submit(os._exit, 7)
        with pytest.raises(tracking.TrackingError, match=r"ended by itself \(status 7\).*--track"):
            dying.result()
        with pytest.raises(tracking.TrackingError, match="ended by itself"):
            process.submit(os.getpid).result()


@pytest.mark.parametrize("python", ["/nowhere/python", None])
def test_a_process_that_cannot_start_is_told(python: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", python)
    with Apart() as process, pytest.raises(tracking.TrackingError, match=r"cannot start.*--track"):
        process.submit(os.getpid).result()


def test_calls_that_were_made_are_done_before_the_end_and_then_nothing_is_left(tmp_path: Path) -> None:
    with Apart() as process:
        there = process.submit(os.getpid).result()
        process.submit(time.sleep, 0.2)
        process.submit((tmp_path / "late").touch)
    assert (tmp_path / "late").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(there, 0)


def test_one_that_is_started_and_never_asked_ends_at_once() -> None:
    with Apart() as process:
        process.start()
        started = time.monotonic()
    assert time.monotonic() - started < 1


def test_requests_end_with_the_pipe(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with (tmp_path / "empty").open("rb") as asked:
        assert apart._next(asked) is None
