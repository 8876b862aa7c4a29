"""What detectors learn: statistics of cached rows, extra passes, neighbour banks. Each is computed once.

Artefacts lie in `fits/<hash>`, named by everything they depend on; a later run that needs the same one
reads it back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from pipeline import __version__, cluster, config, detectors, places, store
from pipeline.columns import FEATURE, KEY, LABEL, LOGITS, PREDICTION
from pipeline.detectors.base import Bank, Detector, Scorer, Training, bank_of
from pipeline.errors import UserError
from pipeline.index import BankFiles
from pipeline.places import Place
from pipeline.statistics import Statistics

SLICE = 8192
"""Rows per task. Fixed, so that sums are added in the same order however the rows lie in parts."""

BATCH = 1024
"""Rows per matrix product when bank vectors and scores are computed."""


@dataclass(frozen=True)
class Cache:
    """The artefacts of a workspace."""

    folder: Place
    mode: Literal["reuse", "frozen", "fresh"] = "reuse"
    """Compute what is not there; or refuse to; or compute everything again."""

    def get(
        self, kind: str, identity: Mapping[str, Any], compute: Callable[[], Mapping[str, NDArray[Any]]]
    ) -> dict[str, NDArray[Any]]:
        """Arrays of an artefact: read back, or computed and stored.

        Raises:
            UserError: if it is not there and the cache is frozen.
        """
        folder = self.place(kind, identity)
        arrays = folder / "arrays.safetensors"
        if not self.has(folder, kind):
            found = save({name: np.asarray(value, order="C") for name, value in compute().items()})
            with places.atomic(arrays) as draft:
                draft.write_bytes(found)
            store.write_json(folder / store.MANIFEST, {"kind": kind, "identity": identity})
        with places.local(arrays) as file:
            return load_file(file)

    def place(self, kind: str, identity: Mapping[str, Any]) -> Place:
        """Folder of an artefact."""
        return self.folder / config.digest({"kind": kind, "version": __version__, **identity})[:16]

    def has(self, folder: Place, kind: str) -> bool:
        """Whether an artefact is there to be used."""
        if self.mode == "fresh":
            store.remove_folder(folder)
        found = (folder / store.MANIFEST).is_file()
        if self.mode == "frozen" and not found:
            raise UserError(f"fit: no {kind} in the workspace. Run `ood-pipeline fit` first.")
        return found


def fit_statistics(cache: Cache, table: store.Table, identity: Mapping[str, Any], classes: int) -> Statistics:
    """Statistics of all rows of a feature table, summed slice by slice in order."""

    def compute() -> dict[str, NDArray[Any]]:
        arguments = [(table, start, stop, classes) for start, stop in table.slices(SLICE)]
        found = cluster.in_order(_slice_statistics, arguments)
        total = next(found)
        for part in found:
            total = total.merge(part)
        return {name: np.asarray(value) for name, value in vars(total).items()}

    arrays = cache.get("statistics", {"features": identity}, compute)
    count = int(arrays.pop("unlabelled_count"))
    return Statistics(unlabelled_count=count, **arrays)


def _slice_statistics(table: store.Table, start: int, stop: int, classes: int) -> Statistics:
    return Statistics.of(table.read(start, stop, [FEATURE, LABEL, PREDICTION]), classes)


def build_bank(cache: Cache, bank: Bank, table: store.Table, identity: Mapping[str, Any]) -> BankFiles:
    """Vectors of training rows, written in pieces by Ray tasks.

    Raises:
        UserError: if fewer than k rows enter the bank.
    """
    folder = cache.place("bank", identity)
    if not cache.has(folder, "bank"):
        arguments = [
            (bank, table, start, stop, str(folder / f"bank-{number:05d}.npy"))
            for number, (start, stop) in enumerate(table.slices(SLICE))
        ]
        counts, widths = zip(*cluster.in_order(_write_bank, arguments), strict=True)
        if sum(counts) < bank.k:
            raise UserError(f"k is {bank.k} but only {sum(counts)} training rows enter the bank; lower k.")
        record = {"kind": "bank", "identity": identity, "counts": list(counts), "width": widths[0]}
        store.write_json(folder / store.MANIFEST, record)
    record = store.read_json(folder / store.MANIFEST)
    return BankFiles(str(folder), tuple(record["counts"]), record["width"])


def _write_bank(bank: Bank, table: store.Table, start: int, stop: int, path: str) -> tuple[int, int]:
    """One piece of a bank; returns its rows and width."""
    columns = table.read(start, stop, [KEY, LABEL, PREDICTION, FEATURE, LOGITS])
    pieces = [
        bank.embed(batch)[:count][bank.keep(batch)[:count]]
        for batch, count in store.fixed_batches(columns, BATCH)
    ]
    vectors = np.concatenate(pieces).astype(np.float32)
    if not np.isfinite(vectors).all():
        raise RuntimeError(f"{path}: bank vectors of rows {start} to {stop} are not finite")
    with places.atomic(places.at(path)) as draft, draft.open("wb") as stream:
        np.save(stream, vectors)
    return len(vectors), vectors.shape[1]


@dataclass(frozen=True)
class Fitted:
    """Detectors ready to score, and where the banks of those that look up neighbours lie."""

    scorers: dict[str, Scorer]
    banks: dict[str, BankFiles]


def fit_detectors(
    chosen: Mapping[str, Detector], training: Training, cache: Cache, source: tuple[store.Table, Any] | None
) -> Fitted:
    """Fit every detector and build the banks.

    Args:
        chosen: detectors by label.
        training: all that `fit` may read.
        cache: where banks are kept.
        source: feature table of the training rows and its identity; None if the run has none.
    """
    scorers, banks = {}, {}
    for label, detector in chosen.items():
        cluster.carry(type(detector))
        try:
            scorers[label] = detector.fit(training)
            bank = bank_of(scorers[label])
            if bank is not None and source is not None:
                table, identity = source
                parts = {"features": identity, "detector": detectors.identity(detector)}
                banks[label] = build_bank(cache, bank, table, parts)
        except UserError as error:
            raise UserError(f"detectors.{label}: {error}") from None
    return Fitted(scorers, banks)
