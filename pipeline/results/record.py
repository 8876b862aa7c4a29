"""`manifest.json` of a run: what was run on what, with which versions, and how long it took."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeline import __version__
from pipeline.config import schema
from pipeline.network import extras
from pipeline.stages.prepare import Prepared
from pipeline.workspace import files


class Record:
    """The record of one run; rewritten after every stage."""

    def __init__(self, ready: Prepared, keep_stages: bool = False) -> None:
        """Start a record; nothing is written before it is `open`.

        Of an earlier run of the same evaluation it keeps what was found in the index and, if asked, how long
        the stages took.
        """
        self.open = False
        classifier, settings = ready.classifier, ready.config
        self.path = ready.folder / "manifest.json"
        self.content: dict[str, Any] = {
            "name": settings.name,
            "fingerprint": ready.fingerprint,
            "status": "running",
            "started": now(),
            "finished": None,
            "seed": settings.seed,
            "protocol": settings.protocol,
            "published": settings.published,
            "versions": _versions(),
            "git_commit": _git_commit(),
            "model": {
                **settings.model.model_dump(include={"source", "name", "weights"}),
                "weights_digest": classifier.digest,
                "classes": len(classifier.head[1]),
                "feature_dim": classifier.head[0].shape[1],
                "head": classifier.taps.head,
                "blocks": list(classifier.taps.blocks),
            },
            "datasets": {dataset.name: _dataset(ready, dataset) for dataset in settings.datasets},
            "detectors": {label: _detector(ready, label) for label in ready.detectors},
            "not_applicable": dict(ready.not_applicable),
            "passes": [],
            "index": {},
            "stages": {},
            "nodes": {},
        }
        earlier = files.read_json(self.path) if self.path.is_file() else {}
        if earlier.get("fingerprint") == ready.fingerprint:
            for part in ("index", "stages", "nodes") if keep_stages else ("index",):
                self.content[part] = earlier.get(part, {})

    def write(self) -> None:
        """Write the record as it stands."""
        if self.open:
            files.write_json(self.path, self.content)

    def leave_out(self, not_applicable: Mapping[str, str]) -> None:
        """Move detectors to those that do not apply, by label and with the reason."""
        for label, reason in not_applicable.items():
            del self.content["detectors"][label]
            self.content["not_applicable"][label] = reason

    def close(self, status: str) -> None:
        """Write the record for the last time."""
        self.content |= {"status": status, "finished": now()}
        self.write()


def _dataset(ready: Prepared, dataset: schema.Dataset) -> dict[str, Any]:
    job = ready.jobs[dataset.name]
    return {
        **dataset.model_dump(include={"role", "format", "path"}),
        "rows": job.manifest.rows,
        "expected": dataset.expected,
        "features": None,
        "errors": None,
        "hash": files.at(job.folder).name.rpartition("-")[2],
        "digest": job.manifest.digest,
        "extras": {extra.column: extras.width(extra, ready.classifier) for extra in job.extras},
        "accuracy": None,
    }


def _detector(ready: Prepared, label: str) -> dict[str, Any]:
    detector = ready.detectors[label]
    entry = next(entry for entry in ready.config.detectors if entry.label == label)
    return {
        "method": entry.methods,
        "title": detector.caption,
        "parameters": detector.model_dump(mode="json"),
        "uses_ood": ready.uses_ood(label),
        "columns": list(dict.fromkeys([*detector.columns, *(extra.kind for extra in detector.extras())])),
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
