"""Programs of `torch.export.save` (.pt2): a network without its Python code.

`torch.export.unflatten` gives the modules their names back, so heads, blocks and layers are found and named
as in the network that was exported.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.export.unflatten import unflatten

from pipeline.config import loading, schema
from pipeline.config.schema import Transform
from pipeline.errors import UserError
from pipeline.network.sources import Built, _archive

EXPORT = "torch.export.export(model.eval(), (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))"

TRAINING = {"aten.dropout.default": 2, "aten.native_dropout.default": 2, "aten.batch_norm.default": 5}
"""Operators with an argument that says whether the network is being trained, and its position."""


def build(model: schema.Model) -> Built:
    """Load the exported program that `model.name` names. Nothing stored in the file is run but its operators.

    Raises:
        UserError: no such file, no exported program, more in it than tensors and known operators, weights
            or options beside it, no written-out transform, a fixed batch size or another image size, or a
            program exported in training mode.
    """
    if model.weights is not None or model.options:
        raise UserError("model.weights, model.options: an exported program has its own; leave them out.")
    if not isinstance(model.transform, Transform):
        raise UserError(
            "model.transform: an exported program has no preset; give crop, mean and std. {crop: 224, "
            "mean: [0, 0, 0], std: [1, 1, 1]} hands it pixels from 0 to 1, as for one that normalises them."
        )
    path = loading.resolve(model.name)
    if not path.is_file():
        raise UserError(f"model.name: no such file: {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(_archive.reduced(path))
        _check_mode(program)
        _check_input(program, model.transform)
        _keep_sizes_local(program)
        module = unflatten(program)
    except UserError:
        raise
    except Exception as error:  # whatever torch raises on an archive it does not understand
        raise UserError(
            f"model.name: torch {torch.__version__} cannot load {path}: {error}. Export it with this version."
        ) from error
    return Built(module, model.transform, path.read_bytes())


def _keep_sizes_local(program: Any) -> None:
    """Compute sizes anew wherever they are used.

    A size that one module computes and another uses is otherwise an output of the first: blocks then give
    tuples instead of maps. The number of images is read off the input, which no module has to hand on.
    """
    graph = program.graph
    images = next(node for node in graph.nodes if node.name in program.graph_signature.user_inputs)
    count = images.meta["val"].shape[0]

    def copy(size: Any, user: Any) -> Any:
        with graph.inserting_before(user):
            if size.target is torch.ops.aten.sym_size.int and str(size.meta["val"]) == str(count):
                made = graph.call_function(size.target, (images, 0))
            else:
                made = graph.node_copy(size, lambda part: copy(part, user) if _is_size(part) else part)
        made.meta = size.meta | {"nn_module_stack": user.meta.get("nn_module_stack")}
        return made

    for node in list(graph.nodes):
        if not _is_size(node):
            for size in filter(_is_size, list(node.all_input_nodes)):
                node.replace_input_with(size, copy(size, node))
    graph.eliminate_dead_code()


def _is_size(node: Any) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


def _check_mode(program: Any) -> None:
    """In training mode statistics are updated or dropout draws."""
    training = bool(program.graph_signature.buffers_to_mutate)
    for node in program.graph.nodes:
        place = TRAINING.get(str(node.target), len(node.args))
        training |= node.args[place : place + 1] == (True,)
    if training:
        raise UserError(f"model.name: the program was exported in training mode. Export it with {EXPORT}.")


def _check_input(program: Any, transform: Transform) -> None:
    """One input of images, any number of them, of the transform's size."""
    names = program.graph_signature.user_inputs
    shapes = [tuple(node.meta["val"].shape) for node in program.graph.nodes if node.name in names]
    expected = (transform.channels, transform.crop, transform.crop)
    if len(shapes) != 1 or len(shapes[0]) != 4:
        raise UserError(f"model.name: the program takes {shapes}; expected one batch of images.")
    batch, *image = shapes[0]
    if isinstance(batch, int):
        raise UserError(
            f"model.name: the program takes batches of {batch} images alone. Export it with {EXPORT}."
        )
    if any(isinstance(size, int) and size != wanted for size, wanted in zip(image, expected, strict=True)):
        raise UserError(
            f"model.transform: the program takes images of {' x '.join(map(str, image))}, the transform "
            f"gives {' x '.join(map(str, expected))}. Set crop and channels to the program's."
        )
