"""Files of code may import what lies beside them; it is found, counted and executed as it is now."""

from __future__ import annotations

import os
import py_compile
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import beside, imports
from pipeline.config.schema import Model, Transform
from pipeline.errors import UserError
from pipeline.network.classifier import load

CLONE = {
    "net.py": "from clonemodels import resnet\n\ndef build():\n    return resnet.build()\n",
    "clonemodels/__init__.py": "",
    "clonemodels/resnet.py": """
import clonetools
from torch import nn

from .widths import WIDTH

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), clonetools.activation(), nn.Linear(WIDTH, 3))
""",
    "clonemodels/widths.py": "WIDTH = 5",
    "clonetools.py": "from torch import nn\nactivation = nn.ReLU",
    "cloneunused.py": "",
}
"""A repository whose root folder is where its modules are imported from."""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test imports is gone after it."""
    before = set(sys.modules)
    monkeypatch.setattr(beside, "homes", {})
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("clone", "net_")):
            del sys.modules[name]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[dict[str, str]], None]:
    """Write files below the folder of the test."""

    def written(files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    return written


def network(path: Path) -> Any:
    transform = Transform(crop=8, mean=(0.5,), std=(0.5,), channels=1)
    return load(Model(source="factory", name=f"{path}:build", transform=transform), 0)


@pytest.mark.parametrize("file", ["net.py", "clonemodels/resnet.py"])
def test_a_network_in_a_cloned_repository_is_known_by_all_its_modules(
    write, tmp_path: Path, file: str
) -> None:
    write(CLONE)
    first = network(tmp_path / file)
    assert first.head[0].shape == (3, 5)
    write({"cloneunused.py": "X = 1"})
    assert network(tmp_path / file).architecture == first.architecture
    write({"clonetools.py": CLONE["clonetools.py"] + "\n"})
    again = network(tmp_path / file)
    assert (again.digest, again.architecture != first.architecture) == (first.digest, True)
    write({"clonemodels/widths.py": "WIDTH = 7"})
    assert network(tmp_path / file).head[0].shape == (3, 7)


def value(path: Path) -> Any:
    return imports.load_function(f"{path}:value", "here")()


def test_a_module_that_another_one_imported_is_executed_anew_in_both(write, tmp_path: Path) -> None:
    write({"net.py": "import cloneone\ndef value():\n    return cloneone.X", "clonebase.py": "X = 1"})
    write(
        {"cloneone.py": "from clonebase import X", "other.py": "from clonebase import X\nvalue = lambda: X"}
    )
    assert (value(tmp_path / "net.py"), value(tmp_path / "other.py")) == (1, 1)
    write({"clonebase.py": "X = 2"})
    assert (value(tmp_path / "other.py"), value(tmp_path / "net.py")) == (2, 2)


def test_code_that_was_compiled_in_the_same_second_is_not_taken_for_the_file(write, tmp_path: Path) -> None:
    write({"net.py": "from clonetools import X\n", "clonetools.py": "X = 1\n"})
    py_compile.compile(str(tmp_path / "clonetools.py"))
    compiled = (tmp_path / "clonetools.py").stat()
    write({"clonetools.py": "X = 2\n"})
    os.utime(tmp_path / "clonetools.py", ns=(compiled.st_atime_ns, compiled.st_mtime_ns))
    assert imports._module(str(tmp_path / "net.py"), "here").X == 2


def test_a_folder_without_init_is_a_package_unless_there_is_a_module_elsewhere(write, tmp_path: Path) -> None:
    write({"net.py": "from clonespace.deep import one\nimport yaml\nvalue = lambda: (one.X, yaml.__file__)"})
    write({"clonespace/deep/one.py": "X = 1", "yaml/script.py": ""})
    found, file = value(tmp_path / "net.py")
    assert (found, str(tmp_path) in file) == (1, False)
    write({"clonespace/deep/one.py": "X = 2"})
    assert value(tmp_path / "net.py")[0] == 2


def test_no_module_of_python_is_replaced(write, tmp_path: Path) -> None:
    write({"net.py": "import tabnanny\nvalue = lambda: tabnanny.__file__", "tabnanny.py": ""})
    assert str(tmp_path) not in value(tmp_path / "net.py")
    assert beside.companions(tmp_path / "net.py") == (tmp_path, {})


def test_a_copy_of_what_is_in_use_is_taken_for_it(write, tmp_path: Path) -> None:
    for folder in ("one", "copy"):
        write({f"{folder}/net.py": "import clonetools\nvalue = lambda: clonetools"})
        write({f"{folder}/clonetools.py": "X = 1"})
    first, second = (value(tmp_path / folder / "net.py") for folder in ("one", "copy"))
    assert first is second


def test_two_modules_of_one_name_are_refused(write, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write({f"{folder}/net.py": "import clonetools\nvalue = lambda: 1"})
        write({f"{folder}/clonetools.py": f"X = {folder!r}"})
    value(tmp_path / "one" / "net.py")
    with pytest.raises(
        UserError, match=r"^here: .*two/net\.py imports 'clonetools', .* in use: .*one\. Rename"
    ):
        value(tmp_path / "two" / "net.py")
    write({"net.py": "import pytest\nvalue = lambda: 1", "pytest.py": ""})
    with pytest.raises(UserError, match=r"imports 'pytest', .* in use: .*pytest"):
        value(tmp_path / "net.py")


@pytest.mark.parametrize(
    ("text", "reason"),
    [("import clonegone", "No module named 'clonegone'"), ("from .parts import x", "relative import")],
)
def test_what_cannot_be_imported_is_told(write, tmp_path: Path, text: str, reason: str) -> None:
    write({"net.py": text})
    with pytest.raises(
        UserError, match=rf"^here: .*net\.py cannot be imported: .*{reason}.* beside the file"
    ):
        value(tmp_path / "net.py")


@pytest.mark.parametrize("line", ["from clonespace.util import X", "from .util import X"])
def test_a_class_in_a_package_without_init_is_known_by_all_its_files(
    write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    digests = []
    for number in range(2):
        write({"clonespace/k.py": f"{line}\nclass K:\n    pass", "clonespace/util.py": f"X = {number}"})
        for name in [name for name in sys.modules if name.startswith("clonespace")]:
            del sys.modules[name]
        digests.append(imports.digest_of(imports.load_class("clonespace.k:K", "here", object)))
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    ("file", "own"),
    [
        ("{ours}/columns.py", False),
        ("{ours}_ext/columns.py", True),
        ("{ours}_plugins.py", True),
        ("/home/a/.local/lib/python3.12/site-packages/torchvision/models/resnet.py", False),
        ("/usr/lib/python3/dist-packages/timm/models/vit.py", False),
        (threading.__file__, False),
    ],
)
def test_code_is_the_users_unless_it_was_installed_or_is_ours(file: str, own: bool) -> None:
    assert beside.is_own(file.format(ours=Path(beside.__file__).parent)) is own
