"""A bundle gives the bits of its run when the run, its workspace and its data are gone."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import pipeline
from pipeline.cli import main
from pipeline.config import loading, schema
from pipeline.data.manifest import compile_manifest
from pipeline.errors import UserError
from pipeline.metrics import drift
from pipeline.network import graph
from pipeline.network.sources import torchvision
from pipeline.results import applied as results
from pipeline.stages import bundle as bundles
from pipeline.stages import extract
from pipeline.stages.calibration import Calibrated
from pipeline.stages.detect import OodDetector
from pipeline.workflows import apply, bundle, run
from pipeline.workflows.progress import Quiet
from pipeline.workspace import artifacts, files
from pipeline.workspace.artifacts import Artifact
from tests.conftest import everything, small
from tests.servers import wait

INLINE: dict[str, Any] = {"engine": "inline", "threads": 1}
DETECTORS: list[Any] = [
    *("msp", "energy", "featurenorm", "tempscale", "vim", "mahalanobis_ensemble"),
    {"knn": {"k": 5}},
    {"grood": {"samples": 32, "class_samples": 5}},
    {"react_dice": {"method": "msp", "steps": ["react", {"dice": {"p": 10}}]}},
    {"together": {"method": "ensemble", "members": ["knn", "energy"]}},
]
RATE = 0.05


@dataclass(frozen=True)
class Kept:
    """What is left of an evaluation: a bundle elsewhere, and the tables that it had."""

    bundle: Path
    images: Path
    tables: dict[str, pa.Table]

    def pixels(self, dataset: str) -> list[np.ndarray]:
        """The images of a dataset in the order of its table."""
        with np.load(self.images) as arrays:
            array = arrays[f"{dataset}_x"]
        return [array[row] for row in self.rows(dataset)]

    def rows(self, dataset: str) -> list[int]:
        """The rows of the array that the run saw."""
        return [int(key.rpartition("/")[2]) for key in self.tables[dataset]["key"].to_pylist()]

    def broken(self, folder: Path) -> Path:
        """A copy of the bundle that a test may spoil."""
        return Path(shutil.copytree(self.bundle, folder / "broken.ood"))


def evaluated(raw: dict[str, Any], folder: Path) -> pipeline.Evaluation:
    """A finished run in a folder."""
    raw["workspace"] = str(folder / "workspace")
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    outcome = run.execute(loading.load(str(folder / "config.yaml")), run.Options(**INLINE), Quiet())
    return pipeline.open_run(str(outcome.folder))


@pytest.fixture(scope="module")
def kept(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """The small evaluation with held-out images; bundled with its weights, moved, and deleted."""
    with pytest.MonkeyPatch.context() as patch:
        from pipeline.results.report import plots

        for name in ("histograms", "roc", "norm_ratio"):
            patch.setattr(plots, name, lambda *_: bytes(16) + (2).to_bytes(4, "big"))
        return made(images, tmp_path_factory.mktemp("bundle"), DETECTORS)


def made(images: Path, folder: Path, detectors: list[Any], **index: Any) -> Kept:
    """A run that is bundled, moved and deleted with its weights and data; of no detectors, it has all."""
    own = folder / "own"
    own.mkdir()
    shutil.copyfile(images, own / "images.npz")
    weights = loading.resolve("package://pipeline.quickstart/resnet.safetensors")
    shutil.copyfile(weights, own / "weights.safetensors")
    raw = small(own / "images.npz")
    if not detectors:
        raw = everything(raw, own / "images.npz")
    else:
        raw["datasets"].append(
            {"name": "held", "role": "id_val", "format": "npz", "path": str(own / "images.npz")}
            | {"images": "held_x", "labels": "held_y"}
        )
        for entry in raw["datasets"]:
            entry["limit"] = {"train": 200, "id_val": 100}.get(entry["role"], 60)
        raw["detectors"] = detectors
    raw["index"] = index
    raw["model"]["weights"] = str(own / "weights.safetensors")
    evaluation = evaluated(raw, own)
    bundle.make(str(evaluation.folder), own / "first.ood", bundle.Options(weights=True))
    found = {name: evaluation.scores(name) for name in ("test", "animals", "held")}
    (own / "first.ood").rename(folder / "moved.ood")
    shutil.rmtree(own)
    return Kept(folder / "moved.ood", images, found)


@pytest.fixture(scope="module")
def detect(kept: Kept) -> OodDetector:
    """The bundle, ready for images."""
    return pipeline.load_bundle(kept.bundle)


def same(found: pa.Table, expected: pa.Table) -> None:
    """All scores and predictions have the same bits."""
    labels = [name for name in expected.column_names if name not in ("key", "label")]
    assert len(labels) > 9
    for name in labels:
        np.testing.assert_array_equal(found[name].to_numpy(), expected[name].to_numpy(), err_msg=name)


def test_exact_scores_have_the_bits_of_the_run(kept, detect) -> None:
    for dataset in ("test", "animals"):
        same(detect(kept.pixels(dataset), exact=True), kept.tables[dataset])


def test_single_images_agree_with_the_run(kept, detect) -> None:
    found = pa.concat_tables([detect([image]) for image in kept.pixels("animals")[:8]])
    for label in detect.detectors:
        expected = kept.tables["animals"][label].to_numpy()
        tolerance = 1e-5 * np.ptp(expected)
        np.testing.assert_allclose(found[label].to_numpy(), expected[:8], rtol=0, atol=tolerance)


def test_torch_is_left_as_it_was(detect) -> None:
    torch.set_num_threads(2)
    try:
        detect([], exact=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_p_values_and_flags_are_those_of_the_held_out_images(kept, detect) -> None:
    found, held = detect(kept.pixels("animals"), exact=True), kept.tables["held"]
    at_ten = detect(kept.pixels("animals"), exact=True, false_alarm=0.1)
    for label in detect.detectors:
        scores, known = found[label].to_numpy(), held[label].to_numpy()
        p = (1 + (known[None, :] >= scores[:, None]).sum(axis=1)) / (len(known) + 1)
        np.testing.assert_array_equal(found[f"p.{label}"].to_numpy(), p)
        assert found[f"is_ood.{label}"].to_pylist() == (p <= RATE).tolist()
        assert at_ten[f"is_ood.{label}"].to_pylist() == (p <= 0.1).tolist()
    assert 0 < found["is_ood.knn"].to_numpy().sum() < len(found)


def test_images_come_as_paths_bytes_pictures_and_arrays_and_bad_ones_are_told(kept, detect, tmp_path) -> None:
    pixels = kept.pixels("test")[0]
    picture, encoded = Image.fromarray(pixels), io.BytesIO()
    picture.save(encoded, "png")
    path = tmp_path / "image.png"
    path.write_bytes(encoded.getvalue())
    given = [path, str(path), encoded.getvalue(), picture, pixels, pixels[:, :, None], b"no", "gone.png"]
    found = detect([*given, np.stack([pixels] * 3, axis=2)])
    assert found["key"].to_pylist() == [str(path)] * 2 + list("23456") + ["gone.png", "8"]
    assert len(set(found["energy"].to_pylist()[:6])) == 1
    errors = found["error"].to_pylist()
    assert errors[:6] == [None] * 6 and errors[8] is None
    assert "not a readable image" in errors[6] and "no such file" in errors[7]
    for name in [*found.column_names[3:], "prediction"]:
        assert found[name].null_count == 2, name
    assert len(detect([])) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("one.png", "images: got str; expected a list of images"),
        ([np.zeros((4, 4))], r"images: 0 is an array of float64 \(4, 4\); expected uint8"),
        ([3], "images: 0 is of type int"),
    ],
)
def test_what_is_no_image_is_refused(detect, given, message) -> None:
    with pytest.raises(UserError, match=message):
        detect(given)


def test_empty_arrays_and_names_that_are_no_text_are_rows_with_a_reason(detect) -> None:
    found = detect([np.zeros((0, 28), np.uint8), np.zeros((0, 0, 3), np.uint8), "\udcff.png"])
    assert found["key"].to_pylist() == ["0", "1", "\\udcff.png"]
    assert found["error"].to_pylist()[0] == "28 x 0 pixels: it is empty"
    assert found["energy"].null_count == found["prediction"].null_count == 3


def test_a_device_that_is_not_there_is_refused(kept, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=r"device: cuda is not available here\. Set it to cpu"):
        pipeline.load_bundle(kept.bundle, "cuda")


def test_two_detectors_do_not_compute_at_once_in_one_process(kept, detect, monkeypatch) -> None:
    """Torch has one number of threads and one choice of algorithms, which `exact` sets and gives back."""
    together, met = threading.Barrier(2), []
    plain = OodDetector._judged

    def judged(*given: Any) -> pa.Table:
        with suppress(threading.BrokenBarrierError):
            met.append(together.wait(0.3))
        return plain(*given)

    monkeypatch.setattr(OodDetector, "_judged", judged)
    images, other = kept.pixels("test")[:1], pipeline.load_bundle(kept.bundle)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda each: each(images, exact=True), (detect, other)))
    assert found[0].equals(found[1]) and not met


def test_a_rate_for_which_there_are_too_few_images_is_refused(detect) -> None:
    with pytest.raises(UserError, match=r"false_alarm: 0.001 takes at least 999 calibration images"):
        detect([b""], false_alarm=0.001)
    with pytest.raises(UserError, match=r"false_alarm: got 1; expected a rate between 0 and 1"):
        detect([b""], false_alarm=1)


def test_the_card_tells_what_it_is(kept) -> None:
    card = (kept.bundle / "README.md").read_text()
    for part in (
        "# Detectors of small",
        "`knn`: KNN (2022)",
        "| `grood` | animals | auroc |",
        "compared with 100 held-out ID images of held",
        "fitted to the same held-out images",
        "role train, 200 images",
        "`pipeline.quickstart.resnet:build`, is not in this folder",
    ):
        assert part in card, part


def test_others_may_read_all_files_of_a_bundle(kept, tmp_path) -> None:
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in kept.bundle.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


def test_nothing_in_a_bundle_is_a_pickle_and_every_file_is_in_its_record(kept) -> None:
    files = {str(path.relative_to(kept.bundle)) for path in kept.bundle.rglob("*") if path.is_file()}
    assert {Path(name).suffix for name in files} == {".json", ".md", ".safetensors", ".npy"}
    assert files == {"_manifest.json", *artifacts.read_record(kept.bundle).files}


def changed_byte(broken: Path) -> None:
    path = next(broken.glob("fits/*/arrays.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def lost(broken: Path) -> None:
    next(broken.glob("fits/*/bank-00000.npy")).unlink()


def unfinished(broken: Path) -> None:
    (broken / "_manifest.json").unlink()


def sealed(broken: Path, kind: str, **document: Any) -> None:
    """Write the record again, of a kind and with another bundle.json."""
    record = artifacts.read_record(broken)
    content = json.loads((broken / "bundle.json").read_text()) | document
    (broken / "bundle.json").write_text(json.dumps(content))
    weights = broken / "weights.safetensors"
    made = {
        name: artifacts.File((broken / name).stat().st_size, artifacts._sha256(broken / name))
        for name in record.files
    }
    assert weights.is_file()
    Artifact(broken, kind, record.identity).finish(made, alone=False)


def newer(broken: Path) -> None:
    sealed(broken, "bundle 2")


def a_run(broken: Path) -> None:
    sealed(broken, "results 4")


def other_weights(broken: Path) -> None:
    arrays = load_file(broken / "weights.safetensors")
    arrays["conv1.weight"] = arrays["conv1.weight"] * np.float32(1.5)
    save_file(arrays, broken / "weights.safetensors")
    sealed(broken, "bundle 1")


def other_code(broken: Path) -> None:
    document = json.loads((broken / "bundle.json").read_text())
    document["detectors"]["knn"]["identity"] = "0" * 64
    sealed(broken, "bundle 1", detectors=document["detectors"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (changed_byte, r"arrays\.safetensors is damaged: other bytes than were written\. Copy the bundle"),
        (lost, r"bank-00000\.npy is damaged: it is missing\. Copy the bundle again"),
        (unfinished, r"no bundle, or one that was not finished: it has no _manifest\.json"),
        (newer, r"a bundle of version 2, and this program reads 1\. Upgrade ood-pipeline"),
        (a_run, r"no bundle\. Name a folder that `ood-pipeline bundle` made"),
        (other_weights, r"the weights in .* have the digest .* the detectors were fitted to"),
        (other_code, r"detectors\.knn: it was fitted by another version of its code than is installed"),
        (shutil.rmtree, r"no such folder\. Name a bundle"),
    ],
)
def test_a_bundle_that_is_not_what_was_made_is_refused(kept, tmp_path, spoil, message) -> None:
    broken = kept.broken(tmp_path)
    spoil(broken)
    with pytest.raises(UserError, match=message):
        apply.prepare(str(broken), str(kept.images), str(tmp_path / "out"), options(tmp_path))
    assert not list(tmp_path.glob("out*"))


def options(folder: Path, **changes: Any) -> apply.Options:
    """Those of an application in this process to images of the shared file."""
    given: dict[str, Any] = {"workspace": str(folder / "state"), "images": "animals_x", **INLINE}
    return apply.Options(**given | changes)


def applied(kept: Kept, data: object, out: Path, **changes: Any) -> apply.Outcome:
    """Apply the bundle in a workspace that tests share, which the others are not told of."""
    shared = {} if "workspace" in changes else {"workspace": str(kept.bundle.parent / "state")}
    chosen = options(out.parent, **shared | changes)
    return apply.execute(str(kept.bundle), str(data), str(out), chosen, Quiet())


def test_applying_has_the_bits_of_the_run_in_every_form_and_is_done_once(kept, tmp_path, monkeypatch) -> None:
    forms: dict[str, Callable[[Path], pa.Table]] = {
        "table": pq.read_table,
        "table.parquet": pq.read_table,
        "table.csv": pyarrow.csv.read_csv,
        "upper.CSV": pyarrow.csv.read_csv,
    }
    outcome = applied(kept, kept.images, tmp_path / "table")
    monkeypatch.setattr(extract, "run", lambda *_: pytest.fail("extracted again"))
    tables = {}
    for name, read in forms.items():
        applied(kept, kept.images, tmp_path / name)
        tables[name] = read(tmp_path / name)
        same(tables[name].take(kept.rows("animals")), kept.tables["animals"])
    table = tables["table"]
    assert tables["table.parquet"].equals(table)
    assert tables["table.csv"].column_names == table.column_names
    assert table.column_names[:3] == ["key", "prediction", "msp"]
    images = outcome.summary["images"]
    assert (images["listed"], images["features"], images["errors"]) == (150, 150, 0)
    for label, entry in outcome.summary["detectors"].items():
        p, flags = table[f"p.{label}"].to_numpy(), table[f"is_ood.{label}"].to_numpy()
        np.testing.assert_array_equal(flags, p <= RATE)
        assert (entry["scored"], entry["flagged"]) == (150, flags.sum())
        assert entry["ci_low"] <= entry["share"] == flags.mean() < entry["ci_high"]


def test_the_images_are_flagged_together_at_a_false_discovery_rate(kept, tmp_path) -> None:
    applied(kept, kept.images, tmp_path / "out", fdr=0.3, detectors=["knn"])
    table = pq.read_table(tmp_path / "out")
    p = np.sort(table["p.knn"].to_numpy())
    named = np.flatnonzero(p <= 0.3 * np.arange(1, len(p) + 1) / len(p))
    assert table["is_ood.knn"].to_numpy().sum() == named[-1] + 1 > 0
    assert table.column_names == ["key", "prediction", "knn", "p.knn", "is_ood.knn"]


@pytest.fixture
def night(kept: Kept, tmp_path: Path) -> Path:
    """Images in folders of dates: two of ID images, and one of animals; one of them is unreadable."""
    for date, dataset, rows in (
        ("2025-01-30", "test", slice(0, 30)),
        ("2025-01-31", "test", slice(30, 60)),
        ("2025-02-01", "animals", slice(0, 30)),
    ):
        folder = tmp_path / "night" / date
        folder.mkdir(parents=True)
        for number, pixels in enumerate(kept.pixels(dataset)[rows]):
            Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    (tmp_path / "night" / "2025-01-30" / "bad.png").write_bytes(b"no image")
    (tmp_path / "night" / "notes.txt").write_text("not an image")
    return tmp_path / "night"


def test_a_folder_a_tar_and_one_image_are_read_as_they_are_and_every_image_is_counted(
    kept, night, tmp_path
) -> None:
    outcome = applied(kept, night, tmp_path / "folder", images=None, alarm_drift=True, alarm_above=0.15)
    images = outcome.summary["images"]
    assert (images["listed"], images["features"], images["errors"]) == (91, 90, 1)
    assert images["left_out"] == ["1 of 92 files not read: .txt 1 (first: notes.txt)"]
    errors = pyarrow.csv.read_csv(tmp_path / "folder.errors.csv").to_pylist()
    assert [row["key"] for row in errors] == ["2025-01-30/bad.png"]
    assert "not a readable image" in errors[0]["reason"]
    table = pq.read_table(tmp_path / "folder")
    same(table.slice(60), kept.tables["animals"].slice(0, 30))
    dates = outcome.summary["detectors"]["knn"]["dates"]
    assert [(each["date"], each["images"]) for each in dates] == [
        (date, 30) for date in ("2025-01-30", "2025-01-31", "2025-02-01")
    ]
    assert [each["signals"] for each in dates] == [False, False, True]
    assert any(text == "knn is out of control on 2025-02-01" for text in outcome.alarms)
    assert any(text.startswith("knn flags") for text in outcome.alarms)
    with tarfile.open(tmp_path / "night.tar", "w") as archive:
        archive.add(night / "2025-02-01", "x")
    applied(kept, tmp_path / "night.tar", tmp_path / "tar", images=None)
    same(pq.read_table(tmp_path / "tar"), kept.tables["animals"].slice(0, 30))
    applied(kept, night / "2025-02-01" / "00.png", tmp_path / "one.csv", images=None)
    one = pyarrow.csv.read_csv(tmp_path / "one.csv")
    assert one["key"].to_pylist() == ["00.png"]
    same(one, kept.tables["animals"].slice(0, 1))


def test_a_column_of_times_is_charted(kept, tmp_path) -> None:
    rows: list[dict[str, Any]] = []
    for number, pixels in enumerate([*kept.pixels("test")[:20], *kept.pixels("animals")[:20]]):
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "png")
        rows.append({"image": content.getvalue(), "taken": datetime(2025, 1, 1 + number // 20, 12)})
    rows[3]["image"] = b"no image"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "images.parquet")
    chosen: dict[str, Any] = {"images": None, "detectors": ["knn"], "alarm_drift": True}
    outcome = applied(kept, tmp_path / "images.parquet", tmp_path / "out", time="taken", **chosen)
    dates = outcome.summary["detectors"]["knn"]["dates"]
    assert [(each["date"], each["images"]) for each in dates] == [("2025-01-01", 19), ("2025-01-02", 20)]
    assert [each["signals"] for each in dates] == [False, True]
    assert outcome.alarms == ["knn is out of control on 2025-01-02"]
    assert "flagged at a false-alarm rate of 0.05" in results.sentences(outcome.summary)
    together = outcome.summary | {"made_of": {"fdr": 0.1, "false_alarm": 0.05}}
    assert (
        "flagged at a false-discovery rate of 0.1; the charts of dates count p-values of at most 0.05"
        in results.sentences(together)
    )


def test_a_date_that_is_lost_is_an_alarm_and_images_without_a_date_are_counted(kept, tmp_path) -> None:
    pixels = kept.pixels("test")[:12]
    for number, each in enumerate(pixels):
        folder = tmp_path / "images" / ("2025-01-01", "2025-01-02", "undated")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(each).save(folder / f"{number}.png")
    for lost in (tmp_path / "images" / "2025-01-02").iterdir():
        lost.write_bytes(b"no image")
    chosen: dict[str, Any] = {"images": None, "detectors": ["knn"], "alarm_drift": True}
    outcome = applied(kept, tmp_path / "images", tmp_path / "out", **chosen)
    assert outcome.alarms[0] == "no image of 2025-01-02 could be read"
    images = outcome.summary["images"]
    assert (images["undated"], images["dates_lost"]) == (4, ["2025-01-02"])
    said = list(results.sentences(outcome.summary))
    assert "no image of 2025-01-02 could be read: it is on no chart" in said
    assert "4 images have no date and are on no chart" in said


def test_images_that_could_not_be_read_have_their_dates_in_whatever_order_they_are_told(tmp_path) -> None:
    taken = [datetime(2025, 1, 1 + day) for day in range(4)]
    pq.write_table(pa.table({"image": [b"no image"] * 4, "taken": taken}), tmp_path / "images.parquet")
    given = {"name": "a", "role": "unlabelled", "format": "parquet", "path": str(tmp_path / "images.parquet")}
    manifest = compile_manifest(schema.Dataset(**given), tmp_path / "manifests")
    keys = manifest.read(0, 4)["key"].to_pylist()
    listed = apply._listed_of(manifest, pa.chunked_array([[keys[3]], [keys[1]]]))
    assert apply._dates(manifest, "taken")(listed) == ["2025-01-02", "2025-01-04"]
    assert apply._listed_of(manifest, pa.chunked_array([], pa.string())) == []


def test_a_column_without_a_date_is_refused_where_drift_is_an_alarm(kept, tmp_path) -> None:
    content = io.BytesIO()
    Image.fromarray(kept.pixels("test")[0]).save(content, "png")
    pq.write_table(pa.table({"image": [content.getvalue()], "taken": ["noon"]}), tmp_path / "images.parquet")
    chosen: dict[str, Any] = {"images": None, "detectors": ["knn"], "alarm_drift": True, "time": "taken"}
    with pytest.raises(UserError, match=r"--alarm-drift: no image of .* has a date in the column taken"):
        applied(kept, tmp_path / "images.parquet", tmp_path / "out", **chosen)


def test_images_none_of_which_can_be_read_give_an_empty_table(kept, tmp_path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "bad.png").write_bytes(b"no image")
    for name in ("out", "out.parquet", "out.csv"):
        outcome = applied(kept, tmp_path / "images", tmp_path / name, images=None, fdr=0.2)
        assert "knn: 0 scores; nothing to flag" in results.sentences(outcome.summary)
    assert len(pq.read_table(tmp_path / "out")) == len(pq.read_table(tmp_path / "out.parquet")) == 0
    assert "is_ood.knn" in pq.read_table(tmp_path / "out").column_names


def test_what_was_killed_goes_on_where_it_stopped(kept, tmp_path, monkeypatch) -> None:
    forwarded: list[int] = []
    plain = extract.extract_rows

    def counting(*given: Any, **named: Any) -> Any:
        if len(forwarded) == 1 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        found = plain(*given, **named)
        forwarded.append(found[2])
        return found

    monkeypatch.setattr(extract, "extract_rows", counting)
    with pytest.raises(KeyboardInterrupt):
        applied(kept, kept.images, tmp_path / "out.parquet", workspace=str(tmp_path / "state"))
    assert not list(tmp_path.glob("out*"))
    (tmp_path / "again").touch()
    applied(kept, kept.images, tmp_path / "out.parquet", workspace=str(tmp_path / "state"))
    assert forwarded == [128, 22]
    same(pq.read_table(tmp_path / "out.parquet").take(kept.rows("animals")), kept.tables["animals"])


def test_a_damaged_file_of_the_workspace_is_made_again(kept, tmp_path) -> None:
    own: dict[str, Any] = {"workspace": str(tmp_path / "state"), "detectors": ["knn"]}
    applied(kept, kept.images, tmp_path / "out", **own)
    before = (tmp_path / "out" / "part-00000.parquet").read_bytes()
    part = next((tmp_path / "state" / "features").glob("*/part-00000.parquet"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    shutil.rmtree(tmp_path / "state" / "scores")
    applied(kept, kept.images, tmp_path / "out", **own)
    assert (tmp_path / "out" / "part-00000.parquet").read_bytes() == before


def test_a_table_of_something_else_is_not_replaced(kept, night, tmp_path) -> None:
    own: dict[str, Any] = {"images": None, "detectors": ["energy"]}
    applied(kept, night / "2025-02-01", tmp_path / "out.csv", **own)
    before = (tmp_path / "out.csv").read_bytes()
    for changes, what in (
        ({"false_alarm": 0.1}, "made with another false-alarm rate"),
        ({"detectors": ["knn"]}, "made with other detectors"),
    ):
        with pytest.raises(UserError, match=rf"--out: .*out\.csv exists and was {what}"):
            applied(kept, night / "2025-02-01", tmp_path / "out.csv", **own | changes)
    with pytest.raises(UserError, match=r"exists and was made with other images\. Name another, or delete"):
        applied(kept, night / "2025-01-31", tmp_path / "out.csv", **own)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"mine exists and was made by something else"):
        applied(kept, night / "2025-01-31", tmp_path / "mine", **own)
    assert (tmp_path / "out.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "data", "message"),
    [
        ({}, "empty", r"no images in .*empty\. Check the path"),
        ({}, "gone", r"gone: no such file or folder\. Name the images"),
        ({}, "strange.bin", r"strange\.bin: its format cannot be told from its name\. Give --format: idx"),
        ({"format": "zip"}, "empty", r"--format: unknown format 'zip'"),
        ({"detectors": ["knnn"]}, "empty", r"unknown detector 'knnn'\. Did you mean 'knn'"),
        ({"false_alarm": 0.001}, "empty", r"--false-alarm: 0\.001 takes at least 999 calibration images"),
        ({"fdr": 0.001}, "empty", r"--fdr: 0\.001 takes at least 999 calibration images"),
        ({"fdr": 2.0}, "empty", r"--fdr: got 2; expected a rate between 0 and 1"),
        ({"alarm_above": 5.0}, "empty", r"--alarm-above: got 5; expected a share from 0 to below 1"),
        ({"alarm_drift": True}, "plain", r"--alarm-drift: no image of .*plain lies in a folder or archive"),
        ({"overrides": ["index.kind=IVF4,Flat"]}, "plain", r"--set index\.kind=.*: of a bundle only keys"),
        ({"overrides": ["extract.batch_size=0"]}, "plain", r"--set extract\.batch_size: "),
    ],
)
def test_what_cannot_be_done_is_told_before_work(kept, tmp_path, changes, data, message) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "plain").mkdir()
    Image.new("L", (28, 28)).save(tmp_path / "plain" / "a.png")
    (tmp_path / "strange.bin").touch()
    own = {"images": None, "workspace": str(tmp_path / "state"), **changes}
    with pytest.raises(UserError, match=message):
        applied(kept, tmp_path / data, tmp_path / "out", **own)
    assert not list(tmp_path.glob("out*"))
    assert not list(tmp_path.glob("state/features/*"))


def test_a_table_that_cannot_be_written_is_told_before_work(kept, tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out: cannot write to .*file: "):
        applied(kept, kept.images, tmp_path / "file" / "out.csv", workspace=str(tmp_path / "state"))
    assert not list(tmp_path.glob("state/features/*"))


def test_an_alarm_that_was_asked_for_is_exit_status_3(kept, tmp_path) -> None:
    command = ["apply", str(kept.bundle), str(kept.images), "--images", "animals_x", "--detectors", "knn"]
    command += ["--out", str(tmp_path / "out.csv"), "--workspace", str(tmp_path / "state")]
    command += ["--engine", "inline", "--threads", "1"]
    for above, status in (("0.01", 3), ("0.99", 0)):
        found = CliRunner().invoke(main.app, [*command, "--alarm-above", above])
        assert found.exit_code == status, found.output
        assert ("alarm    knn flags" in found.output) == (status == 3)
    assert "150 images, 150 read, 0 could not be read\nflagged at a false-alarm rate of 0." in found.output
    assert "\nerrors" not in found.output
    told = CliRunner().invoke(main.app, [*command, "--json", "-q"])
    assert json.loads(told.stdout)["detectors"]["knn"]["scored"] == 150


@pytest.mark.parametrize("asked", [{"alarm_above": 0.5}, {"alarm_drift": True}])
def test_images_of_which_none_can_be_read_are_an_alarm(kept, tmp_path, asked) -> None:
    path = tmp_path / "2025-01-31" / "bad.png"
    path.parent.mkdir()
    path.write_bytes(b"no image")
    told = ["no image of 2025-01-31 could be read"] if "alarm_drift" in asked else []
    for changes, expected in ((asked, [*told, "msp has a score of none of the images"]), ({}, [])):
        given = {"images": None, "detectors": ["msp"], **changes}
        assert applied(kept, tmp_path, tmp_path.with_suffix(".out"), **given).alarms == expected


def test_the_table_of_images_that_could_not_be_read_is_named(kept, tmp_path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "bad.png").write_bytes(b"no image")
    command = ["apply", str(kept.bundle), str(tmp_path / "new"), "--out", str(tmp_path / "out.csv"), "-q"]
    command += ["--detectors", "msp", "--workspace", str(tmp_path / "state"), "--engine", "inline"]
    found = CliRunner().invoke(main.app, command)
    assert f"\nerrors   {tmp_path / 'out.csv.errors.csv'}\n" in found.output


def test_charts_by_class_begin_at_what_the_least_known_threshold_may_flag() -> None:
    settings = schema.Thresholds(false_alarm=(0.1,), per_class=True)
    predictions = np.repeat(np.array([0, 1], np.int32), [80, 20])
    scores = {"a": np.arange(100.0)}
    tally = results.Tally(["a"], Calibrated(settings, scores, predictions, None, ""))
    rows = {"key": [f"2025-01-31/{n}" for n in range(30)], "prediction": pa.array([0] * 30, pa.int32())}
    flags = {"p.a": [0.05] * 15 + [0.5] * 15, "is_ood.a": [True] * 15 + [False] * 15}
    list(tally.counting([pa.table({**rows, "a": np.zeros(30), **flags})]))
    (date,) = tally.detectors()["a"]["dates"]
    images, flagged = np.array([30]), np.array([15])
    (expected,) = drift.chart(["2025-01-31"], images, flagged, drift.centre(0.1, 20))
    assert (date["most"], date["cusum"]) == (expected.most, expected.cusum)
    assert expected.cusum < drift.chart([""], images, flagged, drift.centre(0.1, 100))[0].cusum


@pytest.fixture(scope="module")
def without(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[pipeline.Evaluation]:
    """A run without held-out images whose weights are a file of its own."""
    folder = tmp_path_factory.mktemp("without")
    raw = small(images)
    weights = loading.resolve("package://pipeline.quickstart/resnet.safetensors")
    shutil.copyfile(weights, folder / "weights.safetensors")
    raw["model"]["weights"] = str(folder / "weights.safetensors")
    raw["datasets"] = [entry | {"limit": 70} for entry in raw["datasets"] if entry["role"] != "train"]
    raw["detectors"] = ["msp"]
    yield evaluated(raw, folder)


def test_thresholds_of_a_run_by_class_decide_as_in_the_run(without, tmp_path) -> None:
    folder = without.folder.parent.parent.parent.parent
    raw = yaml.safe_load((folder / "config.yaml").read_text())
    raw["thresholds"] = {"false_alarm": [0.3, 0.25], "calibrate_on": "id", "per_class": True}
    raw["datasets"][0]["limit"] = None
    raw["datasets"][1]["role"] = "unlabelled"
    evaluation = evaluated(raw, tmp_path)
    bundle.make(str(evaluation.folder), tmp_path / "a.ood")
    detect = pipeline.load_bundle(tmp_path / "a.ood")
    assert detect.bundle.false_alarm == (0.3, 0.25)
    expected = pq.read_table(evaluation.folder / "scores" / "animals")
    with np.load(raw["datasets"][1]["path"]) as arrays:
        rows = [int(key.rpartition("/")[2]) for key in expected["key"].to_pylist()]
        found = detect(list(arrays["animals_x"][rows]), exact=True)
    for name in ("prediction", "msp", "p.msp", "is_ood.msp"):
        assert found[name].to_pylist() == expected[name].to_pylist(), name
    assert 0 < found["is_ood.msp"].to_numpy().sum() < len(found)
    assert "those of the same predicted class" in (tmp_path / "a.ood" / "README.md").read_text()
    with pytest.raises(UserError, match=r"false_alarm: 0\.01 takes .* of a predicted class"):
        detect([b""], false_alarm=0.01)


def test_members_that_were_not_asked_for_are_named(without, tmp_path) -> None:
    folder = without.folder.parent.parent.parent.parent
    raw = yaml.safe_load((folder / "config.yaml").read_text())
    raw["name"], raw["thresholds"] = "combined", {"false_alarm": [0.25], "calibrate_on": "id"}
    raw["detectors"] = ["msp", "energy", "entropy", {"ensemble": {"members": ["msp", "energy", "entropy"]}}]
    run = evaluated(raw, folder).folder
    asked = ["bundle", str(run), "--detectors", "ensemble,msp", "--out", str(tmp_path / "a.ood")]
    found = CliRunner().invoke(main.app, asked)
    assert "notice   also in it, as members of those asked for: energy, entropy" in found.output.splitlines()
    assert bundles.opened(tmp_path / "a.ood").labels == ["ensemble", "msp", "energy", "entropy"]
    everything = CliRunner().invoke(main.app, ["bundle", str(run), "--out", str(tmp_path / "b.ood")])
    assert everything.exit_code == 0 and "also in it" not in everything.output


def test_without_held_out_images_there_are_scores_alone(without, images, tmp_path) -> None:
    found = CliRunner().invoke(main.app, ["bundle", str(without.folder), "--out", str(tmp_path / "a.ood")])
    assert found.exit_code == 0, found.output
    assert [line for line in found.output.splitlines() if line.startswith("bundle")] == [
        f"bundle   {tmp_path / 'a.ood'}"
    ]
    assert "no held-out ID images (role id_val)" in found.output
    assert "the weights are not in it; it needs" in found.output
    assert "None: the evaluation had no held-out ID images" in (tmp_path / "a.ood" / "README.md").read_text()
    opened = bundles.opened(tmp_path / "a.ood")
    gone = {**opened.document["model"], "weights": "/gone/resnet.safetensors"}
    with pytest.raises(
        UserError, match=r"a\.ood: it does not hold .* and /gone/res.* is gone.* with --weights"
    ):
        _ = replace(opened, document={**opened.document, "model": gone}).model
    detect = pipeline.load_bundle(tmp_path / "a.ood")
    table = detect([np.zeros((28, 28), np.uint8)])
    assert table["msp"].null_count == 0
    assert table["p.msp"].null_count == table["is_ood.msp"].null_count == 1
    with pytest.raises(UserError, match=r"false_alarm: .* has no scores of held-out images to decide by"):
        detect([b""], false_alarm=0.05)
    chosen = options(tmp_path)
    apply.execute(str(tmp_path / "a.ood"), str(images), str(tmp_path / "out"), chosen, Quiet())
    assert pq.read_table(tmp_path / "out")["p.msp"].null_count == 150
    with pytest.raises(UserError, match="--alarm-above, --alarm-drift: the bundle has no calibration images"):
        apply.prepare(
            str(tmp_path / "a.ood"), str(images), str(tmp_path / "o"), replace(chosen, alarm_above=0.1)
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": ["mps"]}, r"--detectors: unknown detector 'mps'\. Did you mean 'msp'"),
        ({"false_alarm": [0.05]}, r"--false-alarm: the run has no dataset of role id_val"),
        ({"false_alarm": [0]}, r"--false-alarm: got 0; expected a rate between 0 and 1"),
    ],
)
def test_a_bundle_that_cannot_be_made_is_refused(without, tmp_path, given, message) -> None:
    with pytest.raises(UserError, match=message):
        bundle.make(str(without.folder), tmp_path / "a.ood", bundle.Options(**given))
    assert not list(tmp_path.iterdir())


OWN = """
from dataclasses import dataclass
from pipeline.detectors.base import Detector

