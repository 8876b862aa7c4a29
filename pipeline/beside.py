"""Modules that lie beside the files of code that a config names: importable, and part of that code.

A network in a cloned repository is a file among such modules. They are found by reading import statements, so
they are the same whatever was imported before.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import sys
import sysconfig
from collections.abc import Sequence
from functools import lru_cache
from importlib.machinery import ModuleSpec, NamespaceLoader, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from pipeline.errors import UserError

INSTALLED = sorted({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
"""Folders of Python and of installed packages."""

_INSTALLED = tuple(f"{folder}{os.sep}" for folder in INSTALLED)

homes: dict[str, tuple[Path, str]] = {}
"""Folder and digest of the modules that lie beside files that were loaded, by their outermost names."""


def settle(path: Path, where: str) -> tuple[str, ...]:
    """Make the modules beside a file importable, as they are now.

    Returns:
        The package that the file is part of, from the outermost one.

    Raises:
        UserError: a module of the same name is there already, from elsewhere.
    """
    importlib.invalidate_caches()
    root, found = companions(path)
    changed = False
    for name, place in found.items():
        digest = hashlib.sha256(content(place)).hexdigest()
        home, before = homes.get(name, (root, digest))
        loaded = sys.modules.get(name)
        if home != root and digest == before:  # a copy, as in a bundle
            if loaded is not None:
                continue
            home = root
        if home != root or (loaded is not None and place.resolve() not in _places(loaded)):
            other = home if home != root else next(iter(_places(loaded)), "elsewhere")
            raise UserError(
                f"{where}: {path} imports {name!r}, which lies beside it, but another module of that name is "
                f"in use: {other}. Rename one of them, or use each in a process of its own."
            )
        homes[name] = root, digest
        changed |= digest != before
    if changed:
        for name, module in list(sys.modules.items()):
            ours = isinstance(getattr(module, "__loader__", None), _Uncompiled | NamespaceLoader)
            if ours and homes.get(name.partition(".")[0], ("",))[0] == root:
                del sys.modules[name]
    return path.parent.relative_to(root).parts


def _places(module: ModuleType | None) -> list[Path]:
    """File and folders of a module."""
    file = getattr(module, "__file__", None)
    return [Path(each).resolve() for each in (*getattr(module, "__path__", ()), *([file] if file else ()))]


def companions(file: Path) -> tuple[Path, dict[str, Path]]:
    """The modules that a file needs and that lie beside it, or beside the outermost package it belongs to.

    A package counts as a whole. Files with the name of a module of Python's, or ours, replace none.

    Returns:
        The folder they lie in, and files or folders of packages by their names.
    """
    root, first = file.absolute().parent, file.absolute()
    while (root / "__init__.py").is_file():
        root, first = root.parent, root
    found = {first.name: first} if first.is_dir() else {}
    waiting = [first]
    while waiting:
        for code in files_of(waiting.pop()):
            for name in sorted(_imported(code.read_bytes()) - found.keys()):
                spec = _spec(name, root)
                if spec is not None:
                    places = spec.submodule_search_locations
                    found[name] = Path(next(iter(places)) if places else spec.origin or "")
                    waiting.append(found[name])
    return root, dict(sorted(found.items()))


def files_of(place: Path) -> list[Path]:
    """The Python files of a module or package."""
    return sorted(place.rglob("*.py")) if place.is_dir() else [place]


def content(place: Path) -> bytes:
    """Names and content of the Python files of a module or package."""
    named = ((str(file.relative_to(place.parent)).encode(), file.read_bytes()) for file in files_of(place))
    return b"".join(b"\0%b\0%b" % each for each in named)


@lru_cache(1024)
def _imported(source: bytes) -> frozenset[str]:
    """Outermost names of the modules that code imports; none if it is not Python."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):
        return frozenset()
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return frozenset(name.partition(".")[0] for name in names)


def _spec(name: str, root: Path) -> ModuleSpec | None:
    """A module as it lies in a folder; without `__init__.py` it yields to modules elsewhere, as in Python."""
    if name in sys.stdlib_module_names or name == __package__:
        return None
    spec = PathFinder.find_spec(name, [str(root)])
    if spec is not None and spec.loader is None:
        elsewhere = PathFinder.find_spec(name)
        if (elsewhere is not None and elsewhere.loader) or not files_of(root / name):
            return None
        spec.submodule_search_locations = [str(root / name)]
    return spec


def is_own(file: str | None) -> bool:
    """Whether a file is neither Python's, nor of an installed package, nor ours."""
    return (
        file is not None
        and not is_installed(file)
        and not file.startswith(f"{Path(__file__).parent}{os.sep}")
    )


def is_installed(file: str) -> bool:
    """Whether a file is Python's, or of a package that was installed, wherever it was."""
    return file.startswith(_INSTALLED) or "/site-packages/" in file or "/dist-packages/" in file


class _Uncompiled(SourceFileLoader):
    """Reads the source itself: compiled code counts as current if size and second of a change are equal."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


class _Finder:
    """Finds the modules that lie beside files that a config names."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        """What Python's import system asks for."""
        home = homes.get(name.partition(".")[0])
        if home is None:
            return None
        spec = _spec(name, home[0]) if path is None else PathFinder.find_spec(name, path)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Uncompiled(spec.loader.name, spec.loader.path)
        return spec


sys.meta_path.insert(0, _Finder)
