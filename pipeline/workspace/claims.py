"""Who makes what: runs and artifacts are claimed by name before they are made.

In a folder a claim is a lock on one byte of one file, which the system drops when its holder dies. In an
object store it is an object that is created only if there is none; its holder shows that it lives by an
object of its own, and the claims of one that fell silent are void. A claim that is lost in spite of it costs
work that is done twice, with the same bits; never a result.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

from pipeline.errors import UserError
from pipeline.workspace import storage
from pipeline.workspace.files import Place, Remote
from pipeline.workspace.patience import Unavailable, insist

RENEWAL = 30.0
"""Seconds between two signs of life in an object store."""

SILENCE = 180.0
"""Seconds without one, by the store's clock, after which claims there are void."""

PATIENCE = 1.0
"""Seconds between two looks at what others have claimed."""

FOLDER = ".claims"

_AT_ONCE = 16

Owner = dict[str, Any]


class Kind(Protocol):
    """How claims are held."""

    def take(self, name: str) -> bool:
        """Claim a name, unless somebody holds it."""

    def give(self, name: str) -> None:
        """Give it back."""

    def holder(self, name: str) -> Owner:
        """Who holds it, as far as is known."""

    def busy(self) -> bool:
        """Whether anybody holds anything."""

    def close(self) -> None:
        """Give all back."""


@dataclass
class Claims:
    """The claims of a run in its workspace."""

    workspace: Place
    kind: Kind
    told: Callable[[str], None] = lambda _: None
    """Is told whom we wait for."""

    @contextmanager
    def alone(self, name: str, wait: bool = False) -> Iterator[None]:
        """Hold a name during the block.

        Args:
            name: what is claimed.
            wait: for whoever holds it, rather than refuse.

        Raises:
            UserError: if somebody else holds it; names the holder.
        """
        said = False
        while not self.kind.take(name):
            if not wait:
                raise UserError(
                    f"{storage.join(str(self.workspace), name)} is being made by "
                    f"{_told(self.kind.holder(name))}. Wait for it with --wait, or change the config."
                )
            said = said or self._wait_for(name)
            time.sleep(PATIENCE)
        try:
            yield
        finally:
            self.kind.give(name)

    def share(self, lacking: Callable[[], Iterable[str]], make: Callable[[set[str]], None]) -> None:
        """Have everything made that is lacking: by us what is free, the rest by whoever has claimed it.

        Nobody waits while holding a claim, so nobody waits for ever.

        Args:
            lacking: names of what is not there yet.
            make: makes those of some names.
        """
        said = False
        while names := sorted(lacking()):
            taken = storage.ahead(self.kind.take, names, _AT_ONCE)
            ours = [name for name, got in zip(names, taken, strict=True) if got]
            try:
                free = set(lacking()) & set(ours)  # others may have made some before we claimed them
                if free:
                    make(free)
            finally:
                list(storage.ahead(self.kind.give, ours, _AT_ONCE))
            if not ours:
                said = said or self._wait_for(names[0])
                time.sleep(PATIENCE)

    def require_idle(self) -> None:
        """Refuse a workspace in which somebody works.

        Raises:
            UserError: somebody does.
        """
        if self.kind.busy():
            raise UserError(f"workspace: {self.workspace} is in use by a run. Wait for it.")

    def _wait_for(self, name: str) -> bool:
        self.told(f"waiting for {_told(self.kind.holder(name))}, who makes {name}")
        return True


@contextmanager
def opened(workspace: Place, told: Callable[[str], None] = lambda _: None) -> Iterator[Claims]:
    """The claims of a workspace for the time of a block.

    Args:
        workspace: what is shared.
        told: is told whom we wait for.

    Raises:
        UserError: an object store that refuses them.
    """
    kind: Kind = _in_store(workspace) if isinstance(workspace, Remote) else _Locks(workspace / FOLDER)
    try:
        yield Claims(workspace, kind, told)
    finally:
        kind.close()


def _owner() -> Owner:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since}


def _told(owner: Owner) -> str:
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
    return f"{who} (since {owner['since']})" if "since" in owner else who


