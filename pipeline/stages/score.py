"""Every detector over cached rows in one pass: no network, no GPU; one score part per slice of the rows."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.cluster import attempts
from pipeline.cluster.engine import Engine, Shared
from pipeline.columns import IS_OOD, KEY, LABEL, PREDICTION
from pipeline.detectors.base import NEIGHBOURS, Scorer, bank_of
from pipeline.errors import UserError
from pipeline.stages.banks import BATCH
from pipeline.stages.index import Index, Neighbours
from pipeline.stages.statistics import SLICE
from pipeline.workspace import artifacts, files, tables
from pipeline.workspace.files import Place

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoreJob:
    """One dataset to score."""

    dataset: str
    features: tables.Table
    folder: str
    inputs: str
    """Digest of everything the scores depend on."""

    @property
    def complete(self) -> bool:
        """Whether scores of exactly these inputs are there."""
        done = files.at(self.folder) / artifacts.RECORD
        return done.is_file() and files.read_json(done)["inputs"] == self.inputs


@dataclass(frozen=True)
class Scoring:
    """All that scoring needs; sent once."""

    scorers: Mapping[str, Scorer]
    columns: tuple[str, ...]
    index: Index | None

    def table(self, features: Mapping[str, NDArray[Any]]) -> pa.Table:
        """Score table of feature columns."""
        scores: dict[str, list[NDArray[np.float64]]] = {label: [] for label in self.scorers}
        asked = ((*found, self._ask(found[0])) for found in tables.fixed_batches(features, BATCH))
        for batch, count, neighbours in _one_ahead(asked):
            for label, scorer in self.scorers.items():
                near = {NEIGHBOURS: neighbours[label]().distance} if label in neighbours else {}
                scores[label].append(scorer({**batch, **near})[:count])
        kept = {name: features[name] for name in (KEY, LABEL, PREDICTION)}
        return tables.arrow_columns(
            {**kept, **{label: np.concatenate(parts) for label, parts in scores.items()}}
        )

    def _ask(self, batch: Mapping[str, NDArray[Any]]) -> dict[str, Callable[[], Neighbours]]:
        """Begin the searches of a batch."""
        banks = {label: bank_of(scorer) for label, scorer in self.scorers.items()}
        if self.index is None:
            return {}
        return {
            label: self.index.ask(label, bank.queries(batch), bank.k) for label, bank in banks.items() if bank
        }


def _one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each after the next one was made: the index searches while detectors compute."""
    held = deque[T]()
    for item in items:
        held.append(item)
        if len(held) > 1:
            yield held.popleft()
    yield from held


def score_part(row: dict[str, Any], work: Shared[tuple[Scoring, Mapping[str, tables.Table]]]) -> int:
    """Score some rows of a dataset and write them.

    Args:
        row: `dataset`, its rows `start` to `stop`, and the path of the `part` they become.
        work: how to score, and the feature tables by dataset.

    Returns:
        How many rows.
    """
    scoring, features = work.get()
    with attempts.begun(row["part"], "scoring"):
        scores = scoring.table(features[row["dataset"]].read(row["start"], row["stop"], scoring.columns))
        bad = _not_finite(scores, list(scoring.scorers))
        if bad:
            raise UserError(
                f"scores of {row['dataset']} are not finite: {'; '.join(bad)}. "
                "Check these images, the detector's parameters, and index.kind if it is approximate."
            )
        tables.write_table(files.at(row["part"]), scores)
    _log.info("%s: %d rows", row["part"], len(scores))
    return len(scores)


def _not_finite(scores: pa.Table, labels: Sequence[str]) -> list[str]:
    """The first NaN or infinite scores as `detector: key`."""
    found = []
    for label in labels:
        wrong = ~np.isfinite(scores[label].to_numpy())
        found += [f"{label}: {key}" for key in scores[KEY].filter(pa.array(wrong)).to_pylist()[:3]]
    return found


def run(engine: Engine, jobs: Sequence[ScoreJob], scoring: Scoring, progress: Callable[[int], None]) -> int:
    """Score what is missing, all datasets in one sequence of tasks.

    Args:
        engine: does the work.
        jobs: all datasets.
        scoring: how.
        progress: called with the number of rows of every part that is done.

    Returns:
        How many rows were scored.

    Raises:
        UserError: if a score is NaN or infinite; names detector and keys.
    """
    todo = [row for job in jobs for row in _missing(job)]
    rows = 0
    if todo:
        work = engine.share((scoring, {job.dataset: job.features for job in jobs}))
        for count in engine.in_order(score_part, ((row, work) for row in todo)):
            rows += count
            progress(count)
    for job in jobs:
        _finish(job)
    return rows


def _missing(job: ScoreJob) -> list[dict[str, Any]]:
    """Parts still to score; those of other inputs are removed first."""
    folder = files.at(job.folder)
    plan, inputs = folder / "_plan.json", [job.inputs, list(job.features.part_rows)]
    if not plan.is_file() or files.read_json(plan) != inputs:
        for stale in (folder / artifacts.RECORD, *folder.glob("part-*.parquet")):
            stale.unlink(missing_ok=True)
        files.write_json(plan, inputs)
    attempts.forget(folder)
    done = {str(part) for part in folder.glob("part-*.parquet")}
    parts = (
        (str(folder / tables.part_name(number)), rows)
        for number, rows in enumerate(job.features.slices(SLICE))
    )
    return [
        {"dataset": job.dataset, "start": start, "stop": stop, "part": part}
        for part, (start, stop) in parts
        if part not in done
    ]


def _finish(job: ScoreJob) -> None:
    """Count the rows and mark the dataset as scored."""
    folder, slices = files.at(job.folder), job.features.slices(SLICE)
    parts = [folder / tables.part_name(number) for number in range(len(slices))]
    part_rows = [metadata.num_rows for metadata in tables.metadata(parts)]
    if part_rows != [stop - start for start, stop in slices]:
        raise RuntimeError(f"{folder}: {sum(part_rows)} scores for {job.features.rows} feature rows")
    artifacts.remove_drafts(folder)
    files.write_json(folder / artifacts.RECORD, {"inputs": job.inputs, "part_rows": part_rows})


def flag(engine: Engine, folder: Place, thresholds: Mapping[str, float]) -> None:
    """Add the columns `is_ood.<detector>` (score above the threshold) to the scores of a dataset."""
    arguments = [(str(part), dict(thresholds)) for part in tables.Table.open(folder).parts()]
    for _ in engine.in_order(_flag_part, arguments):
        pass
    artifacts.remove_drafts(folder)


def _flag_part(path: str, thresholds: dict[str, float]) -> None:
    with tables.parquet(path) as file:
        table = file.read()
    for label, threshold in thresholds.items():
        name = IS_OOD + label
        flags = pa.array(table[label].to_numpy() > threshold)
        if name in table.column_names:
            table = table.drop_columns(name)
        table = table.append_column(name, flags)
    tables.write_table(files.at(path), table)
