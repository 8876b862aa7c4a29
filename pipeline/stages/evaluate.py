"""From score tables to metrics: one task per detector reads its column and returns a few rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from pipeline.cluster.engine import Engine
from pipeline.columns import LABEL, PREDICTION, Float, Mask
from pipeline.config.schema import LABELLED_ROLES
from pipeline.metrics import comparisons, metrics, pairs
from pipeline.metrics.metrics import LEVEL
from pipeline.metrics.numbering import suspicious
from pipeline.stages.progress import SILENT, Stage
from pipeline.stages.score import SCORE, ScoreJob
from pipeline.workspace import artifacts, files, tables
from pipeline.workspace.artifacts import File
from pipeline.workspace.files import Place

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("detector", "dataset", "group", "metric")),
        *((name, pa.float64()) for name in ("value", "ci_low", "ci_high")),
        *((name, pa.int64()) for name in ("n_id", "n_ood")),
    ]
)

PAIRS = pa.schema(
    [
        *((name, pa.string()) for name in ("detector", "other", "dataset", "group", "metric")),
        *((name, pa.float64()) for name in ("difference", "ci_low", "ci_high", "p_value", "p_holm")),
    ]
)
"""Of `comparisons.parquet`: all pairs of detectors on the same images."""

FORMAT = "results 5"
"""Kind and version: the number goes up when metrics of the same scores change."""

CLASSIFIER = "classifier"
"""What stands in the column `detector` of the rows with the classifier's accuracy."""

_OOD_GROUPS = ("near_ood", "far_ood")


@dataclass(frozen=True)
class Scores:
    """The scores of one detector, by role and dataset."""

    by_role: Mapping[str, Mapping[str, Sequence[tables.Table]]]
    """Each with those of other detectors whose rows without a score do not count either."""
    features: Mapping[str, tables.Table]
    """Labels and predictions of the datasets of ID images; none where labels are not read."""
    tested: Mapping[str, Mask]
    """Rows that count, of the datasets of which others do not."""

    def of(self, *roles: str) -> dict[str, Sequence[tables.Table]]:
        """Scores of the datasets with these roles, by name."""
        return {name: table for role in roles for name, table in self.by_role.get(role, {}).items()}


def run(
    engine: Engine,
    jobs: Mapping[str, Sequence[ScoreJob]],
    stage: Stage = SILENT,
    together: Iterable[Collection[str]] = (),
    level: float = LEVEL,
    labelled: bool = True,
    tested: Mapping[str, Mask] | None = None,
) -> tuple[pa.Table, dict[str, float]]:
    """Metrics of all detectors and their thresholds at 95 % ID acceptance.

    Args:
        engine: does the work.
        jobs: the datasets, scored, by role.
        stage: is told how many detectors are measured.
        together: labels of detectors that are measured on the rows that all of them have scores of; others
            on all that they have scores of.
        level: share at which FPR is measured.
        labelled: whether all ID images have labels; without, metrics that need them are left out.
        tested: rows that count, by dataset; all of the others do.
    """
    known = tested or {}
    rows = [
        _accuracy(job, role, known.get(job.dataset))
        for role in LABELLED_ROLES
        for job in jobs.get(role, ())
        if labelled
    ]
    of_each = _of_each(jobs, known, together, labelled)
    thresholds = {}
    stage.count("detectors measured", len(of_each))
    for label, (found, threshold) in zip(
        of_each,
        engine.in_order(_evaluate, ((scores, label, level) for label, scores in of_each.items())),
        strict=True,
    ):
        rows += found
        thresholds[label] = threshold
        stage.advance(1)
    return pa.Table.from_pylist(rows, SCHEMA), thresholds


