"""Variables that travel are chosen by name, lie in one file, and are set from it."""

from __future__ import annotations

import json
import os

import pytest

from pipeline.cluster.remote import environment
from pipeline.errors import UserError

HAVE = {"AWS_KEY": "k", "AWS_SECRET": "s", "PATH": "/bin"}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ([], {}),
        (["PATH"], {"PATH": "/bin"}),
        (["AWS_*", "AWS_KEY"], {"AWS_KEY": "k", "AWS_SECRET": "s"}),
        (["AZURE_*"], {}),
        (["AWS_[K]*", "PA?H"], {"AWS_KEY": "k", "PATH": "/bin"}),
    ],
)
def test_variables_are_chosen_by_name_or_pattern(patterns, expected):
    assert environment.chosen(patterns, HAVE) == expected


def test_a_name_that_is_not_set_is_refused():
    with pytest.raises(UserError, match=r"--env AWS_TOKEN: not set here"):
        environment.chosen(["AWS_*", "AWS_TOKEN"], HAVE)


def test_the_file_is_its_owners_alone_and_no_two_are_equal(tmp_path):
    contents = set()
    for name in "ab":
        (tmp_path / name).mkdir()
        environment.write(tmp_path / name, {"KEY": "value"})
        path = tmp_path / name / environment.FILE
        assert path.stat().st_mode & 0o777 == 0o600
        contents.add(path.read_text())
    assert len(contents) == 2
    assert all(json.loads(content)["variables"] == {"KEY": "value"} for content in contents)


def test_without_variables_there_is_no_file(tmp_path):
    environment.write(tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_variables_are_read_from_beside_the_package_and_from_nowhere_else(tmp_path, monkeypatch):
    environment.write(tmp_path, {"OOD_TEST_VARIABLE": "grün"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OOD_TEST_VARIABLE", raising=False)
    environment.load()
    assert "OOD_TEST_VARIABLE" not in os.environ
    monkeypatch.setattr(
        environment, "__file__", str(tmp_path / "pipeline" / "cluster" / "remote" / "environment.py")
    )
    monkeypatch.setenv("OOD_TEST_VARIABLE", "the cluster's")
    environment.load()
    assert os.environ["OOD_TEST_VARIABLE"] == "grün"


def test_the_hook_is_the_function_that_loads():
    module, _, name = environment.HOOK.rpartition(".")
    assert (module, getattr(environment, name)) == ("pipeline.cluster.remote.environment", environment.load)
