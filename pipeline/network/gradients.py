"""Gradients of a loss of each image by parameters of the network: many images at a time.

In a linear layer or a convolution that sees every image by itself, the gradient of an image is a product of
what goes in and of what comes back: one forward and one backward pass over all images give them all. Other
parameters are differentiated image by image, vectorised by `torch.func`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from pipeline.network import taps
from pipeline.network.classifier import Classifier


def per_image(
    classifier: Classifier, names: Sequence[str], images: Tensor, temperature: float
) -> dict[str, Tensor]:
    """Gradient of KL(u ‖ softmax(z / T)) of every image by every parameter; u uniform.

    Args:
        classifier: the network; it runs in float32.
        names: of parameters.
        images: (N, channels, H, W), normalised.
        temperature: T.

    Returns:
        (N, size) float32 by name.
    """
    factored = [name for name in names if _factors(classifier, name)]
    others = {name: classifier.module.get_parameter(name) for name in names if name not in factored}
    found = _products(classifier, factored, images, temperature) if factored else {}
    if others:

        def gradients(image: Tensor) -> dict[str, Tensor]:
            by_name = grad(_of_one)(others, classifier.module, image, temperature)
            return {name: each.flatten() for name, each in by_name.items()}

        found |= vmap(gradients)(images)
    return found


def _loss(logits: Tensor, temperature: float) -> Tensor:
    """(N,) KL(u ‖ softmax(z / T)), up to a constant."""
    return -functional.log_softmax(logits / temperature, dim=1).mean(dim=1)


def _of_one(parameters: Mapping[str, Tensor], module: nn.Module, image: Tensor, temperature: float) -> Tensor:
    logits: Tensor = functional_call(module, dict(parameters), (image.unsqueeze(0).clone(),))
    return _loss(logits, temperature)[0]


def _factors(classifier: Classifier, name: str) -> bool:
    """Whether a parameter belongs to a layer whose gradient is a product.

    The layer must run once and give one tensor per image: so it did for as many images as were traced.
    """
    layer, _, kind = name.rpartition(".")
    if layer not in (*classifier.taps.layers, classifier.taps.head) or kind not in ("weight", "bias"):
        return False
    module = classifier.module.get_submodule(layer)
    if isinstance(module, nn.Conv2d):
        return (
            type(module) is nn.Conv2d and module.padding_mode == "zeros" and isinstance(module.padding, tuple)
        )
    return type(module) is nn.Linear


def _products(
    classifier: Classifier, names: Sequence[str], images: Tensor, temperature: float
) -> dict[str, Tensor]:
    """Gradients by parameters of layers that `_factors`."""
    paths = dict.fromkeys(name.rpartition(".")[0] for name in names)
    layers = {path: classifier.module.get_submodule(path) for path in paths}
    sources: dict[str, Tensor] = {}
    probes: dict[str, Tensor] = {}

    def watch(layer: str) -> Any:
        def add(_: Any, inputs: Any, output: Tensor) -> Tensor:
            sources[layer] = inputs[0].detach().clone()  # a later layer may work in place
            probes[layer] = torch.zeros_like(output, requires_grad=True)
            return output + probes[layer]

        return add

    with taps.hooked(classifier.module, {layer: watch(layer) for layer in layers}), torch.enable_grad():
        total = _loss(classifier.module(images.clone()), temperature).sum()  # it may change its input
        backward = torch.autograd.grad(total, [probes[layer] for layer in layers], materialize_grads=True)
    found: dict[str, Tensor] = {}
    for (layer, module), gradient in zip(layers.items(), backward, strict=True):
        parts = _by(layer, module, sources[layer], gradient)
        found |= {name: each for name, each in parts if name in names}
    return found


def _by(layer: str, module: nn.Module, source: Tensor, gradient: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Names and gradients (N, size) of a layer's parameters, of what went in and of what comes back.

    Args:
        layer: its name.
        module: linear layer or convolution.
        source: (N, ..., I) or (N, I, H, W).
        gradient: (N, ..., O) or (N, O, H', W').
    """
    if isinstance(module, nn.Conv2d):
        shape = {name: getattr(module, name) for name in ("dilation", "padding", "stride")}
        columns = functional.unfold(source, module.kernel_size, **shape)
        split = (len(source), module.groups, -1, columns.shape[-1])
        columns, back = columns.view(split), gradient.reshape(split)
    else:
        columns = source.flatten(1, -2).mT if source.dim() > 2 else source.unsqueeze(2)
        back = gradient.flatten(1, -2).mT if gradient.dim() > 2 else gradient.unsqueeze(2)
    yield f"{layer}.weight", (back @ columns.mT).flatten(1)
    yield f"{layer}.bias", back.sum(dim=-1).flatten(1)