def paired(
    engine: Engine,
    jobs: Mapping[str, Sequence[ScoreJob]],
    seed: int,
    level: float = LEVEL,
    tested: Mapping[str, Mask] | None = None,
    stage: Stage = SILENT,
) -> pa.Table:
    """Differences of all pairs of detectors, on the rows that all of them have scores of.

    Args:
        engine: does the work.
        jobs: the datasets, scored, by role.
        seed: of the paired bootstrap.
        level: share at which FPR is measured.
        tested: rows that count, by dataset; all of the others do.
        stage: is told how many detectors are sampled.
    """
    labels = list(jobs["id"][0].scores)
    if len(labels) < 2:
        return PAIRS.empty_table()
    work = ((scores, seed, level) for scores in _of_each(jobs, tested or {}, [labels]).values())
    rows, sampled = [], []
    stage.count("detectors compared", len(labels))
    for each in engine.in_order(_sample, work):
        sampled.append(each)
        stage.advance(1)
    for samples in zip(*sampled, strict=True):
        group_of = samples[0][1]
        differences = pairs.differences(dict(zip(labels, (found for found, _ in samples), strict=True)))
        rows += [{**vars(each), "group": group_of[each.dataset]} for each in differences]
    return pa.Table.from_pylist(rows, PAIRS)


def _of_each(
    jobs: Mapping[str, Sequence[ScoreJob]],
    tested: Mapping[str, Mask],
    together: Iterable[Collection[str]],
    labelled: bool = True,
) -> dict[str, Scores]:
    """The scores of every detector, by its label."""
    beside = {label: group for group in together for label in group}
    scored = {
        role: {job.dataset: _with_others(job, beside) for job in members} for role, members in jobs.items()
    }
    features = {
        job.dataset: job.features for role in LABELLED_ROLES for job in jobs.get(role, ()) if labelled
    }
    return {
        label: Scores(
            {role: {name: each[label] for name, each in found.items()} for role, found in scored.items()},
            features,
            tested,
        )
        for label in jobs["id"][0].scores
    }


def _with_others(job: ScoreJob, beside: Mapping[str, Collection[str]]) -> dict[str, Sequence[tables.Table]]:
    """Scores of each detector on a dataset, and of those beside it that lack some."""
    scores, lacking = job.tables(), set(job.unscored() if beside else ())
    others = {label: lacking & set(beside.get(label, ())) - {label} for label in scores}
    return {label: [own, *(scores[other] for other in others[label])] for label, own in scores.items()}


def write(
    folder: Place, table: pa.Table, thresholds: Mapping[str, float], differences: pa.Table
) -> dict[str, File]:
    """Write metrics.parquet, .csv and .json, thresholds.json and comparisons.parquet; returns these files."""
    documents = {"metrics.json": table.to_pylist(), "thresholds.json": dict(thresholds)}
    fills: dict[str, Callable[[Path], None]] = {
        "metrics.parquet": tables.written(table),
        "comparisons.parquet": tables.written(differences),
        "metrics.csv": lambda path: pyarrow.csv.write_csv(table, path),
        **{name: partial(files.dump_json, value) for name, value in documents.items()},
    }
    return {name: artifacts.write(folder / name, fill) for name, fill in fills.items()}


@dataclass(frozen=True)
class _Spectrum:
    """What one detector is measured on."""

    inside: Float
    right: Mask | None
    outside: Mapping[str, Float]
    members: Mapping[str, Sequence[str]]
    """OOD datasets of each group."""

    @property
    def group_of(self) -> dict[str, str]:
        """The group of each dataset, and of itself."""
        datasets = {name: group for group, names in self.members.items() for name in names}
        return datasets | {group: group for group in self.members}


def spectra(shifted: bool) -> dict[str, tuple[str, ...]]:
    """Roles of the ID images of ID against OOD data, by the prefix of its groups.

    Args:
        shifted: whether there are covariate-shifted ID data, which make the full spectrum.
    """
    return {"": ("id",), "fs_": LABELLED_ROLES} if shifted else {"": ("id",)}


def _spectra(scores: Scores, known: Mapping[str, tuple[Float, Mask]]) -> Iterator[_Spectrum]:
    """ID against OOD data, and the full spectrum; `known` are the datasets of ID images."""
    for prefix, roles in spectra(bool(scores.of("shifted_id"))).items():
        members = {prefix + role: list(scores.of(role)) for role in _OOD_GROUPS if scores.of(role)}
        if members:
            outside = {name: _scored(found)[0] for name, found in scores.of(*_OOD_GROUPS).items()}
            inside = (known[name] for name in scores.of(*roles))
            values, right = (np.concatenate(each) for each in zip(*inside, strict=True))
            yield _Spectrum(values, right if scores.features else None, outside, members)


