"""Rows that detectors are tested on: real ones, random ones and separated blobs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from scipy.spatial.distance import cdist

from pipeline import detectors, quickstart
from pipeline.columns import BLOCK_NORM, FEATURE, LABEL, LOGITS, PREDICTION, Batch, Float
from pipeline.config import loading
from pipeline.detectors.adascale import AdaScale
from pipeline.detectors.base import (
    NEIGHBOURS,
    Detector,
    Dropped,
    Extra,
    Jigsaw,
    Mixup,
    Noise,
    Pass,
    Samples,
    Scorer,
    Training,
    bank_of,
)
from pipeline.learned import statistics
from pipeline.learned.logits import softmax
from pipeline.learned.statistics import Head
from pipeline.network import extras
from pipeline.network.classifier import Classifier
from pipeline.network.classifier import load as load_classifier
from pipeline.quickstart.resnet import build

QUICKSTART = Path(quickstart.__file__).parent
BLOCKS = ("layer1.0", "layer2.0", "layer3.0", "layer4.0")


@dataclass(frozen=True)
class Rows:
    """Rows of one classifier: to learn from (`train`, `ood_val`, maybe `id_val`) and to score (`query`)."""

    train: Batch
    query: Batch
    is_ood: NDArray[np.bool_]
    ood_val: Batch
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    blocks: tuple[str, ...]
    stages: Mapping[str, int]
    results: Mapping[type[Pass], Mapping[str, NDArray[np.float64]]]
    id_val: Batch | None = None

    def training(self, *detectors: Detector) -> Training:
        """Exactly what the detectors declare that they need."""
        head = Head(self.weight, self.bias, tuple(self.stages.values()))
        learned = [wanted for detector in detectors for wanted in detector.statistics()]
        calibrating = [wanted for detector in detectors for wanted in detector.calibration()]
        ood = [wanted for detector in detectors for wanted in detector.ood_statistics()]
        return Training(
            weight=self.weight,
            bias=self.bias,
            blocks=self.blocks,
            stages=self.stages,
            train=statistics.of(self.train, learned, head),
            id_val=statistics.of(self.train if self.id_val is None else self.id_val, calibrating, head),
            ood_val=statistics.of(self.ood_val, ood, head),
            passes={spec: self.results[type(spec)] for detector in detectors for spec in detector.passes()},
        )

    def with_neighbours(self, scorer: Scorer, batch: Batch) -> Batch:
        """The batch with the distances that a scorer with a bank reads, by brute force."""
        bank = bank_of(scorer)
        if bank is None:
            return batch
        vectors = bank.embed(self.train)[bank.keep(self.train)]
        distance = cdist(bank.queries(batch).astype(np.float64), vectors.astype(np.float64))
        return {**batch, NEIGHBOURS: np.sort(distance, axis=1)[:, bank.read]}

    def score(self, detector: Detector) -> Float:
        """Scores of the query rows."""
        scorer = detector.fit(self.training(detector))
        return scorer(self.with_neighbours(scorer, self.query))


def read_only(batch: dict[str, NDArray]) -> Batch:
    for column in batch.values():
        column.setflags(write=False)
    return batch


@cache
def default_extras() -> tuple[Extra, ...]:
    """What detectors look at with default parameters, beyond the feature table."""
    return tuple(extra for name in detectors.names() for extra in detectors.get(name)().extras())


def with_extras(batch: dict[str, NDArray], seed: int = 0) -> Batch:
    """Rows with stand-ins for the columns that take a network: the feature, moved, or the softmax."""
    rng = np.random.default_rng(seed)
    for extra in default_extras():
        moved = batch[FEATURE] + rng.normal(scale=0.01, size=batch[FEATURE].shape)
        stand_in = softmax(batch[LOGITS]) if isinstance(extra, Dropped) else moved
        batch[extra.column] = stand_in.astype(np.float32)
    return read_only(batch)


def halves(width: int) -> dict[str, int]:
    """Two stages, or one, whose pooled maps are as wide as the feature."""
    return {"early": width // 2, "late": width - width // 2} if width > 1 else {"only": 1}


def pass_results(train: Batch) -> dict[type[Pass], dict[str, NDArray[np.float64]]]:
    mean = train[FEATURE].mean(axis=0, dtype=np.float64)
    blocks = train[BLOCK_NORM].shape[1]
    return {
        Mixup: {"mean": 0.9 * mean, "samples": np.array(100)},
        Noise: {"mean": 0.5 * mean, "samples": np.array(100)},
        Samples: {
            "feature": train[FEATURE][:100].astype(np.float64),
            "extra": train[AdaScale().extras()[0].column][:100].astype(np.float64),
            "samples": np.array(100),
        },
        Jigsaw: {
            "ratio": 1 + np.arange(blocks) % 2 / 10,
            "stderr": np.full(blocks, 0.01),
            "samples": np.array(100),
        },
    }


def network() -> torch.nn.Module:
    model = build()
    model.load_state_dict(load_file(QUICKSTART / "resnet.safetensors"))
    return model.eval()


def forward(pixels: NDArray[np.uint8]) -> tuple[dict[str, NDArray], dict[str, torch.Tensor]]:
    """Feature, logits, prediction and block norms of (N, 28, 28) images; and the blocks' outputs."""
    model, maps = network(), {}
    for name in BLOCKS:
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: maps.update({name: out})
        )
    model.fc.register_forward_pre_hook(lambda _module, inputs: maps.update(feature=inputs[0]))
    images = torch.from_numpy((pixels[:, None] / 255 - 0.2860) / 0.3530).float()
    with torch.inference_mode():
        logits = model(images)
    norms = [maps[name].relu().square().sum(dim=(2, 3)).sqrt().mean(dim=1) for name in BLOCKS]
    feature = maps.pop("feature")
    return {
        FEATURE: feature.numpy(),
        LOGITS: logits.numpy(),
        PREDICTION: logits.argmax(dim=1).numpy().astype(np.int32),
        BLOCK_NORM: torch.stack(norms, dim=1).numpy(),
    }, maps


