"""A config file as plain data, merged over the file that it extends. Knows nothing of what the keys mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config import documents
from pipeline.config.documents import Section
from pipeline.errors import UserError

KEY = "extends"


def read(path: Path, library: Path) -> Section:
    """The mapping in a YAML file, over that of the file its key `extends` names, and so on.

    Sections are merged key by key; a list or a value replaces what it meets. `extends` is a path relative
    to the file it stands in, or else a file of `library`, with or without `.yaml`.

    Raises:
        UserError: a file that is missing, no YAML or no mapping, or that extends itself in the end.
    """
    data = documents.read(path)
    chain = [path.resolve()]
    while KEY in data:
        path = _find(data.pop(KEY), path, library)
        if path.resolve() in chain:
            files = " > ".join(file.name for file in [*chain, path])
            raise UserError(f"{chain[0]}: {KEY} goes round in circles: {files}.")
        chain.append(path.resolve())
        data = _merged(documents.read(path, path.name), data)
    return data


def _find(name: Any, source: Path, library: Path) -> Path:
    """The file that `extends: name` means in the file `source`."""
    if not isinstance(name, str) or not name:
        raise UserError(f"{source}: {KEY}: got {name!r}; expected the path of one config file.")
    for candidate in (source.parent / Path(name).expanduser(), library / name, library / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    raise UserError(f"{source}: {KEY}: no such config file: {name}, neither beside this one nor bundled.")


def _merged(base: Section, change: Section) -> Section:
    """A copy of `base` in which sections are merged and everything else is replaced."""
    result = Section(base, {**base.places, **change.places})
    for key, value in change.items():
        below = result.get(key)
        if isinstance(below, Section) and isinstance(value, Section):
            value = _merged(below, value)
        result[key] = value
    return result
