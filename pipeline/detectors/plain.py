"""Fitted detectors as plain data: a JSON document and arrays, without pickle.

A scorer is a frozen dataclass of numbers, texts, arrays, functions of modules, detectors, and others of its
kind. A class or a function is kept by its name; reading one back imports modules that are allowed, and no
others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from importlib import import_module
from operator import attrgetter
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

OURS = ("pipeline.detectors", "pipeline.learned", "numpy")
"""Packages whose classes and functions may be read back."""

Arrays = dict[str, NDArray[Any]]
Nested = Callable[[Any, Any], Any]
"""Encodes what lies in a value under a name."""

_PLAIN = (bool, int, float, str, type(None))


def encode(value: Any) -> tuple[Any, Arrays]:
    """A JSON document that stands for a value, and the arrays it names.

    Raises:
        TypeError: a value that is not plain, with its place.
    """
    arrays: Arrays = {}
    return _encoded(value, arrays, type(value).__name__), arrays


def _encoded(value: Any, arrays: Arrays, place: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        arrays[place] = np.ascontiguousarray(value).reshape(value.shape)
        return {"array": place}
    for kind, written in _WRITERS.items():
        if isinstance(value, kind):
            return written(value, lambda each, name: _encoded(each, arrays, f"{place}.{name}"))
    if is_dataclass(value):
        nested = {each.name: getattr(value, each.name) for each in fields(value)}
        kept = {name: _encoded(each, arrays, f"{place}.{name}") for name, each in nested.items()}
        return {"object": _named(type(value)), "fields": kept}
    raise TypeError(
        f"{place}: got {type(value).__name__}; expected numbers, texts, arrays of numbers, tuples, lists, "
        "dataclasses of such, or functions of a module."
    )


def _function(value: Any, nested: Nested) -> Any:
    if "<" in value.__name__:
        raise TypeError(f"{value.__name__}: a function without a name in its module.")
    return {"function": _named(value)}


def _named(what: Any) -> str:
    module = getattr(what, "__module__", None) or "numpy"  # ufuncs have none
    return f"{module}:{getattr(what, '__qualname__', what.__name__)}"


_WRITERS: dict[type, Callable[[Any, Nested], Any]] = {
    tuple: lambda value, nested: {"tuple": [nested(each, number) for number, each in enumerate(value)]},
    list: lambda value, nested: {"list": [nested(each, number) for number, each in enumerate(value)]},
    dict: lambda value, nested: {"map": [[key, nested(each, key)] for key, each in value.items()]},
    slice: lambda value, nested: {
        "slice": [nested(getattr(value, name), name) for name in ("start", "stop", "step")]
    },
    BaseModel: lambda value, nested: {"model": _named(type(value)), "fields": value.model_dump(mode="json")},
    partial: lambda value, nested: {
        "partial": nested(value.func, "function"),
        "given": [nested(value.args, "positional"), nested(value.keywords, "named")],
    },
    FunctionType: _function,
    BuiltinFunctionType: _function,
    np.ufunc: _function,
}


def decode(document: Any, arrays: Mapping[str, NDArray[Any]], allowed: Collection[str] = OURS) -> Any:
    """The value that a document and arrays stand for.

    Args:
        document: as `encode` gave it.
        arrays: by name.
        allowed: packages and modules whose classes and functions may be named.

    Raises:
        ValueError: a name of another module.
    """
    return _Reader(arrays, allowed).value(document)


@dataclass(frozen=True)
class _Reader:
    arrays: Mapping[str, NDArray[Any]]
    allowed: Collection[str]

    def value(self, document: Any) -> Any:
        """What a document stands for."""
        if isinstance(document, _PLAIN):
            return document
        kind = next(iter(document))
        return getattr(self, f"_{kind}")(document)

    def _array(self, document: Any) -> Any:
        return self.arrays[document["array"]]

    def _tuple(self, document: Any) -> Any:
        return tuple(map(self.value, document["tuple"]))

    def _list(self, document: Any) -> Any:
        return list(map(self.value, document["list"]))

    def _map(self, document: Any) -> Any:
        return {key: self.value(each) for key, each in document["map"]}

    def _slice(self, document: Any) -> Any:
        return slice(*map(self.value, document["slice"]))

    def _model(self, document: Any) -> Any:
        kind = self._imported(document["model"])
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            raise ValueError(f"{document['model']}: no model; refused.")
        return kind(**document["fields"])

    def _object(self, document: Any) -> Any:
        kind = self._imported(document["object"])
        if not (isinstance(kind, type) and is_dataclass(kind)):
            raise ValueError(f"{document['object']}: no dataclass; refused.")
        return kind(**{name: self.value(each) for name, each in document["fields"].items()})

    def _partial(self, document: Any) -> Any:
        positional, named = map(self.value, document["given"])
        return partial(self.value(document["partial"]), *positional, **named)

    def _function(self, document: Any) -> Any:
        return self._imported(document["function"])

    def _imported(self, name: str) -> Any:
        module, _, member = name.partition(":")
        if not any(module == each or module.startswith(f"{each}.") for each in self.allowed):
            raise ValueError(f"{name}: not from one of {', '.join(self.allowed)}; refused.")
        return attrgetter(member)(import_module(module))
