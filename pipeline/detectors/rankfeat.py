"""RankFeat: energy after the maps of two blocks lose their largest singular value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field, FiniteFloat, field_validator

from pipeline.columns import Batch, Float
from pipeline.detectors.base import Detector, RankReduced, Training
from pipeline.learned.logits import logsumexp


class RankFeat(Detector):
    """Energy of the mean of the logits that remain when s₁ u₁ v₁ᵀ is taken from the maps of a block.

    As in the paper, one block is the last one and the other the last of the stage before. Takes a forward
    pass for each block over every image that is scored.
    """

    title: ClassVar[str] = "RankFeat (2022)"
    paper: ClassVar[str] = (
        "Song, Sebe, Wang: RankFeat: Rank-1 Feature Removal for Out-of-distribution Detection. "
        "NeurIPS 2022, arXiv:2209.08590"
    )
    formula: ClassVar[str] = (
        "score = -T log Σ_c exp(z_c / T), z = mean over blocks of the logits with X - s₁ u₁ v₁ᵀ in place of "
        "the block's maps X (channels x positions)"
    )
    reading: ClassVar[str] = (
        "The energy without the largest singular value of a block's maps, with its sign changed, in units "
        "of logits, unbounded: high = the rest speaks for no class; comparable within one network and "
        "blocks only."
    )
    columns: ClassVar[tuple[str, ...]] = ()

    blocks: tuple[str, ...] = Field(
        default=("early", "last"),
        min_length=1,
        description="names of blocks; last, and early: the last one before the final reduction",
    )
    temperature: FiniteFloat = Field(default=1.0, gt=0, description="T, divides the logits")

    @field_validator("blocks")
    @classmethod
    def _once_each(cls, blocks: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(blocks)) < len(blocks):
            raise ValueError(f"{', '.join(blocks)}: one is named twice; expected each once")
        return blocks

    def extras(self) -> tuple[RankReduced, ...]:
        """Features without the largest singular value of each block."""
        return tuple(RankReduced(block=block) for block in self.blocks)

    def fit(self, train: Training) -> RankFeatScorer:
        """Nothing is fitted."""
        return RankFeatScorer(
            columns=tuple(extra.column for extra in self.extras()),
            weight=train.weight.astype(np.float64),
            bias=train.bias.astype(np.float64),
            temperature=self.temperature,
        )


@dataclass(frozen=True)
class RankFeatScorer:
    """Energy of the mean of several features' logits, which are the logits of their mean."""

    columns: tuple[str, ...]
    weight: Float
    """(C, D)."""
    bias: Float
    """(C,)."""
    temperature: float

    def __call__(self, batch: Batch) -> Float:
        """Negative free energy.

        Args:
            batch: a column of features (N, D) float for every block.

        Returns:
            (N,) float64.
        """
        feature = sum(batch[name].astype(np.float64, copy=False) for name in self.columns) / len(self.columns)
        logits = feature @ self.weight.T + self.bias
        score: Float = -self.temperature * logsumexp(logits, self.temperature)
        return score
