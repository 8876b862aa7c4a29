"""Columns that take the network beyond its one forward pass: perturbed, altered and differentiated.

Each is a function of the classifier and one batch of fixed shape; a row does not depend on the others.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pipeline.columns import Pixels, padded
from pipeline.config import schema
from pipeline.detectors.base import Dropped, Extra, ParameterGradient, Perturbed, Pooled, RankReduced
from pipeline.errors import UserError, unknown
from pipeline.network import channels, gradients, taps
from pipeline.network.classifier import Classifier, fitting
from pipeline.network.description import NO_BLOCKS, WRONG_SIZE, Layout

GRADIENTS = 2**27
"""Most bytes of per-image parameter gradients at once."""

_SHORT = 64
"""Entries of a gradient that are summed in float32."""

_CHANNELWISE = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Classes with weights; also by name: in an exported program, modules only know which class they had."""


def measure(classifier: Classifier, spec: Extra, pixels: Pixels, keys: Sequence[str]) -> NDArray[np.float32]:
    """The column of an extra for one batch.

    Args:
        classifier: on the device where it is to run.
        spec: what to compute.
        pixels: (N, H, W, channels) uint8.
        keys: of each image; what is random depends on them alone.

    Returns:
        (N, width) float32.
    """
    key = "extract.batch_size" if spec.tapped else "extract.extras_batch_size"
    with fitting(len(pixels), key), torch.no_grad():
        found = _KINDS[type(spec)](classifier, spec, classifier.images(pixels), keys)
        return found.float().cpu().numpy()


def column(
    classifier: Classifier, spec: Extra, pixels: Pixels, keys: Sequence[str], settings: schema.Extract
) -> NDArray[np.float32]:
    """The same for any number of images, in batches of the configured size, the last one padded.

    What a forward pass brings along has batches of its size: it has the same bits without that pass.
    """
    size = settings.batch_size if spec.tapped else settings.extras_size
    found = []
    for start in range(0, len(pixels), size):
        some, own = pixels[start : start + size], list(keys[start : start + size])
        whole = padded(some, size), own + own[-1:] * (size - len(own))
        found.append(measure(classifier, spec, *whole)[: len(own)])
    return np.concatenate(found)


@contextmanager
def beside(classifier: Classifier, specs: Iterable[Extra]) -> Iterator[dict[Extra, Tensor]]:
    """Those extras that a plain forward pass in the `with` block brings along; none if it is compiled."""
    found: dict[Extra, Tensor] = {}
    for spec in specs:
        if isinstance(spec, Pooled) and classifier.compiled is None:
            with _pooling(classifier) as means:
                yield found
            found[spec] = _joined(classifier, means)
            return
    yield found


def check(spec: Extra, classifier: Classifier) -> None:
    """Try an extra on two images.

    Raises:
        UserError: why the network cannot give it, and what to do about it.
    """
    if type(spec) not in _KINDS:
        known = [kind.__name__ for kind in _KINDS]
        raise UserError(f"extras: {unknown('extra', type(spec).__name__, known)}")
    transform = classifier.transform
    shape = (2, transform.crop, transform.crop, transform.channels)
    pixels = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    try:
        found = measure(classifier, spec, pixels, ["0", "1"])
    except UserError:
        raise
    except (*WRONG_SIZE, NotImplementedError) as error:
        raise UserError(f"the model does not allow it ({spec.kind}): {error}. Drop the detector.") from error
    if isinstance(spec, Perturbed) and np.isnan(found).any(axis=1).all():
        raise UserError(f"the model's input gradient is not finite ({spec.kind}). Drop the detector.")
    if isinstance(spec, ParameterGradient):
        for name, norms in zip(spec.layers, found.T, strict=True):
            if not norms.any():
                raise UserError(f"layers: no gradient reaches {name!r}. Name another.")


def _perturbed(classifier: Classifier, spec: Perturbed, images: Tensor, _: Sequence[str]) -> Tensor:
    """See `Perturbed`; ties among the smallest |dF / dx| are broken by position."""
    with torch.enable_grad():
        moved = images.clone().requires_grad_()
        logits = classifier.answer(moved.clone())[1]  # a network may change its input in place
        value = logits
        if (
            spec.objective == "log_softmax"
        ):  # times T, which changes no sign: else half precision loses gradients at a high T
            value = spec.temperature * functional.log_softmax(logits / spec.temperature, dim=1)
        predicted = value.gather(1, logits.argmax(dim=1, keepdim=True))
        (gradient,) = torch.autograd.grad(predicted.sum(), moved)
    sign = torch.where(gradient.isnan(), gradient, gradient.sign())  # torch's sign of NaN is 0
    step = spec.step * sign
    if spec.pixels:
        step /= torch.tensor(classifier.transform.std, device=images.device).view(1, -1, 1, 1)
    if spec.share < 1:
        magnitude = gradient.abs().flatten(1)
        count = max(1, int(spec.share * magnitude.shape[1]))
        order = magnitude.sort(dim=1, stable=True).indices[:, :count]
        chosen = torch.zeros_like(magnitude).scatter_(1, order, 1.0)
        step *= chosen.view_as(step)
    return classifier.answer(images + step)[0]