def _hashed(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


_held: dict[Path, set[str]] = {}
"""Names that this process holds, by folder: the system's locks do not keep a process from itself."""

_files: dict[Path, int] = {}
"""The open files whose bytes are locked. Closing one gives back all that this process holds in it."""

_guard = Lock()


@dataclass
class _Locks:
    """Claims in a folder."""

    folder: Path
    own: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder = self.folder.resolve()

    def take(self, name: str) -> bool:
        with _guard:
            held = _held.setdefault(self.folder, set())
            if name in held or not self._lock(1, _byte(name)):
                return False
            held.add(name)
            self.own.add(name)
            self._note(name).write_text(json.dumps(_owner()), encoding="utf-8")
        return True

    def give(self, name: str) -> None:
        with _guard:
            self._note(name).unlink(missing_ok=True)
            fcntl.lockf(_files[self.folder], fcntl.LOCK_UN, 1, _byte(name))
            _held[self.folder].discard(name)
            self.own.discard(name)
            self._close()

    def holder(self, name: str) -> Owner:
        with suppress(OSError, ValueError):
            return dict(json.loads(self._note(name).read_text(encoding="utf-8")))
        return {}

    def busy(self) -> bool:
        with _guard:
            busy = bool(_held.get(self.folder)) or not self._lock(0, 0)  # all bytes there can be
            self._close()
            return busy

    def close(self) -> None:
        for name in sorted(self.own):
            self.give(name)

    def _lock(self, length: int, start: int) -> bool:
        """Lock some bytes, unless another process has one of them."""
        if self.folder not in _files:
            try:
                _files[self.folder] = os.open(self.folder / "locks", os.O_RDWR | os.O_CREAT, 0o666)
            except PermissionError as error:
                raise UserError(
                    f"{self.folder}: cannot be written ({error.strerror}), but what works in a workspace "
                    "says so there. Have it writable for this user."
                ) from None
        try:
            fcntl.lockf(_files[self.folder], fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        except (BlockingIOError, PermissionError):
            self._close()
            return False
        return True

    def _close(self) -> None:
        """Close the file if nothing in it is held."""
        if not _held.get(self.folder) and self.folder in _files:
            os.close(_files.pop(self.folder))

    def _note(self, name: str) -> Path:
        return self.folder / f"{_hashed(name)[:16]}.json"


def _byte(name: str) -> int:
    """The byte that stands for a name: two names have the same one with a chance of 1 in 2^62."""
    return int(_hashed(name)[:16], 16) >> 2


class _Objects:
    """Claims in an object store."""

    def __init__(self, workspace: Remote) -> None:
        self.uri = str(workspace)
        self.store, self.folder = _store(workspace)
        self.owner = {**_owner(), "token": uuid.uuid4().hex}
        self.own: set[str] = set()
        self.over = Event()
        insist(self.uri, self._show)
        self.showing = Thread(target=self._keep_showing, name="claims", daemon=True)
        self.showing.start()

    def take(self, name: str) -> bool:
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        content = json.dumps(self.owner).encode()
        try:
            self._put(name, content, "create")
        except AlreadyExistsError:
            found = self._read(self._path(name))
            if found is None or name in self.own:
                return False
            if not self._is_ours(found[0]):  # else the answer was lost when it was made
                if not self._is_silent(found[0]):
                    return False
                try:
                    self._put(name, content, found[1])
                except PreconditionError:
                    return False
        self.own.add(name)
        return True

    def give(self, name: str) -> None:
        import obstore

        self.own.discard(name)
        with suppress(FileNotFoundError, Unavailable):  # one that stays is void when its holder is gone
            found = self._read(self._path(name))
            if found is not None and self._is_ours(found[0]):
                insist(self.uri, obstore.delete, self.store, self._path(name))

    def holder(self, name: str) -> Owner:
        found = self._read(self._path(name))
        return {} if found is None else found[0]

    def busy(self) -> bool:
        owners = [{"token": sign["path"].rpartition("/")[2]} for sign in insist(self.uri, self._signs)]
        return bool(self.own) or any(
            not self._is_ours(owner) and not self._is_silent(owner) for owner in owners
        )

    def close(self) -> None:
        import obstore

        self.over.set()
        self.showing.join()
        for name in sorted(self.own):
            self.give(name)
        with suppress(FileNotFoundError, Unavailable):
            insist(self.uri, obstore.delete, self.store, self._sign(self.owner))

    def _put(self, name: str, content: bytes, mode: Any) -> None:
        import obstore

        insist(self.uri, obstore.put, self.store, self._path(name), content, mode=mode)

    def _signs(self) -> list[Any]:
        """The signs of life there are."""
        import obstore

        return [sign for signs in obstore.list(self.store, f"{self.folder}/alive") for sign in signs]

    def _is_ours(self, owner: Owner) -> bool:
        return bool(owner.get("token") == self.owner["token"])

    def _path(self, name: str) -> str:
        return f"{self.folder}/{_hashed(name)[:16]}.json"

    def _sign(self, owner: Owner) -> str:
        return f"{self.folder}/alive/{owner.get('token')}"

    def _show(self) -> None:
        """Give a sign of life."""
        import obstore

        obstore.put(self.store, self._sign(self.owner), b"")

    def _keep_showing(self) -> None:
        from obstore.exceptions import BaseError

        while not self.over.wait(RENEWAL):
            with suppress(BaseError, OSError):  # a store that does not answer now may do so later
                self._show()

    def _is_silent(self, owner: Owner) -> bool:
        """Whether an owner has given no sign of life for long, by the store's clock."""
        insist(self.uri, self._show)
        try:
            theirs = insist(self.uri, self._shown, owner)
        except FileNotFoundError:
            return True
        return (insist(self.uri, self._shown, self.owner) - theirs).total_seconds() > SILENCE

    def _shown(self, owner: Owner) -> datetime:
        """When an owner gave the last one."""
        import obstore

        return obstore.head(self.store, self._sign(owner))["last_modified"]

    def _read(self, path: str) -> tuple[Owner, Any] | None:
        """What an object says, and which version of it that was; None if there is none."""
        import obstore

        def asked() -> tuple[bytes, Any]:
            found = obstore.get(self.store, path)
            return bytes(found.bytes()), found.meta

        try:
            content, meta = insist(self.uri, asked)
        except FileNotFoundError:
            return None
        version = {name: meta[name] for name in ("e_tag", "version") if meta[name] is not None}
        return dict(json.loads(content)), version


def _in_store(workspace: Remote) -> _Objects:
    from obstore.exceptions import BaseError

    try:
        return _Objects(workspace)
    except (BaseError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"workspace: {workspace} takes no claims: {reason}. Check the credentials in the environment."
        ) from None


def _store(workspace: Remote) -> tuple[Any, str]:
    """Another client of the same object store, as pyarrow's has no conditional writes; and the folder in it.

    Raises:
        UserError: if there is none for this kind of storage.
    """
    from obstore import store

    system, place = storage.located(str(workspace))
    bucket, _, path = place.partition("/")
    parts = urlsplit(str(workspace))
    options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    endpoint, scheme = options.get("endpoint_override"), options.get("scheme", "https")
    silence = timedelta(seconds=storage.SILENCE)
    asking: Any = {
        "client_options": {"timeout": silence, "allow_http": scheme == "http"},
        "retry_config": {"max_retries": storage.TRIES - 1, "retry_timeout": silence * storage.TRIES},
    }
    url = endpoint if endpoint is None or "://" in endpoint else f"{scheme}://{endpoint}"
    folder = f"{path}/{FOLDER}".lstrip("/")
    if parts.scheme == "s3":
        where: Any = {"endpoint": url} if url else {}
        return store.S3Store(bucket, region=system.region, **where, **asking), folder
    if parts.scheme in ("gs", "gcs"):
        where = {"base_url": url} if url else {}
        anonymous: Any = {"bearer_token": "anonymous"} if parts.username == "anonymous" else {}
        return store.GCSStore(bucket, **where, **anonymous, **asking), folder
    if parts.scheme in ("abfs", "abfss"):
        return store.from_url(f"{parts.scheme}://{parts.netloc}", **asking), folder
    raise UserError(f"workspace: runs cannot share {workspace}; expected a folder, s3://, gs:// or abfs://.")
