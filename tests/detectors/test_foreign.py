"""Detectors of the user's own: from the document, from a file, from a module, from an installed package."""

from __future__ import annotations

import re
import sys
from importlib.metadata import Distribution
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline import detectors, imports
from pipeline.cluster.remote import package
from pipeline.config import loading
from pipeline.errors import UserError
from pipeline.stages import prepare
from pipeline.workspace import files, tables

ROOT = Path(__file__).parent.parent.parent
DOCUMENT = (ROOT / "docs/add-a-detector.md").read_text("utf-8")

OWN = """
from dataclasses import dataclass
import numpy as np
from pipeline.detectors.base import Bank, Detector
from pipeline.detectors.knn import every_row, unit_feature
from pipeline.learned.statistics import Part, Statistic

FACTOR = 1.0

@dataclass(frozen=True)
class Sum(Part):
    total: np.ndarray

class Total(Statistic[Sum]):
    part = Sum

    def measure(self, head, known):
        return lambda batch: Sum(FACTOR * batch["feature"].sum(axis=0, dtype="float64"))

class Own(Detector):
    title = paper = formula = "own"
    columns = ("feature",)
    neighbours = True
    k: int = 3

    def statistics(self):
        return (Total(),)

    def fit(self, train):
        return OwnScorer(train.train[Total()].total, self.k)

@dataclass(frozen=True)
class OwnScorer:
    total: np.ndarray
    k: int

    @property
    def bank(self):
        return Bank(embed=embed, keep=every_row, k=self.k)

    def __call__(self, batch):
        return batch["neighbours"].mean(axis=1) + self.total.sum()

def embed(batch):
    return (FACTOR * unit_feature(batch)).astype("float32")

class Bare(Detector):
    title = "bare"

class Strange(Own):
    columns = ("featur",)
"""


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)
    assert found is not None
    return found[1]


def scores(outcome, name: str) -> np.ndarray:
    return pq.read_table(outcome.folder / "scores" / "animals")[name].to_numpy()


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def test_the_document_has_fewer_than_60_lines() -> None:
    assert len(DOCUMENT.splitlines()) < 60


def test_the_example_of_the_document_runs(settings, load, execute, tmp_path) -> None:
    (tmp_path / "my_detector.py").write_text(block("python"), "utf-8")
    settings["detectors"] = yaml.safe_load(block("yaml"))["detectors"]
    loaded = load(settings)
    outcome = execute(loaded)
    ready = prepare.prepare(loaded)
    train, animals = (
        tables.Table.open(files.at(ready.jobs[name].folder)).read(0, rows, ["feature"])["feature"]
        for name, rows in (("train", 500), ("animals", 150))
    )
    expected = np.abs(animals - train.astype(np.float64).mean(axis=0)).sum(axis=1)
    np.testing.assert_allclose(scores(outcome, "centre"), expected, rtol=1e-9)
    assert "Centre (2026)" in (outcome.folder / "report" / "index.html").read_text("utf-8")


