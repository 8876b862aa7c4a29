"""Where the channels are in what a module gives: decided by evidence from a traced batch, never by a guess.

FeatureNorm sums over positions and averages over channels, so a wrong channel axis gives a wrong score
without any error. Three kinds of evidence count:

* images are square, and so are the maps a network makes of them: (N, a, b, b) has its channels at a,
  (N, b, b, a) at the end;
* modules that work along a known axis and take or give a tensor of that shape, inside the module or right
  behind it: convolutions and the normalisations of maps along axis 1, Linear and LayerNorm along the last;
* tokens that are equal for different images before anything has mixed them are class or register tokens,
  the others are the grid; the mean over positions does not ask for their order.

What is left open by them, or contradicts them, has no layout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export.unflatten import InterpreterModule

from pipeline.network.description import Layout

_FIRST = re.compile(r"(torch|torchvision|timm)\..*(Conv2d\w*|Norm\w*2d|GroupNorm\w*)$")
_LAST = re.compile(r"(torch|torchvision|timm)\..*\.(Linear|LayerNorm|RMSNorm)$")
_ELEMENTWISE = re.compile(r"torch\.nn\.modules\.activation\.(?!.*(Attention|[Ss]oftm))")
_SAME = 1e-6
"""Largest difference, relative to the largest value, between tokens that count as equal."""


@dataclass(frozen=True)
class Call:
    """What one module did in the traced forward pass."""

    name: str
    module: nn.Module
    source: Tensor | None
    """First positional argument."""
    result: Tensor | None


def kind(module: nn.Module) -> str:
    """Qualified name of a module's class; in an exported program, of the class it had before."""
    if isinstance(module, InterpreterModule):
        return str(module.type_name())
    return f"{type(module).__module__}.{type(module).__qualname__}"


def of(call: Call, calls: Sequence[Call], images: int) -> Layout | None:
    """Layout of what one call gave, or None where it holds no map or its channels are not certain.

    Args:
        call: one of `calls`.
        calls: the whole traced pass, in order of completion.
        images: how many images went through, at least two, square and all different.
    """
    result = call.result
    if result is None or not result.is_floating_point() or result.shape[:1] != (images,):
        return None
    if result.dim() == 4:
        first, second, third = result.shape[1:]
        axes = {axis for axis, square in ((1, second == third > 1), (3, first == second > 1)) if square}
        known = set(_axes(call, calls)) if axes else set()
        axes = axes & known if known else axes
        return Layout(axes.pop(), second**2) if len(axes) == 1 else None
    if result.dim() == 3 and set(_axes(call, calls)) == {2}:
        prefix = _prefix(calls, result.shape)
        return None if prefix is None else Layout(2, result.shape[1] - prefix, prefix)
    return None


def _axes(call: Call, calls: Sequence[Call]) -> Iterator[int]:
    """Channel axes that modules in or right behind a call know of tensors shaped as its result."""
    assert call.result is not None
    shape, last = call.result.shape, call.result.dim() - 1
    elementwise = _ELEMENTWISE.match(kind(call.module)) is not None
    for other in calls:
        inside = other is call or other.name.startswith(f"{call.name}.")
        before = elementwise and other.result is call.source
        seen = [other.source, other.result] if inside or before else []
        if other.source is call.result:
            seen.append(other.source)
        if any(tensor is not None and tensor.shape == shape for tensor in seen):
            if _LAST.match(kind(other.module)):
                yield last
            elif _FIRST.match(kind(other.module)):
                yield 1


def _prefix(calls: Sequence[Call], shape: torch.Size) -> int | None:
    """How many class and register tokens come before the grid; None if the rest is no square grid."""
    held = (tensor for call in calls for tensor in (call.source, call.result))
    tokens = next(t for t in held if t is not None and t.dim() == 3 and t.shape[:2] == shape[:2])
    difference = (tokens - tokens[:1]).abs().amax(dim=(0, 2))
    varies = difference > _SAME * float(tokens.abs().max())
    prefix = int(varies.int().argmax())
    grid = len(varies) - prefix
    is_grid = bool(varies[prefix:].all()) and grid > 1 and math.isqrt(grid) ** 2 == grid
    return prefix if is_grid else None
