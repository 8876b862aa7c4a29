"""Formats of datasets. A file here is a format; its name is the name used in the config.

It holds a function `read(dataset, notes) -> Iterator[pyarrow.RecordBatch]` that yields rows of
`manifest.SCHEMA` in a fixed order, counts in the `notes` what it leaves out, and raises `UserError` on a path
or name that is not there; a format whose classes have names also has `classes(dataset) -> Classes`, and one
whose `path` is a place in storage has `PLACE`, a word for what lies there: it is looked for before any work.
Modules with an underscore are shared.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType


def names() -> list[str]:
    """Names of all formats, sorted."""
    return sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_"))


def get(name: str) -> ModuleType:
    """The module of a format."""
    return import_module(f"{__name__}.{name}")