def _rank_reduced(classifier: Classifier, spec: RankReduced, images: Tensor, _: Sequence[str]) -> Tensor:
    """See `RankReduced`."""
    name = _block(classifier, spec)
    place = classifier.taps.layouts[classifier.taps.blocks.index(name)]

    def reduce(_: Any, __: Any, output: Tensor) -> Tensor:
        return _without_largest(output, place)

    with taps.hooked(classifier.module, {name: reduce}):
        return classifier.answer(images)[0]


def _block(classifier: Classifier, spec: RankReduced) -> str:
    """Name of the block that is meant."""
    found = classifier.taps
    if not found.blocks or found.early is None:
        raise UserError(NO_BLOCKS)
    if spec.block in ("last", "early"):
        return found.blocks[-1] if spec.block == "last" else found.early
    if spec.block not in found.blocks:
        raise UserError(unknown("block", spec.block, ("early", "last", *found.blocks)))
    return spec.block


def _without_largest(output: Tensor, place: Layout) -> Tensor:
    """A block's output minus s₁ u₁ v₁ᵀ of each image's (M, positions) matrix.

    All tokens count as positions, those that stand for no position included: heads often read just one.
    The leading singular vector is the leading eigenvector of the smaller Gram matrix: the projection on its
    complement is all that is needed of the decomposition. Of a matrix that is not finite there is none, which
    is no error of the other images: NaN counts as 0, and infinity as the largest number.
    """
    changed = output.clone()
    maps = changed.transpose(1, 2) if changed.dim() == 3 else place.maps(changed)
    matrix = maps.flatten(2).nan_to_num().double()  # infinite ones stay finite when they are squared
    wide = matrix.shape[1] <= matrix.shape[2]
    vector = torch.linalg.eigh(matrix @ matrix.mT if wide else matrix.mT @ matrix).eigenvectors[:, :, -1:]
    largest = vector @ (vector.mT @ matrix) if wide else (matrix @ vector) @ vector.mT
    maps.copy_((matrix - largest).view(maps.shape))
    return changed


def _dropped(classifier: Classifier, spec: Dropped, images: Tensor, keys: Sequence[str]) -> Tensor:
    """See `Dropped`; the masks of an image follow from its key, the seed and the number of the sample."""
    layers = _dropouts(classifier)
    words = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") for key in keys]
    total = torch.zeros((), dtype=torch.float64, device=images.device)
    for sample in range(spec.samples):
        rngs = [np.random.default_rng([spec.seed, sample, word]) for word in words]
        states = [rng.bit_generator.state for rng in rngs]
        hooks = {name: _dropping(name, *how, rngs) for name, how in layers.items()}
        with taps.hooked(classifier.module, hooks):
            total = total + classifier.answer(images.clone())[1].double().softmax(dim=1)
    if states == [rng.bit_generator.state for rng in rngs]:
        raise UserError(f"the model's dropout layers ({', '.join(layers)}) do not run. Drop the detector.")
    return total / spec.samples


def _dropouts(classifier: Classifier) -> dict[str, tuple[float, bool]]:
    """Rate of every dropout layer that drops something, and whether it drops whole channels."""
    layers = {
        name: (module.p, isinstance(module, _CHANNELWISE))
        for name, module in classifier.module.named_modules()
        if isinstance(module, (nn.Dropout, *_CHANNELWISE)) and 0 < module.p < 1
    }
    if not layers:
        raise UserError("the model has no dropout layer with a rate above 0. Drop the detector.")
    return layers


def _dropping(
    name: str, rate: float, channelwise: bool, rngs: Sequence[np.random.Generator]
) -> Callable[[Any, Any, Tensor], Tensor]:
    """A hook that does what the layer does in training, with a generator for each image."""

    def drop(_: Any, __: Any, output: Tensor) -> Tensor:
        if len(output) != len(rngs):
            raise UserError(
                f"the model's dropout layer {name!r} gives {tuple(output.shape)} for {len(rngs)} images; "
                "expected one entry of the first axis for each. Drop the detector."
            )
        shape = output.shape[1:2] if channelwise else output.shape[1:]
        kept = np.stack([rng.random(tuple(shape), dtype=np.float32) >= rate for rng in rngs])
        mask = torch.from_numpy(kept).to(output.device, output.dtype) / (1 - rate)
        return output * (mask.view(*mask.shape, *[1] * (output.dim() - 2)) if channelwise else mask)

    return drop


