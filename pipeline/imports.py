"""Functions that a config names: `package.module:function` or `./file.py:function`. They run as they are.

The function may belong to a class: `package.module:Class.method`.
"""

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.errors import UserError, unknown

FOLDER = "OOD_PIPELINE_FOLDER"
"""Environment variable with the folder in which modules are looked for last; Ray's workers inherit it."""


def load_function(reference: str, where: str) -> Callable[..., Any]:
    """The function behind a reference.

    Raises:
        UserError: malformed reference, missing module or file, no such function in it.
    """
    source, _, name = reference.rpartition(":")
    if not source or not name or (source.startswith(".") and not source.endswith(".py")):
        raise UserError(
            f"{where}: got {reference!r}; expected 'package.module:function' or './file.py:function'."
        )
    module = _module(source, where)
    function: Any = module
    for part in name.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        callables = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise UserError(f"{where}: {unknown('function', name, callables)}")
    return function  # type: ignore[no-any-return]


def source_of(function: Callable[..., Any]) -> bytes:
    """Content of the file a function is defined in; empty where there is none."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # an object that is called, or a built-in
        return b""
    return Path(file).read_bytes() if file else b""


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
    name = f"{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{where}: {path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
