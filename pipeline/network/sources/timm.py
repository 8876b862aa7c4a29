"""Classifiers of timm (the extra `timm`), by name, with a local weights file.

Nothing is downloaded: names of a hub are no model names here.
"""

from __future__ import annotations

import math
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from torch import nn

from pipeline.config import schema
from pipeline.config.explanations import explain
from pipeline.config.schema import Transform
from pipeline.errors import UserError
from pipeline.network.sources import Built, _weights

SHOWN = 5
"""timm has more than a thousand names; this many are shown where one is not known."""


def build(model: schema.Model) -> Built:
    """Build a classifier by its timm name, `architecture` or `architecture.tag`.

    The automatic transform is that of timm's own validation: the test size where the model has one.

    Raises:
        UserError: timm is not installed, unknown name, a transform that keeps no aspect, options the model
            does not take, or weights that do not fit.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise UserError(
            f"model.source: timm cannot be imported ({error}). pip install 'ood-pipeline[timm]'"
        ) from error
    module = _made(timm, model)
    transform = model.transform
    if not isinstance(transform, Transform):
        if transform != "auto":
            raise UserError(
                f"model.transform: timm has no preset {transform!r}; give 'auto', or write it out."
            )
        transform = _automatic(timm.data.resolve_model_data_config(module, use_test_size=True))
    _weights.load(module, _weights.require(model.weights))
    return Built(module, transform, f"{timm.__version__} {sorted(model.options.items())}".encode())


def _made(timm: Any, model: schema.Model) -> nn.Module:
    architecture, _, tag = model.name.partition(".")
    if not timm.is_model(architecture):
        raise UserError(_unknown("model.name: unknown timm model", model.name, timm.list_models()))
    tags = timm.models.get_arch_pretrained_cfgs(architecture) if tag else {}
    if tag and model.name not in tags:
        raise UserError(_unknown(f"model.name: {architecture} has no variant", model.name, tags))
    try:
        module: nn.Module = timm.create_model(model.name, pretrained=False, **model.options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        if not model.options:
            raise
        raise UserError(f"model.options: timm's {model.name} does not take them: {error}.") from error
    return module


def _unknown(what: str, name: str, known: Any) -> str:
    close = get_close_matches(name, list(known), n=SHOWN, cutoff=0.5)
    return f"{what} {name!r}. Closest: {', '.join(close) or 'none'}. See timm.list_models(pretrained=True)."


def _automatic(data: dict[str, Any]) -> Transform:
    """A transform from timm's data config, rounded as timm does."""
    channels, height, width = data["input_size"]
    problem = None
    if data["crop_mode"] != "center":
        problem = f"scales images in crop mode {data['crop_mode']!r}, which changes their aspect or pads them"
    elif height != width:
        problem = f"takes {height} x {width} images, which are not square"
    if problem:
        raise UserError(
            f"model.transform: this model {problem}; such a transform is not supported. Write another out "
            "(resize, crop, interpolation, mean, std) if the weights bear it."
        )
    try:
        return Transform(
            resize=math.floor(height / data["crop_pct"]),
            crop=height,
            interpolation=data["interpolation"],
            mean=data["mean"],
            std=data["std"],
            channels=channels,
        )
    except ValidationError as error:
        reason = "\n".join(explain(error, "", Transform))
        raise UserError(f"model.transform: timm's own is not supported: {reason} Write one out.") from error
