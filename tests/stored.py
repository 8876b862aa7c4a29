"""Tables as a workspace keeps them, made of what a test has at hand."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from pipeline.workspace import runs, tables
from pipeline.workspace.artifacts import Artifact, write_part


def stored(folder: Path, pieces: Iterable[pa.Table]) -> tables.Table:
    """A complete table in a folder, a part for each piece."""
    artifact, made = Artifact(folder, "table 1", {}), {}
    for number, piece in enumerate(pieces):
        name = tables.part_name(number)
        made[name] = write_part(folder / name, tables.written(piece), rows=len(piece))
    return tables.Table.of(folder, artifact.finish(made))


def newest(workspace: Path, name: str = "small") -> Path:
    """The newest run of a name."""
    return Path(str(runs.located(str(workspace / "runs" / name))))
