"""FeatureNorm: norm of one block's activation, the block chosen by NormRatio on jigsaws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field

from pipeline.columns import BLOCK_NORM, Batch, Float
from pipeline.detectors.base import Detector, Jigsaw, Pass, Scorer, Training
from pipeline.errors import UserError, unknown

AUTO = "auto"


class FeatureNorm(Detector):
    """FeatureNorm of the block with the highest NormRatio.

    NormRatio is FeatureNorm of a training image over FeatureNorm of its jigsaw, averaged over images.
    """

    title: ClassVar[str] = "FeatureNorm (2023)"
    paper: ClassVar[str] = (
        "Yu, Shin, Lee, Jun, Lee: Block Selection Method for Using Feature Norm in Out-of-distribution "
        "Detection. CVPR 2023, arXiv:2212.02295"
    )
    formula: ClassVar[str] = (
        "score = -f(x; B), f(x; B) = (1/M) Σ_m ‖ReLU(F_m)‖_2 over the M channels of block B, "
        "B = argmax_B E_train[f(x; B) / f(jigsaw(x); B)]"
    )
    reading: ClassVar[str] = (
        "At most 0, the mean norm of the channels of one block with its sign changed: near 0 = the block "
        "hardly responds; comparable within one network, block and image size only, and dark or plain "
        "images score high whatever they show."
    )
    columns: ClassVar[tuple[str, ...]] = (BLOCK_NORM,)

    block: str = Field(
        default=AUTO,
        min_length=1,
        description="name of the block, or auto: the one with the highest NormRatio",
    )
    samples: int = Field(
        default=10_000, ge=2, description="training images that are cut into jigsaws; read if block is auto"
    )
    grid: int = Field(
        default=3, ge=2, description="a jigsaw has grid × grid shuffled tiles; read if block is auto"
    )

    def passes(self) -> tuple[Pass, ...]:
        """The jigsaw pass, unless the block is named."""
        return (self._jigsaw(),) if self.block == AUTO else ()

    def fit(self, train: Training) -> Scorer:
        """Choose the block.

        Raises:
            UserError: as `chosen`.
        """
        return FeatureNormScorer(self.chosen(train))

    def notices(self, train: Training) -> tuple[str, ...]:
        """Whether the premise fails: that images have a larger norm than their jigsaws, in the best block."""
        if self.block != AUTO:
            return ()
        best = train.passes[self._jigsaw()]["ratio"][self._best(train)]
        if best >= 1:
            return ()
        return (
            "jigsaws of training images have larger norms than the images in every block (the best NormRatio "
            f"is {best:.3f}, of {train.blocks[self._best(train)]}), so norms do not tell what the network "
            "knows: do not rely on this detector here, or name another block.",
        )

    def chosen(self, train: Training) -> int:
        """Position of the block in `block_norm`.

        Raises:
            UserError: if the model has no block of that name, or no block has a NormRatio.
        """
        if self.block == AUTO:
            return self._best(train)
        if self.block not in train.blocks:
            raise UserError(f"block: {unknown('block', self.block, train.blocks)}")
        return train.blocks.index(self.block)

    def _jigsaw(self) -> Jigsaw:
        return Jigsaw(samples=self.samples, grid=self.grid)

    def _best(self, train: Training) -> int:
        ratio = train.passes[self._jigsaw()]["ratio"]
        usable = np.isfinite(ratio)
        if not usable.any():
            raise UserError(
                f"block: no block has a finite NormRatio, got {ratio.tolist()} for blocks "
                f"{list(train.blocks)}; expected at least one. Name the block, or check model.blocks."
            )
        return int(np.argmax(np.where(usable, ratio, -np.inf)))


@dataclass(frozen=True)
class FeatureNormScorer:
    """Stored FeatureNorm of one block."""

    block: int
    """Position of the block in `block_norm`."""

    def __call__(self, batch: Batch) -> Float:
        """Negative FeatureNorm.

        Args:
            batch: `block_norm` (N, B) float.

        Returns:
            (N,) float64, at most 0.
        """
        norms = batch[BLOCK_NORM].astype(np.float64, copy=False)
        score: Float = -norms[:, self.block]
        return score
