"""Steps: changes of the feature or of the last layer, before a score of logits is computed.

A step is a detector too: the energy after it. Combined, steps change the feature in their order, and the
last layer likewise; what they are fitted to are statistics of unchanged training features, as in the
authors' code of ReAct with DICE.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, SerializeAsAny, model_serializer

from pipeline.columns import FEATURE, LOGITS, Batch, Float
from pipeline.detectors.base import Detector, Scorer, Training
from pipeline.detectors.energy import Energy
from pipeline.errors import UserError
from pipeline.learned.statistics import Statistic

Shape = Callable[[Float], Float]
"""Feature (N, D) float64 -> changed feature (N, D) float64; never in place."""


class Step(Detector):
    """A change before the last layer or in it; by itself, the energy (T = 1) after the change."""

    columns: ClassVar[tuple[str, ...]] = (FEATURE,)

    def shape(self, train: Training) -> Shape:
        """How the feature changes; picklable."""
        return unchanged

    def weigh(self, weight: Float, train: Training) -> Float:
        """The changed weight (C, D) of the last layer."""
        return weight

    def fit(self, train: Training) -> SteppedScorer:
        """Fit the step; the energy has nothing to fit."""
        return Stepped(score=Energy(), steps=(self,)).fit(train)


_MANY = 200
"""Classes of the smallest network that a choice made on ImageNet is meant for."""


def of_imagenet(choice: str, train: Training, elsewhere: str) -> tuple[str, ...]:
    """A notice that a paper's choice for ImageNet is used for a network of few classes.

    Args:
        choice: parameter and value.
        train: of the network.
        elsewhere: what is known of other networks, a sentence.
    """
    classes = len(train.bias)
    if classes >= _MANY:
        return ()
    return (f"{choice} is the paper's for ImageNet, this network has {classes} classes. {elsewhere}",)


def unchanged(feature: Float) -> Float:
    """The feature as it is."""
    return feature


class Stepped(Detector):
    """A score of logits after some steps."""

    title: ClassVar[str] = "Score after steps"
    columns: ClassVar[tuple[str, ...]] = (FEATURE,)

    score: SerializeAsAny[Detector] = Field(description="computes the score from changed feature and logits")
    steps: tuple[SerializeAsAny[Step], ...] = Field(min_length=1, description="the changes, in their order")

    @property
    def name(self) -> str:
        """All that is combined, in order."""
        return " + ".join(each.name for each in self.parts())

    @property
    def caption(self) -> str:
        """The methods that are combined, in order."""
        return " + ".join(each.title for each in self.parts())

    def parts(self) -> tuple[Detector, ...]:
        """The steps and the score, in order."""
        return (*self.steps, self.score)

    @model_serializer
    def _named(self) -> dict[str, Any]:
        steps = [{step.name: step.model_dump(mode="json")} for step in self.steps]
        return {"score": {self.score.name: self.score.model_dump(mode="json")}, "steps": steps}

    def statistics(self) -> tuple[Statistic[Any], ...]:
        """What the steps learn from."""
        return tuple(statistic for step in self.steps for statistic in step.statistics())

    def notices(self, train: Training) -> tuple[str, ...]:
        """Those of the steps."""
        return tuple(notice for step in self.steps for notice in step.notices(train))

    def fit(self, train: Training) -> SteppedScorer:
        """Fit the steps, and the score to the changed last layer."""
        weight = train.weight.astype(np.float64)
        for step in self.steps:
            weight = step.weigh(weight, train)
        changed = replace(train, weight=weight.astype(np.float32))
        return SteppedScorer(
            score=self.score.fit(changed),
            shapes=tuple(step.shape(train) for step in self.steps),
            weight=weight,
            bias=train.bias.astype(np.float64),
        )


@dataclass(frozen=True)
class SteppedScorer:
    """A score of changed features and the logits of a changed last layer."""

    score: Scorer
    shapes: tuple[Shape, ...]
    weight: Float
    """(C, D)."""
    bias: Float
    """(C,)."""

    def __call__(self, batch: Batch) -> Float:
        """The score after all steps.

        Args:
            batch: `feature` (N, D) float.

        Returns:
            (N,) float64.
        """
        feature = batch[FEATURE].astype(np.float64, copy=False)
        for shape in self.shapes:
            feature = shape(feature)
        return self.score({FEATURE: feature, LOGITS: feature @ self.weight.T + self.bias})


def combined(score: Detector, steps: Sequence[Detector]) -> Stepped:
    """A score after steps.

    Raises:
        UserError: if one of the steps is none, or the score does not follow from feature and logits alone.
    """
    for step in steps:
        if not isinstance(step, Step):
            raise UserError(f"{step.name} is no step; it changes neither the feature nor the last layer.")
    fitted = score.needs_train() or score.calibrates() or score.extras()
    if not {LOGITS} <= set(score.columns) <= {FEATURE, LOGITS} or fitted:
        raise UserError(
            f"{score.name} cannot follow steps; only a score of logits can that learns nothing from training "
            "rows and takes no extra pass, e.g. energy, msp, maxlogit or gradnorm (without layers)."
        )
    return Stepped(score=score, steps=tuple(step for step in steps if isinstance(step, Step)))
