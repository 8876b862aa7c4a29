"""`manifest.json` of a run: what was run on what, with which versions, and how long it took."""

from __future__ import annotations

import contextlib
import platform
import socket
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeline import __version__
from pipeline.config import schema
from pipeline.detectors._combination import Combination
from pipeline.results.class_names import class_names
from pipeline.stages.prepare import Prepared
from pipeline.workspace import files
from pipeline.workspace.runs import MANIFEST


class Record:
    """The record of one run; rewritten after every stage.

    Costs and dates are those of the executions that did the work. One that finds everything done is added to
    the list of executions and changes nothing else.
    """

    def __init__(self, ready: Prepared) -> None:
        """Start a record; nothing is written before it is `open`."""
        self.open = False
        network, settings = ready.network, ready.config
        self.path = ready.folder / MANIFEST
        self.content: dict[str, Any] = {
            "name": settings.name,
            "id": ready.folder.name,
            "fingerprint": ready.fingerprint,
            "status": "running",
            "started": now(),
            "finished": None,
            "seed": settings.seed,
            "metrics": settings.metrics.model_dump(),
            "thresholds": settings.thresholds and settings.thresholds.model_dump(mode="json"),
            "protocol": settings.protocol,
            "published": settings.published,
            "versions": _versions(),
            "git_commit": _git_commit(),
            "model": {
                **settings.model.model_dump(include={"source", "name", "weights"}),
                "weights_digest": network.digest,
                "classes": len(network.head[1]),
                "feature_dim": network.head[0].shape[1],
                "head": network.taps.head,
                "blocks": list(network.taps.blocks),
            },
            "class_names": class_names(settings, len(network.head[1])),
            "datasets": {dataset.name: _dataset(ready, dataset) for dataset in settings.datasets},
            "detectors": {label: _detector(ready, label) for label in ready.detectors},
            "not_applicable": dict(ready.not_applicable),
            "notices": {},
            "passes": [],
            "index": {},
            "unscored": {},
            "costs": {},
            "duplicates": {},
            "warnings": [],
            "stages": {},
            "nodes": {},
            "artifacts": [],
        }
        self.earlier = files.read_json(self.path) if self.path.is_file() else {}
        self.worked = self.earlier.get("status") != "finished"
        """Whether there is something new to say."""
        for part in ("protocol", "published") if self.earlier else ():
            self.worked |= self.earlier[part] != self.content[part]
        told = (("detectors", "uses_ood"), ("datasets", "expected"), ("datasets", "notes"))
        for part, what in told if self.earlier else ():
            for name, entry in self.earlier[part].items():
                self.worked |= entry.get(what) != self.content[part].get(name, entry).get(what)
        if self.earlier and not ready.fresh:
            kept = ("started", "index", "stages", "nodes", "artifacts", "costs")
            self.content |= {part: self.earlier[part] for part in kept if part in self.earlier}
        self.execution: dict[str, Any] = {
            "started": now(),
            "finished": None,
            "status": "running",
            "version": __version__,
            "host": socket.gethostname(),
            "stages": {},
        }

    def write(self) -> None:
        """Write the record as it stands."""
        if self.open:
            executions = [*self.earlier.get("executions", ()), self.execution]
            shown = self.content if self.worked else self.earlier
            files.write_json(self.path, {**shown, "executions": executions})

    def spend(self, stage: str, numbers: Mapping[str, Any], worked: bool) -> None:
        """Note what a stage took.

        Args:
            stage: its name.
            numbers: what it took.
            worked: whether it did anything that earlier executions had not done.
        """
        self.execution["stages"][stage] = dict(numbers)
        known = self.content["stages"].get(stage)
        if known is None:
            self.content["stages"][stage] = dict(numbers)
        elif worked:
            self.content["stages"][stage] = added(known, numbers)
        self.worked |= worked

    def spend_on(self, detectors: Mapping[str, Mapping[str, float]]) -> None:
        """Note what detectors took, by label: how many `scores`, and the `seconds` of all tasks together."""
        for label, more in detectors.items():
            self.content["costs"][label] = added(self.content["costs"].get(label, {}), more)

    def leave_out(self, not_applicable: Mapping[str, str]) -> None:
        """Move detectors to those that do not apply, by label and with the reason."""
        for label, reason in not_applicable.items():
            self.content["detectors"].pop(label, None)
            self.content["not_applicable"][label] = reason

    def close(self, status: str) -> None:
        """Write the record for the last time."""
        closed = {"status": status, "finished": now()}
        self.execution |= closed
        self.content |= closed
        self.write()


def added(known: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """What two executions of a stage took together."""
    total = {name: known.get(name, 0) + value for name, value in more.items()}
    for name in {"peak_memory_mib", "images", "rows"} & more.keys():
        total[name] = max(known.get(name, 0), more[name])
    if total.get("steady_seconds"):
        total["images_per_second"] = total["forward_images"] / total["steady_seconds"]
    return {**known, **total}


def _dataset(ready: Prepared, dataset: schema.Dataset) -> dict[str, Any]:
    job = ready.jobs[dataset.name]
    return {
        **dataset.model_dump(include={"role", "format", "path"}),
        "rows": job.manifest.rows,
        "expected": dataset.expected,
        "notes": list(job.manifest.notes),
        "features": None,
        "errors": None,
        "first_errors": [],
        "errors_in": None,
        "machines": {},
        "hash": files.at(job.folder).name.rpartition("-")[2],
        "digest": job.manifest.digest,
        "extras": {extra.column: ready.network.width(extra) for extra in job.extras},
        "accuracy": None,
        "numbering": None,
    }


def _detector(ready: Prepared, label: str) -> dict[str, Any]:
    detector = ready.detectors[label]
    entry = next(entry for entry in ready.config.detectors if entry.label == label)
    scores = [f"score of {name}" for name in detector.members] if isinstance(detector, Combination) else []
    return {
        "method": entry.methods,
        "title": detector.caption,
        "reading": detector.parts()[-1].reading,
        "formulas": [[part.title, part.formula, part.paper] for part in detector.parts()],
        "parameters": detector.model_dump(mode="json"),
        "uses_ood": ready.uses_ood(label),
        "columns": list(
            dict.fromkeys([*detector.columns, *(extra.kind for extra in detector.extras()), *scores])
        ),
    }


def _versions() -> dict[str, str]:
    names = ("ray", "torch", "torchvision", "numpy", "pyarrow", "pillow", "mlflow")
    found = {"python": platform.python_version(), "ood-pipeline": __version__}
    found |= {name: version(name) for name in names}
    for name in ("faiss-cpu", "faiss-gpu"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _git_commit() -> str | None:
    """Commit of the folder the run was started in, if git knows it."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def now() -> str:
    """The time, in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
