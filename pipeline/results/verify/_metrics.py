"""Metrics and thresholds against the scores, by other means than those that made them.

AUROC and AUPR come from scikit-learn, rates from sorted scores; only the intervals are not computed again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, zip_longest
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import csv
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from pipeline.columns import LABEL, PREDICTION, Float, Mask
from pipeline.results.verify._files import NULL, Run, columns, read, reading, require
from pipeline.results.verify._findings import Finding, Tally, same

FAILURES = ("aurc", "augrc")
"""Names of the metrics of every dataset of ID images."""

_TOLERANCE = 1e-9
_TYPES = {
    **dict.fromkeys(("detector", "dataset", "group", "metric"), pa.string()),
    **dict.fromkeys(("value", "ci_low", "ci_high"), pa.float64()),
    **dict.fromkeys(("n_id", "n_ood"), pa.int64()),
}

_PAIRS = {
    **dict.fromkeys(("detector", "other", "dataset", "group", "metric"), pa.string()),
    **dict.fromkeys(("difference", "ci_low", "ci_high", "p_value", "p_holm"), pa.float64()),
}


class Name(NamedTuple):
    """What a row of the metrics is about."""

    detector: str
    dataset: str
    group: str
    metric: str

    def __str__(self) -> str:
        return f"{self.metric} of {self.detector} on {self.dataset} in {self.group}"


class Numbers(NamedTuple):
    """What a row of the metrics says."""

    value: float
    ci_low: float
    ci_high: float
    n_id: int
    n_ood: int

    def differs(self, value: float, n_id: int, n_ood: int) -> bool:
        """Whether it is not what was computed again."""
        near = abs(self.value - value) <= _TOLERANCE
        return not near or (self.n_id, self.n_ood) != (n_id, n_ood)


@dataclass(frozen=True)
class Comparison:
    """ID datasets against one OOD dataset, or the mean over a group of them."""

    group: str
    dataset: str
    inside: tuple[str, ...]
    outside: tuple[str, ...]


def metrics(level: Fraction) -> tuple[str, ...]:
    """Names of the metrics of every comparison, where FPR is measured at a level."""
    fpr = f"fpr{float(100 * level):.10g}"
    return "auroc", "aupr_in", "aupr_out", f"{fpr}_id", f"{fpr}_ood", "detection_error", "oscr"


def comparisons(run: Run) -> list[Comparison]:
    """What every detector is measured on; with covariate-shifted ID data also the full spectrum."""
    spectra = {"": ("id",), "fs_": ("id", "shifted_id")} if run.of("shifted_id") else {"": ("id",)}
    found = []
    for prefix, roles in spectra.items():
        inside = tuple(run.of(*roles))
        for role in ("near_ood", "far_ood"):
            members, group = tuple(run.of(role)), prefix + role
            found += [Comparison(group, name, inside, (name,)) for name in members]
            found += [Comparison(group, group, inside, members)] if members else []
    return found


def examine(run: Run) -> Iterator[Finding]:
    """Everything about metrics.parquet, .csv and .json."""
    path = run.folder / "metrics.parquet"
    require(path, _TYPES)
    rows = [
        (Name(*values[:4]), Numbers(*values[4:]))
        for found in columns(path, list(_TYPES))
        for values in zip(*(found[name].tolist() for name in _TYPES), strict=True)
    ]
    yield _complete(run, [name for name, _ in rows])
    wrong = Tally()
    wrong.add(name for name, found in rows if not 0 <= found.ci_low <= found.value <= found.ci_high <= 1)
    yield wrong.finding("range", "0 <= ci_low <= value <= ci_high <= 1")
    yield _pairs(run)
    recorded = dict(rows)
    yield from _accuracies(run, recorded)
    for detector in run.record.detectors:
        yield _values(run, detector, recorded)
    documents = [{**name._asdict(), **found._asdict()} for name, found in rows]
    yield _copy("metrics.json", documents, read(run.folder / "metrics.json", list[dict[str, Any]]))
    yield _copy("metrics.csv", documents, _lines(run))


def _complete(run: Run, names: Sequence[Name]) -> Finding:
    """Whether every metric is there once, and no other."""
    expected = [_accuracy_on(run, name) for name in run.of("id", "shifted_id")]
    expected += [
        Name(detector, comparison.dataset, comparison.group, metric)
        for detector in run.record.detectors
        for comparison in comparisons(run)
        for metric in metrics(run.record.metrics.level)
    ]
    expected += [
        Name(detector, dataset, run.record.datasets[dataset].role, metric)
        for detector in run.record.detectors
        for dataset in run.of("id", "shifted_id")
        for metric in FAILURES
    ]
    wrong = Tally()
    wrong.add(f"no {name}" for name in (Counter(expected) - Counter(names)).elements())
    wrong.add(f"needless {name}" for name in (Counter(names) - Counter(expected)).elements())
    return wrong.finding("metrics", f"{len(expected):,}, each once")


def _pairs(run: Run) -> Finding:
    """Whether every pair of detectors is compared once by every metric, with p-values that fit."""
    path, names = run.folder / "comparisons.parquet", list(_PAIRS)[:5]
    require(path, _PAIRS)
    expected: Counter[tuple[str, ...]] = Counter(
        (*pair, comparison.dataset, comparison.group, metric)
        for pair in combinations(run.record.detectors, 2)
        for comparison in comparisons(run)
        for metric in metrics(run.record.metrics.level)
    )
    expected.update(
        (*pair, dataset, run.record.datasets[dataset].role, metric)
        for pair in combinations(run.record.detectors, 2)
        for dataset in run.of("id", "shifted_id")
        for metric in FAILURES
    )
    found, wrong = Counter[tuple[str, ...]](), Tally()
    for rows in columns(path, [*names, "p_value", "p_holm"]):
        found.update(zip(*(rows[name].tolist() for name in names), strict=True))
        fits = (rows["p_value"] >= 0) & (rows["p_value"] <= rows["p_holm"]) & (rows["p_holm"] <= 1)
        wrong.add(f"p-values of row {number}" for number in np.flatnonzero(~fits).tolist())
    wrong.add(f"no {' / '.join(name)}" for name in (expected - found).elements())
    wrong.add(f"needless {' / '.join(name)}" for name in (found - expected).elements())
    return wrong.finding("comparisons.parquet", f"{expected.total():,} differences, each once")


def _copy(file: str, rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> Finding:
    """Whether another file has the same rows."""
    wrong = Tally()
    for number, (row, other) in enumerate(zip_longest(rows, others), start=1):
        wrong.add([f"row {number}"] if row != other else [])
    return wrong.finding(file, "the rows of metrics.parquet")


def _lines(run: Run) -> list[dict[str, Any]]:
    """The rows of metrics.csv."""
    path = run.folder / "metrics.csv"
    with reading(path):
        options = csv.ConvertOptions(column_types=_TYPES)
        found: list[dict[str, Any]] = csv.read_csv(
            pa.BufferReader(path.read_bytes()), convert_options=options
        ).to_pylist()
    return found


def _accuracy_on(run: Run, dataset: str) -> Name:
    return Name("classifier", dataset, run.record.datasets[dataset].role, "id_accuracy")


def _accuracies(run: Run, recorded: Mapping[Name, Numbers]) -> Iterator[Finding]:
    """The classifier's accuracy on datasets of its classes, counted again."""
    for dataset in run.of("id", "shifted_id"):
        right = total = 0
        for rows in run.tested(dataset, (LABEL, PREDICTION)):
            right += int((rows[LABEL] == rows[PREDICTION]).sum())
            total += len(rows[LABEL])
        found = recorded.get(_accuracy_on(run, dataset))
        told = (found.value, found.n_id, found.n_ood) if found else None
        yield same(f"accuracy on {dataset}", (right / max(total, 1), total, 0), told)
        yield same(
            f"accuracy of {dataset} in manifest.json", run.record.datasets[dataset].accuracy, told and told[0]
        )


