"""Where to look inside a classifier: its head, its penultimate feature and its blocks.

Found by running one batch with hooks on every module. Hooks live inside context managers only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError, unknown

TOLERANCE = 1e-5
"""Largest difference between the model's logits and `head(feature)`, relative to the largest logit."""


@dataclass(frozen=True)
class Taps:
    """Names of modules, in the order they run."""

    head: str
    """The last linear layer."""
    blocks: tuple[str, ...]
    """FeatureNorm candidates."""
    early: str | None
    """The last block before the final reduction."""
    layers: tuple[str, ...]
    """Every module before the head that runs once and gives a tensor: where images can be mixed."""


@dataclass(frozen=True)
class _Call:
    """What one module did in the traced forward pass."""

    name: str
    module: nn.Module
    source: Tensor | None
    result: Tensor | None


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
        images: (N, channels, H, W), N >= 1.
        head: name of the last linear layer, or "auto".
        blocks: names of the FeatureNorm blocks, or None to find them.

    Raises:
        UserError: a named module does not exist or does not run, the model does not end in a linear
            layer, or that layer on the penultimate feature does not give the logits.
    """
    calls, logits = _trace(model, images)
    once = _once(calls)
    chosen = _head(model, calls, logits) if head == "auto" else _named(model, once, head, "model.head")
    feature = penultimate(once[chosen].source)
    check_head(model.get_submodule(chosen), feature, logits, chosen)
    if blocks is None:
        maps = _blocks(model, calls)
    else:
        maps = tuple(_named(model, once, name, "model.blocks") for name in blocks)
        for name in maps:
            if not _is_map(once[name].result):
                raise UserError(f"model.blocks: {name!r} gives no (N, M, H, W) map; FeatureNorm needs one.")
    before = calls[: calls.index(once[chosen])]
    layers = tuple(call.name for call in before if call.name in once and call.result is not None)
    return Taps(chosen, maps, _early([(name, once[name].result) for name in maps]), layers)


def penultimate(source: Tensor | None) -> Tensor:
    """(N, D) input of the head, flattened if it is (N, D, 1, 1)."""
    if source is None or source.flatten(1).shape[1] != source.shape[1]:
        raise UserError(
            f"model.head: its input has shape {None if source is None else tuple(source.shape)}; "
            "expected one pooled vector per image. Name another layer with model.head."
        )
    return source.flatten(1)


def head_weight(head: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and bias (C,) of a linear layer or 1x1 convolution; zeros for a missing bias."""
    weight: Tensor = head.weight.detach().flatten(1)  # type: ignore[operator]
    bias: Tensor | None = head.bias  # type: ignore[assignment]
    return weight, weight.new_zeros(len(weight)) if bias is None else bias.detach()


def check_head(head: nn.Module, feature: Tensor, logits: Tensor, name: str) -> None:
    """Refuse a head that does not turn the penultimate feature into the model's logits."""
    if not _is_linear(head):
        raise UserError(
            f"model.head: {name!r} is a {type(head).__name__}; expected Linear or a 1x1 convolution. "
            "The detectors need a linear last layer."
        )
    weight, bias = head_weight(head)
    rebuilt = feature @ weight.T + bias
    if rebuilt.shape != logits.shape:
        raise UserError(
            f"model.head: {name!r} gives {rebuilt.shape[1]} logits, the model {tuple(logits.shape[1:])}."
        )
    scale = max(float(logits.abs().max()), 1.0)
    error = float((rebuilt - logits).abs().max()) / scale
    if not error <= TOLERANCE:
        raise UserError(
            f"model.head: {name!r} applied to its input differs from the model's output by {error:.2g} "
            f"(relative), more than {TOLERANCE:.0e}. Something follows the layer; name the true last one."
        )


def _trace(model: nn.Module, images: Tensor) -> tuple[list[_Call], Tensor]:
    """Run one batch and record every module call in order of completion."""
    calls: list[_Call] = []

    def recorder(name: str) -> Callable[[Any, Any, Any], None]:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            source = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
            calls.append(_Call(name, module, source, output if isinstance(output, Tensor) else None))

        return record

    names = [name for name, _ in model.named_modules() if name]
    with hooked(model, {name: recorder(name) for name in names}), torch.inference_mode():
        logits = model(images)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"model: its output is {found}; expected logits of shape (N, classes).")
    return calls, logits


def _once(calls: list[_Call]) -> dict[str, _Call]:
    """The calls of modules that ran exactly once."""
    count = Counter(call.name for call in calls)
    return {call.name: call for call in calls if count[call.name] == 1}


def _named(model: nn.Module, once: dict[str, _Call], name: str, where: str) -> str:
    if name in once:
        return name
    existing = [found for found, _ in model.named_modules() if found]
    if name in existing:
        raise UserError(f"{where}: {name!r} does not run exactly once per forward pass; name another layer.")
    raise UserError(f"{where}: {unknown('layer', name, existing)}")


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def _head(model: nn.Module, calls: list[_Call], logits: Tensor) -> str:
    """The last linear layer whose output is the logits."""
    once = _once(calls).values()
    for call in reversed(once):
        if _is_linear(call.module) and call.result is not None and call.result.numel() == logits.numel():
            return call.name
    last = next((call for call in reversed(calls) if not list(call.module.children())), None)
    what = f"{last.name!r} ({type(last.module).__name__})" if last else type(model).__name__
    raise UserError(
        f"model: no Linear or 1x1 convolution gives the {logits.shape[1]} logits; the last layer is {what}. "
        "The detectors need a linear last layer; name it with model.head if it was missed."
    )


def _is_map(result: Tensor | None) -> bool:
    """Whether this is (N, M, H, W): square, as the image is; (N, H, W, M) of a token model is not."""
    if result is None or result.dim() != 4 or not result.is_floating_point():
        return False
    return result.shape[2] == result.shape[3] > 1


def _blocks(model: nn.Module, calls: list[_Call]) -> tuple[str, ...]:
    """Outermost modules of a repeated class that give maps; else the activations that do.

    So a ResNet gives its residual blocks, a VGG the outputs of its ReLUs.
    """
    once = _once(calls)
    kinds = Counter(type(module) for module in model.modules() if list(module.children()))
    plain = (nn.Sequential, nn.ModuleList)

    def repeated(name: str, module: nn.Module) -> bool:
        return (
            kinds[type(module)] > 1
            and type(module) not in plain
            and name in once
            and _is_map(once[name].result)
        )

    inner = {name for name, module in model.named_modules() if name and repeated(name, module)}
    outer = {name for name in inner if not any(name.startswith(f"{other}.") for other in inner)}
    if not outer:
        activations = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.ELU)
        outer = {
            name
            for name, call in once.items()
            if isinstance(call.module, activations) and _is_map(call.result)
        }
    return tuple(call.name for call in calls if call.name in outer)


def _early(maps: list[tuple[str, Tensor | None]]) -> str | None:
    """The deepest block before the last spatial reduction: the third of a ResNet's four stages."""
    areas = [(name, result.shape[-1] * result.shape[-2]) for name, result in maps if result is not None]
    larger = [name for name, area in areas if area > areas[-1][1]]
    return larger[-1] if larger else (areas[-1][0] if areas else None)
