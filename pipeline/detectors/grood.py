"""GROOD: gradient of a nearest-prototype loss at an OOD prototype, in closed form.

The OOD prototype and the gradient are shared with `grood_norm`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.columns import FEATURE, LABEL, PREDICTION, Batch, Float, Mask, once
from pipeline.detectors.base import NEIGHBOURS, Bank, Detector, Mixup, Noise, Pass, Training
from pipeline.errors import UserError
from pipeline.learned.logits import logsumexp
from pipeline.learned.statistics import Classes
from pipeline.parameters import Frozen


class OodPrototype(Frozen):
    """Where the OOD prototype comes from."""

    prototype: Literal["mixup", "noise", "proto_mean", "ood_val"] = Field(
        default="mixup",
        description="the OOD prototype p_o is the mean feature of: mixup, training images mixed with their "
        "runner-up class; noise, blurred noise images; proto_mean, the class prototypes; ood_val, the "
        "dataset with that role (uses OOD data)",
    )
    mixup_layer: str = Field(
        default="auto",
        min_length=1,
        description="name of the block whose output is mixed, or auto; mixup only",
    )
    mixup_weight: float = Field(
        default=0.8,
        ge=0,
        le=1,
        description="share of the image in the mix, the rest is the runner-up class; mixup only",
    )
    samples: int = Field(
        default=1000, ge=10, description="training images that are mixed, or noise images that are drawn"
    )
    class_samples: int | None = Field(
        default=100,
        ge=1,
        description="images per runner-up class behind its mean at mixup_layer, null for all; mixup only",
    )

    def passes(self) -> tuple[Pass, ...]:
        """The pass that makes the OOD prototype; none if it is a mean of stored features."""
        if self.prototype == "mixup":
            mixup = Mixup(
                block=self.mixup_layer,
                weight=self.mixup_weight,
                samples=self.samples,
                class_samples=self.class_samples,
            )
            return (mixup,)
        if self.prototype == "noise":
            return (Noise(samples=self.samples),)
        return ()

    def statistics(self) -> tuple[Classes]:
        """Class means."""
        return (Classes(),)

    def ood_statistics(self) -> tuple[Classes, ...]:
        """The mean of OOD data, if that is the OOD prototype."""
        return (Classes(),) if self.prototype == "ood_val" else ()

    def prototypes(self, train: Training) -> Prototypes:
        """Class prototypes and OOD prototype; classes without training rows have none.

        Raises:
            UserError: if no training row has a label.
        """
        classes = train.train[Classes()].class_mean
        if len(classes) == 0:
            raise UserError(
                "GROOD: class prototypes need labels, got none in the training rows; expected at least one. "
                "Give the dataset with role train its labels."
            )
        ood = self._ood(train, classes)
        return Prototypes(ood=ood, classes=classes - ood)

    def _ood(self, train: Training, classes: Float) -> Float:
        if self.prototype == "proto_mean":
            mean: Float = classes.mean(axis=0)
            return mean
        if self.prototype == "ood_val":
            return train.ood_val[Classes()].mean
        return train.passes[self.passes()[0]]["mean"]


@dataclass(frozen=True)
class Prototypes:
    """The nearest-prototype classifier over the classes and OOD."""

    ood: Float
    """(D,) OOD prototype p_o."""
    classes: Float
    """(K, D) class prototypes minus p_o: distances lose no digits to a common offset."""

    def gradient(self, batch: Batch) -> tuple[Float, Float]:
        """Length and direction of ∂L/∂p_o for the cross-entropy L over logits -‖h - p_k‖_2.

        The same for every class label; the authors' code differentiates once per sample instead.

        Args:
            batch: `feature` (N, D) float.

        Returns:
            (N,) float64 in [0, 1], the softmax probability π_o of OOD; and (N, D) float64, the unit
            vectors from p_o to h, zero where h = p_o.
        """
        from scipy.special import expit  # takes a third of a second to import

        odds, to_ood = once(_log_odds, batch, self.ood, self.classes)
        offset = batch[FEATURE] - self.ood
        offset *= np.divide(1, to_ood, out=np.zeros_like(to_ood), where=to_ood > 0)[:, None]
        return expit(odds), offset

    def log_odds(self, batch: Batch) -> Float:
        """Log(π_o / (1 - π_o)) of `feature` (N, D): (N,) float64, which never saturates."""
        return once(_log_odds, batch, self.ood, self.classes)[0]


def _log_odds(batch: Batch, ood: Float, classes: Float) -> tuple[Float, Float]:
    """-log Σ_c exp(d_o - d_c), and d_o, of the rows of a batch.

    d_o - d_c comes from the difference of the squares, which keeps its digits however long h is.
    """
    offset = batch[FEATURE] - ood
    to_ood = np.sqrt(np.einsum("nd,nd->n", offset, offset))
    closer = offset @ classes.T
    closer *= 2
    closer -= np.einsum("kd,kd->k", classes, classes)  # d_o² - d_c²
    to_class = np.sqrt(np.maximum(to_ood[:, None] ** 2 - closer, 0))
    to_class += to_ood[:, None]
    np.divide(closer, to_class, out=closer, where=to_class > 0)
    return -logsumexp(closer), to_ood


_VANISHING = 1e-19
"""Lengths of gradients whose squares float32 rounds to 0."""

_AT_ONCE = 256
"""Class means whose distances to all others are held at once."""


class Grood(OodPrototype, Detector):
    """Distance of the gradient to its nearest training gradient.

    The default reads the TMLR text (mixup only makes the OOD prototype, Euclidean logits, exact search)
    with the layer and weight of the authors' configuration; their OpenOOD code uses real OOD images.
    """

    title: ClassVar[str] = "GROOD (2025)"
    paper: ClassVar[str] = (
        "ElAraby, Sahoo, Pequignot, Novello, Paull: GROOD: GRadient-Aware Out-of-Distribution Detection. "
        "TMLR 2025, arXiv:2312.14427"
    )
    formula: ClassVar[str] = (
        "score = ‖g(h) - g_(k)‖_2, g_(k) the k-th nearest gradient of a correctly classified training row; "
        "g(h) = ∂L/∂p_o = π_o · (h - p_o) / d_o, π_o = exp(-d_o) / (exp(-d_o) + Σ_c exp(-d_c)), "
        "d_j = ‖h - p_j‖_2, p_c the mean feature of class c"
    )
    reading: ClassVar[str] = (
        "At least 0 and below 2, the distance of the image's gradient at the OOD prototype to that of the "
        "most similar training image: 0 = pulled as a training image is, high = pulled as none is."
    )
    columns: ClassVar[tuple[str, ...]] = (FEATURE,)
    version: ClassVar[int] = 2
    neighbours: ClassVar[bool] = True

    k: int = Field(
        default=1, ge=1, description="the distance to the k-th nearest training gradient is the score"
    )

    def fit(self, train: Training) -> GroodScorer:
        """Compute the prototypes."""
        return GroodScorer(self.prototypes(train), self.k)

    def notices(self, train: Training) -> tuple[str, ...]:
        """Whether features are so long that the gradients of ID images vanish in float32."""
        found = self.prototypes(train)
        starts = range(0, len(found.classes), _AT_ONCE)
        means = (found.classes[start : start + _AT_ONCE] + found.ood for start in starts)
        surest = np.max([found.log_odds({FEATURE: each}).max() for each in means])
        if surest > np.log(_VANISHING):
            return ()
        return (
            f"at every class mean the gradient is shorter than exp({surest:.0f}), so that float32 rounds the "
            "distances between those of most ID images to 0: features are long beside 1. grood_norm ranks "
            "such images, too.",
        )


@dataclass(frozen=True)
class GroodScorer:
    """Distance to the k-th neighbour in the bank of training gradients."""

    prototypes: Prototypes
    k: int

    @property
    def bank(self) -> Bank:
        """Gradients of the correctly classified training rows."""
        return Bank(embed=self.gradient, keep=is_correct, k=self.k, kth=True)

    def gradient(self, batch: Batch) -> NDArray[np.float32]:
        """(N, D) float32, the gradient ∂L/∂p_o; its norm lies in [0, 1]."""
        probability, direction = self.prototypes.gradient(batch)
        return (probability[:, None] * direction).astype(np.float32)

    def __call__(self, batch: Batch) -> Float:
        """Distance to the k-th nearest training gradient.

        Args:
            batch: `neighbours` (N, 1) float, the distance to the k-th.

        Returns:
            (N,) float64 in [0, 2].
        """
        return batch[NEIGHBOURS].astype(np.float64, copy=False)[:, 0]


def is_correct(batch: Batch) -> Mask:
    """(N,) bool, whether the classifier got the row right."""
    correct: Mask = batch[PREDICTION] == batch[LABEL]
    return correct
