"""Where classifiers come from. A file here is a source; its name is the name used in the config.

It holds one function `build(model) -> Built` that makes the network with its weights and raises `UserError`
on a name, file or option that does not fit. Everything later sees a module and a transform, never a source.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules

from torch import nn

from pipeline.config.schema import Model, Transform
from pipeline.errors import UserError, unknown


@dataclass(frozen=True)
class Built:
    """A network with its weights, before its taps are known."""

    module: nn.Module
    """(N, channels, crop, crop) in, (N, classes) out."""
    transform: Transform
    code: bytes
    """What the computation depends on besides the module tree: the source or the version that made it."""


def names() -> list[str]:
    """Names of all sources, sorted."""
    return sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_"))


def build(model: Model) -> Built:
    """Build the classifier that a config describes.

    Raises:
        UserError: unknown source, or whatever its file finds wrong.
    """
    if model.source not in names():
        raise UserError(f"model.source: {unknown('source', model.source, names())}")
    built: Built = import_module(f"{__name__}.{model.source}").build(model)
    return built