def _values(run: Run, detector: str, recorded: Mapping[Name, Numbers]) -> Finding:
    """All metrics of one detector, computed again from its scores."""
    level = run.record.metrics.level
    datasets = run.of("id", "shifted_id", "near_ood", "far_ood")
    scores = {name: np.concatenate([*run.column(detector, [name]), np.empty(0)]) for name in datasets}
    right = {name: _right(run, detector, name) for name in run.of("id", "shifted_id")}
    wrong, computed = Tally(), dict[Name, tuple[float, int, int]]()
    for comparison in comparisons(run):
        inside, known = (np.concatenate([of[name] for name in comparison.inside]) for of in (scores, right))
        values = [measured(inside, scores[name], known, level) for name in comparison.outside]
        sizes = len(inside), sum(len(scores[name]) for name in comparison.outside)
        where = detector, comparison.dataset, comparison.group
        for metric, value in zip(metrics(level), np.mean(values, axis=0).tolist(), strict=True):
            computed[Name(*where, metric)] = (value, *sizes)
    for name, known in right.items():
        for metric, value in zip(FAILURES, failures(scores[name], known), strict=True):
            place = Name(detector, name, run.record.datasets[name].role, metric)
            computed[place] = value, len(known), 0
    for place, (value, n_id, n_ood) in computed.items():
        found = recorded.get(place)
        if found is None or found.differs(value, n_id, n_ood):
            told = f"{found.value:.6g} ({found.n_id} ID, {found.n_ood} OOD)" if found else "missing"
            wrong.add([f"{place} is {told}, computed {value:.6g} ({n_id} ID, {n_ood} OOD)"])
    return wrong.finding(f"values of {detector}", f"{len(computed):,} as computed from the scores")


