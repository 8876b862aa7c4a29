"""The command `ui` where another program takes the port that was free; a real server is in test_tracking."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from pipeline.cli import main
from pipeline.results.mlflow import tracking
from pipeline.workspace import files, runs
from tests.servers import free_port

SERVER = """
import http.server, json, sys
class Once(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"run": {"info": {"run_id": "r1"}}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Once).handle_request()
"""
"""Listens like MLflow's, shows one run once, and ends."""


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[int]:
    """A port that somebody has; the run is in a store that no server shows yet."""
    (tmp_path / "manifest.json").write_text('{"datasets": {}}')
    session = tracking.Session(files.at(str(tmp_path)), "sqlite:///nowhere.db", "1", "r1")
    monkeypatch.setattr(runs, "located", lambda run: session.run)
    monkeypatch.setattr(tracking, "session_of", lambda run: session)
    monkeypatch.setattr(tracking, "address", lambda session: None)
    monkeypatch.setattr(tracking, "command", lambda session, port: [sys.executable, "-c", SERVER, str(port)])
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        yield other.getsockname()[1]


def ui(*options: str) -> Result:
    return CliRunner().invoke(main.app, ["ui", "runs/x", "--no-open", *options])


def test_a_port_that_was_taken_meanwhile_is_not_tried_twice(
    taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = free_port()
    ports = iter([taken, free])
    monkeypatch.setattr(tracking, "free_port", lambda: next(ports))
    result = ui()
    assert result.exit_code == 0, result.output
    assert f"http://127.0.0.1:{free}/#/experiments/1/" in result.output


def test_a_port_of_ones_choice_that_is_taken_is_refused(taken: int) -> None:
    result = ui("--port", str(taken))
    assert result.exit_code == 1
    assert "MLflow's server did not start" in str(result.exception or result.output)