class Own(Detector):
    title = paper = formula = "own"
    columns = ("logits",)
    hidden: bool = False

    def fit(self, train):
        return Hidden() if self.hidden else Scorer(2.0)

@dataclass(frozen=True)
class Scorer:
    factor: float

    def __call__(self, batch):
        return -self.factor * batch["logits"].max(axis=1).astype("float64")

class Hidden:
    def __call__(self, batch):
        return Scorer(1.0)(batch)
"""


def test_detectors_of_ones_own_are_bundled_if_they_are_plain_data_and_their_code_stays(
    without, tmp_path
) -> None:
    raw = yaml.safe_load((without.folder.parent.parent.parent.parent / "config.yaml").read_text())
    (tmp_path / "own.py").write_text(OWN)
    method = f"{tmp_path}/own.py:Own"
    raw["detectors"] = [{"mine": {"method": method}}, {"hidden": {"method": method, "hidden": True}}]
    evaluation = evaluated(raw, tmp_path)
    with pytest.raises(UserError, match=r"detectors\.hidden: its fitted form is not kept as plain data"):
        bundle.make(str(evaluation.folder), tmp_path / "a.ood")
    bundle.make(str(evaluation.folder), tmp_path / "a.ood", bundle.Options(["mine"]))
    detect = pipeline.load_bundle(tmp_path / "a.ood")
    assert np.isfinite(detect([np.zeros((28, 28), np.uint8)])["mine"][0].as_py())
    bundle.make(str(evaluation.folder), tmp_path / "b.ood", bundle.Options(["mine"], code=True))
    script = "import sys, pipeline; pipeline.load_bundle(sys.argv[1])([b''])"
    (tmp_path / "own.py").write_text(OWN.replace("-self.factor", "self.factor"))
    found = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a.ood")], capture_output=True, text=True, check=False
    )
    assert "detectors.mine: it was fitted by another version of its code" in found.stderr
    (tmp_path / "own.py").unlink()
    told = (
        r"b\.ood: detectors\.mine: its code is in the bundle .*code/\w+/own\.py\. Read it, .*trust_code=True"
    )
    with pytest.raises(UserError, match=told):
        pipeline.load_bundle(tmp_path / "b.ood")
    with pytest.raises(UserError, match="Read it"):
        apply.prepare(str(tmp_path / "b.ood"), "none", str(tmp_path / "out"), options(tmp_path))
    trusted = pipeline.load_bundle(tmp_path / "b.ood", trust_code=True)
    code_of_bundle_is_refused_by_any_path(trusted.bundle)
    images = [np.zeros((28, 28), np.uint8)]
    assert trusted(images)["mine"].equals(detect(images)["mine"])
    assert "Code of `mine` is in this folder" in (tmp_path / "b.ood" / "README.md").read_text()
    (code,) = (tmp_path / "b.ood" / "code").rglob("own.py")
    code.write_text(OWN.replace("-self.factor", "self.factor"))
    with pytest.raises(UserError, match=r"own\.py is damaged: other bytes than were written"):
        pipeline.load_bundle(tmp_path / "b.ood", trust_code=True)


def code_of_bundle_is_refused_by_any_path(trusted: bundles.Bundle) -> None:
    """However a document names the code, and for whatever."""
    (code,) = trusted.folder.rglob("own.py")
    places = [
        code,
        os.path.relpath(code),
        trusted.folder / ".." / trusted.folder.name / "code" / ".." / "own.py",
    ]
    for place in map(str, places):
        document = deepcopy(trusted.document)
        bundled = replace(trusted, document=document, trust_code=False)
        document["detectors"]["mine"]["config"]["method"] = f"{place}:Own"
        with pytest.raises(UserError, match=r"detectors\.mine: its code is in the bundle"):
            _ = bundled.detectors
        step = {"label": "own", "method": f"{place}:Own", "steps": []}
        document["detectors"]["mine"]["config"] |= {"method": "msp", "steps": [step]}
        with pytest.raises(UserError, match=r"detectors\.mine: its code is in the bundle"):
            _ = replace(bundled, document=document).detectors
        document["model"]["name"] = f"{place}:build"
        with pytest.raises(UserError, match=r"model\.name: its code is in the bundle"):
            _ = replace(bundled, document=document).model


@pytest.mark.slow
def test_code_in_a_bundle_brings_the_modules_beside_it_and_modules_of_packages_stay(
    without, tmp_path
) -> None:
    raw = yaml.safe_load((without.folder.parent.parent.parent.parent / "config.yaml").read_text())
    own = tmp_path / "own"
    own.mkdir()
    (own / "shared_factor.py").write_text("FACTOR = 2.0")
    (own / "mine.py").write_text(
        "from shared_factor import FACTOR\n" + OWN.replace("Scorer(2.0)", "Scorer(FACTOR)")
    )
    (own / "unrelated.py").write_text("")
    raw["detectors"] = [{"mine": {"method": f"{own}/mine.py:Own"}}]
    evaluation = evaluated(raw, tmp_path)
    made = bundle.make(str(evaluation.folder), tmp_path / "a.ood", bundle.Options(code=True))
    assert sorted(path.name for path in made.folder.rglob("*.py")) == ["mine.py", "shared_factor.py"]
    pipeline.load_bundle(made.folder, trust_code=True)  # a copy of what this process has imported
    document = {"detectors": {"mine": {"config": {"label": "mine", "method": "a.b:Own", "steps": []}}}}
    with pytest.raises(
        UserError, match=r"--code: detectors\.mine is of the module a\.b, which a bundle cannot hold"
    ):
        bundle._code(document)
    shutil.rmtree(own)
    script = "import sys, numpy, pipeline; d = pipeline.load_bundle(sys.argv[1], trust_code=True); "
    script += "print(d([numpy.zeros((28, 28), 'uint8')])['mine'][0].as_py())"
    command = [sys.executable, "-c", script, str(made.folder)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert np.isfinite(float(told))


def test_a_bundle_is_not_written_over_anything_nor_of_other_weights(without, tmp_path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match=r"--out: .*there exists already"):
        bundle.make(str(without.folder), tmp_path / "there")
    bundle.make(str(without.folder), tmp_path / "a.ood")
    weights = without.folder.parent.parent.parent.parent / "weights.safetensors"
    before = weights.read_bytes()
    other_weights_of = load_file(weights)
    other_weights_of["conv1.weight"] = other_weights_of["conv1.weight"] * np.float32(1.5)
    save_file(other_weights_of, weights)
    try:
        with pytest.raises(UserError, match="is another network than in the run"):
            bundle.make(str(without.folder), tmp_path / "b.ood")
        with pytest.raises(UserError, match=r"weights\.safetensors have the digest .*--weights"):
            pipeline.load_bundle(tmp_path / "a.ood")
    finally:
        weights.write_bytes(before)
    assert not (tmp_path / "b.ood").exists()


def test_what_was_made_again_since_of_other_data_is_not_bundled_with_the_numbers_of_before(
    without, tmp_path
) -> None:
    seen = next(name for name, entry in without.record["datasets"].items() if entry["role"] == "id")
    record = without.folder / "scores" / seen / "_manifest.json"
    before = record.read_bytes()
    content = json.loads(before)
    del content["sha256 of the rest"]
    artifacts._seal(record, content | {"inputs": content["inputs"] | {"msp": "0" * 64}})
    try:
        with pytest.raises(UserError, match=r"scores/\S+: it was made again since, of other data"):
            bundle.make(str(without.folder), tmp_path / "a.ood")
    finally:
        record.write_bytes(before)


def test_published_weights_keep_their_transform_in_a_file() -> None:
    from pipeline.config.schema import Model
    from pipeline.network import kept

    model = Model(source="torchvision", name="resnet18", weights="IMAGENET1K_V1")
    assert kept.beside(model).transform == "IMAGENET1K_V1"
    assert kept.beside(model.model_copy(update={"weights": "random"})).transform == "auto"
    assert torchvision.build(Model(source="torchvision", name="resnet18", weights="random")).transform


def test_applying_on_ray_has_the_same_bits(kept, tmp_path, ray_session) -> None:
    changes: dict[str, Any] = {"engine": "ray", "threads": None}
    applied(kept, kept.images, tmp_path / "out", overrides=["extract.actors=2"], **changes)
    same(pq.read_table(tmp_path / "out").take(kept.rows("animals")), kept.tables["animals"])


@pytest.mark.slow
def test_runs_tables_and_unfinished_work_may_lie_in_an_object_store(images, bucket, tmp_path) -> None:
    raw = small(images)
    raw["datasets"] = [entry | {"limit": 40} for entry in raw["datasets"]]
    base, _, query = bucket.partition("?")
    raw["workspace"] = f"{base}/ws?{query}"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    outcome = run.execute(loading.load(str(tmp_path / "config.yaml")), run.Options(**INLINE), Quiet())
    made = bundle.make(str(outcome.folder), f"{base}/a.ood?{query}")
    with pytest.raises(UserError, match=r"--out: s3://.*/a\.ood.* exists already"):
        bundle.make(str(outcome.folder), made.name)
    expected = pipeline.open_run(str(outcome.folder)).scores("animals")
    for name in ("out", "out.csv"):
        out, chosen = f"{base}/{name}?{query}", options(tmp_path, workspace=raw["workspace"])
        for _ in range(2):  # the second finds its own table
            outcome = apply.execute(made.name, str(images), out, chosen, Quiet())
            assert outcome.summary["bundle"] == made.name
        with pytest.raises(UserError, match="was made with other detectors"):
            changed = replace(chosen, detectors=["knn"])
            apply.execute(made.name, str(images), out, changed, Quiet())
    found = pyarrow.csv.read_csv(io.BytesIO(files.at(f"{base}/out.csv?{query}").read_bytes()))
    part = pq.read_table(io.BytesIO(files.at(f"{base}/out/part-00000.parquet?{query}").read_bytes()))
    assert found["knn"].equals(part["knn"])
    rows = [int(key.rpartition("/")[2]) for key in expected["key"].to_pylist()]
    assert part["knn"].take(rows).to_pylist() == expected["knn"].to_pylist()


@pytest.fixture
def stored(kept: Kept, bucket: str) -> str:
    """URI of the bundle in an object store."""
    base, _, query = bucket.partition("?")
    place = files.at(f"{base}/a folder/kept.ood?{query}")
    for path in kept.bundle.rglob("*"):
        if path.is_file():
            files.put(path, place / str(path.relative_to(kept.bundle)))
    return str(place)


def test_a_bundle_in_an_object_store_is_opened_by_its_uri(kept, stored) -> None:
    same(pipeline.load_bundle(stored)(kept.pixels("test")[:9], exact=True), kept.tables["test"].slice(0, 9))
    (files.at(stored) / "bundle.json").unlink()
    bundles._copied.cache_clear()
    with pytest.raises(UserError, match=r"s3://.*bundle\.json.* is damaged: it is missing"):
        bundles.opened(stored)
    with pytest.raises(UserError, match=r"s3://.*/no\.ood.*: no such folder\. Name a bundle"):
        bundles.opened(stored.replace("kept.ood", "no.ood"))


def test_names_in_an_object_store_do_not_lead_out_of_the_copy(bucket) -> None:
    place = files.at(bucket) / "evil.ood"
    Artifact(place, "bundle 1", {}).finish({"../../evil": artifacts.File(1, "0" * 64)}, alone=False)
    with pytest.raises(UserError, match=r"evil\?.* is damaged: its name leads out of the bundle"):
        bundles.opened(str(place))


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["state/features/*/part-*", "state/scores/*/*/part-*", "out.summary.json"])
def test_a_process_that_is_killed_is_continued_by_the_next(kept, tmp_path, moment) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "apply", kept.bundle, kept.images, "--images"]
    command += ["animals_x", "--workspace", tmp_path / "state", "--engine", "inline", "--threads", "1"]
    given = list(map(str, [*command, "--set", "extract.shard_rows=16", "--out", tmp_path / "out"]))
    process = subprocess.Popen(given, stdout=subprocess.DEVNULL)
    wait(moment, lambda: list(tmp_path.glob(moment)))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    subprocess.run(given, check=True, stdout=subprocess.DEVNULL)
    same(pq.read_table(tmp_path / "out").take(kept.rows("animals")), kept.tables["animals"])
    left = [path for path in tmp_path.rglob(".*") if path.is_file() and not path.name.endswith(".json")]
    assert [path.name for path in left if ".claims" not in str(path)] == []


SCRIPT = """
import sys
import numpy as np
import pyarrow.parquet as pq
import pipeline

