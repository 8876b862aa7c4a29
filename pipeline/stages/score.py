"""Every detector over cached rows in one pass: no network, no GPU.

The scores of a detector are artifacts of their own, a part per slice of the rows; only those that are not
there are computed. The table of all detectors of a run is put together from them.
"""

from __future__ import annotations

import logging
import re
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from operator import itemgetter
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.cluster import attempts
from pipeline.cluster.engine import Engine, Shared
from pipeline.columns import IS_OOD, KEY, LABEL, PREDICTION, Float, SharedBatch
from pipeline.detectors.base import NEIGHBOURS, Bank, Detector, Scorer, bank_of
from pipeline.errors import UserError
from pipeline.stages import memory, shards
from pipeline.stages.banks import BATCH
from pipeline.stages.index import Index, Search
from pipeline.stages.progress import SILENT, Stage
from pipeline.stages.statistics import SLICE
from pipeline.workspace import files, storage, tables
from pipeline.workspace.artifacts import (
    Artifact,
    File,
    Record,
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

SEARCHES = 2
"""Batches that are looked up ahead: distances of one are computed behind the search for the next."""

_TIMES = 3.5
"""What scoring a slice takes over the bytes of its columns: at most 3.4, be it for 3 or for 36 detectors."""

_TIMES_BATCH = 18
"""What scoring a batch takes over the bytes of its columns: at most 17, with 21,843 classes."""

_NEIGHBOUR = 16
"""Bytes of a neighbour that a shard has found: distance and row, and once more when they are merged."""

SCORE = "score"
"""The column of a detector's own scores; null where it is not finite."""

_NAMED = 3
"""Rows without a score that are named."""

Unscored = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""How many `rows` have no score, and the `first` keys with what came instead; by dataset and label."""


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
    def records(self) -> dict[str, Record]:
        """The records of the scores of all detectors, by label; looked for once.

        Raises:
            Damaged: a file that is not what was written.
        """
        found = storage.ahead(Artifact.require, self.scores.values(), AT_ONCE)
        return dict(zip(self.scores, found, strict=True))

    def tables(self) -> dict[str, tables.Table]:
        """The scores of each detector, by label.

        Raises:
            Damaged: a file that is not what was written.
        """
        return {
            label: tables.Table.of(artifact.folder, self.records[label])
            for label, artifact in self.scores.items()
        }

    def remade(self, table: Record) -> list[str]:
        """Labels of detectors whose scores were made again of other data since a table was put together.

        Raises:
            Damaged: a file that is not what was written.
        """
        names = table.identity["scores"]
        same = [label for label, artifact in self.scores.items() if artifact.name == names.get(label)]
        return [label for label in same if self.records[label].content != table.inputs[label]]

    def unscored(self) -> dict[str, dict[str, Any]]:
        """Rows without a score of each detector that lacks some, by label.

        Raises:
            Damaged: a file that is not what was written.
        """
        facts = {label: record.facts for label, record in self.records.items()}
        return {label: each["unscored"] for label, each in facts.items() if "unscored" in each}


def score_artifact(
    workspace: Place,
    features: shards.Job,
    detector: Detector,
    scoring: Mapping[str, Any],
    contents: Mapping[str, str],
) -> Artifact:
    """Where the scores of a detector on a dataset are kept, whoever asks for them.

    Args:
        workspace: that they are in.
        features: of the dataset.
        detector: whose scores; the folder begins with its name.
        scoring: what else they depend on.
        contents: digests by name of what they are made of.
    """
    identity = {"features": features.name, **scoring}
    method = re.sub(r"\W+", "-", detector.name)
    name = f"{method}-{digest([FORMAT, identity])[:16]}"
    folder = workspace / "scores" / features.artifact.folder.name / name
    return Artifact(folder, FORMAT, identity, contents)


@dataclass(frozen=True)
class Scoring:
    """All that scoring needs; sent once."""

    scorers: Mapping[str, Scorer]
    columns: tuple[str, ...]
    banks: Mapping[str, str] = field(default_factory=dict)
    """Folder of the bank of each scorer that has one."""
    index: Index | None = None

    def of(
        self,
        features: Mapping[str, NDArray[Any]],
        size: int = BATCH,
        seconds: defaultdict[str, float] | None = None,
    ) -> dict[str, NDArray[np.float64]]:
        """(N,) scores of the rows of feature columns, by label; bits depend on the `size` of batches.

        Args:
            features: the columns.
            size: rows of a batch.
            seconds: what each label took, its search included, is added here. What several have in common
                counts with the first.
        """
        spent = defaultdict[str, float](float) if seconds is None else seconds
        scores: dict[str, list[NDArray[np.float64]]] = {label: [] for label in self.scorers}
        batches = ((SharedBatch(batch), count) for batch, count in tables.fixed_batches(features, size))
        asked = ((*found, self._ask(found[0], spent)) for found in batches)
        for batch, count, neighbours in _ahead(asked, self._searches):
            for label, scorer in self.scorers.items():
                begun = time.perf_counter()
                near = {NEIGHBOURS: neighbours[label]()} if label in neighbours else {}
                scores[label].append(scorer(batch.adding(near))[:count])
                spent[label] += time.perf_counter() - begun
        return {label: np.concatenate(parts) for label, parts in scores.items()}

    def only(self, labels: Collection[str]) -> Scoring:
        """The same for some detectors."""
        return replace(
            self,
            scorers={label: self.scorers[label] for label in labels},
            banks={label: self.banks[label] for label in labels if label in self.banks},
        )

    def _ask(
        self, batch: Mapping[str, NDArray[Any]], spent: defaultdict[str, float]
    ) -> dict[str, Callable[[], Float]]:
        """Begin the searches of a batch: one for all scorers that look for the same vectors.

        A copy of the index answers before it returns: its seconds are `spent` by the label that begins.
        """
        if self.index is None:
            return {}
        searches: dict[tuple[str, int], Search] = {}
        asked: dict[str, Callable[[], Float]] = {}
        for label, (folder, k, bank) in self._wanted.items():
            if (folder, k) not in searches:
                begun = time.perf_counter()
                searches[folder, k] = self.index.search(folder, bank.queries(batch), k)
                spent[label] += time.perf_counter() - begun
            asked[label] = partial(searches[folder, k].distance, bank.read)
        return asked

    def held(self, table: tables.Table, rows: int) -> int:
        """Bytes that a task may hold that scores some rows; scorers lie in memory that tasks share."""
        first, stop = memory.cuts(table, self.columns, 0, rows)[0]
        held = max(
            memory.of_rows(table, self.columns, stop - first, _TIMES),
            memory.of_rows(table, self.columns, BATCH, _TIMES_BATCH),
        )
        if self.index is None:
            return held
        most = sum({folder: k for folder, k, _ in self._wanted.values()}.values())
        held += self.index.copied
        return held + (self._searches + 1) * _NEIGHBOUR * BATCH * most * len(self.index.shards)

    @property
    def _searches(self) -> int:
        """Batches that are looked up ahead: none where this process searches itself."""
        return 0 if self.index is None or self.index.copied else SEARCHES

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


def _ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """The same items, each after the next few were made: the index searches while detectors compute."""
    held = deque[T]()
    for item in items:
        held.append(item)
        if len(held) > count:
            yield held.popleft()
    yield from held


def score_part(
    row: dict[str, Any], work: Shared[tuple[Scoring, Mapping[str, tables.Table]]]
) -> tuple[dict[str, File], dict[str, float]]:
    """Score some rows of a dataset and write a part for each detector.

    Args:
        row: `dataset`, its rows `start` to `stop`, and the path of the part of each detector in `parts`.
        work: how to score, and the feature tables by dataset.

    Returns:
        What was written, and the seconds that scoring took, by label.
    """
    scoring, features = work.get()
    seconds = defaultdict[str, float](float)
    part = next(iter(row["parts"].values()))
    with attempts.begun(part, "scoring"):
        table, wanted = features[row["dataset"]], scoring.only(row["parts"])
        keys, found = [], []
        for start, stop in memory.cuts(table, scoring.columns, row["start"], row["stop"]):
            columns = table.read(start, stop, scoring.columns)
            keys.append(columns[KEY])
            found.append(wanted.of(columns, seconds=seconds))
        made = {
            label: _written(
                files.at(path), np.concatenate(keys), np.concatenate([scores[label] for scores in found])
            )
            for label, path in row["parts"].items()
        }
    _log.info("%s: %d rows", part, row["stop"] - row["start"])
    return made, seconds


def _written(path: Place, keys: NDArray[Any], scores: NDArray[np.float64]) -> File:
    """Write a part; scores that are not finite become null, and are counted and named in its facts."""
    bad = ~np.isfinite(scores)
    facts: dict[str, Any] = {"rows": len(scores)}
    if bad.any():
        first = zip(keys[bad][:_NAMED].tolist(), map(str, scores[bad]), strict=False)
        facts["unscored"] = {"rows": int(bad.sum()), "first": dict(first)}
    return write_part(path, tables.written(pa.table({SCORE: pa.array(scores, mask=bad)})), **facts)


def require_few_unscored(jobs: Iterable[ScoreJob], limit: float) -> Unscored:
    """Refuse scores of which more are lacking than are allowed by now.

    Args:
        jobs: all datasets, scored.
        limit: largest share of a dataset's rows that a detector may leave without a score, below 1.

    Returns:
        What is lacking, of the datasets and detectors that lack something.

    Raises:
        UserError: names the detector and the dataset with the largest share, and the first rows.
    """
    lost = {job.dataset: job.unscored() for job in jobs}
    above = [
        (found["rows"] / job.features.rows, label, job)
        for job in jobs
        for label, found in lost[job.dataset].items()
        if found["rows"] > limit * job.features.rows
    ]
    if above:
        _, label, job = max(above, key=itemgetter(0))
        found = lost[job.dataset][label]
        first = "; ".join(f"{key} ({value})" for key, value in found["first"].items())
        raise UserError(
            f"detectors.{label}: {found['rows']:,} of {job.features.rows:,} scores on {job.dataset} are not "
            f"finite, more than score.max_unscored_fraction = {limit:g}. First: {first}. Check these images, "
            "the detector's parameters, and index.kind if it is approximate; or raise the limit, or drop the "
            "detector."
        )
    return {dataset: found for dataset, found in lost.items() if found}


class Made(NamedTuple):
    """What was computed."""

    scores: int
    """Rows, by each detector."""
    slices: Collection[tuple[str, int, int]]
    """Rows of which detectors lacked scores: dataset, start and stop."""
    costs: Mapping[str, Mapping[str, float]]
    """How many `scores` of each label, and the `seconds` that they took, added up over all tasks."""


def run(
    engine: Engine, jobs: Sequence[ScoreJob], scoring: Scoring, stage: Stage = SILENT, unit: str = "rows"
) -> Made:
    """Score what is missing, all datasets in one sequence of tasks.

    Args:
        engine: does the work.
        jobs: all datasets.
        scoring: how.
        stage: is told how many rows are to be scored, and of every part that is done.
        unit: what it is told that they are.
    """
    done = {(job.dataset, label): _begun(job.scores[label]) for job in jobs for label in job.lacking()}
    todo = [row for job in jobs for row in _missing(job, done)]
    lacking = sum(row["stop"] - row["start"] for row in todo)
    stage.count(unit, lacking, sum(job.features.rows for job in jobs if job.scores) - lacking)
    costs: dict[str, dict[str, float]] = {}
    scores = 0
    if todo:
        features = {job.dataset: job.features for job in jobs}
        work = engine.share((scoring, features))

        def held(row: dict[str, Any], _: object) -> int:
            return scoring.held(features[row["dataset"]], row["stop"] - row["start"])

        beside = scoring.index.holds if scoring.index is not None else ()
        parts_made = engine.in_order(score_part, ((row, work) for row in todo), held, beside)
        for row, (made, seconds) in zip(todo, parts_made, strict=True):
            rows = row["stop"] - row["start"]
            for label, file in made.items():
                done[row["dataset"], label][storage.name_of(row["parts"][label])] = file
                cost = costs.setdefault(label, {"scores": 0, "seconds": 0.0})
                cost["scores"] += rows
                cost["seconds"] += seconds[label]
            scores += rows * len(made)
            stage.advance(rows)
    artifacts = {(job.dataset, label): artifact for job in jobs for label, artifact in job.scores.items()}
    for place, parts in done.items():
        artifacts[place].finish(dict(sorted(parts.items())), **_totals(parts))
    return Made(scores, {(row["dataset"], row["start"], row["stop"]) for row in todo}, costs)


def _totals(parts: Mapping[str, File]) -> dict[str, Any]:
    """The facts of all parts on rows without a score; nothing if all rows have one."""
    found = [file.facts["unscored"] for _, file in sorted(parts.items()) if "unscored" in file.facts]
    first = [item for part in found for item in part["first"].items()]
    total = {"rows": sum(part["rows"] for part in found), "first": dict(first[:_NAMED])}
    return {"unscored": total} if found else {}


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


class Judging(Protocol):
    """Adds columns to a table of scores."""

    @property
    def made_of(self) -> str:
        """Digest of all that they depend on."""

    def columns(
        self, keys: NDArray[Any], predictions: NDArray[Any], scores: Mapping[str, Float]
    ) -> dict[str, pa.Array]:
        """Those of some rows, by name."""


def assemble(
    engine: Engine,
    job: ScoreJob,
    folder: Place,
    thresholds: Mapping[str, float] | None = None,
    judge: Judging | None = None,
) -> None:
    """Put the scores of all detectors of a dataset into one table, if it is not there.

    Args:
        engine: does the work.
        job: the dataset, scored.
        folder: of the table.
        thresholds: by label; adds the columns `is_ood.<detector>`, true where the score is above, null where
            there is none.
        judge: adds columns of its own.
    """
    scores = job.tables()
    identity = {
        "features": name_of(files.at(job.features.folder)),
        "scores": {label: artifact.name for label, artifact in job.scores.items()},
    }
    contents = {label: table.content for label, table in scores.items()}
    inputs = {"features": job.features.content, "thresholds": digest(dict(thresholds or {})), **contents}
    inputs |= {} if judge is None else {"judge": judge.made_of}
    table = Artifact(folder, TABLE, identity, inputs)
    if table.intact() is not None:
        return
    remove_folder(folder)
    slices, shared = job.features.slices(SLICE), engine.share(judge)
    arguments = [
        (job.features, scores, dict(thresholds or {}), shared, start, stop, str(folder / tables.part_name(n)))
        for n, (start, stop) in enumerate(slices)
    ]
    names = [tables.part_name(number) for number in range(len(slices))]
    table.finish(dict(zip(names, engine.in_order(_assembled, arguments), strict=True)))


def _assembled(
    features: tables.Table,
    scores: Mapping[str, tables.Table],
    thresholds: Mapping[str, float],
    judge: Shared[Judging | None],
    start: int,
    stop: int,
    path: str,
) -> File:
    rows = features.read(start, stop, (KEY, LABEL, PREDICTION))
    values = {label: own.read(start, stop, (SCORE,))[SCORE] for label, own in scores.items()}  # NaN = none
    table = tables.arrow_columns(rows)
    for label, column in values.items():
        table = table.append_column(label, pa.array(column, from_pandas=True))
    for label, threshold in thresholds.items():
        table = table.append_column(IS_OOD + label, pc.greater(table[label], threshold))
    judging = judge.get()
    more = {} if judging is None else judging.columns(rows[KEY], rows[PREDICTION], values)
    for name, added in more.items():
        table = table.append_column(name, added)
    return write_part(files.at(path), tables.written(table), rows=stop - start)
