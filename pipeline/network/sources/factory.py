"""Any function that returns a `torch.nn.Module`. It is the user's own code and runs as it is."""

from __future__ import annotations

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
    try:
        module = function(**model.options)
    except TypeError as error:
        if not model.options:
            raise
        raise UserError(f"model.options: {model.name} does not take them: {error}.") from error
    if not isinstance(module, nn.Module):
        raise UserError(
            f"model.name: {model.name} returned {type(module).__name__}; expected a torch.nn.Module."
        )
    if not isinstance(model.transform, schema.Transform):
        raise UserError("model.transform: a factory has no preset; give crop, mean and std.")
    if model.weights is not None:
        _weights.load(module, model.weights)
    called = f"{getattr(function, '__qualname__', '')} {sorted(model.options.items())}"
    code = imports.source_of(function) + called.encode()
    return Built(module, model.transform, code)
