"""Detectors and what they learned become scorers; those that look up neighbours get their banks."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any

from numpy.typing import NDArray
from safetensors.numpy import load_file

from pipeline import imports
from pipeline.cluster.engine import Engine
from pipeline.config import schema
from pipeline.detectors import plain
from pipeline.detectors.base import Detector, Scorer, Training, bank_of
from pipeline.errors import UserError
from pipeline.stages.banks import build_bank
from pipeline.stages.index import BankFiles, trained
from pipeline.workspace import files, tables
from pipeline.workspace.artifacts import Artifact, Damaged, Record, Store, opened, saved, write
from pipeline.workspace.patience import Unavailable

FORMAT = "detector 1"
"""Kind and version of what fitted detectors are kept as."""

MadeOf = Callable[[Detector, Collection[str]], tuple[Mapping[str, Any], dict[str, str]]]
"""What a detector is fitted to, but for some of its parameters: identity, and content digests by name."""

_SCORER, _ARRAYS = "scorer.json", "arrays.safetensors"
_REFUSED, _UNKEPT = "refused.json", "not-plain.json"
"""Files with the reason why a detector does not apply, and why its scorer cannot be kept."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fitted:
    """Detectors ready to score, and where the banks of those that look up neighbours lie."""

    scorers: dict[str, Scorer]
    banks: dict[str, BankFiles]
    contents: dict[str, dict[str, str]] = field(default_factory=dict)
    """What scores are made of besides the rows, by label: content digests by name."""
    not_applicable: dict[str, str] = field(default_factory=dict)
    """Why detectors were left out, by label."""
    notices: dict[str, list[str]] = field(default_factory=dict)
    """What is to be known of detectors, of those of which there is something, by label."""


def fit_detectors(
    engine: Engine,
    chosen: Mapping[str, Detector],
    training: Training,
    store: Store,
    source: tables.Table | None,
    made_of: MadeOf,
    searched: schema.Index,
    optional: Container[str] = (),
) -> Fitted:
    """Fit every detector, build the banks and train their indexes.

    Args:
        engine: builds banks and trains indexes.
        chosen: detectors by label.
        training: all that `fit` may read.
        store: where all that is made is kept.
        source: feature table of the training rows; None if the run has none.
        made_of: what each is fitted to.
        searched: how banks are.
        optional: labels of detectors that are left out if the training rows do not have what they need.

    Raises:
        UserError: if another detector cannot be fitted, or a bank is not there and is not to be made.
    """
    fitted, read = Fitted({}, {}), dict[str, NDArray[Any]]()

    def refuse(label: str, reason: str) -> None:
        if label not in optional:
            raise UserError(f"detectors.{label}: {reason}") from None
        fitted.not_applicable[label] = reason

    for label, detector in chosen.items():
        scorer, contents, notices = _fitted(detector, training, store, read, *made_of(detector, ()))
        if isinstance(scorer, UserError):
            refuse(label, str(scorer))
            continue
        bank = bank_of(scorer)
        if bank is not None and source is not None:
            counted = getattr(detector, "k", None) == bank.k  # then the vectors do not depend on it
            identity, inputs = made_of(detector, {"k"} if counted else ())
            extras = [extra.column for extra in detector.extras()]
            bank_files = build_bank(engine, store, bank, source, identity, inputs, extras)
            if bank_files.rows < bank.k:
                refuse(
                    label, f"k is {bank.k} but only {bank_files.rows} training rows enter the bank; lower k."
                )
                continue
            fitted.banks[label] = bank_files
            contents |= {bank_files.name: bank_files.content}
        fitted.scorers[label], fitted.contents[label] = scorer, contents
        if notices:
            fitted.notices[label] = notices
    _train(engine, store, fitted, searched)
    return fitted


def _train(engine: Engine, store: Store, fitted: Fitted, searched: schema.Index) -> None:
    """Train the indexes of all banks; scores are made of them, too."""
    indexes = trained(engine, store, fitted.banks.values(), searched)
    for label, bank in fitted.banks.items():
        fitted.contents[label] |= indexes.get(bank.folder, {})


def _fitted(
    detector: Detector,
    training: Training,
    store: Store,
    read: dict[str, NDArray[Any]],
    identity: Mapping[str, Any],
    inputs: dict[str, str],
) -> tuple[Scorer | UserError, dict[str, str], list[str]]:
    """The scorer of a detector, from the workspace or fitted, or why it cannot be fitted.

    And its content, and what is to be known of it.
    """
    artifact = store.artifact(FORMAT, identity, inputs)

    def make(_: set[str]) -> None:
        try:
            scorer = detector.fit(training)
        except (Damaged, Unavailable):
            raise
        except UserError as error:
            artifact.finish(
                {_REFUSED: write(artifact.folder / _REFUSED, partial(files.dump_json, str(error)))}
            )
            return
        notices = list(detector.notices(training))
        try:
            document, arrays = plain.encode(scorer)
        except TypeError as error:
            _log.info("%s is fitted again in each run: %s", detector.name, error)
            reason = partial(files.dump_json, str(error))
            artifact.finish({_UNKEPT: write(artifact.folder / _UNKEPT, reason)}, notices=notices)
            return
        artifact.finish(
            {
                _SCORER: write(artifact.folder / _SCORER, partial(files.dump_json, document)),
                _ARRAYS: write(artifact.folder / _ARRAYS, saved(arrays)),
            },
            notices=notices,
        )

    (record,) = store.shared([artifact], make)
    notices = list(record.facts.get("notices", ()))
    if _UNKEPT in record.files:
        return detector.fit(training), inputs, notices
    return read_scorer(artifact, record, detector, read), {artifact.name: record.content}, notices


def _content(values: NDArray[Any]) -> str:
    """What two arrays have in common that are the same."""
    return f"{values.dtype} {values.shape} {sha256(values.tobytes()).hexdigest()}"


def read_scorer(
    artifact: Artifact, record: Record, detector: Detector, read: dict[str, NDArray[Any]]
) -> Scorer | UserError:
    """The scorer that is kept, or why there is none.

    It is always read back, so that the first run computes with what later ones read.
    Arrays of other detectors with the same bytes are the same objects: see `columns.once`.
    """

    def file(name: str) -> Any:
        return opened(artifact.folder / name, record.files[name].sha256)

    if _REFUSED in record.files:
        with file(_REFUSED) as path:
            return UserError(json.loads(path.read_text(encoding="utf-8")))
    with file(_SCORER) as path:
        document = json.loads(path.read_text(encoding="utf-8"))
    with file(_ARRAYS) as path:
        arrays = {name: read.setdefault(_content(value), value) for name, value in load_file(path).items()}
    theirs = [type(part).__module__ for part in detector.parts() if imports.is_foreign(type(part))]
    scorer: Scorer = plain.decode(document, arrays, (*plain.OURS, *theirs))
    return scorer
