"""What a person reads while a command works."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import yaml
from rich.console import Console

from pipeline.cli import progress
from pipeline.cli.progress import Display, Stage


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


@pytest.mark.parametrize("terminal", [False, True])
def test_a_stage_closes_with_its_name_time_and_note(terminal: bool) -> None:
    screen = io.StringIO()
    with Display(Console(file=screen, force_terminal=terminal, width=100, color_system=None)).stage(
        "extract", "looks for what is there"
    ) as stage:
        stage.count("images", 10)
        stage.advance(4)
        stage.advance(6)
        stage.note = "10 images"
    assert screen.getvalue().rstrip().endswith("s  10 images")
    assert ("10 of 10 images" in screen.getvalue()) is terminal


def test_a_stage_that_fails_does_not_look_done() -> None:
    screen = io.StringIO()
    with pytest.raises(RuntimeError), Display(Console(file=screen)).stage("fit", "reads"):
        raise RuntimeError
    assert screen.getvalue() == "fit       reads\n"


@dataclass
class Shown:
    """A display without a terminal, and what it has said."""

    display: Display
    screen: io.StringIO

    def told(self, *lines: str) -> bool:
        """Whether these are all the lines, once there are as many."""
        deadline = time.monotonic() + 10
        while self.screen.getvalue().count("\n") < len(lines) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)  # and no more come
        return self.screen.getvalue().splitlines() == [f"extract   {line}" for line in lines]


@pytest.fixture
def shown(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Shown:
    """Looks at its stage all the time."""
    monkeypatch.setattr(progress, "_LOOKS", 0.001)
    screen = io.StringIO()
    return Shown(Display(Console(file=screen, width=100)), screen)


def test_without_a_terminal_a_line_tells_what_lasts_and_then_how_far_it_is(clock, shown) -> None:
    with shown.display.stage("extract", "looks") as stage:
        assert shown.told("looks")
        clock.now += 0.1
        shown.display.doing("takes no time")
        stage.count("images", 10)
        shown.display.doing("loads the network")
        clock.now += progress.LASTS
        assert shown.told("looks", "loads the network")
        stage.advance(3)
        clock.now += progress.EVERY
        assert shown.told("looks", "loads the network", "3 of 10 images")
        clock.now += progress.EVERY
        assert shown.told("looks", "loads the network", "3 of 10 images", "3 of 10 images")
        stage.note = "done"
    assert shown.screen.getvalue().endswith("s  done\n")


def test_nothing_new_is_done_for_longer_than_a_second_in_silence(clock, shown) -> None:
    """Many short steps, none of which lasts, were silent for as long as they took together."""
    step, said = progress.LASTS / 4, ["opens"]
    with shown.display.stage("extract", "opens"):
        for number in range(1, 13):
            clock.now += step
            shown.display.doing(f"lists {number}")
            if number % 4 == 0:
                said.append(f"lists {number}")
            assert shown.told(*said)


def test_an_aside_tells_only_what_lasts_and_has_no_end_of_its_own(clock, shown) -> None:
    with shown.display.aside("extract", "looks"):
        clock.now += progress.LASTS / 2
    assert shown.told()
    with shown.display.aside("extract", "looks") as stage:
        clock.now += progress.LASTS
        assert shown.told("looks")
        stage.count("runs", 5)
        stage.advance(2)
        clock.now += progress.LASTS
        assert shown.told("looks", "2 of 5 runs")
    assert shown.told("looks", "2 of 5 runs")


def test_another_thread_never_reads_half_of_what_a_stage_was_told(clock) -> None:
    stage, seen = Stage("fit"), []

    def look(frame: FrameType, event: str, argument: object) -> object:
        if frame.f_code in (Stage.count.__code__, Stage.advance.__code__):
            seen.append(str(stage))
            return look
        return None

    before = sys.gettrace()
    sys.settrace(look)
    try:
        for what in ("slices", "detectors"):
            stage.count(what, 4)
            for _ in range(2):
                clock.now += 10
                stage.advance(1)
    finally:
        sys.settrace(before)
    assert list(dict.fromkeys(seen)) == [
        "",
        "0 of 4 slices",
        "1 of 4 slices",
        "2 of 4 slices, 0.1/s, 0:00:20 left",
        "0 of 4 detectors",
        "1 of 4 detectors",
        "2 of 4 detectors, 0.1/s, 0:00:20 left",
    ]


def test_no_rate_is_shown_where_results_hardly_come(clock) -> None:
    stage = Stage("extract")
    stage.count("images", 10**12)
    for _ in range(2):
        clock.now += 10**5
        stage.advance(1)
    assert str(stage) == "2 of 1,000,000,000,000 images"


def test_what_lasts_and_has_no_end_tells_its_seconds(clock) -> None:
    stage = Stage("prepare")
    stage.doing("lists the images")
    assert str(stage) == "lists the images"
    clock.now += 75
    assert str(stage) == "lists the images, 75 s so far"


def test_rate_and_remaining_time_are_those_since_the_workers_began(clock) -> None:
    """Eight workers that start for a minute and then give 100 images each every 20 seconds."""
    stage = Stage("extract")
    stage.count("images", 8000)
    stage.doing("starts workers")
    clock.now += 60
    for _ in range(8):
        clock.now += 0.1
        stage.advance(100)
    assert str(stage) == "800 of 8,000 images"  # a whole round at once tells no rate
    for _ in range(2):
        clock.now += 19.2
        for _ in range(8):
            clock.now += 0.1
            stage.advance(100)
    assert str(stage) == "2,400 of 8,000 images, 40/s, 0:02:20 left"
    clock.now += 19  # the next round is not due
    assert str(stage) == "2,400 of 8,000 images, 40/s, 0:02:20 left"
    clock.now += 51  # and now it is late
    assert str(stage) == "2,400 of 8,000 images, 20/s, 0:04:40 left"


def test_what_was_there_is_told_beside_what_is_to_do(clock) -> None:
    stage = Stage("extract")
    stage.count("images", 30_000, 30_000)
    assert str(stage) == "0 of 30,000 images, 30,000 of 60,000 were there"


def test_slow_work_has_a_rate_too(clock) -> None:
    stage = Stage("fit")
    stage.count("parts of the mixup pass", 5)
    for _ in range(3):
        clock.now += 10
        stage.advance(1)
    assert str(stage) == "3 of 5 parts of the mixup pass, 0.1/s, 0:00:20 left"
    stage.count("detectors", 2)
    assert str(stage) == "0 of 2 detectors"


SLOW = """
import time
from pipeline.quickstart import resnet

def build():
    time.sleep(8)
    return resnet.build()
"""
"""A network that takes long to be opened."""


@pytest.mark.slow
@pytest.mark.parametrize("command", [["run", "--engine", "inline"], ["detectors", "--config"]])
def test_a_command_without_a_terminal_tells_what_lasts_long_before_it_is_over(
    settings: dict[str, Any], tmp_path: Path, command: list[str]
) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    settings["model"] |= {"name": f"{tmp_path / 'slow.py'}:build", "weights": "random"}
    settings |= {"workspace": str(tmp_path / "workspace"), "detectors": ["msp"]}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    begun, lines = time.monotonic(), dict[str, float]()
    with subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *command, str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.setdefault(line.rstrip(), time.monotonic() - begun)
    assert process.returncode == 0, lines
    (told,) = (at for line, at in lines.items() if line.endswith("opens the network"))
    over = next(at for at in lines.values() if at > told)
    assert over - told > 4, lines  # of 8 seconds, with machines that are slow in mind
    if command[0] == "run":
        assert min(lines.values()) < told, "what comes before that is told at once"
