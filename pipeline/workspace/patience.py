"""Asking again for what a store may do a moment later: it is busy, does not answer, or a connection broke.

What it says about a file (there is none, no access) is an answer, and is not asked for again.
"""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, NoReturn, ParamSpec, TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential,
    wait_random_exponential,
)

from pipeline.errors import AGAIN, UserError, redact

ATTEMPTS = 8
"""How often something is asked for."""

SECONDS = 60.0
"""After which nothing is asked for again."""

WAIT, LONGEST = 0.5, 16.0
"""Seconds before the second time that it is asked again, doubled each time, and the most; up to half less."""

_SYSTEM = {
    getattr(errno, name)
    for name in (
        *("ETIMEDOUT", "ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "EPIPE", "ENOTCONN"),
        *("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET"),
        *("EIO", "EREMOTEIO", "ESTALE"),  # disks of a network say no more than that
    )
    if hasattr(errno, name)
}

_STATUS = r"(?:408|429|5(?!01|05)\d\d)"
_SAID = re.compile(
    r"AWS Error (?:INTERNAL_FAILURE|SERVICE_UNAVAILABLE|SLOW_DOWN|THROTTLING|REQUEST_TIMEOUT)\b"
    r"|AWS Error NETWORK_CONNECTION\b(?!.*curlCode: (?:60|77)\b)"  # but a certificate that is not trusted
    rf"|AWS Error \w+ \(HTTP status {_STATUS}\)"
    r"|google::cloud::Status\((?:UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|ABORTED|RESOURCE_EXHAUSTED)\b"
    r"|I/O operation on closed file"  # what pyarrow makes of a connection to Google that broke
    rf"|Generic \w+ error: .*(?:HTTP error: |status code: {_STATUS})"  # obstore
)
"""What stores' clients say; they raise the same exception for all reasons."""

P = ParamSpec("P")
T = TypeVar("T")

_given_up: dict[str, float] = {}
"""When stores were given up; for a while they are not asked again and again."""

_log = logging.getLogger(__name__)


class Unavailable(UserError):
    """A store did not answer, however often it was asked: nothing is known about what was asked for."""

    def __init__(self, place: str, reason: str) -> None:
        self.place, self.reason = redact(place), redact(reason)
        where = "the store or the network" if "://" in place else "the disk; remove a file that is lost"
        super().__init__(f"{self.place} cannot be reached: {self.reason}. Look at {where}. {AGAIN}")

    @classmethod
    def after(cls, place: str, error: BaseException) -> Unavailable:
        """The one for what was raised last: the first line of it."""
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return cls(place, str(said).splitlines()[0].partition(" error_info=")[0].rstrip(". "))

    def __reduce__(self) -> tuple[type[Unavailable], tuple[str, str]]:
        return Unavailable, (self.place, self.reason)


def is_transient(error: BaseException) -> bool:
    """Whether what failed may work a moment later."""
    if isinstance(error, UserError):
        return False
    known = isinstance(error, TimeoutError | ConnectionError) or getattr(error, "errno", None) in _SYSTEM
    return known or _SAID.search(str(error)) is not None


def insist(place: str, call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Result of a call that can be made again.

    Args:
        place: path or URI that it is about.
        call: is made again if it fails for a reason that may be gone a moment later.
        arguments: of the call.
        options: of the call.

    Raises:
        Unavailable: it failed too often.
    """
    store, started = _store(place), time.monotonic()
    try:
        result = call(*arguments, **options)
        _given_up.pop(store, None)
        return result
    except Exception as error:
        if not is_transient(error):
            raise
        found = Unavailable.after(place, error)
        spent = time.monotonic() - started
        if started - _given_up.get(store, -SECONDS) < SECONDS:
            raise found from None
        _log.warning("%s: %s; it is asked again", found.place, found.reason)

    def give_up(state: RetryCallState) -> NoReturn:
        assert state.outcome is not None
        error = state.outcome.exception()
        assert error is not None
        _given_up[store] = time.monotonic()
        raise Unavailable.after(place, error) from None

    again = Retrying(
        retry=retry_if_exception(is_transient),
        stop=stop_after_attempt(ATTEMPTS - 1) | stop_after_delay(SECONDS - spent),
        wait=wait_exponential(WAIT / 2, LONGEST / 2) + wait_random_exponential(WAIT / 2, LONGEST / 2),
        retry_error_callback=give_up,
    )
    result = again(call, *arguments, **options)
    _given_up.pop(store, None)
    return result


def patient(call: Callable[Concatenate[str, P], T]) -> Callable[Concatenate[str, P], T]:
    """A function that takes a path first and can be called again, as one that insists."""

    @wraps(call)
    def patiently(path: str, /, *arguments: P.args, **options: P.kwargs) -> T:
        return insist(path, call, path, *arguments, **options)

    return patiently


def _store(place: str) -> str:
    """The bucket of a URI; all local disks are one store."""
    kind, mark, rest = place.partition("://")
    return kind + re.split("[/?]", rest, maxsplit=1)[0] if mark else ""
