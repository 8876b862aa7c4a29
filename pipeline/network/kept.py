"""The weights of a network as one file, so that a copy of it needs nothing from where they came."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save

from pipeline.config import loading, schema
from pipeline.network import sources


def weights(model: schema.Model, seed: int) -> Callable[[Path], object]:
    """A function that writes the state dict of a network as safetensors, or the exported program that it is.

    Raises:
        UserError: as for any classifier that is built.
    """
    if model.source == "exported":
        return partial(shutil.copyfile, loading.resolve(model.name))
    torch.manual_seed(seed)
    state = sources.build(model).module.state_dict()
    content = save({name: tensor.detach().cpu().clone() for name, tensor in state.items()})
    return lambda path: path.write_bytes(content)  # `save_file` shuts out other users


def beside(model: schema.Model) -> schema.Model:
    """The config of a network whose weights lie in a file: the transform no longer comes with their name."""
    published = model.weights is not None and loading.is_name(model.weights) and model.weights != "random"
    if model.source == "torchvision" and model.transform == "auto" and published:
        return model.model_copy(update={"transform": model.weights})
    return model
