"""MLflow in a process of its own: what it imports takes seconds, which the work beside it would lose.

Calls are made one after the other, in the folder and with the environment that the caller has then.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pipeline.results.mlflow.tracking import TrackingError

T = TypeVar("T")

_SERVE = """
import signal, sys
for each in (signal.SIGINT, signal.SIGTERM):  # a run that is ended tells MLflow so
    signal.signal(each, signal.SIG_IGN)
sys.path[:] = {!r}
from pipeline.results.mlflow import apart
apart.serve()
"""

_KEPT = "Nothing on disk is lost; `ood-pipeline report CONFIG --track` sends the results."


class Apart:
    """Calls functions in another process, which is started when the first is called, or before."""

    def __init__(self) -> None:
        self._calls = ThreadPoolExecutor(1, "mlflow")
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for calls that were made, and end the process."""
        self._calls.shutdown()
        if self._child is not None:
            self._child.kill()  # it does nothing any more
            with suppress(BrokenPipeError), self._child:  # closes its pipes and waits
                pass

    def start(self) -> None:
        """Have the process import MLflow, for calls that are going to come, which say if it cannot start."""
        if self._child is None:
            with suppress(OSError):
                self._child = subprocess.Popen(
                    [sys.executable, "-c", _SERVE.format(sys.path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Begin a call of a function of a module, which raises what the function raises.

        Raises:
            TrackingError: by the future, if the process cannot start or has died.
        """
        self.start()
        return self._calls.submit(self._call, function, arguments)

    def _call(self, function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
        if self._child is None:
            raise TrackingError(f"MLflow's process cannot start. {_KEPT}")
        asked, answers = self._child.stdin, self._child.stdout
        assert asked is not None
        assert answers is not None
        try:
            pickle.dump((Path.cwd(), dict(os.environ), function, arguments), asked)
            asked.flush()
            done, result = pickle.load(answers)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            status = self._child.wait()
            raise TrackingError(f"MLflow's process ended by itself (status {status}). {_KEPT}") from error
        if not done:
            raise result
        return result  # type: ignore[no-any-return]


def serve() -> None:
    """Answer the calls on standard input until it is closed."""
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # whatever is printed
        import mlflow  # noqa: F401 - now, before it is asked for

        while (call := _next(sys.stdin.buffer)) is not None:
            folder, environment, function, arguments = call
            with suppress(OSError):  # one that is gone is noticed where it is used
                os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            try:
                answer = True, function(*arguments)
            except Exception as error:
                answer = False, error
            pickle.dump(answer, answers)
            answers.flush()


def _next(asked: BinaryIO) -> Any:
    try:
        return pickle.load(asked)
    except EOFError:
        return None
