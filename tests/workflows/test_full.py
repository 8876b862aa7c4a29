"""A disk that is full, whatever is written to it at that time, costs a message and no result.

The draft of a file leads to `/dev/full`, which takes no byte: whoever writes it finds out by itself.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import loading
from pipeline.errors import UserError
from pipeline.results import verify
from pipeline.results.report import page
from pipeline.workspace import files
from pipeline.workspace.files import Place
from tests.kills import runs
from tests.stored import newest

FULL = Path("/dev/full")

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")

PROBES = ".write-test"
"""Empty files; a full disk may well take them."""


def kind(path: Place) -> str:
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


REMOTE = {
    "manifests": {"rows.parquet"},
    "features": {"part-.parquet", "_manifest.json"},
    "fits": {"bank-.npy", "index.faiss", "scorer.json"},
    "scores": {"part-.parquet"},
    "runs": {"config.yaml", "part-.parquet", "metrics.csv", "index.html"},
}
"""Drafts of each stage that lie in TMPDIR on their way to an object store.

Arrays are not among them: safetensors puts a file of its own in the place of `/dev/full`.
"""


@pytest.mark.slow
def test_a_full_folder_for_temporary_files_is_told_at_every_stage_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path, execute: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, bucket: str
) -> None:
    raw = runs.settings(tmp_path)
    undisturbed = runs.Evaluation(raw, tmp_path / "undisturbed")
    execute(loading.load(str(undisturbed.config)))
    disturbed = runs.Evaluation(raw, tmp_path / "disturbed")
    disturbed.config.write_text(yaml.safe_dump({**raw, "workspace": bucket}))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    workspace, full, drafts = files.at(bucket), set[tuple[str, str]](), list[Path]()

    def fill(path: Place, draft: Path) -> None:
        """Make the first file of a kind one that takes no byte."""
        place = str(path).removeprefix(str(workspace).partition("?")[0]).lstrip("/").partition("/")[0]
        if kind(path) in REMOTE.get(place, ()) and (place, kind(path)) not in full:
            full.add((place, kind(path)))
            draft.symlink_to(FULL)

    def fill_inside(folder: Place, made: Path) -> None:
        drafts.append(made)
        if folder.name == "manifests":
            fill(folder / "rows.parquet", made / "rows.parquet")

    def fill_page(*given: Any, **named: Any) -> str:
        fill(workspace / "runs" / "index.html", drafts[-1] / "new" / "index.html")
        return written(*given, **named)

    written = page._page
    monkeypatch.setattr(page, "_page", fill_page)
    monkeypatch.setattr(files, "_draft", filled(files._draft, fill))
    monkeypatch.setattr(files, "scratch", filled(files.scratch, fill_inside))
    wanted = {(place, name) for place, names in REMOTE.items() for name in names}
    for _ in wanted:
        with pytest.raises(UserError) as refusal:
            execute(loading.load(str(disturbed.config)))
        assert re.match(
            rf"cannot write .*: no space left on the disk of {temporary}.*\. Free some space\. ",
            str(refusal.value),
        )
        assert not list(temporary.rglob("*"))
    folder = execute(loading.load(str(disturbed.config))).folder
    assert full == wanted
    expected = newest(undisturbed.workspace)
    for name in ("metrics.json", "thresholds.json", "metrics.csv"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()
    assert all(finding.good for finding in verify.examine(folder))


def filled(function: Callable[..., Any], change: Callable[[Path, Path], object]) -> Callable[..., Any]:
    """A context manager that gives a path, which is changed first."""

    @contextmanager
    def changed(place: Path) -> Iterator[Path]:
        with function(place) as found:
            change(place, found)
            yield found

    return changed
