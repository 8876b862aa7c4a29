"""What no run of a workspace refers to: features of other weights, statistics of other parameters."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.workspace import files, runs, storage
from pipeline.workspace.artifacts import is_older
from pipeline.workspace.files import Place

KINDS = {"models": 1, "manifests": 1, "features": 1, "fits": 1, "scores": 2}
"""Folders of a workspace that hold artifacts, and how deep these lie."""

YOUNG = 3600.0
"""Seconds for which a manifest is left alone: it may be of a run that still checks its config."""

RECORDS = (runs.MANIFEST, runs.SEARCH)
"""Files of a run folder that name what it refers to."""


@dataclass(frozen=True)
class Leftover:
    """A folder that no run refers to."""

    name: str
    folder: Place
    size: int
    """Bytes of all files in it."""


def referred(workspace: Place) -> set[str]:
    """Names of all artifacts that a run or a search refers to.

    Raises:
        ValueError: a record that cannot be read; what it refers to is then unknown.
    """
    found = set[str]()
    for folder in runs.all_of(workspace):
        for name in RECORDS:
            path = folder / name
            if path.is_file():
                try:
                    found |= set(files.read_json(path)["artifacts"])
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{path}: cannot be read ({error}). Delete it, or its folder") from None
    return found


def unreferred(workspace: Place) -> Iterator[Leftover]:
    """All artifacts that no run refers to, and what older versions left behind.

    Raises:
        ValueError: a record of a run that cannot be read.
    """
    kept = referred(workspace)
    for kind, depth in KINDS.items():
        for name, folder in _folders(workspace / kind, kind, depth):
            if name not in kept and not (kind == "manifests" and _is_young(folder)):
                yield Leftover(name, folder, _size(folder))
    yield from _old_runs(workspace)


def old(workspace: Place) -> list[Leftover]:
    """What versions before 0.3 left behind and nothing reads: runs, and features if there are such runs."""
    found = list(_old_runs(workspace))
    for name, folder in _folders(workspace / "features", "features", 1) if found else ():
        if is_older(folder):
            found.append(Leftover(name, folder, _size(folder)))
    return found


def _old_runs(workspace: Place) -> Iterator[Leftover]:
    for name, folder in _folders(workspace / "runs", "runs", 1):
        if (folder / runs.MANIFEST).is_file():
            yield Leftover(name, folder, _size(folder))


def _folders(folder: Place, name: str, depth: int) -> Iterator[tuple[str, Place]]:
    if depth == 0:
        yield name, folder
    elif folder.is_dir():
        for entry in storage.entries(str(folder)):
            if entry.folder:
                yield from _folders(files.at(entry.uri), f"{name}/{entry.name}", depth - 1)


def _is_young(folder: Place) -> bool:
    oldest = time.time() - YOUNG
    return any(entry.modified > oldest for entry in storage.entries(str(folder)))


def _size(folder: Place) -> int:
    entries = storage.entries(str(folder))
    return sum(_size(files.at(entry.uri)) if entry.folder else entry.size for entry in entries)
