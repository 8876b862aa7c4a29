"""A disk that is full, whatever is written to it at that time, costs a message and no result.

The draft of a file leads to `/dev/full`, which takes no byte: whoever writes it finds out by itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import loading
from pipeline.errors import UserError
from pipeline.workspace import files
from tests.kills import runs

FULL = Path("/dev/full")

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")

PROBES = ".write-test"
"""Empty files; a full disk may well take them."""


def kind(path: Path) -> str:
    """A file's name without what differs between those of a kind."""
    return re.sub("[0-9]+", "", path.name)


@pytest.mark.slow
def test_a_full_disk_is_told_whatever_is_written_and_the_run_ends_as_if_there_had_been_room(
    tmp_path: Path, execute: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = runs.settings(tmp_path)
    undisturbed = runs.Evaluation(raw, tmp_path / "undisturbed")
    execute(loading.load(str(undisturbed.config)))
    disturbed = runs.Evaluation(raw, tmp_path / "disturbed")
    full: dict[tuple[str, str], Path] = {}

    def fill(path: Path, draft: Path) -> None:
        """Make the first file of a kind one that takes no byte."""
        place = path.relative_to(disturbed.workspace).parts[0], kind(path)
        if place not in full and not path.name.startswith(PROBES):
            full[place] = path
            draft.symlink_to(FULL)

    def fill_inside(folder: Path, made: Path) -> None:
        if folder.name == "manifests":
            fill(folder / "rows.parquet", made / "rows.parquet")

    monkeypatch.setattr(files, "_draft", filled(files._draft, fill))
    monkeypatch.setattr(files, "scratch", filled(files.scratch, fill_inside))
    refusals = 0
    while True:
        before = len(full)
        try:
            execute(loading.load(str(disturbed.config)))
        except UserError as error:
            assert re.match(
                r"cannot write .*: no space left on the disk of .*\. Free some space\. ", str(error)
            )
            refusals += 1
        else:
            break
        assert len(full) > before
    assert refusals >= 25
    assert {place for place, _ in full} == {"manifests", "features", "fits", "scores", "runs"}
    assert {"index.faiss", "bank-.npy", "scorer.json", "metrics.csv"} <= {name for _, name in full}
    assert disturbed.wrong(undisturbed.contents()) == []


def filled(function: Callable[..., Any], change: Callable[[Path, Path], object]) -> Callable[..., Any]:
    """A context manager that gives a path, which is changed first."""

    @contextmanager
    def changed(place: Path) -> Iterator[Path]:
        with function(place) as found:
            change(place, found)
            yield found

    return changed
