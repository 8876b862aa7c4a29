"""Classifiers of torchvision, by name, with published or own weights."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
import torchvision
from torch import nn

from pipeline.config import loading, schema
from pipeline.config.schema import Transform
from pipeline.errors import UserError, unknown
from pipeline.network.sources import Built, _weights

NORMALISE_INSIDE = ("googlenet", "inception_v3")
"""Published weights of these expect another normalisation than their preset's; the network converts it."""


def build(model: schema.Model) -> Built:
    """Build a classifier by its torchvision name.

    `weights` may name published weights (`IMAGENET1K_V1`): taken from torch's hub folder, or downloaded into
    it. The transform is then theirs unless it is given.

    Raises:
        UserError: unknown model, weights or preset, a failed download, options the model does not take,
            or weights that do not fit.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if model.name not in known:
        raise UserError(f"model.name: {unknown('torchvision model', model.name, known)}")
    weights = _weights.require(model.weights)
    presets = dict(torchvision.models.get_model_weights(model.name).__members__)
    if loading.is_name(weights) and weights not in (_weights.RANDOM, *presets):
        raise UserError(f"model.weights: {unknown('published weights', weights, presets)}")
    published = presets.get(weights)
    transform = model.transform
    options = dict(model.options)
    if not isinstance(transform, Transform):
        wanted = weights if transform == "auto" and published else transform
        transform = _preset(wanted, {name: preset.transforms() for name, preset in presets.items()})
        if model.name in NORMALISE_INSIDE:
            options.setdefault("transform_input", True)
    if published:
        _fetch(published, weights)
    elif model.name in NORMALISE_INSIDE:
        options.setdefault("init_weights", True)  # what torchvision does and warns about if it is not said
    module = _made(model.name, published, options)
    if not published:
        _weights.load(module, weights)
    return Built(module, transform, f"{torchvision.__version__} {sorted(options.items())}".encode())


def _made(name: str, published: Any, options: dict[str, Any]) -> nn.Module:
    try:
        module: nn.Module = torchvision.models.get_model(name, weights=published, **options)
    except (TypeError, ValueError) as error:
        if not options:
            raise
        raise UserError(f"model.options: torchvision's {name} does not take them: {error}.") from error
    return module


def _fetch(published: Any, name: str) -> None:
    """Have the published weights in torch's hub folder, read once without running anything in them.

    torchvision itself reads the file again, without that care, when it builds the model.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(published.url).path).name
    try:
        published.get_state_dict(check_hash=True, progress=False, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"model.weights: {path} is not a file of tensors alone, and nothing in it was run. Remove it."
        ) from None
    except (OSError, RuntimeError) as error:  # no network, no permission, or another file than published
        raise UserError(
            f"model.weights: {name} is not in {path.parent} and cannot be had: {error}. Fetch "
            f"{published.url} to {path} (TORCH_HOME moves the folder), or name a local file."
        ) from error


def _preset(name: str, presets: dict[str, Any]) -> Transform:
    """Transform of one of the published weights; "auto" only where all of them share it."""
    if name != "auto" and name not in presets:
        raise UserError(f"model.transform: {unknown('preset', name, ['auto', *presets])}")
    chosen = {
        key: Transform(
            resize=preset.resize_size[0],
            crop=preset.crop_size[0],
            interpolation=preset.interpolation.value,
            mean=tuple(preset.mean),
            std=tuple(preset.std),
        )
        for key, preset in presets.items()
        if name in ("auto", key)
    }
    if len(set(chosen.values())) != 1:
        raise UserError(
            f"model.transform: the published weights of this model use different transforms; "
            f"name the one yours were trained with: {', '.join(chosen)}."
        )
    return next(iter(chosen.values()))
