"""Claims in folders and in object stores, within a process and between processes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Thread

import pytest

from pipeline.errors import UserError
from pipeline.workspace import claims, files
from pipeline.workspace.claims import Claims
from pipeline.workspace.files import Place


@pytest.fixture(params=["folder", "object store"])
def workspace(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(claims, "PATIENCE", 0.02)
    monkeypatch.setattr(claims, "RENEWAL", 0.3)
    if request.param == "folder":
        return tmp_path
    return files.at(request.getfixturevalue("bucket")) / "workspace"


@pytest.fixture
def opened(workspace: Place) -> Iterator[Callable[..., Claims]]:
    """Gives the claims of one more run."""
    with ExitStack() as stack:
        yield lambda *told: stack.enter_context(claims.opened(workspace, *told))


def test_a_name_is_held_until_it_is_given_back_and_others_are_free(opened: Callable[..., Claims]) -> None:
    first, second = opened(), opened()
    with first.alone("runs/a"):
        refusal = r"runs/a.* is being made by process \d+ on .* \(since .*\)\. Wait for it with --wait"
        with pytest.raises(UserError, match=refusal), second.alone("runs/a"):
            pass
        with second.alone("runs/b"):
            pass
    with second.alone("runs/a"):
        pass


def test_what_a_run_held_is_free_when_it_ends(workspace: Place) -> None:
    with claims.opened(workspace) as first:
        assert first.kind.take("fits/a")
        assert first.kind.holder("fits/a")["pid"]
    with claims.opened(workspace) as second:
        assert second.kind.holder("fits/a") == {}
        assert second.kind.take("fits/a")


def test_one_waits_for_the_other_if_told_to(opened: Callable[..., Claims]) -> None:
    told = list[str]()
    first, second = opened(), opened(told.append)
    order = list[str]()

    def later() -> None:
        with second.alone("runs/a", wait=True):
            order.append("second")

    with first.alone("runs/a"):
        waiting = Thread(target=later)
        waiting.start()
        while not told:
            time.sleep(0.01)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]
    assert len(told) == 1
    assert told[0].startswith("waiting for process ")


def test_two_share_what_is_to_be_made_and_nothing_is_made_twice(opened: Callable[..., Claims]) -> None:
    wanted, made = [f"fits/{number}" for number in range(12)], list[tuple[int, str]]()

    def run(number: int, ours: Claims) -> None:
        def make(names: set[str]) -> None:
            for name in sorted(names):
                time.sleep(0.01)
                made.append((number, name))

        there = lambda: {name for _, name in made}  # noqa: E731
        ours.share(lambda: [name for name in wanted if name not in there()][: 3 + number], make)

    runs = [Thread(target=run, args=(number, opened())) for number in range(2)]
    for each in runs:
        each.start()
    for each in runs:
        each.join()
    assert sorted(name for _, name in made) == sorted(wanted)


def test_what_another_began_and_left_is_made_by_us(opened: Callable[..., Claims]) -> None:
    first, second, made = opened(), opened(), set[str]()
    assert first.kind.take("fits/a")
    sharing = Thread(target=second.share, args=(lambda: {"fits/a", "fits/b"} - made, made.update))
    sharing.start()
    while "fits/b" not in made:
        time.sleep(0.01)
    assert "fits/a" not in made
    first.kind.give("fits/a")
    sharing.join()
    assert made == {"fits/a", "fits/b"}


def test_claims_are_given_back_when_making_fails(opened: Callable[..., Claims]) -> None:
    first, second = opened(), opened()

    def fail(_: set[str]) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        first.share(lambda: ["fits/a"], fail)
    assert second.kind.take("fits/a")


HOLD = """
import sys, time
from pipeline.workspace import claims, files
with claims.opened(files.at(sys.argv[1])) as ours:
    assert ours.kind.take("fits/a")
    print("held", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_held_becomes_free(
    workspace: Place, opened: Callable[..., Claims], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", HOLD, str(workspace)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        ours = opened()
        assert not ours.kind.take("fits/a")
        assert ours.kind.holder("fits/a")["pid"] == process.pid
        process.kill()
    if isinstance(workspace, Path):
        assert ours.kind.take("fits/a")
        return
    assert not ours.kind.take("fits/a")  # it was alive a moment ago
    monkeypatch.setattr(claims, "SILENCE", 1.0)
    time.sleep(2.1)  # the store tells times in whole seconds
    assert ours.kind.take("fits/a")


def test_one_that_lives_is_not_silent(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "RENEWAL", 0.2)
    monkeypatch.setattr(claims, "SILENCE", 1.5)
    workspace = files.at(bucket)
    with claims.opened(workspace) as first, claims.opened(workspace) as second:
        assert first.kind.take("fits/a")
        time.sleep(3)
        assert not second.kind.take("fits/a")


def test_of_two_that_take_over_at_once_one_has_it(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "SILENCE", -1.0)  # everybody counts as dead
    workspace = files.at(bucket)
    with claims.opened(workspace) as dead, claims.opened(workspace) as one, claims.opened(workspace) as other:
        assert dead.kind.take("fits/a")
        seen = other.kind._read(other.kind._path("fits/a"))
        assert one.kind.take("fits/a")
        monkeypatch.setattr(other.kind, "_read", lambda path: seen)
        assert not other.kind.take("fits/a")


def test_a_store_without_conditional_writes_is_refused() -> None:
    with pytest.raises(UserError, match=r"workspace: runs cannot share mock://"):
        claims._store(files.Remote("mock://host/folder"))


def test_a_folder_that_may_not_be_written_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    with claims.opened(tmp_path) as opened:
        monkeypatch.setattr("pipeline.workspace.claims.os.open", refused)
        with pytest.raises(UserError, match=r"\.claims: cannot be written \(Permission denied\)"):
            opened.require_idle()