def _pooled(classifier: Classifier, _: Pooled, images: Tensor, __: Sequence[str]) -> Tensor:
    """See `Pooled`."""
    with _pooling(classifier) as means:
        classifier.answer(images)
    return _joined(classifier, means)


def _joined(classifier: Classifier, means: Mapping[str, Tensor]) -> Tensor:
    """Means of all stages side by side; named blocks need not run in the order of their names."""
    return torch.cat([means[name] for name in classifier.taps.stages], dim=1)


@contextmanager
def _pooling(classifier: Classifier) -> Iterator[dict[str, Tensor]]:
    """Mean over positions of every stage by its name, of a pass in the `with` block."""
    found = classifier.taps
    if not found.stages:
        raise UserError(NO_BLOCKS)
    means: dict[str, Tensor] = {}

    def keep(name: str, place: Layout) -> Callable[[Any, Any, Tensor], None]:
        def pool(_: Any, __: Any, output: Tensor) -> None:
            means[name] = place.maps(output).float().mean(dim=(2, 3))

        return pool

    places = dict(zip(found.blocks, found.layouts, strict=True))
    with taps.hooked(classifier.module, {name: keep(name, places[name]) for name in found.stages}):
        yield means


def _gradient_norms(
    classifier: Classifier, spec: ParameterGradient, images: Tensor, _: Sequence[str]
) -> Tensor:
    """See `ParameterGradient`; gradients of several images at a time, as many as `GRADIENTS` has room for.

    Always of equally many, as other numbers give other bits.
    """
    groups = [_parameters(classifier.module, name, spec.bias) for name in spec.layers]
    named = {name: each for group in groups for name, each in group.items()}
    count = Counter(name for group in groups for name in group)
    if twice := next((name for name in count if count[name] > 1), None):
        raise UserError(f"layers: {twice!r} is in two of them and would count twice. Leave one out.")

    size = 16 * sum(each.numel() for each in named.values())  # the gradients, their parts, and in float64
    room = max(1, min(len(images), GRADIENTS // size))
    together = next(number for number in range(room, 0, -1) if len(images) % number == 0)
    return torch.cat([_norms(classifier, groups, some, spec) for some in torch.split(images, together)])


def _norms(
    classifier: Classifier, groups: Sequence[Collection[str]], images: Tensor, spec: ParameterGradient
) -> Tensor:
    """(N, L) norm of the gradient of every image in every group of parameters."""
    names = [name for group in groups for name in group]
    found = gradients.per_image(classifier, names, images, spec.temperature)
    parts = [torch.stack([_norm(found[name], spec.order) for name in group], dim=1) for group in groups]
    return torch.stack([_norm(part, spec.order) for part in parts], dim=1)


def _norm(rows: Tensor, order: float) -> Tensor:
    """(N,) float64 norms of (N, size).

    In float32 are only sums of few sizes or squares: those of many lose its last digits, and high powers of
    small entries are 0.
    """
    if order in (1, 2):
        parts = rows.shape[1] // _SHORT
        shorts = rows[:, : parts * _SHORT].reshape(len(rows), parts, _SHORT)
        rest = rows[:, parts * _SHORT :]
        rows = torch.cat([torch.linalg.vector_norm(shorts, order, dim=2), rest], dim=1)
    norm: Tensor = torch.linalg.vector_norm(rows, order, dim=1, dtype=torch.float64)
    return norm


def _parameters(module: nn.Module, name: str, bias: bool) -> dict[str, Tensor]:
    """A parameter, or those of all linear and convolutional layers of a module, by their full names."""
    known = dict(module.named_parameters())
    if name in known:
        return {name: known[name]}
    layers = dict(module.named_modules())
    inside = [layer for layer in layers if layer == name or layer.startswith(f"{name}.")]
    if not inside:
        raise UserError(f"layers: {unknown('layer', name, [*filter(None, layers), *known])}")
    kinds = ("weight", "bias") if bias else ("weight",)
    weighted = [name for name in inside if _weighted(layers[name])]
    wanted = [f"{layer}.{kind}" for layer in weighted for kind in kinds]
    found: dict[str, Tensor] = {each: known[each] for each in wanted if each in known}
    if not found:
        raise UserError(f"layers: {name!r} has no linear or convolutional layer. Name another.")
    return found


def _weighted(module: nn.Module) -> bool:
    """Whether a module is a linear or convolutional layer, one of a class of its own included."""
    names = {each.__name__ for each in _WEIGHTED}
    return isinstance(module, _WEIGHTED) or channels.kind(module).rpartition(".")[2] in names


_KINDS: dict[type[Extra], Callable[[Classifier, Any, Tensor, Sequence[str]], Tensor]] = {
    Perturbed: _perturbed,
    RankReduced: _rank_reduced,
    Dropped: _dropped,
    Pooled: _pooled,
    ParameterGradient: _gradient_norms,
}
