"""Every detector over cached rows in one pass: no network, no GPU.

The scores of a detector are artifacts of their own, a part per slice of the rows; only those that are not
there are computed. The table of all detectors of a run is put together from them.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.cluster import attempts
from pipeline.cluster.engine import Engine, Shared
from pipeline.columns import IS_OOD, KEY, LABEL, PREDICTION
from pipeline.detectors.base import NEIGHBOURS, Bank, Scorer, bank_of
from pipeline.errors import UserError
from pipeline.stages.banks import BATCH
from pipeline.stages.index import Index, Neighbours
from pipeline.stages.statistics import SLICE
from pipeline.workspace import files, storage, tables
from pipeline.workspace.artifacts import (
    Artifact,
    File,
    digest,
    name_of,
    remove_folder,
    write_part,
)
from pipeline.workspace.files import Place

T = TypeVar("T")

_log = logging.getLogger(__name__)


FORMAT, TABLE = "scores 1", "score table 1"
"""Kinds and versions: a number goes up when the bits change though no detector's version did."""

AT_ONCE = 16
"""Artifacts that are looked for at once: in an object store each takes an answer of a server."""

SCORE = "score"
"""The column of a detector's own scores."""


@dataclass(frozen=True)
class ScoreJob:
    """One dataset to score."""

    dataset: str
    features: tables.Table
    scores: Mapping[str, Artifact]
    """Where those of each detector are kept, by label."""

    @property
    def complete(self) -> bool:
        """Whether the scores of all detectors are there."""
        return not self.lacking()

    def lacking(self) -> list[str]:
        """Labels of detectors whose scores are not there."""
        found = storage.ahead(Artifact.intact, self.scores.values(), AT_ONCE)
        return [label for label, record in zip(self.scores, found, strict=True) if record is None]

    def lacking_names(self) -> list[str]:
        """Names of the artifacts of the scores that are not there."""
        return [self.scores[label].name for label in self.lacking()]

    def only(self, names: Collection[str]) -> ScoreJob:
        """The same with the scores of some names alone."""
        some = {label: artifact for label, artifact in self.scores.items() if artifact.name in names}
        return replace(self, scores=some)

    @cached_property
    def tables(self) -> dict[str, tables.Table]:
        """The scores of each detector, by label; looked for once.

        Raises:
            Damaged: a file that is not what was written.
        """
        records = storage.ahead(Artifact.require, self.scores.values(), AT_ONCE)
        found = zip(self.scores.items(), records, strict=True)
        return {label: tables.Table.of(artifact.folder, record) for (label, artifact), record in found}


@dataclass(frozen=True)
class Scoring:
    """All that scoring needs; sent once."""

    scorers: Mapping[str, Scorer]
    columns: tuple[str, ...]
    banks: Mapping[str, str] = field(default_factory=dict)
    """Folder of the bank of each scorer that has one."""
    index: Index | None = None

    def of(self, features: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float64]]:
        """(N,) scores of the rows of feature columns, by label."""
        scores: dict[str, list[NDArray[np.float64]]] = {label: [] for label in self.scorers}
        asked = ((*found, self._ask(found[0])) for found in tables.fixed_batches(features, BATCH))
        for batch, count, neighbours in _one_ahead(asked):
            for label, scorer in self.scorers.items():
                near = {NEIGHBOURS: neighbours[label]().distance} if label in neighbours else {}
                scores[label].append(scorer({**batch, **near})[:count])
        return {label: np.concatenate(parts) for label, parts in scores.items()}

    def only(self, labels: Collection[str]) -> Scoring:
        """The same for some detectors."""
        return replace(
            self,
            scorers={label: self.scorers[label] for label in labels},
            banks={label: self.banks[label] for label in labels if label in self.banks},
        )

    def _ask(self, batch: Mapping[str, NDArray[Any]]) -> dict[str, Callable[[], Neighbours]]:
        """Begin the searches of a batch: one for all scorers that look for the same vectors."""
        if self.index is None:
            return {}
        searches: dict[tuple[str, int], Callable[[], Neighbours]] = {}
        asked = {}
        for label, (folder, k, bank) in self._wanted.items():
            if (folder, k) not in searches:
                searches[folder, k] = cache(self.index.ask(folder, bank.queries(batch), k))
            asked[label] = searches[folder, k]
        return asked

    @cached_property
    def _wanted(self) -> dict[str, tuple[str, int, Bank]]:
        """Which bank each scorer searches, and for how many neighbours: in a flat index the most of any."""
        banks = {label: bank for label in self.banks if (bank := bank_of(self.scorers[label]))}
        most: dict[str, int] = {}
        for label, bank in banks.items():
            folder = self.banks[label]
            most[folder] = max(bank.k, most.get(folder, 0))
        flat = self.index is not None and self.index.flat
        return {
            label: (self.banks[label], most[self.banks[label]] if flat else bank.k, bank)
            for label, bank in banks.items()
        }


