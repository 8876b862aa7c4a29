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
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pipeline.results.mlflow import tracking
from pipeline.results.mlflow.tracking import TrackingError

T = TypeVar("T")

_SERVE = """
import signal, sys
for each in (signal.SIGINT, signal.SIGTERM):  # a run that is ended tells MLflow so
    signal.signal(each, signal.SIG_IGN)
sys.path[:] = {!r}
from pipeline.results.mlflow import apart
apart.serve({:d})
"""

_KEPT = (
    "Nothing on disk is lost; `ood-pipeline report CONFIG --track`, with the run's own `--set` and "
    "`--workspace`, sends the results."
)


class Apart:
    """Calls functions in another process, which is started when the first is called, or before."""

    def __init__(self) -> None:
        self._calls = ThreadPoolExecutor(1, "mlflow")
        self._child: subprocess.Popen[bytes] | None = None
        self._answers: BinaryIO = BytesIO()

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for calls that were made, and end the process."""
        self._calls.shutdown()
        if self._child is not None:
            self._child.kill()  # it does nothing any more
            with self._answers, suppress(BrokenPipeError), self._child:  # closes its pipes and waits
                pass

    def start(self) -> None:
        """Have the process import MLflow, for calls that are going to come, which say if it cannot start."""
        if self._child is None:
            answers, theirs = os.pipe()  # standard output may hold what libraries print
            try:
                self._child = subprocess.Popen(
                    [sys.executable, "-P", "-c", _SERVE.format(sys.path, theirs)],
                    stdin=subprocess.PIPE,
                    stdout=2,
                    pass_fds=[theirs],
                )
                self._answers = os.fdopen(answers, "rb")
            except (OSError, TypeError):  # as where Python is part of another program
                os.close(answers)
            finally:
                os.close(theirs)

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
        asked = self._child.stdin
        assert asked is not None
        call = pickle.dumps((_folder(), dict(os.environ), function, arguments))
        try:
            asked.write(call)
            asked.flush()
            done, result = pickle.load(self._answers)
        except (OSError, EOFError) as error:
            self._child.kill()  # if it has not ended yet
            status = self._child.wait()
            raise TrackingError(f"MLflow's process ended by itself (status {status}). {_KEPT}") from error
        if not done:
            raise result
        return result  # type: ignore[no-any-return]


def _folder() -> str | None:
    """The current folder; None if it is gone."""
    with suppress(FileNotFoundError):
        return str(Path.cwd())
    return None


def serve(place: int) -> None:
    """Answer the calls on standard input, to an open file, until there are no more."""
    with os.fdopen(place, "wb") as answers:
        tracking.import_mlflow()  # now, before it is asked for
        while (call := _next(sys.stdin.buffer)) is not None:
            folder, environment, function, arguments = call
            with suppress(OSError):  # one that is gone is noticed where it is used
                os.chdir(folder or "/")
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
