"""Commands about config files: what may stand in one (schema)."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.app import app, document


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
