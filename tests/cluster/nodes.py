"""A real Ray cluster on this machine: a head and worker nodes, raylets at loopback addresses of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import yaml
from rich.console import Console

from pipeline.cli.progress import Display
from pipeline.config import loading
from pipeline.workflows import run
from pipeline.workspace import files
from tests.servers import free_port, wait
from tests.stored import newest

SPECIAL = ("--num-cpus=1", "--num-gpus=1", '--resources={"special": 1}')
"""A node with a logical GPU and a resource of the cluster's own."""

RAY = str(Path(sys.executable).with_name("ray"))


def kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)


@dataclass
class Site:
    """The cluster, and the runs on it."""

    folder: Path
    port: int = field(default_factory=free_port)
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    started: int = 0

    def __post_init__(self) -> None:
        self.environment = {
            **os.environ,
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": os.urandom(16).hex(),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_timeout_ms": "2000",
        }

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start_head(self) -> None:
        """The node of the drivers, which works itself."""
        self._start("head", "127.0.0.1", "--head", f"--port={self.port}", "--include-dashboard=false",
                    f"--temp-dir={self.folder}", "--num-cpus=2")  # fmt: skip

    def add_node(self, *resources: str, hidden: Path | None = None) -> str:
        """A worker node; its name. It sees another, empty folder in the place of a `hidden` one."""
        self.started += 1
        name = f"node-{self.started}"
        address = f"127.0.0.{self.started + 1}"
        self._start(name, address, f"--address={self.address}", *resources, hidden=hidden)
        return name

    def need_another(self) -> None:
        """Have a node beside the head."""
        if len(self.nodes) == 1:
            self.add_node("--num-cpus=2")

    def _start(self, name: str, ip: str, *options: str, hidden: Path | None = None) -> None:
        command = [RAY, "start", "--block", f"--node-ip-address={ip}", "--object-store-memory=100000000"]
        if hidden is not None:
            script = 'mount -t tmpfs none "$0" && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", script, str(hidden), *command]
        with (self.folder / f"{name}.log").open("wb") as log:
            self.nodes[name] = subprocess.Popen(
                [*command, *options],
                env={key: value for key, value in self.environment.items() if key != "RAY_ADDRESS"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        log_of = self.folder / f"{name}.log"
        wait(f"{name} to start", lambda: b"Ray runtime started" in log_of.read_bytes(), 180)

    def kill_node(self, name: str) -> None:
        """End a node's raylet, as a machine that goes; its workers end with it."""
        process = self.nodes.pop(name)
        for child in psutil.Process(process.pid).children(recursive=True):
            if child.name() == "raylet":
                kill(child)
        process.wait(timeout=30)

    def stop(self) -> None:
        """End all processes of all nodes."""
        for process in reversed(self.nodes.values()):
            with suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                for child in [*parent.children(recursive=True), parent]:
                    kill(child)
            process.wait(timeout=30)

    def workers(self, *titles: str) -> list[psutil.Process]:
        """Processes of tasks and actors of this cluster whose title begins like one of these."""
        found = []
        for process in self.nodes.values():
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    with suppress(psutil.NoSuchProcess, psutil.AccessDenied, IndexError):
                        if child.cmdline()[0].startswith(titles):
                            found.append(child)
        return found

    def run(self, config: Path) -> subprocess.Popen[str]:
        """Start a driver."""
        return self.command("run", str(config))

    def command(self, *arguments: str) -> subprocess.Popen[str]:
        """Start the command line."""
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline.cli", *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def written(raw: dict[str, Any], folder: Path) -> Path:
    """A config file; its workspace lies beside it."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**raw, "workspace": str(folder / "workspace")}))
    return path


def finished(driver: subprocess.Popen[str]) -> str:
    """Output of a driver that must succeed."""
    output, _ = driver.communicate(timeout=240)
    assert driver.returncode == 0, output
    return output


@dataclass(frozen=True)
class Results:
    """What a run has left."""

    scores: dict[str, dict[str, Any]]
    """Rows by dataset and key."""
    metrics: bytes
    record: dict[str, Any]

    def same_as(self, other: Results) -> bool:
        """Whether every score and metric is equal."""
        return (self.scores, self.metrics) == (other.scores, other.metrics)

    @classmethod
    def of(cls, config: Path) -> Results:
        run = newest(config.parent / "workspace")
        scores = {}
        for folder in (run / "scores").iterdir():
            table = pq.read_table(folder)
            scores[folder.name] = {row.pop("key"): row for row in table.to_pylist()}
            assert len(scores[folder.name]) == len(table)
        return cls(scores, (run / "metrics.json").read_bytes(), files.read_json(run / "manifest.json"))


def in_one_process(raw: dict[str, Any], folder: Path) -> Results:
    """What a run of the inline engine gives."""
    config = written(raw, folder)
    run.execute(loading.load(str(config)), run.Options(engine="inline"), Display(Console(quiet=True)))
    return Results.of(config)