def _one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each after the next one was made: the index searches while detectors compute."""
    held = deque[T]()
    for item in items:
        held.append(item)
        if len(held) > 1:
            yield held.popleft()
    yield from held


def score_part(
    row: dict[str, Any], work: Shared[tuple[Scoring, Mapping[str, tables.Table]]]
) -> dict[str, File]:
    """Score some rows of a dataset and write a part for each detector.

    Args:
        row: `dataset`, its rows `start` to `stop`, and the path of the part of each detector in `parts`.
        work: how to score, and the feature tables by dataset.

    Returns:
        What was written, by label.
    """
    scoring, features = work.get()
    part = next(iter(row["parts"].values()))
    with attempts.begun(part, "scoring"):
        columns = features[row["dataset"]].read(row["start"], row["stop"], scoring.columns)
        scores = scoring.only(row["parts"]).of(columns)
        bad = _not_finite(columns[KEY], scores)
        if bad:
            raise UserError(
                f"scores of {row['dataset']} are not finite: {'; '.join(bad)}. "
                "Check these images, the detector's parameters, and index.kind if it is approximate."
            )
        made = {
            label: write_part(
                files.at(path), tables.written(pa.table({SCORE: scores[label]})), rows=len(scores[label])
            )
            for label, path in row["parts"].items()
        }
    _log.info("%s: %d rows", part, row["stop"] - row["start"])
    return made


def _not_finite(keys: NDArray[Any], scores: Mapping[str, NDArray[np.float64]]) -> list[str]:
    """The first NaN or infinite scores as `detector: key`."""
    found = []
    for label, values in scores.items():
        found += [f"{label}: {key}" for key in keys[~np.isfinite(values)][:3].tolist()]
    return found


def run(engine: Engine, jobs: Sequence[ScoreJob], scoring: Scoring, progress: Callable[[int], None]) -> int:
    """Score what is missing, all datasets in one sequence of tasks.

    Args:
        engine: does the work.
        jobs: all datasets.
        scoring: how.
        progress: called with the number of rows of every part that is done.

    Returns:
        How many rows were scored, by one detector or more.

    Raises:
        UserError: if a score is NaN or infinite; names detector and keys.
    """
    done = {(job.dataset, label): _begun(job.scores[label]) for job in jobs for label in job.lacking()}
    todo = [row for job in jobs for row in _missing(job, done)]
    rows = 0
    if todo:
        work = engine.share((scoring, {job.dataset: job.features for job in jobs}))
        for row, made in zip(todo, engine.in_order(score_part, ((row, work) for row in todo)), strict=True):
            for label, file in made.items():
                done[row["dataset"], label][storage.name_of(row["parts"][label])] = file
            rows += row["stop"] - row["start"]
            progress(row["stop"] - row["start"])
    artifacts = {(job.dataset, label): artifact for job in jobs for label, artifact in job.scores.items()}
    for place, parts in done.items():
        artifacts[place].finish(dict(sorted(parts.items())))
    return rows


def _begun(artifact: Artifact) -> dict[str, File]:
    """Parts that are there of scores that are not complete."""
    attempts.forget(artifact.folder)
    return artifact.begin()


def _missing(job: ScoreJob, done: Mapping[tuple[str, str], Mapping[str, File]]) -> Iterator[dict[str, Any]]:
    """Rows still to score, each with the parts that lack them."""
    for number, (start, stop) in enumerate(job.features.slices(SLICE)):
        name = tables.part_name(number)
        parts = {
            label: str(job.scores[label].folder / name)
            for (dataset, label), there in done.items()
            if dataset == job.dataset and name not in there
        }
        if parts:
            yield {"dataset": job.dataset, "start": start, "stop": stop, "parts": parts}


def assemble(
    engine: Engine, job: ScoreJob, folder: Place, thresholds: Mapping[str, float] | None = None
) -> None:
    """Put the scores of all detectors of a dataset into one table, if it is not there.

    Args:
        engine: does the work.
        job: the dataset, scored.
        folder: of the table.
        thresholds: by label; adds the columns `is_ood.<detector>`, true where the score is above.
    """
    scores = job.tables
    identity = {
        "features": name_of(files.at(job.features.folder)),
        "scores": {label: artifact.name for label, artifact in job.scores.items()},
    }
    contents = {label: table.content for label, table in scores.items()}
    inputs = {"features": job.features.content, "thresholds": digest(dict(thresholds or {})), **contents}
    table = Artifact(folder, TABLE, identity, inputs)
    if table.intact() is not None:
        return
    remove_folder(folder)
    slices = job.features.slices(SLICE)
    arguments = [
        (job.features, scores, dict(thresholds or {}), start, stop, str(folder / tables.part_name(number)))
        for number, (start, stop) in enumerate(slices)
    ]
    names = [tables.part_name(number) for number in range(len(slices))]
    table.finish(dict(zip(names, engine.in_order(_assembled, arguments), strict=True)))


def _assembled(
    features: tables.Table,
    scores: Mapping[str, tables.Table],
    thresholds: Mapping[str, float],
    start: int,
    stop: int,
    path: str,
) -> File:
    columns: dict[str, NDArray[Any]] = features.read(start, stop, (KEY, LABEL, PREDICTION))
    for label, table in scores.items():
        columns[label] = table.read(start, stop, (SCORE,))[SCORE]
    for label, threshold in thresholds.items():
        columns[IS_OOD + label] = columns[label] > threshold
    return write_part(files.at(path), tables.written(tables.arrow_columns(columns)), rows=stop - start)
