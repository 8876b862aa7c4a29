"""One run at a time on a workspace; whoever comes second is told who has it.

A local workspace is held by a file lock, which the system drops when its holder dies. An object store has no
locks: there the owner's object is a lease, renewed while the run lives and void some time after it died.
"""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from os import getpid
from pathlib import Path
from threading import Event, Thread
from typing import Any

from filelock import FileLock, Timeout

from pipeline.errors import UserError
from pipeline.workspace import files
from pipeline.workspace.files import Place, Remote

LEASE = timedelta(minutes=3)
"""How long a lease is valid after it was renewed; clocks of machines must agree better than this."""

RENEWAL = 30.0
"""Seconds between renewals."""

SETTLE = 1.0
"""Seconds after which a new lease is read again. The store cannot be asked to create an object only if there
is none, so of two runs that start at once the first to write finds the name of the second."""

_OWNER = ".owner.json"


@contextmanager
def alone(workspace: Place) -> Iterator[Callable[[], None]]:
    """Hold the workspace during the block; gives a check that raises if it was lost to somebody else.

    Raises:
        UserError: if somebody else holds it; names the holder.
    """
    with _leased(workspace) if isinstance(workspace, Remote) else _locked(workspace) as check:
        yield check


@contextmanager
def _locked(workspace: Path) -> Iterator[Callable[[], None]]:
    owner = workspace / _OWNER
    lock = FileLock(workspace / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = files.read_json(owner) if owner.is_file() else {}
        raise UserError(f"{_in_use(workspace, holder)}. Wait for it, or use another workspace.") from None
    try:
        files.write_json(owner, _identity())
        yield lambda: None
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _identity() -> dict[str, Any]:
    return {"pid": getpid(), "host": socket.gethostname(), "since": _now().isoformat(timespec="seconds")}


def _in_use(workspace: Place, holder: dict[str, Any]) -> str:
    return (
        f"workspace: {workspace} is in use by process {holder.get('pid', '?')} on "
        f"{holder.get('host', '?')} since {holder.get('since', '?')}"
    )


@contextmanager
def _leased(workspace: Remote) -> Iterator[Callable[[], None]]:
    lease, over = Lease(workspace), Event()
    renewing = Thread(target=lease.keep, args=(over,), name="lease", daemon=True)
    try:
        lease.take()
        renewing.start()
        try:
            yield lease.check
        finally:
            over.set()
            renewing.join()
    finally:
        lease.release()


@dataclass
class Lease:
    """The owner's object of a workspace in an object store."""

    workspace: Remote
    content: dict[str, Any] = field(default_factory=lambda: {**_identity(), "token": uuid.uuid4().hex})

    @property
    def _path(self) -> Remote:
        return self.workspace / _OWNER

    def take(self) -> None:
        """Become the owner.

        Raises:
            UserError: if somebody else is.
        """
        holder = self._holder()
        if holder and _now() < _expiry(holder):
            raise self._refusal(holder)
        self._renew()
        time.sleep(SETTLE)
        self.check()

    def check(self) -> None:
        """Raise if somebody else has become the owner."""
        holder = self._holder()
        if holder.get("token", self.content["token"]) != self.content["token"]:
            raise self._refusal(holder)

    def keep(self, over: Event) -> None:
        """Renew the lease until an event; while the store does not answer, try again."""
        while not over.wait(RENEWAL):
            with suppress(OSError, UserError):
                if self._is_ours():
                    self._renew()

    def release(self) -> None:
        """Give the workspace up; if the store does not answer, the lease runs out."""
        with suppress(OSError):
            if self._is_ours():
                self._path.unlink(missing_ok=True)

    def _is_ours(self) -> bool:
        return bool(self._holder().get("token") == self.content["token"])

    def _holder(self) -> dict[str, Any]:
        """What the owner's object says; nothing if there is none."""
        try:
            return dict(files.read_json(self._path))
        except FileNotFoundError:
            return {}

    def _renew(self) -> None:
        files.write_json(self._path, {**self.content, "refreshed": _now().isoformat()})

    def _refusal(self, holder: dict[str, Any]) -> UserError:
        return UserError(
            f"{_in_use(self.workspace, holder)}. Wait for it, or use another workspace. If it was killed, "
            f"its lease ends at {_expiry(holder).isoformat(timespec='seconds')}; to end it now, delete "
            f"{self._path}."
        )


def _expiry(holder: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(holder["refreshed"]) + LEASE


def _now() -> datetime:
    return datetime.now(UTC)
