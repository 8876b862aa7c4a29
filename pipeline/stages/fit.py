"""Detectors and what they learned become scorers; those that look up neighbours get their banks."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import imports
from pipeline.cluster.engine import Engine, Shared
from pipeline.config import schema
from pipeline.detectors import plain
from pipeline.detectors.base import Detector, Scorer, Training, bank_of
from pipeline.errors import UserError
from pipeline.learned.statistics import Statistic
from pipeline.stages import memory
from pipeline.stages.banks import build_bank
from pipeline.stages.index import BankFiles, check_k, trained
from pipeline.stages.progress import SILENT, Stage
from pipeline.stages.statistics import size_of
from pipeline.workspace import files, tables
from pipeline.workspace.artifacts import (
    Arrays,
    Artifact,
    Damaged,
    File,
    Kept,
    Record,
    Store,
    mapped,
    opened,
    saved,
    write,
)
from pipeline.workspace.patience import Unavailable

FORMAT = "detector 1"
"""Kind and version of what fitted detectors are kept as."""

MadeOf = Callable[[Detector, Collection[str]], tuple[Mapping[str, Any], dict[str, str]]]
"""What a detector is fitted to, but for some of its parameters: identity, and content digests by name."""

Unfitted = tuple[Detector, Artifact]
"""A detector, and where what it becomes is kept."""

_SCORER, _ARRAYS = "scorer.json", "arrays.safetensors"
_REFUSED, _UNKEPT = "refused.json", "not-plain.json"
"""Files with the reason why a detector does not apply, and why its scorer cannot be kept."""

_TIMES = 12
"""What fitting a detector takes over the bytes of what it learned: at most 10.1."""

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
    stage: Stage = SILENT,
) -> Fitted:
    """Fit every detector, build the banks and train their indexes.

    Args:
        engine: fits, builds banks and trains indexes.
        chosen: detectors by label.
        training: all that `fit` may read.
        store: where all that is made is kept.
        source: feature table of the training rows; None if the run has none.
        made_of: what each is fitted to.
        searched: how banks are.
        optional: labels of detectors that are left out if the training rows do not have what they need.
        stage: is told what is fitted, and how much of it is.

    Raises:
        UserError: if another detector cannot be fitted, or a bank is not there and is not to be made.
    """
    fitted, read = Fitted({}, {}), dict[str, NDArray[Any]]()
    inputs = {label: made_of(detector, ()) for label, detector in chosen.items()}
    made = _made(engine, chosen, training, store, inputs, stage)

    def refuse(label: str, reason: str) -> None:
        if label not in optional:
            raise UserError(f"detectors.{label}: {reason}") from None
        fitted.not_applicable[label] = reason

    for label, detector in chosen.items():
        kept = made[label]
        plainly = _UNKEPT not in kept.record.files
        scorer = (
            read_scorer(kept.artifact, kept.record, detector, read) if plainly else detector.fit(training)
        )
        if isinstance(scorer, UserError):
            refuse(label, str(scorer))
            continue
        contents = kept.content if plainly else inputs[label][1]
        bank = bank_of(scorer)
        if bank is not None and source is not None:
            counted = getattr(detector, "k", None) == bank.k  # then the vectors do not depend on it
            extras = [extra.column for extra in detector.extras()]
            bank_files = build_bank(
                engine, store, bank, source, *made_of(detector, {"k"} if counted else ()), extras, stage
            )
            if bank_files.rows < bank.k:
                refuse(
                    label, f"k is {bank.k} but only {bank_files.rows} training rows enter the bank; lower k."
                )
                continue
            check_k(label, bank.k, bank_files.rows, searched)
            fitted.banks[label] = bank_files
            contents |= {bank_files.name: bank_files.content}
        fitted.scorers[label], fitted.contents[label] = scorer, contents
        if notices := kept.record.facts.get("notices"):
            fitted.notices[label] = list(notices)
    _train(engine, store, fitted, searched, stage)
    return fitted


def _made(
    engine: Engine,
    chosen: Mapping[str, Detector],
    training: Training,
    store: Store,
    inputs: Mapping[str, tuple[Mapping[str, Any], dict[str, str]]],
    stage: Stage,
) -> dict[str, Kept]:
    """What is kept of every detector, by label; tasks fit those that are not in the workspace."""
    places = {label: store.artifact(FORMAT, *given) for label, given in inputs.items()}
    found = {places[label].name: (detector, places[label]) for label, detector in chosen.items()}

    def make(names: set[str]) -> None:
        shared = engine.share(training)
        together = _together([given for name, given in found.items() if name in names])
        arguments = ((some, shared) for some in together)
        fits = engine.in_order(_fit, arguments, lambda some, _: _held(some[0][0], training))
        stage.count("detectors", len(names), len(found) - len(names))
        for some, made in zip(together, fits, strict=True):
            for (_, artifact), (files_of, facts) in zip(some, made, strict=True):
                artifact.finish(files_of, **facts)
            stage.advance(len(some))

    records = store.shared(list(places.values()), make)
    return {label: Kept(places[label], record) for label, record in zip(places, records, strict=True)}


def _train(engine: Engine, store: Store, fitted: Fitted, searched: schema.Index, stage: Stage) -> None:
    """Train the indexes of all banks; scores are made of them, too."""
    if fitted.banks and searched.kind != "flat":
        stage.doing("trains the index")
    indexes = trained(engine, store, fitted.banks.values(), searched)
    for label, bank in fitted.banks.items():
        fitted.contents[label] |= indexes.get(bank.folder, {})


def _together(some: Iterable[Unfitted]) -> list[list[Unfitted]]:
    """Detectors that learn from the same statistics: what these give them, as a spectrum, is found once."""
    found: dict[frozenset[Any], list[Unfitted]] = {}
    for detector, artifact in some:
        found.setdefault(frozenset(_learned(detector)), []).append((detector, artifact))
    return list(found.values())


def _learned(detector: Detector) -> list[tuple[str, Statistic[Any]]]:
    """The statistics that a detector learns from, each with the field of `Training` that holds it."""
    return [
        *(("train", each) for each in detector.statistics()),
        *(("id_val", each) for each in detector.calibration()),
        *(("ood_val", each) for each in detector.ood_statistics()),
    ]


def _held(detector: Detector, training: Training) -> int:
    """Bytes that a task may hold that fits a detector and others that learn from the same."""
    sizes = [size_of(getattr(training, where), [each]) for where, each in _learned(detector)]
    return memory.PROCESS + _TIMES * (sum(sizes) + training.weight.nbytes)


def _fit(some: Sequence[Unfitted], shared: Shared[Training]) -> list[tuple[dict[str, File], dict[str, Any]]]:
    """Write the scorers of some detectors; returns the files of each, and facts of its artifact."""
    training = shared.get()
    for detector, _ in some:
        for where, each in _learned(detector):  # is read: what fails at that is no refusal of a detector
            getattr(training, where)[each]
    return [_fitted(detector, artifact.folder, training) for detector, artifact in some]


def _fitted(
    detector: Detector, folder: files.Place, training: Training
) -> tuple[dict[str, File], dict[str, Any]]:
    """Write the scorer of a detector, or why there is none or it cannot be kept; see `_fit`."""

    def reason(name: str, error: Exception) -> dict[str, File]:
        return {name: write(folder / name, partial(files.dump_json, str(error)))}

    try:
        scorer = detector.fit(training)
    except (Damaged, Unavailable):
        raise
    except UserError as error:
        return reason(_REFUSED, error), {}
    facts = {"notices": list(detector.notices(training))}
    try:
        document, arrays = plain.encode(scorer)
    except TypeError as error:
        _log.info("%s is fitted again in each run: %s", detector.name, error)
        return reason(_UNKEPT, error), facts
    return {
        _SCORER: write(folder / _SCORER, partial(files.dump_json, document)),
        _ARRAYS: write(folder / _ARRAYS, saved(arrays)),
    }, facts


def _content(values: NDArray[Any]) -> str:
    """What two arrays have in common that are the same."""
    stored = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
    return f"{values.dtype} {values.shape} {sha256(stored).hexdigest()}"


def read_scorer(
    artifact: Artifact,
    record: Record,
    detector: Detector,
    read: dict[str, NDArray[Any]],
    arrays_of: Callable[[Path], Arrays] = mapped,
) -> Scorer | UserError:
    """The scorer that is kept, or why there is none.

    It is always read back, so that the first run computes with what later ones read.

    Args:
        artifact: where.
        record: of it.
        detector: that was fitted.
        read: arrays by content, to which its own are added: equal ones are the same object (`columns.once`).
        arrays_of: reads the arrays of a file.
    """

    def file(name: str) -> Any:
        return opened(artifact.folder / name, record.files[name].sha256)

    if _REFUSED in record.files:
        with file(_REFUSED) as path:
            return UserError(json.loads(path.read_text(encoding="utf-8")))
    with file(_SCORER) as path:
        document = json.loads(path.read_text(encoding="utf-8"))
    with file(_ARRAYS) as path:
        arrays = {name: read.setdefault(_content(value), value) for name, value in arrays_of(path).items()}
    theirs = [type(part).__module__ for part in detector.parts() if imports.is_foreign(type(part))]
    scorer: Scorer = plain.decode(document, arrays, (*plain.OURS, *theirs))
    return scorer
