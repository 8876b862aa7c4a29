"""What a run says of its calibrated thresholds, and its rows without those that were calibrated on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.columns import CALIBRATION
from pipeline.workspace import tables
from pipeline.workspace.files import Place


def split(manifest: Mapping[str, Any], dataset: str) -> bool:
    """Whether thresholds are calibrated on a part of a dataset's images and the others are tested."""
    wanted, role = manifest.get("thresholds"), manifest["datasets"][dataset]["role"]
    return wanted is not None and wanted["calibrate_on"] == role == "id"


def columns(
    folder: Place, manifest: Mapping[str, Any], dataset: str, names: Sequence[str]
) -> Iterator[pa.Table]:
    """Some columns of a table of scores, part by part, without the rows that were calibrated on.

    Args:
        folder: of the run.
        manifest: of the run.
        dataset: whose scores.
        names: of the columns.

    Raises:
        FileNotFoundError: the run has no scores of the dataset.
    """
    scores = tables.Table.open(folder / "scores" / dataset)
    if not split(manifest, dataset):
        return scores.columns(names)
    whole = scores.columns([*names, CALIBRATION])
    return (part.filter(pc.invert(part[CALIBRATION])).select(list(names)) for part in whole)


def sentence(manifest: Mapping[str, Any], decided: Sequence[Mapping[str, Any]]) -> str:
    """Which images the thresholds of a run come from.

    Args:
        manifest: of the run, with `thresholds`.
        decided: rows of `decisions.parquet`.
    """
    wanted = manifest["thresholds"]
    entries = {
        name: entry for name, entry in manifest["datasets"].items() if entry["role"] == wanted["calibrate_on"]
    }
    count = max(row["n_calibration"] for row in decided if row["dataset"] is not None)
    names = ", ".join(entries)
    if wanted["calibrate_on"] == "id":
        rows = sum(entry["features"] for entry in entries.values())
        told = f"{count:,} of the {rows:,} images of {names}, drawn by their keys and the seed"
        rest = f"all metrics are of the other {rows - count:,}"
    else:
        told, rest = f"{count:,} images of {names} (role id_val)", "they are in no metric"
    by_class = ", by predicted class" if wanted["per_class"] else ""
    return f"Thresholds come from {told}{by_class}; {rest}."


def flagging(manifest: Mapping[str, Any]) -> str:
    """By what rule the images of role unlabelled are flagged."""
    wanted = manifest.get("thresholds")
    if wanted is None:
        return (
            "they score above the threshold that accepts 95% of the ID images. At most 5% of the ID images do"
        )
    if wanted["fdr"] is not None:
        return (
            "Benjamini and Hochberg's procedure names them: of those it names, on average at most "
            f"{percent(wanted['fdr'])} are ID images"
        )
    return (
        "their p-value is at most the first false-alarm rate: of new ID images "
        f"{percent(wanted['false_alarm'][0])} or fewer are flagged"
    )


def percent(share: float) -> str:
    """A rate as people write it: 5%, 0.1%."""
    return f"{100 * share:.10g}%"
