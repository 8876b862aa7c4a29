"""What a run folder says to MLflow: tags, parameters and metrics under names MLflow accepts. No I/O."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import redact

_MAX_KEY, _MAX_PARAM, MAX_TAG = 240, 6000, 8000
"""Characters; MLflow cuts or refuses what is longer."""

_FLAGGED = {"id": "false_alarm", "near_ood": "caught", "far_ood": "caught"}
"""What the share of flagged images is called, by the role of the dataset."""

_Items = Iterable[tuple[tuple[str, ...], Any]]
"""Values, each with the parts its key is made of."""


@dataclass(frozen=True)
class Content:
    """What one MLflow run holds."""

    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]


def of_run(manifest: Mapping[str, Any], config: object, rows: list[dict[str, Any]]) -> Content:
    """The parent run: what was run on what, its counts, times and the classifier's accuracy."""
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
    accuracy = [row for row in rows if row["detector"] not in manifest["detectors"]]
    alone = sum(row["group"] == "id" for row in accuracy) == 1
    metrics += [
        ((row["metric"], *([] if alone and row["group"] == "id" else [row["dataset"]])), row["value"])
        for row in accuracy
    ]
    return _content(tags, _flat(config), metrics)


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
    mine = [row for row in rows if row["detector"] == label]
    for row in sorted(mine, key=lambda row: row["dataset"] != row["group"]):
        dataset, group = row["dataset"], row["group"]
        full_spectrum = group.startswith("fs_") and dataset != group
        metrics.append(((row["metric"], f"fs.{dataset}" if full_spectrum else dataset), row["value"]))
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
    return _content(tags, _flat(detector["parameters"]), metrics)


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
            name = () if len(entry) == 1 else (str(entry.get("name", number)),)
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
