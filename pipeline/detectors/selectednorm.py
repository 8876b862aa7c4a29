"""Selected norm: MSP or energy of a feature that has its own direction and FeatureNorm's length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.columns import BLOCK_NORM, FEATURE, Batch, Float, once
from pipeline.detectors.base import Training
from pipeline.detectors.featurenorm import FeatureNorm
from pipeline.learned.logits import log_softmax, logsumexp
from pipeline.learned.statistics import unit_rows


class SelectedNorm(FeatureNorm):
    """A logit score with the length of the feature taken from the block with the highest NormRatio."""

    title: ClassVar[str] = "Selected norm (2023)"
    paper: ClassVar[str] = FeatureNorm.paper
    formula: ClassVar[str] = (
        "score = -log Σ_c exp z_c or log(1 - max_c softmax(z)_c), z = W (f(x; B) · h / ‖h‖_2) + b, "
        "B and f(x; B) as in featurenorm"
    )
    reading: ClassVar[str] = (
        "The energy (or for `msp` log(1 - p)) of a feature that has the length of a block's norm, with its "
        "sign changed, unbounded for the energy: high = the block hardly responds, or no class gets much "
        "evidence; comparable within one network and block only."
    )
    columns: ClassVar[tuple[str, ...]] = (FEATURE, BLOCK_NORM)
    version: ClassVar[int] = 2

    score: Literal["energy", "msp"] = Field(
        default="energy", description="what is computed from the logits z of the rescaled feature"
    )

    def fit(self, train: Training) -> SelectedNormScorer:
        """Choose the block.

        Raises:
            UserError: as `FeatureNorm.chosen`.
        """
        weight, bias = train.weight.astype(np.float64), train.bias.astype(np.float64)
        return SelectedNormScorer(weight, bias, self.chosen(train), self.score)


@dataclass(frozen=True)
class SelectedNormScorer:
    """MSP or energy of rescaled features."""

    weight: Float
    """(C, D)."""
    bias: Float
    """(C,)."""
    block: int
    """Position of the block in `block_norm`."""
    score: Literal["energy", "msp"]

    def __call__(self, batch: Batch) -> Float:
        """Negative energy, or as `msp` log(1 - p) for the largest probability p.

        Args:
            batch: `feature` (N, D) float, `block_norm` (N, B) float.

        Returns:
            (N,) float64; of the bias alone where the feature is zero and has no direction.
        """
        length = batch[BLOCK_NORM].astype(np.float64, copy=False)[:, self.block, None]
        logits = (once(unit_rows, batch) * length) @ self.weight.T + self.bias
        return -logsumexp(logits) if self.score == "energy" else log_softmax(logits).doubt
