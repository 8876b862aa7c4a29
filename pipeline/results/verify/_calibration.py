"""p-values, flags and decisions of a run with thresholds, counted again from its score tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import floor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from pipeline.columns import CALIBRATION, P_VALUE, PREDICTION, Float, Mask
from pipeline.results.verify._files import NULL, Kept, Rows, Run, columns, kept, parts, reading, row_groups
from pipeline.results.verify._findings import Finding, Tally, same
from pipeline.workspace import files

_FILES = "calibration.safetensors", "decisions.parquet"
_DECIDED = ("id", "shifted_id", "near_ood", "far_ood", "unlabelled")


@dataclass(frozen=True)
class Held:
    """The rows that thresholds come from."""

    run: Run

    @property
    def datasets(self) -> list[str]:
        """Those that have such rows."""
        assert self.run.record.thresholds is not None
        return self.run.of(self.run.record.thresholds.calibrate_on)

    @cached_property
    def rows(self) -> dict[str, NDArray[Any]]:
        """Predictions, and the scores of each detector; NaN where there is none."""
        detectors = list(self.run.record.detectors)
        found = [
            {name: values[_marked(rows)] for name, values in _scores(rows, detectors).items()}
            for dataset in self.datasets
            for rows in self.read(dataset, detectors)
        ]
        return {name: np.concatenate([each[name] for each in found]) for name in (PREDICTION, *detectors)}

    def read(self, dataset: str, detectors: list[str]) -> Iterator[Rows]:
        """Predictions and scores of a dataset, and which rows calibrate where that is marked."""
        folder = self.run.scores(dataset)
        names = [PREDICTION, *detectors, *([CALIBRATION] if self.run.split(dataset) else [])]
        for path in parts(folder, kept(folder, Kept).part_rows):
            yield from columns(path, names, nullable=detectors)

    def groups(self, detector: str) -> dict[int, Float]:
        """The scores that count, highest first, by predicted class; all under -1 if classes do not matter."""
        scores, predictions = self.rows[detector], self.rows[PREDICTION]
        assert self.run.record.thresholds is not None
        if not self.run.record.thresholds.per_class:
            predictions = np.full_like(predictions, -1)
        there = ~np.isnan(scores)
        return {
            int(each): -np.sort(-scores[there & (predictions == each)])
            for each in np.unique(predictions[there])
        }

    @cached_property
    def sorted(self) -> dict[str, dict[int, Float]]:
        """`groups` of every detector."""
        return {detector: self.groups(detector) for detector in self.run.record.detectors}

    def p_values(self, detector: str, scores: Float, predictions: NDArray[Any]) -> Float:
        """Of scores of rows, whatever stands where there is none."""
        found = np.ones(len(scores))
        for each, group in self.sorted[detector].items():
            own = np.full(len(scores), True) if each == -1 else predictions == each
            higher = np.searchsorted(-group, -scores[own], side="right")
            found[own] = (1 + higher) / (1 + len(group))
        return found


def _marked(rows: Rows) -> Mask:
    """Which rows calibrate: those that are marked; all where none is."""
    marked: Mask = rows[CALIBRATION] if CALIBRATION in rows else np.ones(len(rows[PREDICTION]), np.bool_)
    return marked


def _scores(rows: Rows, detectors: list[str]) -> dict[str, NDArray[Any]]:
    """Predictions, and scores with NaN where there is none."""
    own = {detector: np.where(rows[NULL + detector], np.nan, rows[detector]) for detector in detectors}
    return {PREDICTION: rows[PREDICTION], **own}


def limits(run: Run, dataset: str) -> dict[str, float]:
    """The largest p-value that is flagged in an unlabelled dataset, by detector."""
    wanted = run.record.thresholds
    assert wanted is not None
    if wanted.fdr is None:
        return dict.fromkeys(run.record.detectors, wanted.false_alarm[0])
    return {detector: _named(run, dataset, detector, wanted.fdr) for detector in run.record.detectors}


def _named(run: Run, dataset: str, detector: str, rate: float) -> float:
    """The largest p-value that Benjamini and Hochberg's procedure names; 0 if there is none."""
    name, folder = P_VALUE + detector, run.scores(dataset)
    found = [np.empty(0)]
    for path in parts(folder, kept(folder, Kept).part_rows):
        found += [rows[name][~rows[NULL + name]] for rows in columns(path, [name], nullable=[name])]
    return largest(np.concatenate(found), rate)