def seen(pixels: NDArray[np.uint8], labels: NDArray[np.int32] | None = None) -> Batch:
    """All columns of (N, 28, 28) images; for dropout, which the shipped network has none of, a stand-in."""
    unlabelled = np.full(len(pixels), -1, dtype=np.int32)
    rows = {**forward(pixels)[0], LABEL: unlabelled if labels is None else labels}
    keys = [str(row) for row in range(len(pixels))]
    for extra in default_extras():
        if isinstance(extra, Dropped):
            rows[extra.column] = softmax(rows[LOGITS] / 2).astype(np.float32)
        else:
            rows[extra.column] = extras.measure(classifier(), extra, pixels[..., None], keys)
    return read_only(rows)


@cache
def classifier() -> Classifier:
    """The shipped network as the pipeline loads it."""
    return load_classifier(loading.load("quickstart").model, 0)


@cache
def random_rows(rows: int = 200, classes: int = 7, dim: int = 16, seed: int = 0) -> Rows:
    """Rows of a random classifier with signed features; 70 % of the labels or more agree with it."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(classes, dim)).astype(np.float32)
    bias = rng.normal(size=classes).astype(np.float32)

    def batch() -> Batch:
        feature = rng.normal(size=(rows, dim)).astype(np.float32)
        logits = feature @ weight.T + bias
        prediction = logits.argmax(axis=1).astype(np.int32)
        guess = rng.integers(classes, size=rows, dtype=np.int32)
        return with_extras(
            {
                FEATURE: feature,
                LOGITS: logits,
                PREDICTION: prediction,
                LABEL: np.where(rng.random(rows) < 0.7, prediction, guess),
                BLOCK_NORM: rng.random((rows, 3), dtype=np.float32),
            }
        )

    train = batch()
    return Rows(
        train=train,
        query=batch(),
        is_ood=rng.random(rows) < 0.5,
        ood_val=batch(),
        weight=weight,
        bias=bias,
        blocks=("stem", "middle", "last"),
        stages=halves(dim),
        results=pass_results(train),
    )


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., Rows]:
    return random_rows


@pytest.fixture(scope="session")
def real() -> Rows:
    """Fashion-MNIST and textures through the shipped network."""
    images = np.load(QUICKSTART / "images.npz")
    labels = images["id_train_y"][:600].astype(np.int32)
    is_ood = np.arange(300) >= 200
    train = seen(images["id_train_x"][:600], labels)
    head = network().fc
    return Rows(
        train=train,
        query=seen(np.concatenate([images["id_test_x"][:200], images["ood_textures_x"][:100]])),
        is_ood=is_ood,
        ood_val=seen(images["ood_animals_x"][:100]),
        weight=head.weight.detach().numpy(),
        bias=head.bias.detach().numpy(),
        blocks=BLOCKS,
        stages=classifier().taps.stages,
        results=pass_results(train),
    )


@pytest.fixture(scope="session")
def real_maps() -> dict[str, NDArray[np.float32]]:
    """(3, M, H, W) output of every block for the first three query images of `real`."""
    pixels = np.load(QUICKSTART / "images.npz")["id_test_x"][:3]
    return {name: output.numpy() for name, output in forward(pixels)[1].items()}


@pytest.fixture(params=["real", "random"])
def rows(request: pytest.FixtureRequest) -> Rows:
    """Real rows, then random ones."""
    return request.getfixturevalue("real") if request.param == "real" else random_rows()


@pytest.fixture(scope="session")
def blobs() -> Rows:
    """OOD rows differ in norm, confidence, block norm and position: every method can tell them apart.

    Each of five classes lights up four dimensions of its own; OOD rows light up twelve others, weakly.
    """
    rng = np.random.default_rng(0)
    classes, own, dim = 5, 4, 32
    pattern = np.repeat(np.eye(classes, dtype=np.float32), own, axis=1)
    weight = np.full((classes, dim), -0.05, dtype=np.float32)
    weight[:, : classes * own] += pattern
    bias = np.zeros(classes, dtype=np.float32)

    def batch(count: int, ood: bool) -> dict[str, NDArray]:
        label = np.arange(count, dtype=np.int32) % classes
        centre = np.zeros((count, dim), dtype=np.float32)
        if ood:
            centre[:, classes * own :] = 1
        else:
            centre[:, : classes * own] = 6 * pattern[label]
        feature = np.abs(centre + rng.normal(scale=0.3, size=centre.shape)).astype(np.float32)
        logits = feature @ weight.T + bias
        return {
            FEATURE: feature,
            LOGITS: logits,
            PREDICTION: logits.argmax(axis=1).astype(np.int32),
            LABEL: np.full(count, -1, dtype=np.int32) if ood else label,
            BLOCK_NORM: rng.normal(2 if ood else 4, 0.3, size=(count, 3)).astype(np.float32),
        }

    train, known, strange = with_extras(batch(300, ood=False)), batch(80, ood=False), batch(60, ood=True)
    return Rows(
        train=train,
        query=with_extras({name: np.concatenate([known[name], strange[name]]) for name in known}),
        is_ood=np.arange(140) >= 80,
        ood_val=with_extras(batch(50, ood=True)),
        weight=weight,
        bias=bias,
        blocks=("stem", "middle", "last"),
        stages=halves(dim),
        results=pass_results(train),
    )
