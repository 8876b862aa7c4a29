"""Banks of training vectors for the neighbour index: written in pieces by tasks, read in ranges by shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.cluster.engine import Engine
from pipeline.columns import FEATURE, KEY, LABEL, LOGITS, PREDICTION
from pipeline.detectors.base import Bank
from pipeline.stages.index import BankFiles
from pipeline.stages.statistics import SLICE
from pipeline.workspace import artifacts, files, tables
from pipeline.workspace.artifacts import Cache

BATCH = 1024
"""Rows per matrix product when bank vectors and scores are computed."""


def build_bank(
    engine: Engine,
    cache: Cache,
    bank: Bank,
    table: tables.Table,
    identity: Mapping[str, Any],
    extras: Sequence[str] = (),
) -> BankFiles:
    """Vectors of training rows, written in pieces.

    Args:
        engine: does the work.
        cache: where they are kept.
        bank: which vectors.
        table: training rows.
        identity: what the vectors depend on.
        extras: columns beyond those of the feature table that they are made of.
    """
    columns = [KEY, LABEL, PREDICTION, FEATURE, LOGITS, *extras]
    folder = cache.place("bank", identity)
    if not cache.has(folder, "bank"):
        arguments = [
            (bank, table, columns, start, stop, str(folder / f"bank-{number:05d}.npy"))
            for number, (start, stop) in enumerate(table.slices(SLICE))
        ]
        counts, widths = zip(*engine.in_order(_write_bank, arguments), strict=True)
        record = {"kind": "bank", "identity": identity, "counts": list(counts), "width": widths[0]}
        files.write_json(folder / artifacts.RECORD, record)
    record = files.read_json(folder / artifacts.RECORD)
    return BankFiles(str(folder), tuple(record["counts"]), record["width"])


def _write_bank(
    bank: Bank, table: tables.Table, columns: Sequence[str], start: int, stop: int, path: str
) -> tuple[int, int]:
    """One piece of a bank; returns its rows and width."""
    rows = table.read(start, stop, columns)
    pieces = [
        bank.embed(batch)[:count][bank.keep(batch)[:count]]
        for batch, count in tables.fixed_batches(rows, BATCH)
    ]
    vectors = np.concatenate(pieces).astype(np.float32)
    if not np.isfinite(vectors).all():
        raise RuntimeError(f"{path}: bank vectors of rows {start} to {stop} are not finite")
    with files.atomic(files.at(path)) as draft, draft.open("wb") as stream:
        np.save(stream, vectors)
    return len(vectors), vectors.shape[1]