bundle, images, rows, out = sys.argv[1:]
pixels = np.load(images)["animals_x"]
table = pipeline.load_bundle(bundle)([pixels[int(row)] for row in rows.split(",")], exact=True)
assert "ray" not in sys.modules
pq.write_table(table, out)
"""


@pytest.mark.slow
def test_trained_indexes_give_the_same_neighbours(images, tmp_path, undrawn) -> None:
    kept = made(images, tmp_path, [{"knn": {"k": 5}}, {"nnguide": {"k": 5}}], kind="IVF4,Flat", shards=2)
    detect = pipeline.load_bundle(kept.bundle)
    for label in ("knn", "nnguide"):
        found = detect(kept.pixels("animals"), exact=True)
        assert found[label].to_pylist() == kept.tables["animals"][label].to_pylist()
        applied(kept, images, tmp_path / "out")
        rows = pq.read_table(tmp_path / "out").take(kept.rows("animals"))
        assert rows[label].to_pylist() == kept.tables["animals"][label].to_pylist()


@pytest.mark.slow
def test_every_detector_has_the_same_bits_in_a_new_process_and_applied(images, tmp_path, undrawn) -> None:
    with np.load(images) as arrays:
        assert len(arrays["animals_x"]) == 150
    kept = made(images, tmp_path, [])
    rows = ",".join(map(str, kept.rows("animals")))
    command = [sys.executable, "-c", SCRIPT, kept.bundle, images, rows, tmp_path / "table.parquet"]
    subprocess.run(list(map(str, command)), check=True, cwd=tmp_path)
    same(pq.read_table(tmp_path / "table.parquet"), kept.tables["animals"])
    applied(kept, images, tmp_path / "out")
    same(pq.read_table(tmp_path / "out").take(kept.rows("animals")), kept.tables["animals"])
    assert len(bundles.opened(kept.bundle).labels) > 35


GRAPH = ["msp", "energy", "featurenorm", "vim", "mahalanobis_ensemble", "react_dice"]
ALONE = """
import json, sys
import numpy as np, torch
about = {"detectors.json": ""}
graph = torch.export.load("graph.pt2", extra_files=about).module()
limits = torch.tensor(json.loads(about["detectors.json"])["thresholds"], dtype=torch.float64)
for images in (np.load("images.npy"), np.load("images.npy")[:1]):
    prediction, scores, flags = graph(torch.from_numpy(images), limits)
    np.savez(f"{len(images)}.npz", prediction=prediction, scores=scores, flags=flags)
