"""The detectors. A file here is a detector; its name is the name used in the config.

`base` is their contract, `plain` how fitted ones are kept, and files that begin with an underscore are what
several of them share.
Others come from a file or module that the config names, or by name from packages that are installed.

Array in, array out; may import learned, columns, errors and imports only.
"""

from collections.abc import Collection
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pkgutil import iter_modules
from typing import Any

from pipeline import imports
from pipeline.columns import BLOCK_NORM, FEATURE, KEY, LABEL, LOGITS, PREDICTION
from pipeline.detectors.base import Detector
from pipeline.errors import UserError, unknown

GROUP = "ood_pipeline.detectors"
"""Entry points of installed packages: the name in the config = "package.module:Class"."""

_SHARED = ("base", "plain")
_COMBINING = ("ensemble",)
_DECLARED = ("title", "paper", "formula", "columns")
_STORED = (KEY, LABEL, PREDICTION, FEATURE, LOGITS, BLOCK_NORM)


def names() -> list[str]:
    """Names of the detectors that come with this package, sorted, but for those that combine others."""
    return [name for name in _names() if name not in _COMBINING]


def combining() -> list[str]:
    """Names of those that combine others, which have to be named."""
    return list(_COMBINING)


@cache
def _names() -> tuple[str, ...]:
    found = (module.name for module in iter_modules(__path__))
    return tuple(sorted(name for name in found if not name.startswith("_") and name not in _SHARED))


def installed() -> dict[str, EntryPoint]:
    """Detectors of other packages that are installed, by name; names of ours stay ours."""
    found = sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
    return {entry.name: entry for entry in found if entry.name not in _names()}


def get(name: str) -> type[Detector]:
    """The detector of a name or reference: `knn`, `./file.py:Class`, `package.module:Class`.

    Raises:
        UserError: no such detector, with the closest one; or a class that is none or declares too little.
    """
    if name in _names():
        module = import_module(f"{__name__}.{name}")
        return next(
            member
            for member in vars(module).values()
            if isinstance(member, type)
            and issubclass(member, Detector)
            and member.__module__ == module.__name__
        )
    if ":" in name:
        return _checked(imports.load_class(name, "method", Detector), name)
    others = installed()
    if name not in others:
        raise UserError(unknown("detector", name, [*_names(), *others]))
    reference = others[name].value
    return _checked(imports.load_class(reference, f"entry point {name}", Detector), reference)


def identity(detector: Detector, without: Collection[str] = ()) -> list[Any]:
    """What scores depend on besides data: class and version, parameters, and the code of what is not ours.

    Args:
        detector: whose.
        without: parameters that do not count.
    """
    versions = [part.version for part in detector.parts()]
    foreign = [imports.foreign(type(part)) for part in detector.parts()]
    parameters = detector.model_dump(mode="json", exclude=set(without))
    return [type(detector).__name__, versions, parameters, *(part for part in foreign if part)]


def _checked(kind: type[Detector], reference: str) -> type[Detector]:
    """A class that says what every detector says."""
    missing = [name for name in _DECLARED if not hasattr(kind, name)]
    if missing:
        raise UserError(
            f"method: {reference} does not declare {', '.join(missing)}; expected {', '.join(_DECLARED)}."
        )
    strange = [column for column in kind.columns if column not in _STORED]
    if strange:
        raise UserError(f"method: {reference}: columns: {unknown('column', strange[0], _STORED)}")
    return kind
