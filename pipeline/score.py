"""Every detector over cached rows in one pass: no network, no GPU; one score part per feature part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray

from pipeline import cluster, store
from pipeline.columns import IS_OOD, KEY, LABEL, PREDICTION
from pipeline.detectors.base import NEIGHBOURS, Scorer, bank_of
from pipeline.errors import UserError
from pipeline.fit import BATCH
from pipeline.index import Index


@dataclass(frozen=True)
class Job:
    """One dataset to score."""

    dataset: str
    features: store.Table
    folder: str
    inputs: str
    """Digest of everything the scores depend on."""

    @property
    def complete(self) -> bool:
        """Whether scores of exactly these inputs are there."""
        done = Path(self.folder) / store.MANIFEST
        return done.is_file() and store.read_json(done)["inputs"] == self.inputs


@dataclass(frozen=True)
class Scoring:
    """All that scoring needs; put into the object store once."""

    scorers: Mapping[str, Scorer]
    columns: tuple[str, ...]
    index: Index | None

    def table(self, features: Mapping[str, NDArray[Any]]) -> pa.Table:
        """Score table of feature columns."""
        scores: dict[str, list[NDArray[np.float64]]] = {label: [] for label in self.scorers}
        for batch, count in store.fixed_batches(features, BATCH):
            for label, scorer in self.scorers.items():
                scores[label].append(self._score(label, scorer, batch)[:count])
        kept = {name: features[name] for name in (KEY, LABEL, PREDICTION)}
        return store.arrow_columns(
            {**kept, **{label: np.concatenate(parts) for label, parts in scores.items()}}
        )

    def _score(self, label: str, scorer: Scorer, batch: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        bank = bank_of(scorer)
        if bank is not None and self.index is not None:
            found = self.index.search(label, bank.embed(batch), bank.k)
            batch = {**batch, NEIGHBOURS: found.distance}
        return scorer(batch)


def score_part(row: dict[str, Any], scoring: Any) -> dict[str, Any]:
    """Ray Data function: score one feature part and return a receipt.

    Args:
        row: `dataset`, `source` and `part` paths.
        scoring: object reference of a `Scoring`.
    """
    return cluster.receipt(lambda: _score_part(row, ray.get(scoring)))


def _score_part(row: dict[str, Any], work: Scoring) -> dict[str, Any]:
    source = pq.read_table(row["source"], columns=list(work.columns))
    scores = _empty(work) if not len(source) else work.table(store.numpy_columns(source, work.columns))
    bad = _not_finite(scores, list(work.scorers))
    if bad:
        raise UserError(
            f"scores of {row['dataset']} are not finite: {'; '.join(bad)}. "
            "Check these images, the detector's parameters, and index.kind if it is approximate."
        )
    store.write_table(Path(row["part"]), scores)
    return {"dataset": row["dataset"], "rows": len(scores)}


def _empty(work: Scoring) -> pa.Table:
    fields = [(KEY, pa.string()), (LABEL, pa.int32()), (PREDICTION, pa.int32())]
    return pa.schema([*fields, *((label, pa.float64()) for label in work.scorers)]).empty_table()


def _not_finite(scores: pa.Table, labels: Sequence[str]) -> list[str]:
    """The first NaN or infinite scores as `detector: key`."""
    found = []
    for label in labels:
        wrong = ~np.isfinite(scores[label].to_numpy())
        found += [f"{label}: {key}" for key in scores[KEY].filter(pa.array(wrong)).to_pylist()[:3]]
    return found


def run(jobs: Sequence[Job], scoring: Scoring, progress: Callable[[dict[str, Any]], None]) -> int:
    """Score what is missing, all datasets in one Ray Data execution.

    Returns:
        How many rows were scored.

    Raises:
        UserError: if a score is NaN or infinite; names detector and keys.
    """
    todo = [row for job in jobs for row in _missing(job)]
    rows = 0
    if todo:
        cluster.connect()
        reference = ray.put(scoring)
        parts = ray.data.from_items(todo, override_num_blocks=len(todo))
        receipts = parts.map(score_part, fn_kwargs={"scoring": reference}, num_cpus=1)
        for receipt in cluster.receipts(receipts):
            rows += receipt["rows"]
            progress(receipt)
    for job in jobs:
        _finish(job)
    return rows


def _missing(job: Job) -> list[dict[str, str]]:
    """Parts still to score; those of other inputs are removed first."""
    folder = Path(job.folder)
    plan, parts = folder / "_plan.json", [job.inputs, list(job.features.part_rows)]
    if not plan.is_file() or store.read_json(plan) != parts:
        for stale in (folder / store.MANIFEST, *folder.glob("part-*.parquet")):
            stale.unlink(missing_ok=True)
        store.write_json(plan, parts)
    return [
        {"dataset": job.dataset, "source": str(source), "part": str(folder / source.name)}
        for source in job.features.parts()
        if not (folder / source.name).is_file()
    ]


def _finish(job: Job) -> None:
    """Count the rows and mark the dataset as scored."""
    folder = Path(job.folder)
    part_rows = [pq.read_metadata(folder / source.name).num_rows for source in job.features.parts()]
    if part_rows != list(job.features.part_rows):
        raise RuntimeError(f"{folder}: {sum(part_rows)} scores for {job.features.rows} feature rows")
    store.remove_drafts(folder)
    store.write_json(folder / store.MANIFEST, {"inputs": job.inputs, "part_rows": part_rows})


def flag(folder: Path, thresholds: Mapping[str, float]) -> None:
    """Add the columns `is_ood.<detector>` (score above the threshold) to the scores of a dataset."""
    arguments = [(str(part), dict(thresholds)) for part in store.Table.open(folder).parts()]
    for _ in cluster.in_order(_flag_part, arguments):
        pass


def _flag_part(path: str, thresholds: dict[str, float]) -> None:
    table = pq.read_table(path)
    for label, threshold in thresholds.items():
        name = IS_OOD + label
        flags = pa.array(table[label].to_numpy() > threshold)
        if name in table.column_names:
            table = table.drop_columns(name)
        table = table.append_column(name, flags)
    store.write_table(Path(path), table)
