"""The detectors. A file here is a detector; its name is the name used in the config.

`base` is their contract, and files that begin with an underscore are what several of them share.
"""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from pipeline.detectors.base import Detector
from pipeline.errors import UserError, unknown


def names() -> list[str]:
    """Names of all detectors, sorted."""
    return sorted(
        module.name for module in iter_modules(__path__) if not module.name.startswith(("_", "base"))
    )


@cache
def get(name: str) -> type[Detector]:
    """The detector in the file of that name.

    Raises:
        UserError: if there is no such file; names the closest one.
    """
    if name not in names():
        raise UserError(unknown("detector", name, names()))
    module = import_module(f"{__name__}.{name}")
    return next(
        member
        for member in vars(module).values()
        if isinstance(member, type) and issubclass(member, Detector) and member.__module__ == module.__name__
    )
