"""What a run folder says to MLflow: tags, parameters and metrics under names MLflow accepts. No I/O."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pipeline.errors import redact

_MAX_KEY, _MAX_PARAM, MAX_TAG = 240, 6000, 8000
"""Characters; MLflow cuts or refuses what is longer."""

_FLAGGED = {"id": "false_alarm", "near_ood": "caught", "far_ood": "caught"}
"""What the share of flagged images is called, by the role of the dataset."""

MOST, LEAST = 12, 6
"""Metrics of a detector's run, and how many of them at least are of `metrics.parquet`: charts take that many.

All are in the parent's artifacts.
"""

_FIRST = ("auroc", "fpr95_id", "fpr95_ood")
_REST = 4

_Items = Iterable[tuple[tuple[str, ...], Any]]
"""Values, each with the parts its key is made of."""


@dataclass(frozen=True)
class Content:
    """What one MLflow run holds."""

    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]


def of_run(manifest: Mapping[str, Any], config: object, rows: list[dict[str, Any]]) -> Content:
    """The parent run: what was run on what, its counts and times, and what two evaluations are compared by.

    Args:
        manifest: of the run, which may have just begun.
        config: the settings; those of detectors are parameters of their own runs.
        rows: of `metrics.parquet`; none before the end.
    """
    datasets, model, commit = manifest["datasets"], manifest["model"], manifest["git_commit"]
    tags: list[tuple[tuple[str, ...], Any]] = [(("fingerprint",), manifest["fingerprint"])]
    tags += [(("model",), model["name"]), (("weights_digest",), model["weights_digest"])]
    tags += [(("features", name), dataset["hash"]) for name, dataset in datasets.items()]
    tags += [(("version", package), version) for package, version in manifest["versions"].items()]
    tags += [(("warnings",), "\n".join(manifest["warnings"]))] if manifest.get("warnings") else []
    tags += [(("not_applicable", label), reason) for label, reason in manifest["not_applicable"].items()]
    tags += [(("notice", label), " ".join(texts)) for label, texts in manifest.get("notices", {}).items()]
    tags += [((key,), commit) for key in ("git_commit", "mlflow.source.git.commit") if commit]
    metrics: list[tuple[tuple[str, ...], Any]] = []
    for stage, numbers in manifest["stages"].items():
        metrics += [((key, stage), value) for key, value in numbers.items()]
    for name, dataset in datasets.items():
        keys = ("rows", "features", "errors", "accuracy")
        metrics += [((key, name), dataset[key]) for key in keys if dataset[key] is not None]
    accuracy = [row for row in rows if row["metric"] == "id_accuracy"]
    alone = sum(row["group"] == "id" for row in accuracy) == 1
    metrics += [
        ((row["metric"], *([] if alone and row["group"] == "id" else [row["dataset"]])), row["value"])
        for row in accuracy
    ]
    best = _best(rows)
    for group, found in best.items():
        metrics += [(("best_auroc", group), found[0][0]), (("mean_auroc", group), fmean(v for v, _ in found))]
        tags += [(("best_detector", group), found[0][1])]
    tags += [(("mlflow.note.content",), _note(manifest, best))]
    return _content(tags, _flat(_without_detectors(config)), metrics)


def _best(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[float, str]]]:
    """Mean AUROC over each group and the detector with it, best first."""
    found: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        if row["metric"] == "auroc" and row["dataset"] == row["group"] and math.isfinite(row["value"]):
            found.setdefault(row["group"], []).append((row["value"], row["detector"]))
    return {group: sorted(values, key=lambda each: -each[0]) for group, values in found.items()}


def _note(manifest: Mapping[str, Any], best: Mapping[str, list[tuple[float, str]]]) -> str:
    """The description that MLflow shows above a run, as Markdown."""
    sets = ", ".join(f"{name} ({dataset['role']})" for name, dataset in manifest["datasets"].items())
    lines = [
        f"{len(manifest['detectors'])} detectors of OOD images for `{manifest['model']['name']}` on {sets}."
    ]
    lines += [
        f"Best on {group}: **{found[0][1]}**, AUROC {found[0][0]:.4f}." for group, found in best.items()
    ]
    lines += [f"**Warning:** {text}" for text in manifest.get("warnings", ())]
    return "\n\n".join(lines)


def _without_detectors(config: object) -> object:
    """Settings with the labels of the detectors alone."""
    if not isinstance(config, dict) or not isinstance(config.get("detectors"), list):
        return config
    labels = [entry.get("label", next(iter(entry), "")) for entry in config["detectors"]]
    return {**config, "detectors": ", ".join(labels)}


def of_detector(
    label: str,
    manifest: Mapping[str, Any],
    rows: list[dict[str, Any]],
    threshold: float,
    decided: Iterable[Mapping[str, Any]] = (),
) -> Content:
    """The child run of one detector: its parameters, metrics and threshold, and what it flags.

    Args:
        label: of the detector.
        manifest: of the run.
        rows: of `metrics.parquet`.
        threshold: that 95 % of the ID images pass.
        decided: rows of `decisions.parquet`; those at the first false-alarm rate become metrics.
    """
    detector = manifest["detectors"][label]
    tags: list[tuple[tuple[str, ...], Any]] = [
        (("detector",), label),
        (("model",), manifest["model"]["name"]),
    ]
    tags += [((key,), detector[key]) for key in ("method", "title", "uses_ood")]
    metrics: list[tuple[tuple[str, ...], Any]] = [(("threshold",), threshold)]
    first = [
        row
        for row in decided
        if row["detector"] == label and row["dataset"] is not None
        if row["false_alarm"] == manifest["thresholds"]["false_alarm"][0]
    ]
    metrics += [((f"threshold_{row['false_alarm']:.10g}",), row["threshold"]) for row in first[:1]]
    metrics += [
        ((f"{_FLAGGED[row['role']]}_{row['false_alarm']:.10g}", row["dataset"]), row["share"])
        for row in first
        if row["role"] in _FLAGGED
    ]
    lost = manifest.get("unscored", {}).items()
    metrics += [(("unscored", name), found[label]["rows"]) for name, found in lost if label in found]
    index = manifest["index"].get(label, {})
    metrics += [(("index", key), value) for key, value in index.items() if isinstance(value, int | float)]
    mine = [row for row in rows if row["detector"] == label]
    shown = sorted((row for row in mine if _rank(row) < _REST), key=_rank) or mine
    for row in shown[: max(MOST - len(metrics), LEAST)]:
        dataset, group = row["dataset"], row["group"]
        full_spectrum = group.startswith("fs_") and dataset != group
        metrics.append(((row["metric"], f"fs.{dataset}" if full_spectrum else dataset), row["value"]))
    return _content(tags, _flat(detector["parameters"]), metrics)


def _rank(row: Mapping[str, Any]) -> int:
    """What is looked at first: means over groups, AUROC of datasets, the full spectrum; `_REST` is not."""
    mean = row["dataset"] == row["group"] and row["metric"] in _FIRST
    spectrum = row["group"].startswith("fs_")
    auroc = row["metric"] == "auroc"
    kinds = (mean and not spectrum, auroc and not spectrum, mean, auroc)
    return kinds.index(True) if True in kinds else _REST


def _content(tags: _Items, params: _Items, metrics: _Items) -> Content:
    """What MLflow takes; a metric without a finite value is named in the tag `undefined_metrics`."""
    texts, numbers = _keyed(tags, "."), _keyed(metrics, "/")
    finite = {
        key: float(value) for key, value in numbers.items() if value is not None and math.isfinite(value)
    }
    if len(finite) < len(numbers):
        texts["undefined_metrics"] = ", ".join(key for key in numbers if key not in finite)
    return Content(
        {key: limited(value, MAX_TAG) for key, value in texts.items()},
        {key: limited(value, _MAX_PARAM) for key, value in _keyed(params, ".").items()},
        finite,
    )


def _flat(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Leaves of nested settings; an entry of a list of mappings goes by its name, else by its number."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, (*path, str(key)))
    elif isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        for number, entry in enumerate(value):
            name = () if len(entry) == 1 else (str(entry.get("name", entry.get("label", number))),)
            yield from _flat(entry, path + name)
    elif path:
        yield path, value


def _keyed(items: _Items, separator: str) -> dict[str, Any]:
    """The values under keys MLflow accepts; of equal keys the later ones are numbered."""
    keyed: dict[str, Any] = {}
    for parts, value in items:
        key = wanted = separator.join(map(_part, parts))[:_MAX_KEY].rstrip("/")
        number = 1
        while key in keyed:
            number += 1
            key = f"{wanted}-{number}"
        keyed[key] = value
    return keyed


def _part(text: str) -> str:
    """One part of a key: letters and digits of any script, `_`, `-`, `.` and inner spaces."""
    clean = re.sub(r"[^\w.\- ]", "_", unicodedata.normalize("NFC", text).strip())
    return re.sub(r"^(\.+|$)", "_", clean)


def limited(value: object, limit: int) -> str:
    """A value as text of at most `limit` characters, without credentials; an ellipsis ends what is cut."""
    text = redact(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= limit else text[: limit - 1] + "…"
