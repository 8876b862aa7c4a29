"""Networks whose logits are the mean of two linear heads end in one linear layer, made of both.

(W1 x1 + b1 + W2 x2 + b2) / 2 is the linear layer [W1/2, W2/2] on the features beside each other, as of a
class token and a distillation token (Touvron et al., ICML 2021); where both heads read one feature, it is
(W1 + W2) / 2 on that. A BatchNorm before a head is linear in eval mode and goes into its weights where both
normalise one feature, as in LeViT (Graham et al., ICCV 2021).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.network import taps
from pipeline.network.channels import Call

Affine = tuple[Tensor, Tensor]
"""Weight (C, D) and bias (C,)."""


class First(nn.Module):
    """In place of the first head: its part of the sum is given by the second."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.feature: Tensor | None = None

    def forward(self, feature: Tensor) -> Tensor:
        """Zeros (N, C) for the feature (N, D), which is kept until the second head asks for it."""
        self.feature = feature
        return feature.new_zeros(len(feature), self.classes)


class Second(nn.Module):
    """In place of the second head: twice the logits, of which the network takes half."""

    def __init__(self, mean: Affine, first: First | None) -> None:
        super().__init__()
        weight, bias = mean
        self.mean = nn.Linear(weight.shape[1], len(weight))
        self.mean.weight.data, self.mean.bias.data = weight, bias
        self.first = (first,)  # no module of this one

    def forward(self, feature: Tensor) -> Tensor:
        """Twice the mean (N, C) of both heads."""
        (first,) = self.first
        if first is not None and first.feature is not None:
            feature, first.feature = torch.cat([first.feature, feature], dim=1), None
        mean: Tensor = self.mean(feature)
        return 2 * mean  # exact, as is the half


def merge(model: nn.Module, images: Tensor) -> bool:
    """Make one linear layer of two that are averaged; the model then has its name.

    Args:
        model: classifier in eval mode; its last two linear layers are replaced.
        images: (N, channels, side, side), all different.

    Returns:
        Whether the model is one of these; else it stays as it is.
    """
    calls, logits = taps.trace(model, images)
    pair = taps.alike(calls, logits)
    if len(pair) != 2 or not _is_mean(pair, logits):
        return False
    norms = [_norm(call, calls) for call in pair]
    normalised = [each for each in norms if each is not None]
    sources = [call.source for call in pair]
    affine = [taps.head_weight(call.module) for call in pair]
    if len(normalised) == 2 and _is_same(normalised[0].source, normalised[1].source):
        affine = [_folded(each, norm.module) for each, norm in zip(affine, normalised, strict=True)]
        for norm in normalised:
            model.set_submodule(norm.name, nn.Identity())
        sources = [norm.source for norm in normalised]
    (one, one_bias), (other, other_bias) = affine
    first, bias = First(len(one)), (one_bias + other_bias) / 2
    if _is_same(*sources):
        second = Second(((one + other) / 2, bias), None)
    else:
        second = Second((torch.cat([one, other], dim=1) / 2, bias), first)
    model.set_submodule(pair[0].name, first.eval())
    model.set_submodule(pair[1].name, second.eval().requires_grad_(False))
    return True


def _is_mean(pair: Sequence[Call], logits: Tensor) -> bool:
    """Whether the logits are the mean of what two layers give."""
    one, other = (call.result for call in pair)
    assert one is not None and other is not None
    largest = max(float(logits.abs().max()), 1.0)
    return float(((one + other) / 2 - logits).abs().max()) <= taps.TOLERANCE * largest


def _norm(head: Call, calls: Sequence[Call]) -> Call | None:
    """The BatchNorm that gives a head its input, if nothing that drops values lies between."""
    norm = None
    for call in calls:
        if isinstance(call.module, nn.BatchNorm1d) and _is_same(call.result, head.source):
            norm = call
        elif isinstance(call.module, nn.Dropout) and call.module.p > 0 and _is_same(call.source, head.source):
            return None
    return norm


def _is_same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors of a traced pass, none of which has been freed, are one."""
    if one is None or other is None:
        return False
    return (one.data_ptr(), one.shape, one.stride()) == (other.data_ptr(), other.shape, other.stride())


def _folded(head: Affine, norm: nn.Module) -> Affine:
    """Weight and bias of a head on what its BatchNorm reads."""
    assert isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None and norm.running_var is not None
    weight, bias = head
    scale = (norm.running_var + norm.eps).rsqrt()
    shift = -norm.running_mean * scale
    if norm.affine:
        scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
    return weight * scale, bias + weight @ shift
