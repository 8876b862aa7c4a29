"""Networks are described from a note as long as the files they came from are the same."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.config.schema import Model, Transform
from pipeline.errors import UserError
from pipeline.network import classifier, known
from pipeline.network.classifier import Classifier
from pipeline.network.known import Network
from pipeline.workspace import artifacts
from pipeline.workspace.patience import Unavailable
from tests.damage import DAMAGES

CODE = """
from pathlib import Path
from torch import nn

def build():
    width = int((Path(__file__).parent / "width.txt").read_text())
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 3))
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that other tests wrote and imported are none of this process."""
    before = known._own_modules()
    monkeypatch.setattr(known, "_own_modules", lambda own=known._own_modules: own() - before)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A network whose file reads another, with weights of its own."""
    (tmp_path / "net.py").write_text(CODE)
    (tmp_path / "width.txt").write_text("5")
    save(tmp_path, 0)
    for path in tmp_path.iterdir():  # not changed while it is read
        os.utime(path, (1e9, 1e9))
    monkeypatch.setattr(known, "_PROCESS", time.time())  # nor after it was imported
    return Model(
        source="factory",
        name=f"{tmp_path / 'net.py'}:build",
        weights=str(tmp_path / "weights.safetensors"),
        transform=Transform(crop=8, mean=(0.5,), std=(0.5,), channels=1),
    )


def save(folder: Path, seed: int) -> None:
    folder.mkdir(exist_ok=True)
    rng = torch.Generator().manual_seed(seed)
    shapes = {"1.weight": (5, 64), "1.bias": (5,), "3.weight": (3, 5), "3.bias": (3,)}
    tensors = {name: torch.rand(shape, generator=rng) for name, shape in shapes.items()}
    save_file(tensors, folder / "weights.safetensors")


def noted(model: Model, folder: Path) -> Network:
    network = Network(model, 0, folder / "workspace")
    assert network.description
    network.note()
    return network


def is_loaded(network: Network) -> bool:
    assert network.description
    return "loaded" in vars(network)


def test_a_network_that_is_known_is_not_loaded_and_described_alike(model: Model, tmp_path: Path) -> None:
    first, second = noted(model, tmp_path), Network(model, 0, tmp_path / "workspace")
    assert is_loaded(first) and not is_loaded(second)
    assert second.description.document() == first.description.document()
    for name, values in first.description.arrays().items():
        np.testing.assert_array_equal(second.description.arrays()[name], values)
    assert second.loaded.digest == second.description.digest
    assert is_loaded(Network(model, 1, tmp_path / "workspace"))


@pytest.mark.parametrize("name", ["net.py", "width.txt", "weights.safetensors"])
def test_a_file_that_was_touched_makes_it_be_loaded(model: Model, tmp_path: Path, name: str) -> None:
    noted(model, tmp_path)
    os.utime(tmp_path / name, (2e9, 2e9))
    assert is_loaded(Network(model, 0, tmp_path / "workspace"))
    (tmp_path / name).unlink()
    with pytest.raises((UserError, FileNotFoundError)):
        is_loaded(Network(model, 0, tmp_path / "workspace"))


def test_other_weights_are_another_network(model: Model, tmp_path: Path) -> None:
    before = noted(model, tmp_path).description.digest
    save(tmp_path, 1)
    os.utime(tmp_path / "weights.safetensors", (1e9 + 1, 1e9 + 1))
    after = noted(model, tmp_path)
    assert after.description.digest != before
    assert Network(model, 0, tmp_path / "workspace").description.digest == after.description.digest


def test_weights_in_the_place_of_others_like_them_are_another_network(model: Model, tmp_path: Path) -> None:
    before = noted(model, tmp_path).description.digest
    weights = tmp_path / "weights.safetensors"
    save(tmp_path / "other", 1)
    old = weights.stat()
    os.utime(tmp_path / "other" / weights.name, ns=(old.st_atime_ns, old.st_mtime_ns))
    (tmp_path / "other" / weights.name).replace(weights)
    new = weights.stat()
    assert (new.st_size, new.st_mtime_ns) == (old.st_size, old.st_mtime_ns)
    assert noted(model, tmp_path).description.digest != before
    assert not is_loaded(Network(model, 0, tmp_path / "workspace"))


def test_what_may_have_changed_while_it_was_read_is_not_noted(model: Model, tmp_path: Path) -> None:
    os.utime(tmp_path / "width.txt", (4e9, 4e9))
    noted(model, tmp_path)
    assert is_loaded(Network(model, 0, tmp_path / "workspace"))


def test_a_file_that_was_replaced_while_it_was_read_is_not_noted(model: Model, tmp_path: Path) -> None:
    swap = """
    other = Path(__file__).with_name("other")
    other.write_text("5")
    os.utime(other, (1e9, 1e9))
    other.replace(other.with_name("width.txt"))
    return """
    code = CODE.replace("    return ", swap.lstrip("\n"))
    (tmp_path / "net.py").write_text(f"import os\n{code}")
    os.utime(tmp_path / "net.py", (1e9, 1e9))
    noted(model, tmp_path)
    assert is_loaded(Network(model, 0, tmp_path / "workspace"))


