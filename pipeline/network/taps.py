"""Where to look inside a classifier: its head, its penultimate feature and its blocks.

Found by running one batch with hooks on every module. Hooks live inside context managers only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError, unknown
from pipeline.network import channels
from pipeline.network.channels import Call
from pipeline.network.description import Layout, Taps

TOLERANCE = 1e-5
"""Largest difference between the model's logits and `head(feature)`, relative to the largest logit."""

SCRIPTED = (
    "model: its layers are TorchScript, which runs without Python, so that none can be looked at. Build the "
    "network from its Python code and give these weights as a state dict (torch.save(torch.jit.load(FILE)"
    ".state_dict(), 'weights.pt')), or export that network (model.source: exported)."
)
"""What is wrong with TorchScript."""

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.ELU)


@contextmanager
def hooked(model: nn.Module, hooks: Mapping[str, Callable[[Any, Any, Any], Any]]) -> Iterator[None]:
    """Forward hooks on named modules for the time of the `with` block."""
    with ExitStack() as stack:
        for name, hook in hooks.items():
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield


def find(model: nn.Module, images: Tensor, head: str = "auto", blocks: tuple[str, ...] | None = None) -> Taps:
    """Find the taps of a classifier by tracing one batch, and check them.

    Args:
        model: classifier in eval mode.
        images: (N, channels, side, side), N >= 2, all different.
        head: name of the last linear layer, or "auto".
        blocks: names of the FeatureNorm blocks, or None to find them.

    Raises:
        UserError: a named module does not exist or does not run, the model does not end in a linear
            layer, that layer on the penultimate feature does not give the logits, or a named block has
            no map whose channels are certain.
    """
    calls, logits = trace(model, images)
    once = _once(calls)
    chosen = _head(model, calls, logits) if head == "auto" else _named(model, once, head, "model.head")
    _check_head(once[chosen], logits, [call.name for call in alike(calls, logits)])
    if blocks is None:
        places = _blocks(model, calls, len(images))
    else:
        for name in blocks:
            _named(model, once, name, "model.blocks")
        places = {name: _place(once[name], calls, len(images)) for name in blocks}
    before = calls[: calls.index(once[chosen])]
    layers = tuple(call.name for call in before if call.name in once and _is_batch(call.result, len(images)))
    channels = tuple(_channels(once[name], place) for name, place in places.items())
    return Taps(chosen, tuple(places), _early(places), layers, tuple(places.values()), channels)


def _channels(call: Call, place: Layout) -> int:
    assert call.result is not None
    return call.result.shape[place.axis]


def penultimate(head: nn.Module, source: Tensor | None) -> Tensor:
    """Penultimate feature: the input of the head, averaged over positions where it has several.

    A linear layer and the mean over positions commute, so a head that runs at every position and is
    averaged afterwards is the same head on the averaged input. Whether the model does just that shows
    when `find` compares the logits; SqueezeNet does not, there is a ReLU before its mean.

    Args:
        head: linear layer or 1x1 convolution.
        source: (N, D) or (N, ..., D); (N, D, H, W) for a convolution.

    Returns:
        (N, D).
    """
    width = head_weight(head)[0].shape[1]
    axis = 1 if _is_convolution(head) else -1
    if source is None or source.dim() < 2 or source.shape[axis] != width:
        shape = None if source is None else tuple(source.shape)
        raise UserError(
            f"model.head: its input has shape {shape}; expected {width} features per image. "
            "Name another layer with model.head."
        )
    if source.numel() == source.shape[0] * width:  # len() would fix the number of images of a graph
        return source.flatten(1)
    return source.movedim(axis, 1).flatten(2).mean(dim=2)


