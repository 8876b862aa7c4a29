"""Functions and classes that a config names: `package.module:name` or `./file.py:name`. They run as they are.

A function may belong to a class: `package.module:Class.method`. A file may import modules that lie beside it;
they count as its code (`beside`).
"""

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from pipeline import beside
from pipeline.errors import UserError, unknown

T = TypeVar("T")

FOLDER = "OOD_PIPELINE_FOLDER"
"""Environment variable with the folder in which modules are looked for last; Ray's workers inherit it."""


def load_function(reference: str, where: str) -> Callable[..., Any]:
    """The function behind a reference.

    Raises:
        UserError: malformed reference, missing module or file, no such function in it.
    """
    module, name, function = _find(reference, where, "function")
    if not callable(function):
        callables = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise UserError(f"{where}: {unknown('function', name, callables)}")
    return function  # type: ignore[no-any-return]


def load_class(reference: str, where: str, base: type[T]) -> type[T]:
    """The subclass of `base` behind a reference.

    Raises:
        UserError: malformed reference, missing module or file, no such class in it.
    """
    module, name, found = _find(reference, where, "Class")
    if not _is_a(found, base):
        classes = [key for key, value in vars(module).items() if _is_a(value, base) and value is not base]
        raise UserError(f"{where}: {unknown(f'subclass of {base.__name__}', name, classes)}")
    for value in vars(module).values():
        if _is_a(value, object) and value.__module__ == found.__module__:
            digest_of(value)  # now: the files may change while their classes are in use
    return found  # type: ignore[no-any-return]


@cache
def digest_of(kind: type) -> str:
    """SHA-256 of the code of a class as it was loaded: its file, its whole package, and modules beside it."""
    package = sys.modules.get(kind.__module__.partition(".")[0])
    folders = map(Path, getattr(package, "__path__", ()))
    return hashlib.sha256(source_of(kind) + b"".join(map(beside.content, folders))).hexdigest()


def is_foreign(kind: type) -> bool:
    """Whether a class is no part of this package."""
    return kind.__module__.partition(".")[0] != __package__


def foreign(kind: type) -> dict[str, str]:
    """The digest of a foreign class as `code`; nothing for ours, whose code the version stands for."""
    return {"code": digest_of(kind)} if is_foreign(kind) else {}


def source_of(function: Callable[..., Any]) -> bytes:
    """Content of the file a function is defined in and of modules beside it; empty where there is none."""
    file = _file(function)
    if file is None:
        return b""
    found = beside.companions(Path(file))[1].values() if beside.is_own(file) else ()
    return Path(file).read_bytes() + b"".join(map(beside.content, found))


def modules_of(kind: type) -> list[ModuleType]:
    """The module of a class and those that lie beside its file and were imported."""
    file = _file(kind)
    names = beside.companions(Path(file))[1] if file and beside.is_own(file) else ()
    imported = [sys.modules[name] for name in names if name in beside.homes and name in sys.modules]
    return [sys.modules[kind.__module__], *imported]


def _file(code: Callable[..., Any]) -> str | None:
    """Where a function or class is defined."""
    try:
        return inspect.getsourcefile(inspect.unwrap(code))
    except TypeError:  # an object that is called, or a built-in
        return None


def _find(reference: str, where: str, what: str) -> tuple[ModuleType, str, Any]:
    """Module, name and what has it there; None if there is nothing."""
    source, _, name = reference.rpartition(":")
    if not source or not name or (source.startswith(".") and not source.endswith(".py")):
        raise UserError(
            f"{where}: got {reference!r}; expected 'package.module:{what}' or './file.py:{what}'."
        )
    module = _module(source, where)
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return module, name, found


def _is_a(value: Any, base: type) -> bool:
    return isinstance(value, type) and issubclass(value, base)


def _module(source: str, where: str) -> ModuleType:
    if not source.endswith(".py"):
        folder = os.environ.get(FOLDER)
        if folder and folder not in sys.path:
            sys.path.append(folder)
        try:
            return importlib.import_module(source)
        except ModuleNotFoundError as error:
            raise UserError(
                f"{where}: cannot import {source!r}: {error}. Install it or check the name."
            ) from None
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{where}: no such file: {path}")
    package = beside.settle(path.resolve(), where)
    own = map(beside.content, beside.companions(path.resolve())[1].values())
    digest = hashlib.sha256(path.read_bytes() + b"".join(own)).hexdigest()
    name = ".".join([*package, f"{path.stem}_{digest[:16]}"])  # the same wherever it lies: fits name it
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{where}: {path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    try:
        # Not by its loader, which takes compiled code for current if size and second of the change are equal.
        exec(compile(path.read_bytes(), path, "exec"), vars(module))
    except ImportError as error:
        del sys.modules[name]
        raise UserError(
            f"{where}: {path} cannot be imported: {error}. Install what it needs, or have it beside "
            f"the file: modules are looked for in {beside.companions(path.resolve())[0]}, too."
        ) from error
    except BaseException:
        del sys.modules[name]
        raise
    return module
