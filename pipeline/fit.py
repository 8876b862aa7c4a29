"""What detectors learn: statistics of cached rows, extra passes, neighbour banks. Each is computed once.

Artefacts lie in `fits/<hash>`, named by everything they depend on; a later run that needs the same one
reads it back.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import ray
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from pipeline import __version__, cluster, config, detectors, imports, places, statistics, store
from pipeline.columns import FEATURE, KEY, LABEL, LOGITS, PREDICTION, Batch
from pipeline.detectors.base import Bank, Detector, Scorer, Training, bank_of
from pipeline.errors import UserError
from pipeline.index import BankFiles
from pipeline.places import Place
from pipeline.statistics import Head, Part, Statistic, Statistics

SLICE = 8192
"""Rows per task. Fixed, so that sums are added in the same order however the rows lie in parts."""

BATCH = 1024
"""Rows per matrix product when bank vectors and scores are computed."""

_ARRAYS = "arrays.safetensors"


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
        return self.get_all(kind, [identity], lambda _: [compute()])[0]

    def get_all(
        self,
        kind: str,
        identities: Sequence[Mapping[str, Any]],
        compute: Callable[[list[int]], Iterable[Mapping[str, NDArray[Any]]]],
    ) -> list[dict[str, NDArray[Any]]]:
        """Arrays of several artefacts; those that are missing are computed together.

        Args:
            kind: what they are.
            identities: what each depends on.
            compute: gives the arrays of those at some positions.

        Raises:
            UserError: if one is not there and the cache is frozen.
        """
        folders = [self.place(kind, identity) for identity in identities]
        missing = [number for number, folder in enumerate(folders) if not self.has(folder, kind)]
        for number, found in zip(missing, compute(missing) if missing else (), strict=True):
            data = save({name: np.asarray(value, order="C") for name, value in found.items()})
            with places.atomic(folders[number] / _ARRAYS) as draft:
                draft.write_bytes(data)
            store.write_json(folders[number] / store.MANIFEST, {"kind": kind, "identity": identities[number]})
        return [self._read(folder) for folder in folders]

    @staticmethod
    def _read(folder: Place) -> dict[str, NDArray[Any]]:
        with places.local(folder / _ARRAYS) as file:
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


@dataclass(frozen=True)
class Rows:
    """Feature tables one after the other, and what they hold."""

    tables: Sequence[store.Table]
    identities: Sequence[Mapping[str, Any]]


def fit_statistics(cache: Cache, rows: Rows, wanted: Iterable[Statistic[Any]], head: Head) -> Statistics:
    """Statistics of all rows, merged slice by slice in order; only those not in the cache are computed.

    Raises:
        UserError: if one is not there and the cache is frozen.
    """

    def sweep(group: Sequence[Statistic[Any]], known: Statistics) -> list[Part]:
        identities = [
            {"features": rows.identities, **each.identity, **imports.foreign(type(each))} for each in group
        ]
        found = cache.get_all(
            "statistics", identities, lambda missing: _sweep(rows, [group[n] for n in missing], head, known)
        )
        return [each.part(**arrays) for each, arrays in zip(group, found, strict=True)]

    return statistics.compute(wanted, sweep)


def _sweep(
    rows: Rows, group: Sequence[Statistic[Any]], head: Head, known: Statistics
) -> list[dict[str, NDArray[Any]]]:
    """Arrays of some statistics, from one pass over the columns they read."""
    cluster.connect()
    columns = sorted({name for each in group for name in each.columns})
    measures = ray.put([each.measure(head, known) for each in group])
    slices = [
        (table, start, stop, columns, measures)
        for table in rows.tables
        for start, stop in table.slices(SLICE)
    ]
    found = cluster.in_order(_slice_statistics, slices)
    total = next(found)
    for parts in found:
        total = [one.merge(other) for one, other in zip(total, parts, strict=True)]
    return [each.arrays() for each in total]


def _slice_statistics(
    table: store.Table, start: int, stop: int, columns: list[str], measures: list[Callable[[Batch], Part]]
) -> list[Part]:
    batch = table.read(start, stop, columns)
    return [measure(batch) for measure in measures]


def build_bank(
    cache: Cache, bank: Bank, table: store.Table, identity: Mapping[str, Any], extras: Sequence[str] = ()
) -> BankFiles:
    """Vectors of training rows, written in pieces by Ray tasks.

    Args:
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
        counts, widths = zip(*cluster.in_order(_write_bank, arguments), strict=True)
        record = {"kind": "bank", "identity": identity, "counts": list(counts), "width": widths[0]}
        store.write_json(folder / store.MANIFEST, record)
    record = store.read_json(folder / store.MANIFEST)
    return BankFiles(str(folder), tuple(record["counts"]), record["width"])


def _write_bank(
    bank: Bank, table: store.Table, columns: Sequence[str], start: int, stop: int, path: str
) -> tuple[int, int]:
    """One piece of a bank; returns its rows and width."""
    rows = table.read(start, stop, columns)
    pieces = [
        bank.embed(batch)[:count][bank.keep(batch)[:count]]
        for batch, count in store.fixed_batches(rows, BATCH)
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
    not_applicable: dict[str, str] = field(default_factory=dict)
    """Why detectors were left out, by label."""


def fit_detectors(
    chosen: Mapping[str, Detector],
    training: Training,
    cache: Cache,
    source: tuple[store.Table, Any] | None,
    optional: Container[str] = (),
) -> Fitted:
    """Fit every detector and build the banks.

    Args:
        chosen: detectors by label.
        training: all that `fit` may read.
        cache: where banks are kept.
        source: feature table of the training rows and its identity; None if the run has none.
        optional: labels of detectors that are left out if the training rows do not have what they need.

    Raises:
        UserError: if another detector cannot be fitted, or a bank is not there and the cache is frozen.
    """
    fitted = Fitted({}, {})

    def refuse(label: str, reason: str) -> None:
        if label not in optional:
            raise UserError(f"detectors.{label}: {reason}") from None
        fitted.not_applicable[label] = reason

    for label, detector in chosen.items():
        try:
            scorer = detector.fit(training)
        except UserError as error:
            refuse(label, str(error))
            continue
        bank = bank_of(scorer)
        if bank is not None and source is not None:
            table, identity = source
            parts = {"features": identity, "detector": detectors.identity(detector)}
            extras = [extra.column for extra in detector.extras()]
            files = build_bank(cache, bank, table, parts, extras)
            if files.rows < bank.k:
                refuse(label, f"k is {bank.k} but only {files.rows} training rows enter the bank; lower k.")
                continue
            fitted.banks[label] = files
        fitted.scorers[label] = scorer
    return fitted
