"""What is sent: the code, the config as it was checked here, and the files it names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cluster.remote import package, start
from pipeline.config import loading, schema
from pipeline.errors import UserError
from tests.jobs.conftest import clean

RAW: dict[str, Any] = {
    "name": "small",
    "workspace": "s3://bucket/ood",
    "model": {
        "source": "factory",
        "name": "./nets/net.py:build",
        "weights": "../weights/w.pt",
        "transform": {"crop": 8, "mean": [0.5], "std": [0.25], "channels": 1},
    },
    "datasets": [
        {"name": "train", "role": "train", "format": "npz", "path": "data.npz", "images": "x", "labels": "y"},
        {"name": "test", "role": "id", "format": "npz", "path": "data.npz", "images": "x", "labels": "y"},
        {"name": "mnist", "role": "far_ood", "format": "idx", "path": "other/data.npz", "labels": "y.gz"},
        {"name": "code", "role": "far_ood", "format": "python", "path": "./nets/data.py:images"},
        {"name": "module", "role": "far_ood", "format": "python", "path": "package.data:images"},
        {"name": "list", "role": "far_ood", "format": "imagelist", "path": "l.txt", "root": "/data/images"},
        {
            "name": "folder",
            "role": "far_ood",
            "format": "imagefolder",
            "path": "gs://b/x",
            "labels": "classes.yaml",
        },
        {"name": "tars", "role": "far_ood", "format": "webdataset", "path": "/data/*.tar"},
        {
            "name": "home",
            "role": "far_ood",
            "format": "imagefolder",
            "path": "~/images",
            "labels": "imagenet1k",
        },
    ],
    "detectors": ["msp"],
}
FILES = (
    "nets/net.py",
    "../weights/w.pt",
    "data.npz",
    "other/data.npz",
    "y.gz",
    "nets/data.py",
    "l.txt",
    "classes.yaml",
)


@pytest.fixture
def fill(tmp_path: Path) -> Callable[..., tuple[schema.Config, Path]]:
    """Make the package of a raw config beside which there are all files it names."""
    here = tmp_path / "laptop"
    for name in FILES:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(f"content of {name}")

    def filled(raw: dict[str, Any], *overrides: str, **variables: str) -> tuple[schema.Config, Path]:
        (here / "small.yaml").write_text(yaml.safe_dump(raw))
        folder = tmp_path / f"package-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        sent = package.fill(folder, str(here / "small.yaml"), list(overrides), variables)
        return next(iter(sent.values())), folder

    return filled


def change(path: str, value: Any) -> dict[str, Any]:
    """RAW with one value set."""
    raw = deepcopy(RAW)
    *parents, last = path.split(".")
    node: Any = raw
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node[last] = value
    return raw


def test_relative_files_travel_under_their_names_and_all_other_paths_stay(fill):
    sent, folder = fill(RAW, "seed=7")
    assert sent.seed == 7
    assert sent.workspace == "s3://bucket/ood"
    assert (sent.model.name, sent.model.weights) == ("files/0/net.py:build", "files/1/w.pt")
    assert [(dataset.path, dataset.root, dataset.labels) for dataset in sent.datasets] == [
        ("files/2/data.npz", None, "y"),
        ("files/2/data.npz", None, "y"),
        ("files/3/data.npz", None, "files/4/y.gz"),
        ("files/0/data.py:images", None, None),
        ("package.data:images", None, None),
        ("files/5/l.txt", "/data/images", None),
        ("gs://b/x", None, "files/6/classes.yaml"),
        ("/data/*.tar", None, None),
        ("~/images", None, "imagenet1k"),
    ]
    for number, name in enumerate(("nets/net.py", "../weights/w.pt", "data.npz", "other/data.npz")):
        assert (folder / f"files/{number}/{Path(name).name}").read_text() == f"content of {name}"
    loaded = loading.load(str(folder / "config.yaml"))
    assert loaded.model.name == f"{folder}/files/0/net.py:build"
    assert loaded.model.weights == f"{folder}/files/1/w.pt"
    assert loaded.detectors == sent.detectors


def test_a_file_of_code_is_sent_with_the_modules_beside_it(fill, tmp_path):
    clone = tmp_path / "laptop" / "nets"
    (clone / "models" / "__pycache__").mkdir(parents=True)
    code = {
        "net.py": "from models import parts\nimport torch",
        "data.py": "import tools",
        "tools.py": "",
        "unused.py": "",
        "models/__init__.py": "",
        "models/parts.py": "import tools",
        "models/sizes.json": "{}",
        "models/__pycache__/parts.pyc": "",
    }
    for name, text in code.items():
        (clone / name).write_text(text)
    sent, folder = fill(RAW)
    assert (sent.model.name, sent.datasets[3].path) == ("files/0/net.py:build", "files/0/data.py:images")
    found = {path.relative_to(folder / "files/0").as_posix() for path in (folder / "files/0").rglob("*.*")}
    assert found == code.keys() - {"unused.py", "models/__pycache__/parts.pyc"}
    assert (folder / "files/0/models/parts.py").read_text() == "import tools"
    raw = change("model.name", "./nets/models/parts.py:build")
    assert fill(raw)[0].model.name == "files/0/models/parts.py:build"


def test_below_an_absolute_data_folder_everything_is_the_clusters(fill):
    sent, folder = fill(RAW, "data=/data/all")
    assert sent.data == "/data/all"
    assert (sent.model.name, sent.model.weights) == ("files/0/net.py:build", "../weights/w.pt")
    assert sent.datasets[0].path == "data.npz"
    assert sent.datasets[3].path == "files/0/data.py:images"
    assert loading.load(str(folder / "config.yaml")).datasets[0].path == "/data/all/data.npz"
    assert fill(RAW, "data=s3://bucket/all")[0].datasets[5].path == "l.txt"


def test_an_extended_config_is_sent_whole_and_two_packages_of_it_are_equal(fill, tmp_path):
    (tmp_path / "laptop" / "base.yaml").write_text(yaml.safe_dump(RAW))
    first, second = (fill({"extends": "base.yaml", "seed": 3})[1] for _ in range(2))
    assert loading.load(str(first / "config.yaml")).seed == 3
    assert contents(first) == contents(second)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name, _ in package.contents(folder)}


SCRIPT = """
import pipeline
from pipeline.cli.doctor import examine
from pipeline.config import loading as config, published
assert published.read("cifar10-resnet18") and published.members("OpenOOD v1.5 CIFAR-10")
assert next(found for found in examine() if found.what == "ood-pipeline").text == pipeline.__version__
print(pipeline.__file__, config.bundled())
"""


def test_the_package_has_code_labels_and_published_numbers_of_its_own(fill, tmp_path):
    _, folder = fill(RAW)
    names = dict(package.contents(folder))
    assert {"config.yaml", "pipeline/cli/__main__.py", "pipeline/configs/labels/imagenet1k.txt"} <= set(names)
    assert not [name for name in names if "__pycache__" in name]
    assert sum(names.values()) < 10 * 2**20
    assert python(folder, tmp_path, "-c", SCRIPT).split() == [
        f"{folder}/pipeline/__init__.py",
        f"{folder}/pipeline/configs",
    ]


def python(package: Path, current: Path, *arguments: str) -> str:
    """What Python prints with a package before everything that is installed."""
    environment = clean("COVERAGE") | {"PYTHONPATH": str(package)}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=current,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_an_installed_package_sends_the_same_as_a_checkout_and_a_dry_run_says_what(fill, tmp_path):
    """The package has the layout of a wheel."""
    _, folder = fill(RAW)
    sent = dict(package.contents(folder))  # running it leaves bytecode there
    shown = python(
        *(folder, tmp_path, "-m", "pipeline.cli", "submit", str(tmp_path / "laptop" / "small.yaml")),
        *("--address", "http://127.0.0.1:1", "--dry-run", "--env", "PATH", "--command", "extract", "-vq"),
    )
    found = re.findall(r"^file +([\d,]+)  (.*)$", shown, re.MULTILINE)
    listed = {name: int(size.replace(",", "")) for size, name in found}
    assert ".environment.json" in listed
    del listed[".environment.json"]
    assert listed == sent
    assert f"command   python -m {start.MODULE} extract config.yaml -v\nvariables PATH\n" in shown
    assert os.environ["PATH"] not in shown


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (
            "workspace",
            "./workspace",
            r"^workspace: \./workspace lies on this machine\. Give a folder that all",
        ),
        ("data", "./photos", r"^data: \./photos lies on this machine\. Give a folder"),
        ("datasets.2.path", "nets", r"^datasets\.mnist\.path: nets lies on this machine"),
        ("datasets.6.path", "nowhere", r"^datasets\.folder\.path: no such file: .*nowhere\. A relative path"),
        ("datasets.5.root", "nets", r"^datasets\.list\.root: nets lies on this machine"),
        ("datasets.5.root", None, r"^datasets\.list\.root: not set, so images lie beside l\.txt on this"),
        (
            "datasets.7.path",
            "data.npz",
            r"^datasets\.tars\.path: data\.npz .* no webdataset file is sent",
        ),
        ("model.weights", "none.pt", r"^model\.weights: no such file: .*none\.pt"),
        ("model.name", "./none.py:build", r"^model\.name: no such file: .*none\.py"),
        (
            "tracking",
            {"uri": "sqlite:///a.db"},
            r"^tracking\.uri: sqlite:///a\.db lies on this machine\. Name a",
        ),
        ("detectors", ["mps"], r"small\.yaml: detectors\.mps: unknown detector 'mps'"),
    ],
)
def test_what_the_cluster_would_not_find_is_refused(fill, path, value, expected):
    with pytest.raises(UserError, match=expected):
        fill(change(path, value))


def test_the_default_workspace_is_refused(fill):
    raw = deepcopy(RAW)
    del raw["workspace"]
    with pytest.raises(UserError, match=r"^workspace: \./workspace lies on this machine"):
        fill(raw)


def test_files_that_are_too_large_are_refused_with_the_largest(fill, monkeypatch):
    monkeypatch.setattr(package, "LIMIT", 100)
    with pytest.raises(UserError, match=r"/w\.pt has 0 MiB, all files .* Put it on storage that all"):
        fill(RAW)


def test_a_sweep_is_sent_whole_with_the_files_of_each_model(fill, tmp_path):
    raw = deepcopy(RAW)
    one = raw.pop("model")
    (tmp_path / "laptop" / "v.pt").write_text("other weights")
    raw["models"] = {"one": one, "two": {**one, "weights": "v.pt"}}
    _, folder = fill(raw)
    found = loading.load_all(str(folder / "config.yaml"))
    assert [config.name for config in found] == ["small-one", "small-two"]
    assert [Path(config.model.weights or "").read_text() for config in found] == [
        "content of ../weights/w.pt",
        "other weights",
    ]
    raw["models"]["two"]["weights"] = "nowhere.pt"
    with pytest.raises(UserError, match=r"^models\.two\.weights: no such file"):
        fill(raw)


def test_a_package_says_what_its_code_needs_but_for_the_ray_of_the_cluster(fill):
    _, folder = fill(RAW)
    lines = (folder / start.FILE).read_text().splitlines()
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[^\w-]", text)[0] for text in project["dependencies"]}
    assert {re.split(r"[^\w-]", line)[0] for line in lines} == names - {"ray"}


def test_a_job_whose_python_lacks_something_says_so_at_once(fill):
    """Even if it lacks everything that is not Python's own."""
    _, folder = fill(RAW)
    command = ["-m", start.MODULE, "run", "config.yaml"]
    environment = clean("COVERAGE", "PYTHONPATH")
    done = subprocess.run(
        [sys.executable, "-S", *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"error: \S+ on \S+ lacks .*typer.*\. Start the cluster from the image of .*--pip\.\n",
        done.stderr,
    )
    (folder / start.FILE).write_text("typer>=0.19\nno-such-package>=1")
    assert start.missing((folder / start.FILE).read_text().splitlines()) == ["no-such-package>=1"]
