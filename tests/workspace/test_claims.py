"""One run at a time; what a second process sees of a local lock is tested with the command line."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.workspace import claims, files
from pipeline.workspace.files import Place


@pytest.fixture
def workspace(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A workspace in an object store, where leases are renewed quickly."""
    monkeypatch.setattr(claims, "RENEWAL", 0.05)
    monkeypatch.setattr(claims, "SETTLE", 0.1)
    return files.at(bucket) / "workspace"


def test_a_local_workspace_is_held_and_given_back(tmp_path: Path) -> None:
    with (
        claims.alone(tmp_path),
        pytest.raises(UserError, match=r"in use by process \d+ on .* since .*Z?\. Wait for it, or"),
        claims.alone(tmp_path),
    ):
        pass
    with claims.alone(tmp_path) as check:
        check()
    assert not (tmp_path / ".owner.json").exists()


def test_a_second_owner_is_refused_with_the_name_of_the_first(workspace: Place) -> None:
    refusal = (
        r"^workspace: s3://.*/workspace\?.* is in use by process \d+ on .* since .*\. Wait for it.*"
        r"its lease ends at .*; to end it now, delete s3://.*/workspace/\.owner\.json\?"
    )
    with claims.alone(workspace) as check:
        with pytest.raises(UserError, match=refusal), claims.alone(workspace):
            pass
        check()
    with claims.alone(workspace) as check:
        check()
    assert not (workspace / ".owner.json").is_file()


def test_a_lease_is_renewed_while_the_run_lives_and_can_be_taken_over_when_it_ran_out(
    workspace: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = claims.Lease(workspace)
    killed.take()
    with pytest.raises(UserError, match="in use"):
        claims.Lease(workspace).take()
    monkeypatch.setattr(claims, "LEASE", timedelta(seconds=1.5))
    time.sleep(1.6)
    with claims.alone(workspace) as check:
        time.sleep(1.8)
        with pytest.raises(UserError, match="in use"):
            claims.Lease(workspace).take()
        check()
        with pytest.raises(UserError, match="in use"):
            killed.check()
        killed.release()
        check()


def test_of_two_that_start_at_once_the_first_to_write_gives_way(
    workspace: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = claims.Lease(workspace), claims.Lease(workspace)
    monkeypatch.setattr(first, "check", lambda: (second._renew(), claims.Lease.check(first)))
    with pytest.raises(UserError, match="in use"):
        first.take()
    second.check()
    assert files.read_json(workspace / ".owner.json")["token"] == second.content["token"]