def largest(p_values: Float, rate: float) -> float:
    """The largest of some p-values that the procedure names; 0 if there is none."""
    values, counts = np.unique(p_values, return_counts=True)
    above, below = map(float, Fraction(repr(rate)).as_integer_ratio())
    good = values <= above * np.cumsum(counts) / (below * counts.sum())
    return float(values[good].max(initial=0.0))


def examine(run: Run) -> Iterator[Finding]:
    """`calibration.safetensors` and `decisions.parquet`; nothing of a run without thresholds."""
    if run.record.thresholds is None:
        there = [name for name in _FILES if (run.folder / name).is_file()]
        if there:
            yield same("calibration", "none", ", ".join(there))
        return
    held = Held(run)
    yield _stored(run, held)
    yield _decisions(run, held)


def _stored(run: Run, held: Held) -> Finding:
    """Whether the scores that were kept are those of the rows that calibrate."""
    path, wrong = run.folder / _FILES[0], Tally()
    with reading(path), files.local(path) as file:
        arrays = load_file(file)
    wrong.add(sorted(arrays.keys() ^ held.rows.keys()))
    both = arrays.keys() & held.rows.keys()
    wrong.add(
        name for name in sorted(both) if not np.array_equal(arrays[name], held.rows[name], equal_nan=True)
    )
    return wrong.finding(_FILES[0], f"scores and predictions of {len(held.rows[PREDICTION]):,} images")


Decision = tuple[str, float, int, str | None]
"""Detector, rate, predicted class or -1, and dataset."""


def _decisions(run: Run, held: Held) -> Finding:
    """Whether every decision is there once and is what the scores say."""
    path, wrong, expected = run.folder / _FILES[1], Tally(), dict(_counted(run, held))
    found: dict[Decision, Mapping[str, Any]] = {}
    for table in row_groups(path, [*_NAMES, *_VALUES]):
        for row in table.to_pylist():
            place = row["detector"], row["false_alarm"], row["prediction"], row["dataset"]
            wrong.add([f"{place} twice"] if place in found else [])
            found[place] = row
    wrong.add(f"needless {place}" for place in found.keys() - expected.keys())
    for place, values in expected.items():
        told = found.get(place)
        if told is None or tuple(told[name] for name in _VALUES[:6]) != values:
            wrong.add([f"{place}: {told and [told[name] for name in _VALUES[:6]]}, computed {list(values)}"])
        elif told["share"] is not None and not 0 <= told["ci_low"] <= told["share"] <= told["ci_high"] <= 1:
            wrong.add([f"{place}: the interval"])
    return wrong.finding(_FILES[1], f"{len(expected):,} decisions, each once, as computed from the scores")


_NAMES = ("detector", "false_alarm", "prediction", "dataset")
_VALUES = ("threshold", "n_calibration", "role", "n", "flagged", "share", "ci_low", "ci_high")


def _counted(run: Run, held: Held) -> Iterator[tuple[Decision, tuple[Any, ...]]]:
    """Every decision, with the first of its `_VALUES`."""
    wanted = run.record.thresholds
    assert wanted is not None
    for detector in run.record.detectors:
        groups = held.sorted[detector]
        total = sum(map(len, groups.values()))
        tables = {name: _tested(held, name, detector) for name in run.of(*_DECIDED)}
        for rate in wanted.false_alarm:
            of_class = {each: _threshold(group, rate) for each, group in groups.items()}
            for each, threshold in of_class.items():
                if each != -1:
                    yield (detector, rate, each, None), (threshold, len(groups[each]), *[None] * 4)
            for name, (scores, predictions) in tables.items():
                flagged = sum(
                    int(np.sum(scores[predictions == each if each != -1 else slice(None)] > threshold))
                    for each, threshold in of_class.items()
                )
                share = flagged / len(scores) if len(scores) else None
                counted = run.record.datasets[name].role, len(scores), flagged, share
                yield (detector, rate, -1, name), (of_class.get(-1), total, *counted)


def _threshold(group: Float, rate: float) -> float:
    """Of scores, highest first: the largest that at most a share of them, and of one more, does not pass."""
    return float(group[floor(Fraction(repr(rate)) * (len(group) + 1)) - 1])


def _tested(held: Held, dataset: str, detector: str) -> tuple[Float, NDArray[Any]]:
    """Scores and predictions of the rows of a dataset that are tested and have a score."""
    scores, predictions = [np.empty(0)], [np.empty(0, np.int32)]
    for rows in held.read(dataset, [detector]):
        there = ~rows[NULL + detector] & ~rows.get(CALIBRATION, np.zeros(len(rows[PREDICTION]), np.bool_))
        scores.append(rows[detector][there])
        predictions.append(rows[PREDICTION][there])
    return np.concatenate(scores), np.concatenate(predictions)
