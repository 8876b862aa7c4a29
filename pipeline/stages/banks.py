"""Banks of training vectors for the neighbour index: written in pieces by tasks, read in ranges by shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cluster.engine import Engine, Shared
from pipeline.columns import FEATURE, KEY, LABEL, LOGITS, PREDICTION
from pipeline.detectors.base import Bank
from pipeline.stages import memory
from pipeline.stages.index import BankFiles
from pipeline.stages.progress import SILENT, Stage
from pipeline.stages.statistics import SLICE
from pipeline.workspace import files, tables
from pipeline.workspace.artifacts import File, Store, write_part

BATCH = 1024
"""Rows per matrix product when bank vectors and scores are computed."""

_TIMES = 6
"""What a piece of a bank takes over the bytes of its columns: at most 5.9, with D = 512 and C = 100."""

FORMAT = "bank 1"
"""Kind and version: the number goes up when the bits of vectors change though no detector's did."""


def build_bank(
    engine: Engine,
    store: Store,
    bank: Bank,
    table: tables.Table,
    identity: Mapping[str, Any],
    inputs: Mapping[str, str],
    extras: Sequence[str] = (),
    stage: Stage = SILENT,
) -> BankFiles:
    """Vectors of training rows, written in pieces; pieces that are there are kept.

    Args:
        engine: does the work.
        store: where they are kept.
        bank: which vectors.
        table: training rows.
        identity: what the vectors depend on.
        inputs: content digests, by name, of what they are made of.
        extras: columns beyond those of the feature table that they are made of.
        stage: is told how many slices of rows are done.

    Raises:
        UserError: if it is not there and this command may not make it.
    """
    columns = [KEY, LABEL, PREDICTION, FEATURE, LOGITS, *extras]
    artifact = store.artifact(FORMAT, identity, inputs)

    def make(_: set[str]) -> None:
        done = artifact.begin()
        pieces = {f"bank-{number:05d}.npy": cut for number, cut in enumerate(table.slices(SLICE))}
        todo = {name: cut for name, cut in pieces.items() if name not in done}
        shared = engine.share(bank)  # with all that the detector has learned
        arguments = [
            (shared, table, columns, start, stop, str(artifact.folder / name))
            for name, (start, stop) in todo.items()
        ]
        stage.count("slices of a bank", len(todo), len(done))
        for name, file in zip(todo, engine.in_order(_write_bank, arguments, _held), strict=True):
            done[name] = file
            stage.advance(1)
        artifact.finish({name: done[name] for name in pieces})

    (record,) = store.shared([artifact], make)
    return BankFiles.of(artifact, record)


def _held(
    _: Shared[Bank], table: tables.Table, columns: Sequence[str], start: int, stop: int, __: str
) -> int:
    """Bytes that a task may hold."""
    first, last = memory.cuts(table, columns, start, stop)[0]
    return memory.of_rows(table, columns, last - first, _TIMES)


def _write_bank(
    shared: Shared[Bank], table: tables.Table, columns: Sequence[str], start: int, stop: int, path: str
) -> File:
    """One piece of a bank."""
    bank = shared.get()
    pieces = [
        bank.embed(batch)[:count][bank.keep(batch)[:count]]
        for cut in memory.cuts(table, columns, start, stop)
        for batch, count in tables.fixed_batches(table.read(*cut, columns), BATCH)
    ]
    vectors = np.concatenate(pieces).astype(np.float32)
    if not np.isfinite(vectors).all():
        raise RuntimeError(f"{path}: bank vectors of rows {start} to {stop} are not finite")
    rows_kept, width = vectors.shape
    return write_part(files.at(path), partial(_save, vectors), rows=rows_kept, width=width)


def _save(vectors: np.ndarray[Any, Any], path: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, vectors)
