"""One image of a finished run: what every detector says of it, and which training images are most like it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.columns import BLOCK_NORM, FEATURE, IS_OOD, KEY, LABEL, LOGITS, P_VALUE, PREDICTION, Batch
from pipeline.detectors.base import Bank, Scorer, bank_of
from pipeline.detectors.knn import KnnScorer
from pipeline.errors import UserError, unknown
from pipeline.results import class_names
from pipeline.results.evaluation import Evaluation, opened
from pipeline.results.report import review
from pipeline.results.report.tables import Results
from pipeline.stages import memory
from pipeline.stages.fit import read_scorer
from pipeline.workflows.bundle import config_of, detectors_of, fit_of
from pipeline.workflows.progress import Display, Quiet, Stage
from pipeline.workspace import artifacts, tables
from pipeline.workspace.artifacts import Artifact
from pipeline.workspace.runs import workspace_of

FEATURES = "features"
"""What the neighbours by direction of the feature are called, whether a detector looks for them or not."""


@dataclass(frozen=True)
class Said:
    """What a detector says of the image."""

    detector: str
    score: float | None
    """Higher = more OOD; None if it has none."""
    percentile: float | None
    """Share of the ID test images that score lower, in [0, 1]."""
    p_value: float | None
    """Among held-out ID images; None in runs without thresholds."""
    is_ood: bool | None
    """Whether it is flagged: as the run did, or at its first false-alarm rate; None where it has neither."""


@dataclass(frozen=True)
class Neighbour:
    """A training image."""

    dataset: str
    key: str
    label: int
    prediction: int
    distance: float
    """Euclidean, between the vectors that the detector compares."""


@dataclass(frozen=True)
class Explained:
    """What is known of one image."""

    dataset: str
    key: str
    label: int
    prediction: int
    said: Sequence[Said]
    """By every detector, the best of the run first."""
    norms: Mapping[str, float]
    """FeatureNorm of each block."""
    nearest: Mapping[str, Sequence[Neighbour]]
    """The closest training images, by the label of each detector that looks for some, and by `FEATURES`."""
    classes: Mapping[int, str]
    """Names of the classes above, by index; none where the run knows none."""

    def shown(self, index: int) -> str:
        """A class with its name, if it has one."""
        return class_names.shown(index, self.classes)


def explain(
    run: str, key: str, dataset: str | None = None, count: int = 5, display: Display | None = None
) -> Explained:
    """What a finished run knows of one of its images.

    Reads the features of all training images once, and holds a slice of them.

    Args:
        run: path or URI of its folder.
        key: of the image, as the tables of scores have it.
        dataset: that it is in; None = whichever has the key.
        count: training images to find for each detector; 0 = none.
        display: shows what is read, and how many training images.

    Raises:
        UserError: no such run, dataset or key; a key of several datasets; features that are gone.
    """
    evaluation = opened(run)
    with (display or Quiet()).stage("explain", "looks for the image") as stage:
        results = Results.read(evaluation.folder)
        where, row = _found(evaluation, key, dataset)
        own = _score_row(evaluation, where, row)
        table = _features(evaluation, where)
        blocks = evaluation.record["model"]["blocks"]
        columns = [KEY, LABEL, PREDICTION, FEATURE, LOGITS, *([BLOCK_NORM] if blocks else [])]
        image = table.read(row, row + 1, columns)
        norms = dict(zip(blocks, image[BLOCK_NORM][0].tolist(), strict=True)) if BLOCK_NORM in image else {}
        nearest = _nearest(evaluation, image, columns, count, stage) if count else {}
        thresholds = evaluation.record.get("thresholds")
        rate = thresholds["false_alarm"][0] if thresholds else None
        said = [_said(results, own, label, rate) for label in results.detectors]
    images = [(own[LABEL], own[PREDICTION])]
    images += [(each.label, each.prediction) for found in nearest.values() for each in found]
    names = class_names.known(evaluation.record)
    classes = {index: names[index] for image in images for index in image if index in names}
    return Explained(where, key, own[LABEL], own[PREDICTION], said, norms, nearest, classes)


def pictures(run: str, found: Explained) -> dict[tuple[str, str], bytes]:
    """Small JPEG files of the image and of its closest training images, of those that can be read again.

    Args:
        run: path or URI of its folder.
        found: what `explain` knows of the image.

    Returns:
        By dataset and key.
    """
    evaluation = opened(run)
    keys: dict[str, set[str]] = {found.dataset: {found.key}}
    for each in (neighbour for nearest in found.nearest.values() for neighbour in nearest):
        keys.setdefault(each.dataset, set()).add(each.key)
    return {
        (dataset, key): place["picture"]
        for dataset, own in keys.items()
        for key, place in review.places(evaluation.folder, evaluation.record, dataset, own).items()
        if place.get("picture")
    }


def _found(evaluation: Evaluation, key: str, dataset: str | None) -> tuple[str, int]:
    """The dataset that an image is in, and its row there."""
    names = [name for name, entry in evaluation.record["datasets"].items() if entry["role"] != "train"]
    if dataset is not None and dataset not in names:
        raise UserError(f"--dataset: {unknown('dataset with scores', dataset, names)}")
    there = {}
    for name in [dataset] if dataset is not None else names:
        start = 0
        for part in tables.Table.open(evaluation.folder / "scores" / name).columns([KEY]):
            row = pc.index(part[KEY], key).as_py()
            if row >= 0:
                there[name] = start + row
                break
            start += len(part)
    if len(there) > 1:
        raise UserError(f"{key}: is a key of {', '.join(there)}. Name one with --dataset.")
    if not there:
        raise UserError(
            f"{key}: no image of {dataset or ', '.join(names)} has this key and scores. Keys are paths below "
            "the dataset's folder, or names of arrays with a number, as in report/review.csv."
        )
    return next(iter(there.items()))


def _score_row(evaluation: Evaluation, dataset: str, row: int) -> dict[str, Any]:
    """Labels, scores, p-values and flags of a row of a table of scores, as far as the run has them."""
    record, labels = evaluation.record, list(evaluation.record["detectors"])
    names = [LABEL, PREDICTION, *labels]
    names += [P_VALUE + label for label in labels if record.get("thresholds")]
    names += [IS_OOD + label for label in labels if record["datasets"][dataset]["role"] == "unlabelled"]
    found = tables.Table.open(evaluation.folder / "scores" / dataset).read(row, row + 1, names)
    return {name: _plain(column[0]) for name, column in found.items()}


def _plain(value: Any) -> Any:
    """A value of an array as Python has it; None where there is none."""
    plain = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(plain, float) and math.isnan(plain) else plain


def _said(results: Results, own: Mapping[str, Any], label: str, rate: float | None) -> Said:
    score = own[label]
    inside = results.scores(results.datasets("id"), label)
    percentile = float((inside < score).mean()) if score is not None and len(inside) else None
    p_value, is_ood = own.get(P_VALUE + label), own.get(IS_OOD + label)
    if is_ood is None and p_value is not None and rate is not None:  # only unlabelled images have the column
        is_ood = p_value <= rate
    return Said(label, score, percentile, p_value, is_ood)


def _features(evaluation: Evaluation, dataset: str) -> tables.Table:
    """What was extracted of a dataset.

    Raises:
        UserError: it is gone.
    """
    entry = evaluation.record["datasets"][dataset]
    folder = workspace_of(evaluation.folder) / "features" / f"{dataset}-{entry['hash']}"
    try:
        return tables.Table.open(folder)
    except FileNotFoundError:
        raise UserError(
            f"{folder}: is gone. Run the evaluation again, which extracts what is missing."
        ) from None


def _nearest(
    evaluation: Evaluation, image: Batch, columns: Sequence[str], count: int, stage: Stage
) -> dict[str, list[Neighbour]]:
    """The closest training images by each detector that looks for neighbours, and by direction."""
    datasets = [name for name, entry in evaluation.record["datasets"].items() if entry["role"] == "train"]
    sources = {name: _features(evaluation, name) for name in datasets}
    if not sources:
        return {}
    banks = dict(_banks(evaluation))
    queries = {label: bank.queries(image)[0] for label, bank in banks.items()}
    found: dict[str, list[tuple[float, Neighbour]]] = {label: [] for label in banks}
    stage.count("training images", sum(table.rows for table in sources.values()))
    for name, table in sources.items():
        for start, stop in memory.cuts(table, columns, 0, table.rows):
            batch = table.read(start, stop, columns)
            for label, bank in banks.items():
                close = _closest(batch, bank, queries[label], name, count)
                found[label] = sorted([*found[label], *close], key=lambda each: each[0])[:count]
            stage.advance(stop - start)
    return {label: [neighbour for _, neighbour in each] for label, each in found.items()}


def _closest(
    batch: Batch, bank: Bank, query: NDArray[np.float32], dataset: str, count: int
) -> Iterable[tuple[float, Neighbour]]:
    """The closest rows of a batch, with their distances."""
    vectors = bank.embed(batch).astype(np.float64)
    distances = np.linalg.norm(vectors - query.astype(np.float64), axis=1)
    distances[~bank.keep(batch)] = np.inf
    for row in np.argsort(distances, kind="stable")[:count].tolist():
        if np.isfinite(distances[row]):
            key, label, prediction = (batch[name][row] for name in (KEY, LABEL, PREDICTION))
            distance = float(distances[row])
            yield distance, Neighbour(dataset, str(key), int(label), int(prediction), distance)


def _banks(evaluation: Evaluation) -> Iterator[tuple[str, Bank]]:
    """What detectors look up neighbours by, by label; all training images by direction come first."""
    directions = KnnScorer(1).bank
    yield FEATURES, directions
    workspace, read = workspace_of(evaluation.folder), dict[str, NDArray[Any]]()
    for label, (_, detector) in detectors_of(evaluation, (), config_of(evaluation)).items():
        fit = fit_of(evaluation, label, detector).fit if detector.neighbours else None
        if fit is not None:
            record = artifacts.read_record(workspace / fit)
            artifact = Artifact(workspace / fit, record.kind, record.identity, record.inputs)
            bank = bank_of(cast(Scorer, read_scorer(artifact, record, detector, read)))
            assert bank is not None
            if (bank.embed, bank.keep) != (directions.embed, directions.keep):
                yield label, bank
