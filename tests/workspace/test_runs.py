"""Run folders of a workspace: what a name means."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.workspace import runs


def test_a_name_whose_newest_run_was_deleted_names_those_that_are_there(tmp_path: Path) -> None:
    above = tmp_path / "runs" / "mine"
    for name in ("a", "b", "c"):
        (above / name).mkdir(parents=True)
        runs.mark_latest(above / name)
    assert runs.located(str(above)) == above / "c"
    shutil.rmtree(above / "c")
    with pytest.raises(UserError, match=r"mine: the newest run, c, is gone\. Name one .* \(a, b\), or run"):
        runs.located(str(above))


def test_a_search_is_no_run_and_a_folder_that_nobody_may_look_into_is_no_search(tmp_path: Path) -> None:
    assert not runs.is_search(str(tmp_path))
    (tmp_path / runs.SEARCH).touch()
    assert runs.is_search(str(tmp_path))
    (tmp_path / runs.MANIFEST).touch()
    assert not runs.is_search(str(tmp_path))
    assert not runs.is_search(str(tmp_path / ("long" * 100)))
