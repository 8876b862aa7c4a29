from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipeline.cli.progress import Display


@pytest.mark.parametrize("terminal", [False, True])
def test_a_stage_closes_with_its_name_time_and_note(terminal: bool) -> None:
    screen = io.StringIO()
    with Display(Console(file=screen, force_terminal=terminal, width=100, color_system=None)).stage(
        "extract", 10
    ) as stage:
        stage.advance(4)
        stage.advance(6)
        stage.note = "10 images"
    assert screen.getvalue().rstrip().endswith("s  10 images")
    assert ("10/10" in screen.getvalue()) is terminal


def test_a_stage_that_fails_does_not_look_done() -> None:
    screen = io.StringIO()
    with pytest.raises(RuntimeError), Display(Console(file=screen)).stage("fit"):
        raise RuntimeError
    assert "fit" not in screen.getvalue()
