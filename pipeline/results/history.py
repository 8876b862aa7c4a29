"""The runs of a workspace, one line each: what was run on what, and how it went."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pipeline.stages.progress import SILENT, Stage
from pipeline.workspace import files, runs, storage
from pipeline.workspace.files import Place
from pipeline.workspace.patience import Unavailable

GROUPS = ("near_ood", "far_ood")


@dataclass(frozen=True)
class Summary:
    """One run."""

    name: str
    id: str
    state: str
    """finished, failed, partial, running; or unreadable, with the reason in `model`."""
    finished: str
    """When, as ISO 8601; of one that is not finished, when it was started."""
    model: str
    datasets: int
    detectors: int
    best: tuple[tuple[str, float], ...]
    """For near-OOD and far-OOD: the detector with the best mean AUROC in [0, 1], and that; or "" and NaN."""


def listed(workspace: Place, stage: Stage = SILENT) -> list[Summary]:
    """All runs of a workspace, name by name and the oldest first; the stage is told of each that is read."""
    folders, known = list(runs.all_of(workspace)), []
    stage.count("runs", len(folders))
    for folder in folders:
        if (summary := _summary(folder)) is not None:
            known.append(summary)
        stage.advance(1)
    return sorted(known, key=lambda summary: (summary.name, summary.finished))


def _summary(folder: Place) -> Summary | None:
    """What the record of a run says; None of a folder without one."""
    name = storage.name_of(storage.parent(str(folder)))
    try:
        record = files.read_json(folder / runs.MANIFEST)
        metrics = folder / "metrics.json"
        rows = files.read_json(metrics) if metrics.is_file() else []
        return Summary(
            name=name,
            id=folder.name,
            state=record["status"],
            finished=record["finished"] or record["started"],
            model=record["model"]["name"],
            datasets=len(record["datasets"]),
            detectors=len(record["detectors"]),
            best=tuple(_best(rows, group) for group in GROUPS),
        )
    except FileNotFoundError:
        return None
    except Unavailable:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        return Summary(name, folder.name, "unreadable", "", reason, 0, 0, ())


def _best(rows: list[dict[str, Any]], group: str) -> tuple[str, float]:
    """The detector with the best mean AUROC over a group, and that."""
    means = [row for row in rows if row["dataset"] == row["group"] == group and row["metric"] == "auroc"]
    found = [(row["value"], row["detector"]) for row in means if math.isfinite(row["value"])]
    value, detector = max(found, default=(math.nan, ""))
    return detector, value
