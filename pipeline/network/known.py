"""Networks that were loaded before: a note in the workspace describes them while their files are the same.

The note tells which files a network came from. No result is named after it or made of it: the workers load
the network itself and compare.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import __version__, beside
from pipeline.config import loading, schema
from pipeline.errors import AGAIN, UserError
from pipeline.network.description import Description, same_network
from pipeline.workspace import storage
from pipeline.workspace.artifacts import Damaged, Record, Store, digest, mend
from pipeline.workspace.files import Place
from pipeline.workspace.patience import Unavailable

if TYPE_CHECKING:
    from pipeline.network.classifier import Classifier

FORMAT = "model 1"
"""Kind and version of the notes."""

_LIBRARIES = ("torch", "torchvision", "timm")

_opened: list[set[str]] = []
"""Files that are opened, and folders that are looked through, while a network is built."""


class Network:
    """A network by its config; loaded when something is asked that the note does not tell."""

    def __init__(
        self,
        model: schema.Model,
        seed: int,
        workspace: Place,
        begin: Callable[[], object] = lambda: None,
    ) -> None:
        """A network.

        Args:
            model: its config.
            seed: of what a factory draws.
            workspace: with the note.
            begin: is called before the network is loaded, which takes seconds.
        """
        self.model, self.seed, self._begin = model, seed, begin
        identity = {"model": model.model_dump(mode="json"), "seed": seed, "versions": _versions()}
        self.artifact = Store(workspace / "models").artifact(FORMAT, identity)
        self._files: dict[str, str] | None = None
        self._checks: dict[str, str] = {}
        self._new = False
        self._known = self._noted()

    @property
    def name(self) -> str:
        """The name of the note."""
        return self.artifact.name

    @cached_property
    def description(self) -> Description:
        """What is known of it.

        Raises:
            UserError: unknown name, weights that are missing or do not fit, taps that cannot be found.
        """
        return self._known or self.loaded

    @cached_property
    def loaded(self) -> Classifier:
        """The network itself.

        Raises:
            UserError: as `description` does; or it is another one than the note describes.
        """
        self._begin()
        from pipeline.network.classifier import load  # takes seconds to import

        started, imported = time.time(), _own_modules()
        with _watching() as opened:
            found = load(self.model, self.seed)
        if self._known is None:
            self._files, self._new = self._read(opened, started, imported), True
        elif found.document() != self._known.document() or not same_network(found.probe, self._known.probe):
            self.artifact.discard()
            raise UserError(f"model: it is no longer the network that was noted in {self.name}. {AGAIN}")
        return found

    def check(self, what: Any, test: Callable[[Classifier], object]) -> None:
        """Test something of the network, unless the note tells how that went.

        Args:
            what: is tested, as JSON holds it.
            test: raises `UserError` if it fails.

        Raises:
            UserError: the test's.
        """
        key = digest(what)
        if key not in self._checks:
            network = self.loaded
            try:
                test(network)
                self._checks[key] = ""
            except UserError as error:
                if isinstance(error, Unavailable) or "memory" in str(error):
                    raise  # says nothing about the network
                self._checks[key] = str(error)
            self._new = True
        if self._checks[key]:
            raise UserError(self._checks[key])

    def note(self) -> None:
        """Write down what is new."""
        if self._new and self._files is not None:
            facts = {**self.description.document(), "files": self._files, "checks": self._checks}
            self.artifact.keep(self.description.arrays(), alone=False, **facts)  # another run may write it
            self._new = False

    def _noted(self) -> Description | None:
        """What the note says, if there is one and the files are those that it was written about."""
        try:
            record = self.artifact.record()
            if record is None or not _same(record):
                return None
            found = Description.of(record.facts, self.artifact.arrays(record))
        except Damaged as damaged:
            mend(damaged)
            return None
        self._files, self._checks = record.facts["files"], dict(record.facts["checks"])
        return found

    def _read(self, opened: set[str], started: float, imported: set[str]) -> dict[str, str] | None:
        """The files that decide what the network is, with their states; None if nobody knows them all.

        Among them are folders that were looked through, and those of Python and of installed packages: their
        time stamps change when something is added, installed or upgraded.

        A factory may read its weights in ways that cannot be seen, and what was changed since it was read, or
        imported, is not what lies there. One that was looked for in vain has no size.

        Args:
            opened: files that were opened while the network was built.
            started: when that began.
            imported: modules that were there before.
        """
        if self.model.source == "factory" and self.model.weights is None:
            return None
        weights = self.model.weights
        named = [] if weights is None or loading.is_name(weights) else [str(loading.resolve(weights))]
        read = {str(Path(path).absolute()) for path in (*named, *opened)} | _own_modules()
        entries = {path: storage.find(path) for path in [*beside.INSTALLED, *sorted(read)]}
        states = {path: _state(path, entry) for path, entry in entries.items()}
        for path, entry in entries.items():
            changed = 0.0 if entry is None else max(entry.modified, storage.touched(path) / 1e9)
            if changed > (_PROCESS if path in imported else started):
                return None
        return states


def _same(record: Record) -> bool:
    """Whether all files of a note are as they were."""
    return all(_state(path, storage.find(path)) == state for path, state in record.facts["files"].items())


def _state(path: str, entry: storage.Entry | None) -> str:
    """What changes with a file, also where another took its place with its size and time stamp.

    Of a folder, such as that of the installed packages, machines with one image share the time stamp alone.
    """
    if entry is None:
        return ""
    return entry.identity if entry.folder else f"{entry.identity}-{storage.touched(path)}"


def _versions() -> dict[str, str]:
    found = {"python": sys.version, "ood-pipeline": __version__}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _began() -> float:
    """When this process began; where the system does not tell, now."""
    with suppress(OSError, ValueError, IndexError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
    return time.time()


_PROCESS = _began()


_SYSTEM = ("/proc/", "/sys/", "/dev/")


def _is_own(path: object) -> bool:
    """Whether a file is of neither Python, an installed package nor the system."""
    if not isinstance(path, str) or path.endswith(".pyc") or beside.is_installed(path):
        return False
    return not path.startswith(_SYSTEM) or path.startswith("/dev/shm/")


def _own_modules() -> set[str]:
    """Files of the modules that were imported and are the user's, or of a checkout."""
    files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
    return {path for path in files if _is_own(path) and Path(path).is_absolute()}


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("open", "os.scandir") and _opened and _is_own(arguments[0]):
        _opened[-1].add(arguments[0])


@cache
def _listen() -> None:
    """Have Python tell of every file that it opens; there is no way to end that."""
    sys.addaudithook(_audit)


@contextmanager
def _watching() -> Iterator[set[str]]:
    """The files that Python opens during the block, but for those of installed packages."""
    _listen()
    _opened.append(set())
    try:
        yield _opened[-1]
    finally:
        _opened.pop()


@contextmanager
def settings_kept() -> Iterator[None]:
    """Give torch back, after the block, what networks that ran in it have changed, if it was imported."""
    give_back = None
    if "torch" in sys.modules:
        from pipeline.network.classifier import settings

        give_back = settings()
    try:
        yield
    finally:
        name = f"{__package__}.classifier"
        if give_back is None and name in sys.modules:
            give_back = sys.modules[name].give_back_first
        if give_back is not None:
            give_back()
