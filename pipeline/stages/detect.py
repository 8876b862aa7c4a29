"""Images that a program holds, judged by a bundle in this process: no Ray, no workspace, no files written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from pipeline import imports
from pipeline.columns import (
    CALIBRATION,
    DIGEST,
    ERROR,
    IS_OOD,
    KEY,
    LABEL,
    P_VALUE,
    PREDICTION,
    Float,
    Pixels,
)
from pipeline.config import schema
from pipeline.data import decode
from pipeline.errors import UserError
from pipeline.network.known import settings_kept
from pipeline.stages import bundle, index
from pipeline.stages.banks import BATCH
from pipeline.stages.bundle import Bundle
from pipeline.stages.calibration import Calibrated
from pipeline.stages.decisions import Judge
from pipeline.stages.decoding import ACCEPTED, Decoded, reason
from pipeline.stages.score import Scoring
from pipeline.workspace import files, storage, tables

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipeline.network.classifier import Classifier
    from pipeline.network.graph import Fitted


_ALONE = Lock()
"""Held by the one thread of the process that computes: torch's settings are those of the process."""


class OodDetector:
    """A network and its fitted detectors, ready for images; threads that call such wait for each other."""

    def __init__(self, opened: Bundle, device: str = "auto") -> None:
        from pipeline.network.classifier import load

        self.bundle = opened
        self._settings = _on(opened.extract, device)
        with _ALONE, settings_kept():
            classifier = load(opened.model, opened.document["run"]["seed"], self._device)
            opened.require_same(classifier)
            self._classifier: Classifier = classifier.tuned(self._settings, self._settings.compile)
        self._scoring = self._searching(opened)

    @property
    def _device(self) -> str:
        from pipeline.stages.identity import device

        return device(self._settings.device, self._settings.gpus_per_actor)

    @property
    def detectors(self) -> list[str]:
        """Labels of the detectors."""
        return self.bundle.labels

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes by index, if they are known."""
        return self.bundle.classes

    def __call__(
        self,
        images: Sequence[str | Path | bytes | Image | NDArray[np.uint8]],
        *,
        exact: bool = False,
        false_alarm: float | None = None,
    ) -> pa.Table:
        """Judge some images.

        Args:
            images: paths, encoded files, PIL images, or uint8 arrays (H, W), (H, W, 1) or (H, W, 3).
            exact: compute in batches of the shape that the evaluation had, with one thread: the same bits as
                there on machines of the same kind. Without, results agree to about 1e-5 of their range, and
                a single image takes no longer than it has to.
            false_alarm: rate at which images are flagged; None = the first one the bundle was made for.

        Returns:
            A row per image: key (the path, or the number of the image), prediction, error (why it could not
            be read; all else is null then), and for each detector its score, `p.<detector>` and
            `is_ood.<detector>`; the last two are null if the bundle has no calibration images.

        Raises:
            UserError: a rate that too few images were calibrated for, or something that is no image.
        """
        judge = self._judge(false_alarm)
        if isinstance(images, str | bytes | Path) or not isinstance(images, Sequence):
            raise UserError(f"images: got {type(images).__name__}; expected a list of images.")
        keys = [_key(each, number) for number, each in enumerate(images)]
        parts = [self._empty]
        with _ALONE, _as_in_workers() if exact else ExitStack():
            for start in range(0, len(images), BATCH):
                found = self._judged(keys[start : start + BATCH], images[start : start + BATCH], exact, judge)
                parts.append(found)
        return pa.concat_tables(parts)

    def export(
        self, path: str | Path, *, detectors: Sequence[str] = (), false_alarm: float | None = None
    ) -> None:
        """Write network and detectors as one graph, which torch or ONNX Runtime runs without this program.

        Its inputs are `images`, (N, channels, H, W) float32 as `transform` in the bundle makes them, and
        `thresholds`, (K,) float64: the largest score of each detector that is not flagged; (C, K) where
        thresholds are by predicted class. Its outputs are `prediction` (N,) int64, `scores` (N, K) float64
        and `is_ood` (N, K) bool. Scores agree with the bundle's to 1e-5 of their spread, which is tried.

        Args:
            path: a file or URI; `.pt2` is for `torch.export.load`, `.onnx` takes the packages of
                `ood-pipeline[export]`. `detectors.json` in it holds labels, thresholds and transform.
            detectors: labels; none = all.
            false_alarm: rate of the thresholds in `detectors.json`; None = the first one of the bundle.

        Raises:
            UserError: another ending, packages that are not installed, a rate that too few images were
                calibrated for, detectors that take neighbours, more than a forward pass or the scores of
                others, or a network or detector that cannot be traced.
        """
        from pipeline.network import graph

        known = self.bundle.only(detectors or self.detectors)
        graph.require(known.detectors, [str(path)])
        if self._device != "cpu":
            OodDetector(known, "cpu").export(path, detectors=detectors, false_alarm=false_alarm)
            return
        calibrated = known.calibrated(false_alarm, field="false_alarm")
        limits = _limits(known, calibrated)
        traced = graph.Graph(
            replace(self._classifier, compiled=None),
            {label: _fitted(known, label, calibrated) for label in known.labels},
            list(known.extras.values()),
            self._settings.feature_dtype,
        )
        about = {
            "labels": known.labels,
            "false_alarm": calibrated and calibrated.settings.false_alarm[0],
            "thresholds": limits.tolist(),
            **{name: known.document[name] for name in ("input", "classes", "run", "versions")},
            "bundle": known.content,
        }
        place = files.at(str(path))
        with files.scratch(files.at(storage.parent(str(place)))) as folder, _ALONE, settings_kept():
            graph.export(traced, limits, folder / place.name, json.dumps(about))
            if others := [each.name for each in folder.iterdir() if each.name != place.name]:
                raise UserError(
                    f"--export: {place.name}: too large for one file; its weights would lie in {others[0]} "
                    "beside it. Export .pt2."
                )
            files.put(folder / place.name, place)

    @cached_property
    def _empty(self) -> pa.Table:
        """The columns, without rows."""
        kinds: dict[str, pa.DataType] = {KEY: pa.string(), PREDICTION: pa.int32(), ERROR: pa.string()}
        kinds |= {label: pa.float64() for label in self.detectors}
        kinds |= {P_VALUE + label: pa.float64() for label in self.detectors}
        kinds |= {IS_OOD + label: pa.bool_() for label in self.detectors}
        return pa.schema(list(kinds.items())).empty_table()

    def _judged(self, keys: list[str], images: Sequence[Any], exact: bool, judge: Judge | None) -> pa.Table:
        """The rows of at most `BATCH` images."""
        pixels, rows, errors = list[Pixels](), list[int](), dict[int, str]()
        for number, image in enumerate(images):
            try:
                pixels.append(self._pixels(image, keys[number]))
                rows.append(number)
            except (ValueError, OSError, EOFError) as error:
                if isinstance(error, UserError):
                    raise
                errors[number] = reason(error)
        columns, failed = self._features(pixels, exact)
        errors |= {rows[number]: text for number, text in failed.items()}
        there = [number for position, number in enumerate(rows) if position not in failed]
        prediction, scores = np.zeros(0, np.int32), dict.fromkeys(self.detectors, np.zeros(0))
        if there:
            prediction = columns[PREDICTION]
            scores = self._scores(columns, BATCH if exact else len(there))
        values = {PREDICTION: pa.array(prediction)}
        values |= {label: pa.array(each, mask=~np.isfinite(each)) for label, each in scores.items()}
        if judge is not None:
            values |= judge.columns(np.array(there), prediction, scores)
        place = pa.array(np.searchsorted(there, range(len(images))), mask=~np.isin(range(len(images)), there))
        table = {name: each.take(place) for name, each in values.items()}
        told = [errors.get(number) for number in range(len(images))]
        nothing = {field.name: pa.nulls(len(images), field.type) for field in self._empty.schema}
        return pa.table({**nothing, KEY: keys, ERROR: pa.array(told, pa.string()), **table})

    def _judge(self, false_alarm: float | None) -> Judge | None:
        """What gives p-values and flags; None without calibration images."""
        calibrated = self.bundle.calibrated(false_alarm, field="false_alarm")
        if calibrated is None:
            return None
        limits = dict.fromkeys(self.detectors, calibrated.settings.false_alarm[0])
        return Judge(calibrated.of, calibrated.made_of, limits=limits)

    def _pixels(self, image: Any, key: str) -> Pixels:
        """Pixels of one image as the network takes them.

        Raises:
            ValueError, OSError: it cannot be read.
            UserError: it is no image.
        """
        transform, decoder = self.bundle.description.transform, self._settings.decoder
        if isinstance(image, str | Path):
            image = Path(image).read_bytes()
        if isinstance(image, bytes):
            if len(image) > self._settings.max_image_bytes:
                raise ValueError(f"{len(image):,} bytes, more than {self._settings.max_image_bytes:,}")
            return decode.decode(image, None, transform, decoder)
        if isinstance(image, np.ndarray):
            shape = image.shape
            if image.dtype != np.uint8 or image.ndim not in (2, 3) or shape[2:] not in ((), (1,), (3,)):
                raise UserError(
                    f"images: {key} is an array of {image.dtype} {shape}; expected uint8, (height, width) or "
                    "(height, width, 3)."
                )
            return decode.decode(image.tobytes(), shape, transform)
        if hasattr(image, "convert"):
            return decode.fit(image, transform)
        raise UserError(
            f"images: {key} is of type {type(image).__name__}; expected a path, bytes, a PIL image or an "
            "array."
        )

    def _features(self, pixels: list[Pixels], exact: bool) -> tuple[dict[str, NDArray[Any]], dict[int, str]]:
        """Feature columns of images, and why some have none, by position."""
        if not pixels:
            return {}, {}
        from pipeline.stages import extract

        size, stacked = self._settings.batch_size, np.stack(pixels)
        if not exact and not self._settings.compile:  # a compiled network is compiled for one shape
            size = min(size, len(stacked))
        settings = self._settings.model_copy(update={"batch_size": size})
        rows = [{KEY: str(n), LABEL: -1, ACCEPTED: None, DIGEST: "00" * 16} for n in range(len(stacked))]
        extras = self.bundle.extras
        others = extract.Others(self._classifier, list(extras.values()))
        batches = Decoded(stacked, rows, []).batches(size)
        table, failed, _ = extract.extract_rows(self._classifier, batches, settings, others=others)
        beside = dict(others.columns(table[KEY].to_pylist()))
        columns = tables.numpy_columns(table, [name for name in self.bundle.columns if name not in extras])
        for name in extras:
            columns |= tables.numpy_columns(beside[name], [name])
        return columns, {int(key): text for key, text in failed}

    def _scores(self, columns: dict[str, NDArray[Any]], size: int) -> dict[str, Float]:
        """Scores of all detectors in their order, in batches of some size."""
        found = self._scoring.of(columns, size)
        combined = self.bundle.combined
        if combined is not None:
            marks = np.zeros(len(columns[KEY]), np.bool_)
            found |= combined.of({KEY: columns[KEY], CALIBRATION: marks, **found}, size)
        return {label: found[label] for label in self.detectors}

    def _searching(self, opened: Bundle) -> Scoring:
        """The detectors of rows, with their neighbours in memory."""
        folders = {label: bank.folder for label, bank in opened.banks.items()}
        searched = None
        if folders:
            settings = opened.index
            if self._device == "cpu":
                settings = settings.model_copy(update={"device": "cpu"})
            searched = index.here(opened.banks.values(), settings)
        return Scoring(opened.scorers, opened.columns, folders, searched)


def _fitted(known: Bundle, label: str, calibrated: Calibrated | None) -> Fitted:
    """A detector of a bundle as it goes into a graph."""
    from pipeline.network.graph import Fitted

    parts = known.detectors[label].parts()
    modules = [type(part).__module__ for part in parts if imports.is_foreign(type(part))]
    held = np.zeros(0) if calibrated is None else calibrated.scores[label]
    there = held[np.isfinite(held)]
    return Fitted(known.scorers[label], modules, float(np.ptp(there)) if len(there) else 0.0)


def _limits(known: Bundle, calibrated: Calibrated | None) -> Float:
    """(K,) largest score of each detector that is not flagged, or (C, K) by class; infinite where none is."""
    if calibrated is None:
        return np.full(len(known.labels), np.inf)
    rate, classes = calibrated.settings.false_alarm[0], range(len(known.description.head[1]))
    found = [calibrated.of[label].thresholds(rate) for label in known.labels]
    if not calibrated.settings.per_class:
        return np.array([each[-1] for each in found])
    return np.array([[each.get(number, np.inf) for each in found] for number in classes])


def _on(settings: schema.Extract, device: str) -> schema.Extract:
    """The same on a device."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device: got {device!r}; expected 'auto' (as in the evaluation), 'cpu' or 'cuda'.")
    if device == "auto":
        return settings
    return settings.model_copy(update={"device": device})


def _key(image: Any, number: int) -> str:
    """The path of an image, bytes that are no UTF-8 spelled out; its number if it has none."""
    if not isinstance(image, str | Path):
        return str(number)
    return str(image).encode("utf-8", "backslashreplace").decode()


@contextmanager
def _as_in_workers() -> Iterator[None]:
    """In the block, libraries compute as in a worker with one CPU."""
    from pipeline.network.classifier import make_reproducible

    with settings_kept(), threadpool_limits(limits=1):
        make_reproducible(1)
        yield


def load(path: str | Path, device: str = "auto", *, trust_code: bool = False) -> OodDetector:
    """Open a bundle for images in this process.

    Args:
        path: its folder, by path or URI.
        device: "cpu" or "cuda"; "auto" is what the evaluation computed on.
        trust_code: whether the code of detectors that the bundle holds may run here.

    Raises:
        UserError: no bundle, one that is damaged or of a newer version, a network that is not the one the
            detectors were fitted to, code in it that is not trusted, or no such device.
    """
    return OodDetector(bundle.opened(path, trust_code), device)
