"""State dicts from files, read without running anything that is stored in them."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.config import loading
from pipeline.errors import UserError

RANDOM = "random"
"""Value of `model.weights` that keeps the seeded initialisation; for tests."""


def require(weights: str | None) -> str:
    """The configured weights of a source that has none of its own.

    Raises:
        UserError: there are none.
    """
    if weights is None:
        raise UserError("model.weights: name a weights file (.safetensors or .pt), or 'random' for tests.")
    return weights


def load(module: nn.Module, weights: str) -> None:
    """Load a state dict, unless the weights are to stay random.

    Raises:
        UserError: no such file, a file that holds more than tensors, or entries that do not fit.
    """
    if weights == RANDOM:
        return
    path = loading.resolve(weights)
    if not path.is_file():
        raise UserError(f"model.weights: no such file: {path}")
    try:
        state = _read(path)
    except pickle.UnpicklingError:
        raise UserError(
            f"model.weights: {path} is not a file of tensors alone, and nothing in it was run. "
            "Save the model's state dict, best as .safetensors."
        ) from None
    except Exception as error:
        if "TorchScript" in str(error):
            raise UserError(
                f"model.weights: {path} is a TorchScript archive, and nothing in it was run. If you trust "
                "it, make a state dict of it: "
                f"torch.save(torch.jit.load({path.name!r}).state_dict(), 'weights.pt')."
            ) from None
        raise UserError(f"model.weights: {path} cannot be read: {error}. Check the file.") from error
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except Exception as error:
        raise UserError(
            f"model.weights: {path} does not fit the model: {error}. Check model.name and the file; another "
            "number of classes is set with model.options."
        ) from error
    if missing or unexpected:
        raise UserError(
            f"model.weights: {path} does not fit the model: {len(missing)} entries missing "
            f"({', '.join(missing[:3])}), {len(unexpected)} unexpected ({', '.join(unexpected[:3])})."
        )


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)  # type: ignore[no-any-return]
