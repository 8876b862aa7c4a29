"""Run folders of a workspace: `<workspace>/runs/<name>`."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UserError
from pipeline.workspace import files, storage
from pipeline.workspace.files import Place


def located(run: str) -> Place:
    """The run folder at a path or URI.

    Raises:
        UserError: if there is none.
    """
    base, mark, query = run.partition("?") if storage.is_remote(run) else (_absolute(run), "", "")
    folder = files.at(f"{base.rstrip('/')}{mark}{query}")
    above = storage.name_of(storage.parent(str(folder)))
    try:
        found = any((folder / name).is_file() for name in ("manifest.json", "config.yaml"))
    except OSError as error:
        raise UserError(
            f"{run}: cannot be read: {str(error).splitlines()[0]}. Check the credentials."
        ) from None
    if above != "runs" or not found:
        raise UserError(f"{run}: no run folder. Give the path or URI of <workspace>/runs/<name>.")
    return folder


def _absolute(path: str) -> str:
    return str(Path(storage.located(path)[1]).resolve())
