"""Images of a run as a dataset of FiftyOne: the chosen ones, with what the run says of them.

Exports run on a stand-in, and on FiftyOne itself where its package is installed and a database is there that
it can reach (FIFTYONE_DATABASE_URI).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli.main import app
from pipeline.config.schema import Config
from pipeline.data.decode import as_file
from pipeline.errors import UserError
from pipeline.results import fiftyone as work
from pipeline.results.report.review import chosen
from pipeline.results.report.tables import Results
from pipeline.workspace import tables
from tests.results.test_report import Setup, make_run
from tests.results.test_review import folders as folders  # a fixture


def test_without_its_package_the_message_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    run = make_run(tmp_path / "runs" / "r", Setup())
    with pytest.raises(
        UserError, match=r"FiftyOne cannot be imported .* pip install 'ood-pipeline\[fiftyone\]'"
    ):
        work.export(str(run))


def test_raw_pixels_become_a_png_with_the_same_pixels_and_encoded_images_stay_as_they_are(
    tmp_path: Path,
) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (9, 7, 1), np.uint8)
    file, ending = as_file(pixels.tobytes(), pixels.shape)
    (tmp_path / f"a{ending}").write_bytes(file)
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(image), pixels[:, :, 0])
        image.save(tmp_path / "b.jpg")
    encoded = (tmp_path / "b.jpg").read_bytes()
    assert as_file(encoded, None) == (encoded, ".jpg")


class Fields:
    """A sample or a classification."""

    def __init__(self, **fields: Any) -> None:
        assert not any("." in name for name in fields)
        vars(self).update(fields)

    def __getattr__(self, name: str) -> None:
        """None: what other samples of a dataset have."""


def stand_in() -> Any:
    """What the export asks of FiftyOne, in memory, with its rules for names."""
    kept: dict[str, Dataset] = {}

    class Dataset(list[Fields]):
        persistent = False

        def __init__(self) -> None:
            self._name = uuid4().hex
            kept[self._name] = self

        @property
        def name(self) -> str:
            return self._name

        @name.setter
        def name(self, name: str) -> None:
            if name in kept or not any(map(str.isalnum, name)):
                raise ValueError("no such name")
            kept[name] = kept.pop(self._name)
            self._name = name

        def add_samples(self, samples: Iterable[Fields], progress: bool) -> None:
            self.extend(samples)

        def delete(self) -> None:
            del kept[self._name]

    return SimpleNamespace(
        Dataset=Dataset,
        Sample=Fields,
        Classification=Fields,
        list_datasets=lambda: sorted(kept),
        dataset_exists=kept.__contains__,
        load_dataset=kept.__getitem__,
        delete_dataset=kept.__delitem__,
    )


@pytest.fixture(params=["stand-in", "fiftyone"])
def voxel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """FiftyOne, or what stands in for it."""
    if request.param == "fiftyone":
        return pytest.importorskip("fiftyone")
    monkeypatch.setitem(sys.modules, "fiftyone", stand_in())
    return sys.modules["fiftyone"]


@pytest.fixture
def name(voxel: Any) -> Iterator[str]:
    """Of a dataset that FiftyOne has not, and has no more after the test."""
    name = f"test-{uuid4().hex}"
    yield name
    if voxel.dataset_exists(name):
        voxel.delete_dataset(name)


def test_samples_are_the_chosen_images_with_tags_classes_scores_and_p_values(
    folders: dict[str, Any],
    load: Callable[..., Config],
    execute: Callable[..., Any],
    tmp_path: Path,
    voxel: Any,
    name: str,
) -> None:
    folders["detectors"] = [{"en.ergy": {"method": "energy"}}, "msp"]
    folders["thresholds"] = {"false_alarm": [0.05], "calibrate_on": "id"}
    run = execute(load(folders)).folder
    found = chosen(Results.read(run), 5)

    inside = [image for image in found.images if image.dataset != "animals"]
    made = work.export(str(run), name, 5)
    assert (made.inside, made.gone) == (len({(image.dataset, image.key) for image in inside}), [])
    assert {sample.tags[0] for sample in voxel.load_dataset(name)} == {"animals"}

    with pytest.raises(UserError, match=f"FiftyOne has a dataset {name}.*--force"):
        work.export(str(run), name, 5)
    options = ["--name", name, "--images", "5", "--files", str(tmp_path / "written"), "--force"]
    result = CliRunner().invoke(app, ["fiftyone", str(run), *options], catch_exceptions=False)
    assert f"fiftyone app launch {name}" in result.output
    dataset = voxel.load_dataset(name)
    assert dataset.persistent
    samples = {(sample.tags[0], sample.key): sample for sample in dataset}
    assert len(samples) == len(dataset)
    assert samples.keys() == {(image.dataset, image.key) for image in found.images}
    for dataset_name, role in {"test": "id", "animals": "near_ood", "textures": "far_ood"}.items():
        table = pa.concat_tables(
            tables.Table.open(run / "scores" / dataset_name).columns(
                ["key", "label", "prediction", "msp", "en.ergy", "p.msp", "p.en.ergy"]
            )
        )
        rows = {row["key"]: row for row in table.to_pylist()}
        own = {key: sample for (where, key), sample in samples.items() if where == dataset_name}
        for key, sample in own.items():
            row = rows[key]
            whys = [image.why for image in found.images if (image.dataset, image.key) == (dataset_name, key)]
            assert sample.tags == [dataset_name, role, *whys]
            assert sample.prediction.label == str(row["prediction"])
            assert (sample.score_msp, sample.score_en_ergy) == (row["msp"], row["en.ergy"])
            assert (sample.p_msp, sample.p_en_ergy) == (row["p.msp"], row["p.en.ergy"])
            known = None if sample.ground_truth is None else sample.ground_truth.label
            assert known == (str(row["label"]) if row["label"] >= 0 else None)
            with Image.open(sample.filepath) as image:
                assert image.size == (28, 28)
            within = Path(sample.filepath).relative_to(tmp_path).parent.as_posix()
            assert re.fullmatch(
                "animals" if dataset_name == "animals" else rf"written/{dataset_name}-[0-9a-f]{{16}}", within
            )


def test_images_that_are_gone_are_counted_and_an_export_of_none_leaves_no_dataset(
    folders: dict[str, Any],
    load: Callable[..., Config],
    execute: Callable[..., Any],
    tmp_path: Path,
    voxel: Any,
    name: str,
) -> None:
    run = execute(load(folders)).folder
    image = next(image for image in chosen(Results.read(run), 1).images if image.dataset == "animals")
    (tmp_path / "animals" / image.key).unlink()
    assert work.export(str(run), name, 5).gone == [f"animals/{image.key}"]
    for file in (tmp_path / "animals").iterdir():
        file.unlink()
    before = voxel.list_datasets()
    with pytest.raises(UserError, match="no image is left"):
        work.export(str(run), name, 5, force=True)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^--files: "):
        work.export(str(run), name, 5, str(tmp_path / "file"), force=True)
    with pytest.raises(UserError, match="--name: FiftyOne takes no"):
        work.export(str(run), "!", 5, str(tmp_path / "written"))
    assert voxel.list_datasets() == before


def test_pictures_of_another_listing_are_not_overwritten_and_a_changed_file_is_refused(
    folders: dict[str, Any],
    load: Callable[..., Config],
    execute: Callable[..., Any],
    tmp_path: Path,
    voxel: Any,
    name: str,
) -> None:
    folders["detectors"] = ["msp"]
    for entry in folders["datasets"]:
        entry["limit"] = 64
    written: list[dict[str, bytes]] = []
    for seed in (0, 1):
        run = execute(load(folders | {"seed": seed})).folder
        work.export(str(run), name, 5, str(tmp_path / "written"), force=True)
        files = [Path(sample.filepath) for sample in voxel.load_dataset(name) if sample.tags[0] == "test"]
        written.append({str(file): file.read_bytes() for file in files})
    first, second = written
    assert not first.keys() & second.keys()
    assert {file: Path(file).read_bytes() for file in first} == first

    image = next(image for image in chosen(Results.read(run), 1).images if image.dataset == "animals")
    with (tmp_path / "animals" / image.key).open("ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match=rf"{re.escape(image.key)} was changed after it was listed"):
        work.export(str(run), name, 5, force=True)


@pytest.mark.parametrize(
    ("error", "expected"),
    [(FileNotFoundError, "listing of test is gone"), (PermissionError, "listing of test cannot be read")],
)
def test_a_listing_that_is_gone_is_told_apart_from_one_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, error: type[OSError], expected: str
) -> None:
    def listed(*_: object) -> None:
        raise error

    monkeypatch.setattr(work, "listed", listed)
    with pytest.raises(UserError, match=expected):
        work._files(SimpleNamespace(folder="run", manifest={}), "test", [], None, work.Exported("a"))  # type: ignore[arg-type]


def test_what_cannot_be_exported_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^detectors: m\.sp and m_sp are one name in FiftyOne"):
        work._plain(["m.sp", "knn", "m_sp"])
    (tmp_path / "test-1").touch()
    with pytest.raises(UserError, match=r"^--files: cannot write .*/test-1/a\.png: "):
        work._write(tmp_path / "test-1" / "a.png", b"")
    with pytest.raises(UserError, match=r"^--files: s3://b/x is not on this machine"):
        work._local("s3://b/x")
    voxel = stand_in()
    made, other = voxel.Dataset(), voxel.Dataset()
    other.name = "taken"
    with pytest.raises(UserError, match=r"FiftyOne has a dataset taken.*--force"):
        work._keep(made, voxel, "taken", force=False)
    assert voxel.load_dataset("taken") is other
    work._keep(made, voxel, "taken", force=True)
    assert voxel.load_dataset("taken") is made


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("raise OSError('libssl')", "FiftyOne fails when it is imported: OSError: libssl"),
        ("from json import nothing", r"FiftyOne cannot be imported \(cannot import name"),
        ("def list_datasets(): raise OSError('refused')", "does not start: refused.* FIFTYONE_DATABASE_URI"),
    ],
)
def test_a_broken_package_is_told_apart_from_a_database_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, expected: str
) -> None:
    (tmp_path / "fiftyone.py").write_text(source)
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    del sys.modules["fiftyone"]  # and what is imported goes with the test
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=expected):
        work._package()
