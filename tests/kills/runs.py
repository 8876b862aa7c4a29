"""A small evaluation with every kind of artifact in several parts, run by processes that can be killed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.cluster import engine
from pipeline.config import loading
from pipeline.results import verify
from pipeline.results.report import plots
from pipeline.stages import banks, score, statistics
from pipeline.workflows import run
from tests.golden import evaluation as golden
from tests.kills.strikes import Display, Engine, Plan, Strike
from tests.stored import newest

IMAGES = {"train": 120, "test": 40, "near": 40, "production": 24}

DATED = ("started", "finished", "stages", "costs", "nodes", "executions", "git_commit")
"""Of the record of a run: when, where and at which cost it was done."""

_NO_RESULTS = re.compile(r"\.claims/|runs/small/[^/]+/(logs|report)/")

_DRAFT = r"\.[\w.-]+\.[0-9a-f]{32}"
_LEFT = re.compile(
    rf"""\.write-test-\w+ | \.{_DRAFT}         # whether the workspace can be written to
    | manifests/\.ood-pipeline-\w+/.+          # `ood-pipeline clean` deletes them
    | runs/small/{_DRAFT}                      # all runs of the name write there
    | runs/small/\w+/({_DRAFT} | \.ood-pipeline-\w+/.+)
    """,
    re.VERBOSE,
)
"""Drafts that outlive the process that wrote them: nobody can tell whether it is dead, or looks there."""

_PRELOADED = [__name__, "pandas", "pyarrow.dataset", "scipy.stats", "threadpoolctl", "charset_normalizer"]
"""What an evaluation imports, most of it late."""


def settings(folder: Path) -> dict[str, Any]:
    """The raw config; its images are put into a folder."""
    np.savez(folder / "images.npz", **golden.arrays())
    raw = golden.settings(folder / "images.npz")
    datasets = [entry | {"limit": IMAGES.get(entry["name"])} for entry in raw["datasets"]]
    return {
        **raw,
        "name": "small",
        "datasets": [entry for entry in datasets if entry["limit"]],
        "extract": {"batch_size": 16, "shard_rows": 32, "actors": 1},
        "index": {"kind": "IVF4,Flat", "shards": 2, "cpus_per_shard": 0.5},
        "detectors": [
            *("msp", "dice", "odin", {"knn": {"k": 2}}),
            {"grood": {"samples": 32, "class_samples": 8, "mixup_weight": 0.75}},
        ],
    }


@contextmanager
def watched(display: Display) -> Iterator[None]:
    """Evaluations in the block cut their work into small pieces, draw no pictures, and count what appears."""
    opened = engine.opened

    @contextmanager
    def counting(*arguments: Any) -> Iterator[Engine]:
        with opened(*arguments) as inner:
            yield Engine(inner, display)

    with pytest.MonkeyPatch.context() as patch:
        for module in (banks, score, statistics):
            patch.setattr(module, "SLICE", 24)
        patch.setattr(statistics, "EVERY", 2)
        for name in ("histograms", "roc", "norm_ratio"):
            patch.setattr(plots, name, lambda *_: bytes(16) + (2).to_bytes(4, "big"))
        patch.setattr(engine, "opened", counting)
        yield


def evaluate(config: Path, plan: Plan, chosen: engine.Name, threads: int | None) -> None:
    """Run the evaluation in this process."""
    display = Display(plan)
    with watched(display), display.watched():
        run.execute(loading.load(str(config)), run.Options(engine=chosen, threads=threads), display)


class Evaluation:
    """The evaluation in a workspace of its own."""

    def __init__(self, raw: Mapping[str, Any], folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.workspace, self.config = folder, folder / "workspace", folder / "config.yaml"
        self.config.write_text(yaml.safe_dump({**raw, "workspace": str(self.workspace)}))
        self.raw, self.starts = raw, 0

    def plan(self, *strikes: Strike) -> Plan:
        """For the next start."""
        self.starts += 1
        counts = self.folder / f"counts-{self.starts}"
        counts.mkdir()
        return Plan(str(self.workspace), str(counts), strikes)

    def start(self, *strikes: Strike, threads: int = 1) -> tuple[int | None, Plan]:
        """Run it without Ray in a process that is forked off one that has imported all; its exit status."""
        context, plan = get_context("forkserver"), self.plan(*strikes)
        context.set_forkserver_preload(_PRELOADED)
        process = context.Process(target=evaluate, args=(self.config, plan, "inline", threads))
        process.start()
        process.join()
        return process.exitcode, plan

    def driver(self, environment: Mapping[str, str], *strikes: Strike) -> subprocess.Popen[str]:
        """Start it on Ray in a process of its own.

        Torch has one thread in all of them: what a network answers to the probe depends on how many it has.
        """
        return subprocess.Popen(
            [sys.executable, "-m", __name__, str(self.config), json.dumps(asdict(self.plan(*strikes)))],
            env={**environment, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def contents(self) -> dict[str, str]:
        """SHA-256 of every file of the workspace, by relative path.

        Left out are claims and logs, which are no results, and the report, which shows the dates of the run's
        record; of the record counts all but `DATED`.
        """
        files = [path for path in self.workspace.rglob("*") if path.is_file()]
        named = {str(path.relative_to(self.workspace)): path for path in files}
        return {name: self._digest(path) for name, path in named.items() if not _NO_RESULTS.match(name)}

    def _digest(self, path: Path) -> str:
        content = path.read_bytes()
        if path.name == "config.yaml":
            content = content.replace(str(self.workspace).encode(), b"workspace")
        if path.name == "manifest.json":
            record = {name: value for name, value in json.loads(content).items() if name not in DATED}
            content = json.dumps(record).encode()
        return hashlib.sha256(content).hexdigest()

    def wrong(self, expected: Mapping[str, str]) -> list[object]:
        """What is missing or has other bytes, what does not belong there, and what `verify` finds wrong."""
        found = self.contents()
        others = [name for name, digest in expected.items() if found.get(name) != digest]
        strangers = [name for name in found if name not in expected and not _LEFT.fullmatch(name)]
        findings = verify.examine(newest(self.workspace))
        return [*others, *strangers, *(finding for finding in findings if not finding.good)]


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    given |= {"strikes": tuple(Strike(**strike) for strike in given["strikes"]), "driver": os.getpid()}
    evaluate(Path(sys.argv[1]), Plan(**given), "ray", None)
