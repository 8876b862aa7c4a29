"""A small classifier whose arithmetic is exact, and the images it tells apart.

Pixels are 0 or 255, so that inputs are -1 or 1; weights are small integers times powers of two; averages are
over powers of two. Every sum then has few enough binary digits for float32, in whatever order it is made:
features and logits have the same bits on every machine and with every version of torch.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

CLASSES, SIDE, CELL = 5, 16, 4

_SEED = 302
"""With it one feature is 0 everywhere, and the covariance of the others is far from singular."""

Pixels = NDArray[np.uint8]


def patterns(rng: np.random.Generator, count: int) -> Pixels:
    """Images of black and white squares."""
    cells = rng.integers(0, 2, (count, SIDE // CELL, SIDE // CELL), dtype=np.uint8)
    return 255 * cells.repeat(CELL, axis=1).repeat(CELL, axis=2)


def noisy(rng: np.random.Generator, images: Pixels, eighths: int) -> Pixels:
    """The images with so many eighths of their pixels inverted."""
    return np.where(rng.integers(0, 8, images.shape) < eighths, 255 - images, images).astype(np.uint8)


def classes() -> Pixels:
    """The image of each class without noise."""
    return patterns(np.random.Generator(np.random.PCG64(1)), CLASSES)


class Block(nn.Module):
    """A convolution whose windows do not overlap, and a ReLU; with a shortcut where nothing else changes."""

    def __init__(self, channels_in: int, channels_out: int, side: int, unit: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, side, side)
        self.relu = nn.ReLU()
        self.adds = side == 1 and channels_in == channels_out
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels_in, H, W) to (N, channels_out, H / side, W / side)."""
        y = self.relu(self.conv(x))
        return x + y if self.adds else y


class Network(nn.Module):
    """Four blocks of 8, 16, 16 and 32 channels, at three resolutions, and a linear layer behind dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.block1 = Block(1, 8, 2, 1 / 2)
        self.block2 = Block(8, 16, 2, 1 / 8)
        self.block3 = Block(16, 16, 1, 1 / 4)
        self.block4 = Block(16, 32, 2, 1 / 8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(32, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """Map images (N, 1, 16, 16) to features (N, 32)."""
        x = self.block4(self.block3(self.block2(self.block1(x))))
        return self.pool(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 1, 16, 16) to logits (N, 5)."""
        logits: Tensor = self.head(self.dropout(self.features(x)))
        return logits


@torch.no_grad()
def build() -> Network:
    """The network with fixed weights: its blocks are drawn, its head knows a few images of each class."""
    network, rng = Network().eval(), np.random.Generator(np.random.PCG64(_SEED))
    for block in (network.block1, network.block2, network.block3, network.block4):
        draw = rng.integers(-1, 2, block.conv.weight.shape)
        block.conv.weight.copy_(torch.tensor(block.unit * draw))
        block.conv.bias.copy_(torch.tensor(block.unit * rng.integers(0, 4, len(draw))))
    known = noisy(rng, classes().repeat(16, axis=0), 1)
    feature = network.features(torch.tensor(known[:, None]).float() / 127.5 - 1)
    mean = feature.double().view(CLASSES, 16, -1).mean(dim=1)
    weight = (128 * (mean - mean.mean(dim=0) * 3 / 4)).round() / 16
    network.head.weight.copy_(weight)
    network.head.bias.copy_((-4 * (weight * (mean + mean.mean(dim=0))).sum(dim=1)).round() / 8)
    return network
