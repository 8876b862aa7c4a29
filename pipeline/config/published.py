"""Published numbers of benchmarks, one table per protocol and model: `configs/published/<name>.csv`.

Every value stands under the metric of ours that has its definition (`fpr95_ood` for OpenOOD's FPR95,
`fpr95_id` for that of the papers) and names the place it was read in. Compares nothing; the report does.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from pipeline.config.loading import bundled
from pipeline.errors import UserError, unknown


@dataclass(frozen=True)
class Published:
    """One published value."""

    protocol: str
    model: str
    detector: str
    """Name of the method, or `classifier`."""
    dataset: str
    """Name of a dataset, or of a group such as `near_ood` for the mean over it."""
    metric: str
    value: float
    """In [0, 1]."""
    std: float | None
    """Over training runs, if the source has several."""
    source: str
    """Where the value was read, and settings that matter."""


def read(name: str) -> list[Published]:
    """The rows of a bundled table, in its order.

    Raises:
        UserError: if there is no such table.
    """
    folder = bundled() / "published"
    known = {path.stem: path for path in folder.glob("*.csv")}
    if name not in known:
        raise UserError(f"published: {unknown('table of published numbers', name, known)}")
    with known[name].open(encoding="utf-8", newline="") as file:
        return [_row(row) for row in csv.DictReader(file)]


def _row(cells: dict[str, str]) -> Published:
    value, std = float(cells.pop("value")), cells.pop("std")
    return Published(value=value, std=float(std) if std else None, **cells)


def members(protocol: str) -> dict[str, set[str]]:
    """Datasets of a protocol by role, from the bundled file that describes it."""
    for path in (bundled() / "protocols").glob("*.yaml"):
        described: Mapping[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        if described["protocol"] == protocol:
            found: dict[str, set[str]] = {}
            for dataset in described["datasets"]:
                found.setdefault(dataset["role"], set()).add(dataset["name"])
            return found
    raise UserError(f"published: no protocol {protocol!r} is described in {bundled() / 'protocols'}.")
