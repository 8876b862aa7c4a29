"""The engine of a workflow: what an interruption waits for is told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.cluster import inline
from pipeline.cluster.logs import Logs
from pipeline.workflows.engines import engine_for
from pipeline.workflows.progress import Quiet
from pipeline.workspace import files


class Heard(Quiet):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize(("threads", "lines"), [(2, 1), (1, 0), (None, 0)])
def test_who_interrupts_threads_is_told_that_they_finish_what_they_have_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int | None, lines: int
) -> None:
    monkeypatch.setattr(inline, "cpus", lambda: 1)
    heard, asked = Heard(), SimpleNamespace(engine="inline", threads=threads)
    logs = Logs(files.at(str(tmp_path / "logs")), 0)
    with (
        pytest.raises(KeyboardInterrupt),
        engine_for(asked, 1, True, heard, files.at(str(tmp_path)), logs, []),
    ):
        raise KeyboardInterrupt
    assert [text.partition(";")[0] for text in heard.said] == ["interrupted"] * lines
