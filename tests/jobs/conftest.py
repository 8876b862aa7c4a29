"""A real cluster head that asks for a token, and the command line that submits to it."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.servers import free_ports, wait

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    """A head node of its own, with two CPUs."""

    address: str
    folder: Path
    """Ray's folder for sessions."""
    token: str
    printed: list[str] = field(default_factory=list)
    """What commands have printed."""

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """Start the command on a machine that knows the cluster's address and token."""
        environment = clean() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        environment |= {"RAY_API_SERVER_ADDRESS": self.address, "COLUMNS": "200"} | variables
        return subprocess.Popen(
            [BIN / "ood-pipeline", *arguments],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored below background jobs
        )

    def finish(self, process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
        """Wait for a command."""
        out, err = process.communicate(timeout=240)
        self.printed.extend([out, err])
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def command(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the command to its end."""
        return self.finish(self.start(*arguments, **variables))

    def get(self, path: str) -> Any:
        """What the server answers."""
        answer = requests.get(
            self.address + path, headers={"Authorization": f"Bearer {self.token}"}, timeout=10
        )
        answer.raise_for_status()
        return answer


def clean(*others: str) -> dict[str, str]:
    """The environment without what other tests may have set for Ray, and without names that begin so."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", *others))}


@pytest.fixture(scope="package")
def head() -> Iterator[Head]:
    """A head in a process group of its own, which alone is ended; its Python has no path to this checkout."""
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="r"))
    port, dashboard, client, agent = free_ports(4)
    made = Head(f"http://127.0.0.1:{dashboard}", folder, secrets.token_hex(16))
    environment = clean("PYTHONPATH", "COVERAGE") | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": made.token, "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    options = {
        "port": port,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "ray-client-server-port": client,
        "dashboard-agent-listen-port": agent,
        "min-worker-port": "0",
        "max-worker-port": "0",
        "num-cpus": "2",
        "object-store-memory": str(200 * 2**20),
        "temp-dir": str(folder),
    }
    started = subprocess.Popen(
        [
            BIN / "ray",
            "start",
            "--head",
            "--block",
            *(f"--{name}={value}" for name, value in options.items()),
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait("the head to answer", lambda: answers(made))
        yield made
    finally:
        os.killpg(started.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            started.wait(15)
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        shutil.rmtree(folder, ignore_errors=True)


def answers(head: Head) -> bool:
    """Whether the server is up."""
    try:
        return bool(head.get("/api/version").ok)
    except requests.RequestException:
        return False
