"""State dicts from files, read without running anything that is stored in them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Set
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.config import loading
from pipeline.errors import UserError

WRAPPED = ("state_dict", "model_state_dict", "model")
"""Where training checkpoints keep the state dict, beside that of the optimiser and the like."""

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
        missing, unexpected = module.load_state_dict(
            _renamed(state, module.state_dict().keys()), strict=False
        )
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
    return next((state[key] for key in WRAPPED if isinstance(state.get(key), dict)), state)


def _renamed(state: dict[str, Tensor], names: Set[str]) -> dict[str, Tensor]:
    """Entries by the network's own names, where only the module differs that all of them lie in.

    DataParallel (`module.`), torch.compile (`_orig_mod.`) and Lightning (`model.`) save them below one more,
    and a module around a network has it below one. Nothing is done unless each entry is then one of the
    network's, which may have more: batch norms before PyTorch 0.4.1 did not count batches.
    """
    own, other = _shared(names), _shared(state)
    found = {own + name.removeprefix(other): tensor for name, tensor in state.items()}
    return found if found.keys() <= names else state


def _shared(names: Iterable[str]) -> str:
    """The modules that all entries lie in, with a dot at the end."""
    letters = os.path.commonprefix(list(names))  # noqa: RUF071, up to the last dot of which there are modules
    return "".join(letters.rpartition(".")[:2])