def test_a_changed_file_never_meets_old_statistics_vectors_or_scores(settings, load, execute, own) -> None:
    settings["detectors"] = [{"mine": {"method": "./own.py:Own"}}]
    first = scores(execute(load(settings), last="score"), "mine")
    own.write_text(OWN.replace("FACTOR = 1.0", "FACTOR = 2.0"))
    second = scores(execute(load(settings), last="score"), "mine")
    np.testing.assert_allclose(second, 2 * first, rtol=1e-6)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with two files and entry points for a name of its own and for one of ours."""
    folder = tmp_path / "site"
    (folder / "plugin_of_mine").mkdir(parents=True)
    (folder / "plugin_of_mine" / "__init__.py").write_text("")
    (folder / "plugin_of_mine" / "parts.py").write_text("")
    (folder / "plugin_of_mine" / "own.py").write_text(OWN)
    info = folder / "plugin_of_mine-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-of-mine\nVersion: 1\n")
    names = "\n".join(f"{name} = plugin_of_mine.own:Own" for name in ("own", "knn"))
    (info / "entry_points.txt").write_text(f"[{detectors.GROUP}]\n{names}\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    assert Distribution.from_name("plugin-of-mine")
    yield folder / "plugin_of_mine"
    for name in [name for name in sys.modules if name.startswith("plugin_of_mine")]:
        del sys.modules[name]


def test_an_installed_package_makes_its_detector_known_by_name(settings, load, plugin) -> None:
    settings["detectors"] = ["own", "knn"]
    built = load(settings).built()
    assert type(built["own"]).__module__ == "plugin_of_mine.own"
    assert type(built["knn"]).__module__ == "pipeline.detectors.knn"
    assert "own" not in detectors.names()
    with pytest.raises(UserError, match="Did you mean 'own'"):
        detectors.get("owm")


def test_every_file_of_a_package_is_part_of_the_identity(plugin) -> None:
    before = detectors.identity(detectors.get("own")())
    for name in [name for name in sys.modules if name.startswith("plugin_of_mine")]:
        del sys.modules[name]
    (plugin / "parts.py").write_text("X = 1")
    after = detectors.identity(detectors.get("own")())
    assert before[:3] == after[:3]
    assert before != after


def test_the_identity_is_that_of_the_code_that_runs(own) -> None:
    detector = detectors.get(f"{own}:Own")()
    before = detectors.identity(detector)
    total = imports.foreign(type(detector.statistics()[0]))
    own.write_text(OWN + "\n")
    assert detectors.identity(detector) == before == [*before[:3], total]
    assert detectors.identity(detectors.get(f"{own}:Own")()) != before


def test_a_relative_file_starts_from_the_config_and_is_sent_with_a_job(
    settings, tmp_path, own, monkeypatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    settings |= {"detectors": [{"mine": {"method": "./own.py:Own", "k": 4}}], "workspace": "s3://bucket/x"}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    (entry,) = loading.load(str(path)).detectors
    assert entry.method == f"{own}:Own"
    sent = package.fill(tmp_path / "elsewhere", str(path), [], {})[""]
    (entry,) = sent.detectors
    assert entry.method == "files/0/own.py:Own"
    assert (elsewhere / "files/0/own.py").read_text() == OWN
    assert loading.load(str(elsewhere / package.CONFIG)).built()["mine"].k == 4


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("./own.py:Owm", {}, r"mine: method: unknown subclass of Detector 'Owm'\. Did you mean 'Own'"),
        ("./own.py:embed", {}, "unknown subclass of Detector 'embed'"),
        ("./gone.py:Own", {}, r"detectors\.mine: method: no such file"),
        ("./own.py:", {}, r"expected 'package\.module:Class' or '\./file\.py:Class'"),
        ("no_such.module:Own", {}, r"cannot import 'no_such\.module'"),
        ("./own.py:Bare", {}, "Bare does not declare paper, formula, columns"),
        ("./own.py:Strange", {}, r"unknown column 'featur'\. Did you mean 'feature'"),
        ("./own.py:Own", {"kk": 3}, r"detectors\.mine\.kk"),
    ],
)
def test_mistakes_are_named(settings, load, own, method, parameters, message) -> None:
    settings["detectors"] = [{"mine": {"method": method, **parameters}}]
    with pytest.raises(UserError, match=message):
        load(settings)


STEP = """
import divisors_of_mine
from pipeline.detectors._steps import Step

class Halve(Step):
    title = paper = formula = "halve"

    def shape(self, train):
        return halve

def halve(feature):
    return divisors_of_mine.divide(feature)
"""


def test_what_the_driver_alone_can_import_travels_and_a_step_is_part_of_the_identity(
    ray_session, settings, load, execute, own, tmp_path, monkeypatch
) -> None:
    own.rename(tmp_path / "module_of_mine.py")
    monkeypatch.setenv(imports.FOLDER, str(tmp_path))
    monkeypatch.setattr(sys, "path", sys.path.copy())
    step = {"half": {"method": "./halve.py:Halve"}}
    settings["detectors"] = [
        {"mine": {"method": "module_of_mine:Own"}},
        {"halved": {"method": "energy", "steps": [step]}},
    ]
    found = []
    (tmp_path / "halve.py").write_text(STEP)
    for engine, divisor in {"ray": 2, "inline": 4}.items():
        (tmp_path / "divisors_of_mine.py").write_text(
            f"def divide(feature):\n    return feature / {divisor}\n"
        )
        execute(load(settings), last="extract")
        outcome = execute(load(settings), first="fit", last="score", engine=engine)
        found.append({name: scores(outcome, name) for name in ("mine", "halved")})
    assert np.isfinite(found[0]["mine"]).all()
    np.testing.assert_array_equal(found[0]["mine"], found[1]["mine"])
    assert (found[0]["halved"] != found[1]["halved"]).all()
