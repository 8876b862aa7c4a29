"""Scores against the features they were computed from: the same rows in the same order, one column each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipeline.columns import CALIBRATION, IS_OOD, KEY, LABEL, P_VALUE, PREDICTION, Mask
from pipeline.results.verify import _calibration
from pipeline.results.verify._calibration import Held
from pipeline.results.verify._files import (
    NULL,
    Cached,
    Kept,
    Rows,
    Run,
    columns,
    intact,
    kept,
    parts,
    read,
    recount,
    require,
)
from pipeline.results.verify._findings import Finding, Tally, same
from pipeline.stages.calibration import SHARE, Split
from pipeline.workspace.files import Place

_SHARED = (KEY, LABEL, PREDICTION)


def strangers(run: Run) -> Iterator[Finding]:
    """Whether there are scores of exactly the datasets that are scored."""
    there = {folder.name for folder in (run.folder / "scores").glob("*") if folder.is_dir()}
    wrong = Tally()
    wrong.add(f"{name} is missing" for name in run.scored if name not in there)
    wrong.add(f"{name} is not of this run" for name in sorted(there - set(run.scored)))
    yield wrong.finding("folders", ", ".join(run.scored))


def examine(run: Run, name: str, advance: Callable[[int], None]) -> Iterator[Finding]:
    """Everything about the scores of a dataset.

    Args:
        run: the run they belong to.
        name: the dataset.
        advance: called with the number of rows of every piece that was read.
    """
    folder, scored = run.scores(name), kept(run.scores(name), Kept)
    cached = kept(run.features(name), Cached)
    yield intact(folder, scored)
    yield recount(folder, scored.part_rows)
    yield same("score rows", cached.facts.features, sum(scored.part_rows))
    types, known = _types(run, name), Known.of(run, name)
    for path in parts(folder, scored.part_rows):
        require(path, types)
    wrong = {check: Tally() for check in CHECKS if check not in known.needless}
    lost = {detector: Tally() for detector in known.detectors}
    features = _rows(parts(run.features(name), cached.part_rows), _SHARED)
    scores = _rows(parts(folder, scored.part_rows), list(types), types.keys() - {*_SHARED, CALIBRATION})
    for one, other in aligned(features, scores):
        for check, tally in wrong.items():
            tally.add(other[KEY][CHECKS[check].wrong(one, other, known)])
        for detector, tally in lost.items():
            tally.add(other[KEY][other[NULL + detector]])
        advance(len(other[KEY]))
    for check, tally in wrong.items():
        yield tally.finding(check, CHECKS[check].expected)
    yield _unscored(run, name, {detector: tally for detector, tally in lost.items() if tally.count})


def _unscored(run: Run, name: str, found: Mapping[str, Tally]) -> Finding:
    """Whether the nulls are those that are recorded."""
    entries = run.record.unscored.get(name, {})
    recorded = {detector: Tally(entry.rows, list(entry.first)) for detector, entry in entries.items()}
    expected, there = (
        "; ".join(f"{detector}: {tally}" for detector, tally in sorted(lost.items())) or "none"
        for lost in (recorded, found)
    )
    return Finding("rows without a score", expected, there, recorded == found)


def _flagged(run: Run, name: str) -> bool:
    return run.record.datasets[name].role == "unlabelled"


def _types(run: Run, name: str) -> dict[str, pa.DataType]:
    """Columns of a part."""
    types = {KEY: pa.string(), LABEL: pa.int32(), PREDICTION: pa.int32()}
    if run.split(name):
        types[CALIBRATION] = pa.bool_()
    for detector in run.record.detectors:
        types[detector] = pa.float64()
        if run.record.thresholds is not None:
            types[P_VALUE + detector] = pa.float64()
        if _flagged(run, name):
            types[IS_OOD + detector] = pa.bool_()
    return types


def _thresholds(run: Run, name: str) -> dict[str, float]:
    """Threshold of each detector if they flag the rows of the dataset; NaN, which flags none, if lost."""
    if not _flagged(run, name) or run.record.thresholds is not None:
        return {}
    recorded = read(run.folder / "thresholds.json", dict[str, float])
    return {detector: recorded.get(detector, np.nan) for detector in run.record.detectors}


def _rows(paths: Sequence[Place], names: Sequence[str], nullable: Collection[str] = ()) -> Iterator[Rows]:
    return (rows for path in paths for rows in columns(path, names, nullable))


def aligned(left: Iterator[Rows], right: Iterator[Rows]) -> Iterator[tuple[Rows, Rows]]:
    """The rows of two tables side by side, however each is cut, until one of them ends."""
    held: list[Rows | None] = [None, None]
    while True:
        for side, source in enumerate((left, right)):
            held[side] = held[side] or next(source, None)
        one, other = held
        if one is None or other is None:
            return
        count = min(len(one[KEY]), len(other[KEY]))
        yield _cut(one, 0, count), _cut(other, 0, count)
        held = [_cut(rows, count, None) if len(rows[KEY]) > count else None for rows in (one, other)]


def _cut(rows: Rows, start: int, stop: int | None) -> Rows:
    return {name: values[start:stop] for name, values in rows.items()}


@dataclass(frozen=True)
class Known:
    """What the scores of a dataset are held against."""

    detectors: list[str]
    thresholds: dict[str, float]
    """Empty where they do not flag rows."""
    held: Held | None = None
    """Where p-values come from."""
    limits: dict[str, float] = field(default_factory=dict)
    """The largest p-values that are flagged; empty where they do not flag rows."""
    split: Split | None = None
    """Which rows calibrate."""

    @classmethod
    def of(cls, run: Run, name: str) -> Known:
        """Of a dataset of a run."""
        wanted = run.record.thresholds
        if wanted is None:
            return cls(list(run.record.detectors), _thresholds(run, name))
        limits = _calibration.limits(run, name) if _flagged(run, name) else {}
        share = SHARE if wanted.share is None else wanted.share
        split = Split(share, run.record.seed) if run.split(name) else None
        return cls(list(run.record.detectors), {}, Held(run), limits, split)

    @property
    def needless(self) -> set[str]:
        """Checks that do not apply."""
        applies = {
            "flags": bool(self.thresholds or self.limits),
            "p-values": self.held is not None,
            "rows that calibrate": self.split is not None,
        }
        return {check for check, there in applies.items() if not there}


@dataclass(frozen=True)
class Check:
    """What must hold for every row."""

    expected: str
    wrong: Callable[[Rows, Rows, Known], Mask]
    """Which rows break it, given the features, the scores and the rest."""


def _other(column: str) -> Callable[[Rows, Rows, Known], Mask]:
    def wrong(features: Rows, scores: Rows, known: Known) -> Mask:
        found: Mask = features[column] != scores[column]
        return found

    return wrong


def _not_finite(features: Rows, scores: Rows, known: Known) -> Mask:
    wrong: Mask = ~np.all([np.isfinite(scores[label]) for label in known.detectors], axis=0)
    return wrong


def _wrongly_flagged(features: Rows, scores: Rows, known: Known) -> Mask:
    wrong: Mask = np.zeros(len(scores[KEY]), bool)
    for label in known.detectors:
        flag, lost = IS_OOD + label, scores[NULL + label]
        wrong |= scores[NULL + flag] != lost
        if known.limits:
            flags = scores[P_VALUE + label] <= known.limits[label]
        else:
            flags = scores[label] > known.thresholds[label]
        wrong |= ~lost & (scores[flag] != flags)
    return wrong


def _wrong_p_values(features: Rows, scores: Rows, known: Known) -> Mask:
    wrong: Mask = np.zeros(len(scores[KEY]), bool)
    assert known.held is not None
    for label in known.detectors:
        name, lost = P_VALUE + label, scores[NULL + label]
        expected = known.held.p_values(label, scores[label], scores[PREDICTION])
        wrong |= (scores[NULL + name] != lost) | (~lost & (scores[name] != expected))
    return wrong


def _other_split(features: Rows, scores: Rows, known: Known) -> Mask:
    assert known.split is not None
    wrong: Mask = scores[CALIBRATION] != known.split.calibrates(scores[KEY])
    return wrong


CHECKS: dict[str, Check] = {
    "score keys": Check("those of the features, in their order", _other(KEY)),
    "score labels": Check("those of the features", _other(LABEL)),
    "score predictions": Check("those of the features", _other(PREDICTION)),
    "finite scores": Check("every score is finite or null", _not_finite),
    "rows that calibrate": Check("those that seed and key decide", _other_split),
    "p-values": Check("(1 + scores of calibration at least as high) / (their number + 1)", _wrong_p_values),
    "flags": Check("is_ood as the threshold or p-value says, null where there is none", _wrongly_flagged),
}
"""Checks of every row of scores, by name."""