def _right(run: Run, detector: str, dataset: str) -> Mask:
    """Which rows of a dataset that a detector has scores of the classifier has right."""
    read_rows = run.tested(dataset, (LABEL, PREDICTION, detector), nullable=[detector])
    found = [(rows[LABEL] == rows[PREDICTION])[~rows[NULL + detector]] for rows in read_rows]
    found.append(np.empty(0, np.bool_))
    return np.concatenate(found)


def measured(inside: Float, outside: Float, right: Mask, level: Fraction) -> list[float]:
    """`metrics` of ID and OOD scores; NaN if a score is not finite, or there is none."""
    scores = np.concatenate([inside, outside])
    if not len(inside) or not len(outside) or not np.isfinite(scores).all():
        return [np.nan] * len(metrics(level))
    is_ood = np.repeat([False, True], [len(inside), len(outside)])
    alarms, hits, _ = roc_curve(is_ood, scores, drop_intermediate=False)
    caught = roc_curve(is_ood, scores)
    reached = (caught[1] * len(outside)).round() * level.denominator >= level.numerator * len(outside)
    kept_right = np.sort(inside[right])
    above = (kept_right.searchsorted(outside, side) for side in ("left", "right"))
    return [
        float(roc_auc_score(is_ood, scores)),
        float(average_precision_score(~is_ood, -scores)),
        float(average_precision_score(is_ood, scores)),
        float(np.mean(outside <= at_share(inside, level))),
        float(caught[0][np.argmax(reached)]),
        float(np.min(alarms + 1 - hits) / 2),
        float(np.mean(sum(above)) / 2 / len(inside)),
    ]


def failures(scores: Float, right: Mask) -> list[float]:
    """`FAILURES` of the scores of ID images; NaN if a score is not finite, or there is none."""
    if not len(scores) or not np.isfinite(scores).all():
        return [np.nan] * len(FAILURES)
    order = np.argsort(scores, kind="stable")
    _, place, tied = np.unique(scores[order], return_inverse=True, return_counts=True)
    wrong = ~right[order]
    expected = (np.bincount(place, wrong) / tied)[place]  # of equal scores, each order counts as much
    accuracy = float(np.mean(right))
    told = float(roc_auc_score(wrong, scores[order])) if 0 < accuracy < 1 else 0.5
    return [
        float(np.mean(np.cumsum(expected) / np.arange(1, len(scores) + 1))),
        (1 - told) * accuracy * (1 - accuracy) + (1 - accuracy) ** 2 / 2,
    ]


def at_share(scores: Float, level: Fraction) -> float:
    """The smallest score that at least such a share of the scores does not exceed."""
    return float(np.sort(scores)[ceil(level * len(scores)) - 1])


def thresholds(run: Run) -> Iterator[Finding]:
    """thresholds.json: of every detector the score at 95 % acceptance of the ID rows."""
    recorded = read(run.folder / "thresholds.json", dict[str, float])
    yield same("detectors", sorted(run.record.detectors), sorted(recorded))
    for detector in run.record.detectors:
        inside = np.concatenate([*run.column(detector, run.of("id")), np.empty(0)])
        computed = at_share(inside, Fraction(95, 100)) if len(inside) else None
        yield same(f"threshold of {detector}", computed, recorded.get(detector))
