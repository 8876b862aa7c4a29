"""Commands about config files: a first one (init), and what may stand in one (schema)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.app import Quietly, app, aside, console, document

_Sets = Annotated[list[str], typer.Option(metavar="DATA", help="May be repeated.")]


@app.command()
def init(
    out: Annotated[str, typer.Argument(metavar="FILE", help="The config; must not exist.")],
    model: Annotated[
        str,
        typer.Option(help="torchvision name, timm:NAME, program.pt2, or ./file.py:function that returns it."),
    ],
    id: Annotated[
        list[str], typer.Option("--id", metavar="DATA", help="Test images of the model's classes.")
    ],
    weights: Annotated[str, typer.Option(help="State dict, or published weights: IMAGENET1K_V1.")] = "",
    train: _Sets = [],  # noqa: B006 - typer copies defaults
    near_ood: _Sets = [],  # noqa: B006
    far_ood: _Sets = [],  # noqa: B006
    id_val: _Sets = [],  # noqa: B006
    unlabelled: _Sets = [],  # noqa: B006
    quiet: Quietly = False,
) -> None:
    """Write a first config, with comments, for a model and data: folders of images, tar, Parquet, .npz files.

    Example: `ood-pipeline init mine.yaml --model resnet50 --weights w.pt --id ./val --far-ood ./textures`
    """
    from pipeline.config import beginning, loading
    from pipeline.data.guess import guessed
    from pipeline.errors import UserError
    from pipeline.workspace import files

    file = Path(out)
    if file.exists():
        raise UserError(f"{out}: exists already. Name another file, or delete it.")
    roles = {
        "train": train,
        "id": id,
        "id_val": id_val,
        "near_ood": near_ood,
        "far_ood": far_ood,
        "unlabelled": unlabelled,
    }
    written = partial(_written, file.absolute().parent)
    with aside("init", "looks at the data", quiet):
        datasets = [
            {"role": role, "format": guessed(path, f"--{role.replace('_', '-')}"), "path": written(path)}
            for role, paths in roles.items()
            for path in paths
        ]
    files.write_text(file, beginning.text(file, written(model), written(weights) or None, datasets))
    try:
        loading.load(str(file))
    except UserError:
        file.unlink()
        raise
    console.print(f"config   {file}\nnext     ood-pipeline validate {file}", markup=False, soft_wrap=True)


def _written(folder: Path, given: str) -> str:
    """A path of something that is there, also of `file.py:function`, as a config in a folder has it.

    Below the folder it is relative, so that both can be moved, elsewhere absolute. Other words stay.
    """
    place, mark, rest = given.partition(":")
    if not place or rest.startswith("//") or not Path(place).exists():
        return given
    path = Path(place).absolute()
    below = path.is_relative_to(folder) and ".." not in path.relative_to(folder).parts
    return f"{f'./{path.relative_to(folder).as_posix()}' if below else path}{mark}{rest}"


@app.command()
def schema(
    out: Annotated[str, typer.Option(metavar="FILE", help="Write it there; default: the terminal.")] = "",
) -> None:
    """JSON Schema of a config, with which editors complete it: every key, detector and parameter.

    For the YAML extension of VS Code and others, write as a config's first line:
    `# yaml-language-server: $schema=ood-pipeline.schema.json`

    Example: `ood-pipeline schema --out ood-pipeline.schema.json`
    """
    from pipeline.config.json_schema import json_schema
    from pipeline.data import formats
    from pipeline.network import sources
    from pipeline.workspace import files

    found = json_schema(formats.names(), sources.names())
    if out:
        files.write_json(files.at(out), found)
    else:
        document(found)
