"""Run folders of a workspace, `<workspace>/runs/<name>/<id>`; the name alone means the newest.

The id is the beginning of the run's fingerprint, what its results depend on; `<id>-2` is the second time that
everything was made again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pipeline.errors import UserError
from pipeline.workspace import files, storage
from pipeline.workspace.files import Place

MANIFEST = "manifest.json"

SEARCH = "tune.json"
"""What a search of `tune` leaves in a folder of its own, beside those of runs."""

LATEST = "latest"
"""File beside the folders of a name that holds the id of the newest."""


def folder_of(workspace: Place, name: str, fingerprint: str, fresh: bool = False) -> Place:
    """The folder of an evaluation: where it was begun, or a new one.

    Args:
        workspace: where runs are kept.
        name: of the run.
        fingerprint: what its results depend on.
        fresh: whether everything is to be made again; what was finished keeps its folder.
    """
    above, run = workspace / "runs" / name, fingerprint[:12]
    numbers = [number for entry in _entries(above) if (number := _number(entry.name, run))]
    last = max(numbers, default=1)
    newest = above / (run if last == 1 else f"{run}-{last}")
    if fresh and numbers and _finished(newest):
        return above / f"{run}-{last + 1}"
    return newest


def _number(name: str, run: str) -> int:
    """How many times a run was begun when it got a folder of some name; 0 for another run's."""
    base, _, number = name.partition("-")
    if base != run:
        return 0
    return int(number) if number.isdecimal() else 1


def _finished(folder: Place) -> bool:
    manifest = folder / MANIFEST
    return manifest.is_file() and files.read_json(manifest).get("status") == "finished"


def mark_latest(folder: Place) -> None:
    """Make a run the one that its name means."""
    files.write_text(files.at(storage.parent(str(folder))) / LATEST, f"{folder.name}\n")


def located(run: str) -> Place:
    """The run folder at a path or URI, `<workspace>/runs/<name>/<id>`; without the id, the newest.

    The file that names the newest, which `<name>/*` of a shell has among the folders, means it, too.

    Raises:
        UserError: if there is none.
    """
    base, mark, query = run.partition("?") if storage.is_remote(run) else (_absolute(run), "", "")
    folder = files.at(f"{base.rstrip('/')}{mark}{query}")
    above = files.at(storage.parent(str(folder)))
    try:
        if folder.name == LATEST and folder.is_file():
            folder, above = above, files.at(storage.parent(str(above)))
        if above.name == "runs" and (folder / LATEST).is_file():
            newest = folder / (folder / LATEST).read_text("utf-8").strip()
            if newest.is_dir():
                return newest
            there = ", ".join(sorted(entry.name for entry in _entries(folder)))
            raise UserError(
                f"{run}: the newest run, {newest.name}, is gone. Name one that is there ({there}), or run "
                "the evaluation again."
            )
        found = any((folder / name).is_file() for name in (MANIFEST, "config.yaml"))
    except OSError as error:
        raise UserError(
            f"{run}: cannot be read: {str(error).splitlines()[0]}. Check the credentials."
        ) from None
    if not found or storage.name_of(storage.parent(str(above))) != "runs":
        raise UserError(
            f"{run}: no run folder. Give the path or URI of <workspace>/runs/<name> or one of its ids; "
            "`ood-pipeline runs` lists them."
        )
    return folder


def is_search(folder: str) -> bool:
    """Whether there is a search of `tune`, and no run, at a path or URI; not where nobody may look."""
    place = files.at(folder)
    with suppress(OSError):
        return (place / SEARCH).is_file() and not (place / MANIFEST).is_file()
    return False


def all_of(workspace: Place) -> Iterator[Place]:
    """Folders of all runs and searches of a workspace, name by name."""
    for name in _entries(workspace / "runs"):
        for run in _entries(files.at(name.uri)):
            if run.folder:
                yield files.at(run.uri)


def workspace_of(folder: Place) -> Place:
    """The workspace that a run folder lies in."""
    return files.at(storage.parent(storage.parent(storage.parent(str(folder)))))


def _entries(folder: Place) -> list[storage.Entry]:
    return [entry for entry in storage.entries(str(folder)) if entry.folder] if folder.is_dir() else []


def _absolute(path: str) -> str:
    return str(Path(storage.located(path)[1]).resolve())