assert "pipeline" not in sys.modules
"""


def pixels_in(detect: OodDetector, images: list[np.ndarray]) -> np.ndarray:
    """Images as a graph takes them: (N, channels, H, W) float32."""
    pixels = np.stack([detect._pixels(image, "") for image in images])
    return detect._classifier.images(pixels).numpy()


@pytest.mark.slow
def test_a_graph_judges_images_in_a_process_that_has_the_file_alone(kept, detect, tmp_path) -> None:
    detect.export(tmp_path / "graph.pt2", detectors=GRAPH)
    images, table = kept.pixels("animals"), kept.tables["animals"]
    np.save(tmp_path / "images.npy", pixels_in(detect, images))
    subprocess.run([sys.executable, "-I", "-c", ALONE], cwd=tmp_path, check=True)
    for count in (len(images), 1):
        found = np.load(tmp_path / f"{count}.npz")
        np.testing.assert_array_equal(found["prediction"], table["prediction"].to_numpy()[:count])
        flags = detect(images[:count])
        for column, label in enumerate(GRAPH):
            expected = table[label].to_numpy()
            tolerance = 1e-5 * np.ptp(expected)
            np.testing.assert_allclose(found["scores"][:, column], expected[:count], rtol=0, atol=tolerance)
            np.testing.assert_array_equal(found["flags"][:, column], flags[f"is_ood.{label}"].to_numpy())
        assert count == 1 or 0 < found["flags"].mean() < 1


@pytest.mark.slow
def test_a_graph_in_onnx_gives_the_scores_of_the_bundle(kept, detect, tmp_path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="takes ood-pipeline[export]")
    detect.export(tmp_path / "graph.onnx", detectors=GRAPH)
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["detectors.json"])
    images, table = kept.pixels("animals"), kept.tables["animals"]
    given = {"images": pixels_in(detect, images), "thresholds": np.array(about["thresholds"])}
    scores, flags = session.run(["scores", "is_ood"], given)
    for column, label in enumerate(about["labels"]):
        expected = table[label].to_numpy()
        np.testing.assert_allclose(scores[:, column], expected, rtol=0, atol=1e-5 * np.ptp(expected))
    np.testing.assert_array_equal(flags, scores > about["thresholds"])


def test_what_is_no_function_of_one_forward_pass_is_in_no_graph(kept, detect, tmp_path, monkeypatch) -> None:
    with pytest.raises(
        UserError, match=r"but knn looks up neighbours; grood looks up .* together combines"
    ) as told:
        detect.export(tmp_path / "graph.pt2")
    assert "--detectors msp,energy,featurenorm,tempscale,vim,mahalanobis_ensemble,react_dice." in str(
        told.value
    )
    with pytest.raises(UserError, match=r"graph\.pt is no graph; expected an ending of \.pt2, \.onnx"):
        detect.export(tmp_path / "graph.pt", detectors=["msp"])
    monkeypatch.setattr(graph, "_PACKAGES", ("no_such_package",))
    with pytest.raises(UserError, match=r"graph\.onnx takes no_such_package; install ood-pipeline\[export\]"):
        detect.export(tmp_path / "graph.onnx", detectors=["msp"])
    (tmp_path / "there.pt2").touch()
    with pytest.raises(UserError, match=r"--export: .*there\.pt2 exists already"):
        bundle._require({}, {}, [str(tmp_path / "there.pt2")])
    (tmp_path / "there.pt2").unlink()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_graph_that_gives_other_scores_is_not_kept(detect, tmp_path, monkeypatch) -> None:
    plain = graph.Graph.expected
    monkeypatch.setattr(graph.Graph, "expected", lambda *given: {"msp": plain(*given)["msp"] + 0.01})
    with pytest.raises(
        UserError, match=r"msp differs by 0.01 in .*graph\.pt2, more than 1e-05 of the spread"
    ):
        detect.export(tmp_path / "graph.pt2", detectors=["msp"])
    assert not list(tmp_path.iterdir())
