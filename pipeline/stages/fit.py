"""Detectors and what they learned become scorers; those that look up neighbours get their banks."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline import detectors
from pipeline.cluster.engine import Engine
from pipeline.detectors.base import Detector, Scorer, Training, bank_of
from pipeline.errors import UserError
from pipeline.stages.banks import build_bank
from pipeline.stages.index import BankFiles
from pipeline.workspace import tables
from pipeline.workspace.artifacts import Cache


@dataclass(frozen=True)
class Fitted:
    """Detectors ready to score, and where the banks of those that look up neighbours lie."""

    scorers: dict[str, Scorer]
    banks: dict[str, BankFiles]
    not_applicable: dict[str, str] = field(default_factory=dict)
    """Why detectors were left out, by label."""


def fit_detectors(
    engine: Engine,
    chosen: Mapping[str, Detector],
    training: Training,
    cache: Cache,
    source: tuple[tables.Table, Any] | None,
    optional: Container[str] = (),
) -> Fitted:
    """Fit every detector and build the banks.

    Args:
        engine: builds banks.
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
            files = build_bank(engine, cache, bank, table, parts, extras)
            if files.rows < bank.k:
                refuse(label, f"k is {bank.k} but only {files.rows} training rows enter the bank; lower k.")
                continue
            fitted.banks[label] = files
        fitted.scorers[label] = scorer
    return fitted
