"""What there is to know of a classifier before it runs: enough for all that looks at cached rows.

Imports no torch: a run whose features are all there needs none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.config.schema import Transform
from pipeline.detectors.base import Extra

if TYPE_CHECKING:
    from torch import Tensor

NO_BLOCKS = (
    "the model has no block with maps or tokens whose channels are certain. Name some with model.blocks, or "
    "drop the detector."
)

Probe = NDArray[np.float32]
"""(n, C) answers to fixed noise."""

TOLERANCE = 1e-3
"""Difference of answers, as a share of the largest, that is put down to how machines round."""

WRONG_SIZE = (RuntimeError, AssertionError, TypeError, ValueError, IndexError)
"""What modules raise on images of a size they were not made for."""


def same_network(one: Probe, other: Probe) -> bool:
    """Whether two answers to the probe differ no more than by how machines round."""
    return one.shape == other.shape and bool(abs(one - other).max() <= TOLERANCE * abs(one).max())


@dataclass(frozen=True)
class Layout:
    """How to read a module's output as one map per channel."""

    axis: int
    """Where the channels are: 1, or the last one."""
    positions: int
    """How many the grid of the traced images had."""
    prefix: int = 0
    """Tokens before those of the grid."""

    def maps(self, output: Tensor) -> Tensor:
        """View of an output as (N, M, H, W), or (N, M, 1, positions) if it holds tokens."""
        if self.axis == 1:
            return output
        if output.dim() == 4:
            return output.permute(0, 3, 1, 2)
        return output[:, self.prefix :].transpose(1, 2).unsqueeze(2)


@dataclass(frozen=True)
class Taps:
    """Names of modules, in the order they run."""

    head: str
    """The last linear layer."""
    blocks: tuple[str, ...]
    """FeatureNorm candidates."""
    early: str | None
    """The last block before the final reduction; three quarters down where nothing is reduced."""
    layers: tuple[str, ...]
    """Every module before the head that runs once and gives one tensor per image: where they can be mixed."""
    layouts: tuple[Layout, ...] = ()
    """Where the channels of each block are."""
    channels: tuple[int, ...] = ()
    """How many each block has."""

    @property
    def stages(self) -> dict[str, int]:
        """Channels of the blocks that end a stage, by name: the last one of every resolution.

        Where the resolution never changes, as in a vision transformer, a block after every quarter.
        """
        positions = [place.positions for place in self.layouts]
        last = [number for number, (own, after) in enumerate(pairwise([*positions, 0])) if own != after]
        if len(last) == 1 and len(positions) > 4:
            last = [math.ceil(len(positions) * quarter / 4) - 1 for quarter in (1, 2, 3, 4)]
        return {self.blocks[number]: self.channels[number] for number in last}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        """What `asdict` made a document of, after it was JSON."""
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in document.items()
        }
        return replace(cls(**plain), layouts=tuple(Layout(**each) for each in document["layouts"]))


@dataclass(frozen=True)
class Description:
    """What a classifier is, where it is tapped, and its last layer."""

    transform: Transform
    taps: Taps
    digest: str
    """SHA-256 of the state dict."""
    architecture: str
    """SHA-256 of the module tree and of the source that built it."""
    probe: Probe
    """(n, C) what it answers to fixed noise, on the CPU: tells what the source does not show."""
    head: tuple[NDArray[np.float32], NDArray[np.float32]]
    """Weight (C, D) and bias (C,) of the last linear layer."""

    def width(self, spec: Extra) -> int:
        """Values of an extra per image."""
        classes, features = self.head[0].shape
        return spec.width(classes, features, tuple(self.taps.stages.values()))

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """Its arrays by name."""
        return {"probe": self.probe, "weight": self.head[0], "bias": self.head[1]}

    def document(self) -> dict[str, Any]:
        """The rest of it, as JSON holds it."""
        return {
            "transform": self.transform.model_dump(mode="json"),
            "taps": asdict(self.taps),
            "digest": self.digest,
            "architecture": self.architecture,
        }

    @classmethod
    def of(cls, document: Mapping[str, Any], arrays: Mapping[str, NDArray[np.float32]]) -> Description:
        """What `document` and `arrays` were made of."""
        return Description(
            Transform(**document["transform"]),
            Taps.of(document["taps"]),
            document["digest"],
            document["architecture"],
            arrays["probe"],
            (arrays["weight"], arrays["bias"]),
        )
