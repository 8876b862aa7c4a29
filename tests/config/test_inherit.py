"""A config may build on another file; what comes of it is plain data."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.config import inherit
from pipeline.errors import UserError


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_sections_are_merged_and_lists_and_values_replaced(tmp_path):
    write(tmp_path / "base.yaml", {"a": {"x": 1, "y": {"p": 1, "q": 2}}, "b": [1, 2], "c": 1, "d": {"x": 1}})
    change = {"extends": "base.yaml", "a": {"y": {"q": 3}}, "b": [9], "d": None, "e": {"x": 2}}
    assert inherit.read(write(tmp_path / "mine.yaml", change), tmp_path) == {
        "a": {"x": 1, "y": {"p": 1, "q": 3}},
        "b": [9],
        "c": 1,
        "d": None,
        "e": {"x": 2},
    }


def test_the_path_starts_from_the_file_it_stands_in_and_the_nearest_file_wins(tmp_path):
    write(tmp_path / "far" / "first.yaml", {"a": 1, "b": 1, "c": 1})
    write(tmp_path / "far" / "second.yaml", {"extends": "./first.yaml", "b": 2, "c": 2})
    mine = write(tmp_path / "near" / "mine.yaml", {"extends": "../far/second.yaml", "c": 3})
    assert inherit.read(mine, tmp_path) == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize("name", ["protocols/set", "protocols/set.yaml"])
def test_a_file_that_is_not_there_is_looked_for_in_the_library(tmp_path, name):
    write(tmp_path / "library" / "protocols" / "set.yaml", {"a": 1})
    mine = write(tmp_path / "mine.yaml", {"extends": name})
    assert inherit.read(mine, tmp_path / "library") == {"a": 1}


def test_a_circle_is_refused_with_all_files_in_it(tmp_path):
    write(tmp_path / "b.yaml", {"extends": "c.yaml"})
    write(tmp_path / "c.yaml", {"extends": "./a.yaml"})
    mine = write(tmp_path / "a.yaml", {"extends": "b.yaml"})
    with pytest.raises(
        UserError, match=r"a\.yaml: extends goes round .*: a\.yaml > b\.yaml > c\.yaml > a\.yaml"
    ):
        inherit.read(mine, tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.yaml", "extends: no such config file: nowhere.yaml"),
        (["a.yaml"], "extends: got .*expected the path of one config file"),
        (None, "extends: got None"),
        ("list.yaml", r"list\.yaml: expected a mapping"),
    ],
)
def test_what_cannot_be_extended_is_refused_by_name(tmp_path, name, message):
    write(tmp_path / "list.yaml", [1, 2])
    with pytest.raises(UserError, match=message):
        inherit.read(write(tmp_path / "mine.yaml", {"extends": name}), tmp_path)
