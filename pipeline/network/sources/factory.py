"""Any function that returns a `torch.nn.Module`. It is the user's own code and runs as it is."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import nn

from pipeline import imports
from pipeline.config import schema
from pipeline.errors import UserError
from pipeline.network.sources import Built, _weights


def build(model: schema.Model) -> Built:
    """Call the function with `model.options` and load the weights, if some are given.

    Raises:
        UserError: no such function, options it does not take, a result that is no module, weights that
            do not fit, or no written-out transform.
    """
    function = imports.load_function(model.name, "model.name")
    _check(function, model)
    module = function(**model.options)
    if not isinstance(module, nn.Module):
        raise UserError(
            f"model.name: {model.name} returned {type(module).__name__}; expected a torch.nn.Module."
        )
    if not isinstance(model.transform, schema.Transform):
        raise UserError(
            "model.transform: a factory has no preset; give crop, mean and std. {crop: 224, mean: [0, 0, 0], "
            "std: [1, 1, 1]} hands it pixels from 0 to 1, as for a network that normalises them itself."
        )
    if model.weights is not None:
        _weights.load(module, model.weights)
    called = f"{getattr(function, '__qualname__', '')} {sorted(model.options.items())}"
    code = imports.source_of(function) + called.encode()
    return Built(module, model.transform, code)


def _check(function: Callable[..., object], model: schema.Model) -> None:
    """Whether a function can be called with the options of a model."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some that are written in C nobody knows
        return
    try:
        signature.bind(**model.options)
    except TypeError as error:
        raise UserError(
            f"model.options: {model.name}{signature} cannot be called with "
            f"{model.options or 'no options'}: {error}. Give what it needs, or name a function in model.name "
            "that needs nothing."
        ) from None