def _evaluate(scores: Scores, label: str, level: float) -> tuple[list[dict[str, Any]], float]:
    """All metric rows of one detector, and its threshold."""
    inside = _inside(scores)
    rows = [
        {"detector": label, "group": spectrum.group_of[result.dataset], **asdict(result)}
        for spectrum in _spectra(scores, inside)
        for result in comparisons.compare(
            spectrum.inside, spectrum.outside, spectrum.members, spectrum.right, level
        )
    ]
    for role in LABELLED_ROLES if scores.features else ():
        for name in scores.of(role):
            results = comparisons.failures(name, *inside[name])
            rows += [{"detector": label, "group": role, **asdict(result)} for result in results]
    of_id = (inside[name][0] for name in scores.of("id"))
    return rows, metrics.threshold(np.concatenate([np.empty(0), *of_id]))


def _sample(scores: Scores, seed: int, level: float) -> list[tuple[list[pairs.Sample], dict[str, str]]]:
    """One detector's samples on every spectrum and dataset of ID images, and the group of each dataset."""
    samples, inside = [], _inside(scores)
    for spectrum in _spectra(scores, inside):
        rows = spectrum.inside, spectrum.outside, spectrum.members
        samples.append((pairs.sample(*rows, seed, spectrum.right, level), spectrum.group_of))
    for role in LABELLED_ROLES:
        for name in scores.of(role):
            failing = pairs.sample_failures(name, *inside[name], seed)
            samples.append(([failing], {name: role}))
    return samples


def _inside(scores: Scores) -> dict[str, tuple[Float, Mask]]:
    """One detector's scores of every dataset of ID images, and which of these rows the classifier has right.

    None are right where labels are not read.
    """
    inside = {}
    for name, found in scores.of(*LABELLED_ROLES).items():
        values, there = _scored(found, scores.tested.get(name))
        features = scores.features.get(name)
        right = np.zeros(len(there), np.bool_) if features is None else _right(features)
        inside[name] = values, right[there]
    return inside


def _scored(found: Sequence[tables.Table], tested: Mask | None = None) -> tuple[Float, Mask]:
    """One detector's scores of the rows that it, and those beside it, have scores of, and which these are.

    Of rows that are not tested there are none.
    """
    columns, kept, start = [np.empty(0)], [np.empty(0, np.bool_)], 0
    for parts in zip(*(table.columns([SCORE]) for table in found), strict=True):
        own, *others = (part[SCORE] for part in parts)
        there = reduce(pc.and_, (each.is_valid() for each in others), own.is_valid())
        if tested is not None:
            there = pc.and_(there, pa.array(tested[start : start + len(own)]))
        columns.append(own.filter(there).to_numpy())
        kept.append(there.to_numpy())
        start += len(own)
    return np.concatenate(columns), np.concatenate(kept)


@lru_cache(8)  # all detectors are measured on the same rows
def _right(features: tables.Table) -> Mask:
    """Which rows the classifier has right."""
    parts = features.columns([LABEL, PREDICTION])
    right = [part[LABEL].to_numpy() == part[PREDICTION].to_numpy() for part in parts]
    return np.concatenate([np.empty(0, np.bool_), *right])


def numbering(features: tables.Table, classes: int) -> str:
    """What is suspicious about the order of the labels of ID rows, in words; nothing if nothing is."""
    parts = [
        (table[LABEL].fill_null(-1).to_numpy(), table[PREDICTION].to_numpy())
        for table in features.columns([LABEL, PREDICTION])
    ]
    labels, predictions = (np.concatenate(each).astype(np.int64) for each in zip(*parts, strict=True))
    return str(suspicious(labels, predictions, classes) or "")


def _accuracy(job: ScoreJob, role: str, tested: Mask | None) -> dict[str, Any]:
    """The row with the classifier's accuracy on a dataset of its classes; its argmax, not a detector's."""
    right = _right(job.features)
    right = right if tested is None else right[tested]
    found = metrics.accuracy(int(right.sum()), len(right))
    result = comparisons.Result(job.dataset, "id_accuracy", *found, len(right), 0)
    return {"detector": CLASSIFIER, "group": role, **asdict(result)}
