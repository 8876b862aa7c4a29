"""Functions that a config names: `package.module:function` or `./file.py:function`. They run as they are."""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.errors import UserError, unknown


def load_function(reference: str, where: str) -> Callable[..., Any]:
    """The function behind a reference.

    Raises:
        UserError: malformed reference, missing module or file, no such function in it.
    """
    source, separator, name = reference.rpartition(":")
    if not separator:
        raise UserError(
            f"{where}: got {reference!r}; expected 'package.module:function' or './file.py:function'."
        )
    module = _module(source, where)
    function = getattr(module, name, None)
    if not callable(function):
        callables = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise UserError(f"{where}: {unknown('function', name, callables)}")
    return function  # type: ignore[no-any-return]


def source_of(function: Callable[..., Any]) -> bytes:
    """Content of the file a function is defined in; empty where there is none."""
    file = inspect.getsourcefile(inspect.unwrap(function))
    return Path(file).read_bytes() if file else b""


def _module(source: str, where: str) -> ModuleType:
    if not source.endswith(".py"):
        try:
            return importlib.import_module(source)
        except ModuleNotFoundError as error:
            raise UserError(
                f"{where}: cannot import {source!r}: {error}. Install it or check the name."
            ) from None
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{where}: no such file: {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{where}: {path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