def test_a_file_that_was_looked_for_in_vain_makes_it_be_loaded_when_it_is_there(
    model: Model, tmp_path: Path
) -> None:
    optional = """
    try:
        bias = float(Path(__file__).with_name("bias.txt").read_text())
    except FileNotFoundError:
        bias = 0.0
    return """
    (tmp_path / "net.py").write_text(CODE.replace("    return ", optional.lstrip("\n")))
    os.utime(tmp_path / "net.py", (1e9, 1e9))
    noted(model, tmp_path)
    assert not is_loaded(Network(model, 0, tmp_path / "workspace"))
    (tmp_path / "bias.txt").write_text("1")
    assert is_loaded(Network(model, 0, tmp_path / "workspace"))


def test_a_package_beside_it_is_looked_through_again(model: Model, tmp_path: Path) -> None:
    package = tmp_path / "parts_of_a_known_network"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (tmp_path / "net.py").write_text(CODE + f"\nimport {package.name}\n")
    for path in (package / "__init__.py", package, tmp_path / "net.py"):
        os.utime(path, (1e9, 1e9))
    noted(model, tmp_path)
    assert not is_loaded(Network(model, 0, tmp_path / "workspace"))
    (package / "more.py").write_text("")
    assert is_loaded(Network(model, 0, tmp_path / "workspace"))


def test_a_module_that_was_changed_since_it_was_imported_is_not_noted(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "imported.py").write_text(CODE)
    os.utime(tmp_path / "imported.py", (1e9, 1e9))
    monkeypatch.syspath_prepend(tmp_path)
    own = model.model_copy(update={"name": "imported:build"})
    noted(own, tmp_path)
    assert not is_loaded(Network(own, 0, tmp_path / "workspace"))
    os.utime(tmp_path / "imported.py")
    noted(own, tmp_path)
    assert is_loaded(Network(own, 0, tmp_path / "workspace"))
    del sys.modules["imported"]


def test_a_factory_that_has_its_own_weights_is_always_loaded(model: Model, tmp_path: Path) -> None:
    own = model.model_copy(update={"weights": None})
    noted(own, tmp_path)
    assert is_loaded(Network(own, 0, tmp_path / "workspace"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_note_is_written_anew(model: Model, tmp_path: Path, damage: str) -> None:
    noted(model, tmp_path)
    for name in ("arrays.safetensors", artifacts.RECORD):
        (path,) = (tmp_path / "workspace" / "models").glob(f"*/{name}")
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
        assert is_loaded(noted(model, tmp_path))
        assert not is_loaded(Network(model, 0, tmp_path / "workspace"))


def test_what_says_nothing_about_the_network_is_not_kept(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(*_: object) -> Classifier:
        raise Unavailable("weights", "busy")

    def full(_: Classifier) -> None:
        raise UserError("can't allocate memory")

    noted(model, tmp_path)
    for _ in range(2):
        network = Network(model, 0, tmp_path / "workspace")
        with monkeypatch.context() as patch, pytest.raises(Unavailable):
            patch.setattr(classifier, "load", down)
            network.check("fits", lambda found: None)
        with pytest.raises(UserError, match="memory"):
            network.check("fits", full)
        network.check("fits", lambda found: None)


def test_another_network_than_was_noted_is_refused_once(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted(model, tmp_path)
    (tmp_path / "net.py").write_text(CODE.replace("ReLU", "GELU"))
    monkeypatch.setattr(known, "_same", lambda record: True)
    assert not is_loaded(Network(model, 0, tmp_path / "workspace"))
    with pytest.raises(UserError, match=r"^model: it is no longer the network that was noted in models/"):
        Network(model, 0, tmp_path / "workspace").check("fits", lambda found: None)
    noted(model, tmp_path).check("fits", lambda found: None)


def test_two_runs_may_write_a_note_at_once(model: Model, tmp_path: Path) -> None:
    (draft,) = noted(model, tmp_path).artifact.folder.parent.glob("*")
    (draft / ".arrays.safetensors.0123").write_bytes(b"of another run")
    network = Network(model, 0, tmp_path / "workspace")
    network.check("fits", lambda found: None)
    network.note()
    assert (draft / ".arrays.safetensors.0123").is_file()


def test_what_was_tested_is_not_tested_again(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(found: Classifier) -> None:
        raise UserError(f"{len(found.head[1])} classes are too many")

    first = Network(model, 0, tmp_path / "workspace")
    first.check("fits", lambda found: None)
    with pytest.raises(UserError, match="3 classes are too many"):
        first.check("classes", fails)
    first.note()
    monkeypatch.setattr(classifier, "load", None)
    second = Network(model, 0, tmp_path / "workspace")
    second.check("fits", fails)
    with pytest.raises(UserError, match=r"^3 classes are too many$"):
        second.check("classes", lambda found: None)