def head_weight(head: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and bias (C,) of a linear layer or 1x1 convolution; zeros for a missing bias."""
    weight: Tensor = head.weight.detach().flatten(1)  # type: ignore[operator]
    bias: Tensor | None = getattr(head, "bias", None)
    return weight, weight.new_zeros(len(weight)) if bias is None else bias.detach()


def alike(calls: list[Call], logits: Tensor) -> list[Call]:
    """The calls of linear layers that ran exactly once and gave as many outputs as the model."""
    return [call for call in _linear(calls) if call.result is not None and call.result.shape == logits.shape]


def _check_head(call: Call, logits: Tensor, alike: list[str]) -> None:
    """Refuse a head that does not turn the penultimate feature into the model's logits."""
    head, name = call.module, call.name
    if not _is_linear(head):
        raise UserError(
            f"model.head: {name!r} is a {_class(head)}; expected Linear or a 1x1 convolution. "
            "The detectors need a linear last layer."
        )
    feature = penultimate(head, call.source)
    weight, bias = head_weight(head)
    rebuilt = feature @ weight.T + bias
    if rebuilt.shape != logits.shape:
        raise UserError(
            f"model.head: {name!r} gives {rebuilt.shape[1]} logits, the model {tuple(logits.shape[1:])}."
        )
    scale = max(float(logits.abs().max()), 1.0)
    error = float((rebuilt - logits).abs().max()) / scale
    if error <= TOLERANCE:
        return
    differs = f"differs from the model's output by {error:.2g} (relative), more than {TOLERANCE:.0e}"
    if call.source is not None and call.source.numel() > feature.numel():
        raise UserError(
            f"model.head: {name!r} runs at every position, and the mean of what it gives {differs}. "
            "Something that is not linear, such as a ReLU, lies between it and the pooling: no linear layer "
            "gives the logits, and the detectors need one."
        )
    if len(alike) > 1:
        raise UserError(
            f"model.head: {name!r} applied to its input {differs}. {len(alike)} layers have as many outputs "
            f"({', '.join(alike)}), and the model gives neither that of one nor the mean of two. Write a "
            "factory (model.source: factory) whose network returns the logits of one of them, or their mean."
        )
    raise UserError(
        f"model.head: {name!r} applied to its input {differs}. "
        "Something follows the layer; name the true last one."
    )


def trace(model: nn.Module, images: Tensor) -> tuple[list[Call], Tensor]:
    """Run one batch and record every module call in order of completion.

    Raises:
        UserError: its output is no logits.
    """
    calls: list[Call] = []

    def recorder(name: str) -> Callable[[Any, Any, Any], None]:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            source = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
            calls.append(Call(name, module, source, output if isinstance(output, Tensor) else None))

        return record

    names = [name for name, part in model.named_modules() if name and not _is_scripted(part)]
    with hooked(model, {name: recorder(name) for name in names}), torch.inference_mode():
        logits = model(images)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(
            f"model: its output is {found}; expected logits of shape (N, classes). A network that returns "
            "more takes a module around it whose forward returns the logits alone: docs/models.md, factory."
        )
    return calls, logits


def _once(calls: list[Call]) -> dict[str, Call]:
    """The calls of modules that ran exactly once."""
    count = Counter(call.name for call in calls)
    return {call.name: call for call in calls if count[call.name] == 1}


def _named(model: nn.Module, once: dict[str, Call], name: str, where: str) -> str:
    if name in once:
        return name
    existing = [found for found, _ in model.named_modules() if found]
    if name in existing:
        raise UserError(f"{where}: {name!r} does not run exactly once per forward pass; name another layer.")
    raise UserError(f"{where}: {unknown('layer', name, existing)}")


def _is_scripted(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


def _class(module: nn.Module) -> str:
    """Name of a module's class without its package."""
    return channels.kind(module).rpartition(".")[2]


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) or _class(module) == "Conv2d"


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    if _is_convolution(module):
        return weight.shape[2:] == (1, 1) and getattr(module, "groups", 1) == 1
    return isinstance(module, nn.Linear) or _class(module) == "Linear"


def _linear(calls: list[Call]) -> list[Call]:
    """The calls of linear layers and 1x1 convolutions that ran exactly once."""
    return [call for call in _once(calls).values() if _is_linear(call.module)]


def _head(model: nn.Module, calls: list[Call], logits: Tensor) -> str:
    """The last linear layer that gives the logits, or as many of them at several positions."""
    last_first = _linear(calls)[::-1]
    whole = [call for call in last_first if call.result is not None and call.result.numel() == logits.numel()]
    for call in whole or last_first:
        if len(head_weight(call.module)[0]) == logits.shape[1]:
            return call.name
    if any(map(_is_scripted, model.modules())):
        raise UserError(SCRIPTED)
    last = next((call for call in reversed(calls) if not list(call.module.children())), None)
    what = f"{last.name!r} ({_class(last.module)})" if last else type(model).__name__
    raise UserError(
        f"model: no Linear or 1x1 convolution gives the {logits.shape[1]} logits; the last layer is {what}. "
        "The detectors need a linear last layer; name it with model.head if it was missed."
    )


def _is_batch(result: Tensor | None, images: int) -> bool:
    return result is not None and result.is_floating_point() and result.shape[:1] == (images,)


def _place(call: Call, calls: list[Call], images: int) -> Layout:
    """Layout of a block that the user names."""
    place = channels.of(call, calls, images)
    if place is None:
        shape = None if call.result is None else tuple(call.result.shape)
        raise UserError(
            f"model.blocks: {call.name!r} gives {shape}, no map whose channels are certain; FeatureNorm "
            "needs (N, M, H, W), (N, H, W, M) or (N, tokens, M) of square images. Name another."
        )
    return place


def _blocks(model: nn.Module, calls: list[Call], images: int) -> dict[str, Layout]:
    """Outermost modules of a repeated class that give maps, with their like; else the activations that do.

    So a ResNet gives its residual blocks, a vision transformer its encoder blocks, a VGG the outputs of its
    ReLUs. A module beside a block that has weights of its own counts as a block too, as the two Inception
    modules that occur only once: the layers inside them are branches, not steps of the network.
    """
    once = _once(calls)
    composite = {
        name: channels.kind(module)
        for name, module in model.named_modules()
        if name and any(list(child.parameters()) for child in module.children())
    }
    plain = ("torch.nn.modules.container.Sequential", "torch.nn.modules.container.ModuleList")
    count = Counter(composite.values())
    own = [name for name, kind in composite.items() if kind not in plain and name in once]
    places = {name: place for name in own if (place := channels.of(once[name], calls, images)) is not None}
    outer = _outermost([name for name in places if count[composite[name]] > 1])
    beside = {name.rpartition(".")[0] for name in outer}
    outer = _outermost([name for name in places if name in outer or name.rpartition(".")[0] in beside])
    if not outer:
        outer = [name for name, call in once.items() if _is_activation(call.module)]
        found = {name: channels.of(once[name], calls, images) for name in outer}
        places = {name: place for name, place in found.items() if place is not None}
    return {call.name: places[call.name] for call in calls if call.name in outer and call.name in places}


def _is_activation(module: nn.Module) -> bool:
    return isinstance(module, _ACTIVATIONS) or _class(module) in {kind.__name__ for kind in _ACTIVATIONS}


def _outermost(names: list[str]) -> list[str]:
    """The names that lie inside no other one."""
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _early(blocks: dict[str, Layout]) -> str | None:
    """The deepest block before the last spatial reduction: the third of a ResNet's four stages.

    Where nothing is reduced, as in a vision transformer, the block three quarters down.
    """
    if not blocks:
        return None
    names, last = list(blocks), list(blocks.values())[-1]
    larger = [name for name, place in blocks.items() if place.positions > last.positions]
    return larger[-1] if larger else names[math.ceil(0.75 * len(names)) - 1]
