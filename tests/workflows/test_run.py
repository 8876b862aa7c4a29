"""Whole evaluations, in this process where they are not about Ray."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
import yaml
from PIL import Image
from scipy.optimize import minimize_scalar
from scipy.spatial.distance import cdist
from scipy.special import log_softmax, rel_entr, softmax

from pipeline import detectors
from pipeline.config import loading
from pipeline.errors import UserError
from pipeline.results import report, verify
from pipeline.results.evaluation import Evaluation
from pipeline.stages import passes, prepare, shards
from pipeline.workflows import run
from pipeline.workflows.progress import Quiet
from pipeline.workflows.run import Outcome, Run
from pipeline.workspace import artifacts, files
from tests.conftest import everything
from tests.stored import newest


def scores(folder: Path, dataset: str) -> dict[str, np.ndarray]:
    """Score columns of a dataset, by key order of the table."""
    table = pq.read_table(folder / "scores" / dataset)
    return {name: table[name].to_numpy() for name in table.column_names}


@pytest.mark.slow
def test_every_detector_runs_on_an_exported_vision_transformer(
    settings, images, load, execute, tmp_path
) -> None:
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(28, 7, 4, 3, 24, 48, num_classes=10)
    vit.conv_proj = torch.nn.Conv2d(1, 24, 7, stride=7)
    torch.nn.init.normal_(vit.heads.head.weight)
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(vit.eval(), (torch.rand(2, 1, 28, 28),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "vit.pt2")
    raw = everything(settings, images)
    raw["model"] = {"source": "exported", "name": "vit.pt2", "transform": raw["model"]["transform"]}
    raw["detectors"][-1]["gradnorm_fc"]["layers"] = ["heads.head"]
    raw["datasets"] = [entry for entry in raw["datasets"] if entry["name"] not in ("textures", "production")]
    found = scores(execute(load(raw), last="score").folder, "animals")
    assert set(found) - {"key", "label", "prediction"} >= {
        "featurenorm",
        "grood",
        "grood_norm",
        "grood_noise",
    }
    for name in set(found) - {"key", "label", "prediction"}:
        assert np.isfinite(found[name]).all()
        assert np.ptp(found[name]) > 0


def test_a_run_keeps_the_contract_and_its_scores_are_those_of_independent_formulas(
    settings, images, load, execute, tmp_path, monkeypatch
) -> None:
    """With every role; all detectors are in tests/test_golden and, on several nodes, in tests/cluster."""
    raw = everything(settings, images)
    raw["detectors"] = [entry for entry in raw["detectors"] if CHECKED & set(entry)]
    named, original = [], Run._score_jobs
    monkeypatch.setattr(Run, "_score_jobs", lambda run, fitted: named.append(fitted) or original(run, fitted))
    folder = execute(load(raw), last="evaluate").folder
    assert len(named) == 2  # once after the fit, for all that tell what the run refers to, and to score
    check_contract(folder)
    check_scores(folder, tmp_path / "workspace")


PERCEPTRON = """
from torch import nn

def build():
    hidden = nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU()
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(16, 10, bias=False))
"""


@pytest.mark.slow
def test_all_detectors_that_apply_run_on_a_perceptron_without_a_bias_and_the_others_are_listed(
    settings, load, execute, tmp_path, monkeypatch
) -> None:
    (tmp_path / "perceptron.py").write_text(PERCEPTRON)
    settings["model"] |= {"name": "./perceptron.py:build", "weights": "random"}
    settings["detectors"] = "all"
    for entry in settings["datasets"][1:]:
        entry["limit"] = 60
    monkeypatch.setattr(detectors.get("she"), "fit", refuse)
    loaded = load(settings)
    first = execute(loaded, last="evaluate")
    maps = ["featurenorm", "gram", "grood", "grood_norm", "mahalanobis_ensemble", "rankfeat", "selectednorm"]
    left_out = sorted([*maps, "mcdropout", "she"])
    assert not prepare.prepare(loaded).network.head[1].any()
    before = (first.folder / "metrics.json").read_bytes()
    reported = execute(loaded, first="report")
    assert reported.not_applicable == first.not_applicable
    check_left_out(reported, left_out)
    assert (reported.folder / "metrics.json").read_bytes() == before


def refuse(*_: Any) -> None:
    """The fit of a detector that the training rows do not serve."""
    raise UserError("no training row is classified correctly.")


def check_left_out(outcome: Outcome, labels: list[str]) -> None:
    """These detectors have a reason and no result; all others have finite metrics."""
    record = files.read_json(outcome.folder / "manifest.json")
    assert sorted(record["not_applicable"]) == labels
    assert record["not_applicable"] == outcome.not_applicable
    assert record["notices"] == outcome.notices
    assert "this network has 10 classes" in outcome.notices["dice"][0]
    assert record["not_applicable"]["she"] == "no training row is classified correctly."
    assert "no block with maps or tokens" in record["not_applicable"]["featurenorm"]
    applied = {name for name in detectors.names() if name not in labels}
    assert set(record["detectors"]) == applied
    assert set(scores(outcome.folder, "animals")) == {"key", "label", "prediction", *applied}
    rows = files.read_json(outcome.folder / "metrics.json")
    assert {row["detector"] for row in rows} == {"classifier", *applied}
    assert all(np.isfinite(row["value"]) for row in rows)
    page = (outcome.folder / "report" / "index.html").read_text(encoding="utf-8")
    assert "no training row is classified correctly." in page
    assert [finding for finding in verify.examine(outcome.folder) if not finding.good] == []


def test_more_actors_than_there_are_gpus_are_refused(settings, load, execute, ray_session) -> None:
    settings["extract"] |= {"actors": 3, "gpus_per_actor": 1, "device": "cpu"}
    with pytest.raises(UserError, match=r"extract\.actors: 3 asked for, the cluster has room for 2"):
        execute(load(settings), engine="ray")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_an_index_that_cannot_be_searched_is_refused_before_images_are_read(
    settings, load, execute, tmp_path
) -> None:
    settings["index"] = {"device": "cuda"}
    with pytest.raises(UserError, match=r"index\.device: cuda was asked for, but this FAISS sees no GPU"):
        execute(load(settings))
    assert list(tmp_path.glob("workspace/features/*/part-*")) == []
    execute(load(settings), last="extract")
    assert list(tmp_path.glob("workspace/features/*/part-*"))


def test_the_index_is_told_where_another_run_has_made_the_scores(settings, load, execute) -> None:
    settings["index"], records = {"kind": "HNSW4"}, []
    for chosen in ([{"knn": {"k": 5}}], ["msp", {"knn": {"k": 5}}]):
        settings["detectors"] = chosen
        record = json.loads((execute(load(settings)).folder / "manifest.json").read_text())
        records.append(record["index"]["knn"])
    measured, found = records
    assert found == {name: measured[name] for name in ("rows", "dim", "kind")}
    assert (found["kind"], measured.keys() - found.keys()) == ("HNSW4", {"shards", "recall_at_1"})


def test_scores_of_a_finished_run_are_not_replaced_by_those_of_other_data(settings, load, execute) -> None:
    settings["detectors"] = ["dice"]
    folder = execute(load(settings)).folder
    record = folder / "scores" / "test" / artifacts.RECORD
    content = json.loads(record.read_text())
    del content["sha256 of the rest"]
    artifacts._seal(record, content | {"inputs": content["inputs"] | {"dice": "0" * 64}})
    for _ in range(2):  # what is fitted anew before does not make it an unfinished one
        shutil.rmtree(folder.parents[2] / "fits")
        message = r"is finished, but its scores of test by dice were made again since"
        with pytest.raises(UserError, match=message):
            execute(load(settings))
    assert json.loads(record.read_text())["inputs"]["dice"] == "0" * 64
    assert json.loads((folder / "manifest.json").read_text())["status"] == "finished"
    assert execute(load(settings), fresh=True).folder.name == f"{folder.name}-2"


def test_gpus_that_are_left_idle_are_told(settings, load, monkeypatch, tmp_path) -> None:
    settings["workspace"] = str(tmp_path / "new")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    said: list[str] = []
    display = Quiet()
    display.say = said.append
    options = run.Options(last="extract", publish="never", engine="inline", threads=1)
    run.execute(load(settings), options, display)
    run.execute(load(settings), options, display)  # has nothing to do
    assert said == ["GPUs: 2 there, none used; `--set hardware=gpu` uses them"]


def features(workspace: Path, dataset: str) -> dict[str, np.ndarray]:
    """Cached rows of a dataset, read without our own code."""
    folder = next(workspace.glob(f"features/{dataset}-*"))
    table = pa.concat_tables([pq.read_table(part) for part in sorted(folder.glob("part-*.parquet"))])
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


CHECKED = {
    *("msp", "maxlogit", "energy", "gradnorm", "gradnorm_fc", "knn", "grood_val", "tempscale", "klmatching"),
    "featurenorm",
}
"""Detectors of which `check_scores` knows a formula."""


def check_scores(folder: Path, workspace: Path) -> None:
    """Scores of a whole run against plain formulas on the cached rows."""
    train, query, held, val = (features(workspace, name) for name in ("train", "textures", "held", "val"))
    found = scores(folder, "textures")
    assert found["key"].tolist() == query["key"].tolist()
    h, logits = query["feature"], query["logits"]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = {
        "msp": doubt(p),
        "maxlogit": -logits.max(axis=1),
        "energy": -np.log(np.exp(logits).sum(axis=1)),
        "gradnorm": -np.abs(h).sum(axis=1) * np.abs(p - 0.1).sum(axis=1),
        "gradnorm_fc": found["gradnorm"],
        "knn": np.sort(cdist(unit(h), unit(train["feature"])), axis=1)[:, 4],
        "grood_val": grood(train, val, query),
        "tempscale": doubt(softmax(logits / temperature(held), axis=1)),
        "klmatching": kl_matching(held, p),
    }
    ratio = files.read_json(folder / "manifest.json")["passes"]
    block = int(np.argmax(next(entry["ratio"] for entry in ratio if entry["kind"] == "jigsaw")))
    expected["featurenorm"] = -query["block_norm"][:, block]
    assert set(expected) == CHECKED
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, err_msg=name)


def doubt(p: np.ndarray) -> np.ndarray:
    """Logarithm of what the largest probabilities leave."""
    return np.log(np.sort(p, axis=1)[:, :-1].sum(axis=1))


def temperature(held: dict[str, np.ndarray]) -> float:
    """The temperature at which held-out images have the smallest NLL."""

    def nll(inverse: float) -> float:
        known = log_softmax(held["logits"].astype(float) * inverse, axis=1)
        return -known[np.arange(len(known)), held["label"]].sum()

    return 1 / minimize_scalar(nll, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-9}).x


def kl_matching(held: dict[str, np.ndarray], p: np.ndarray) -> np.ndarray:
    """Divergence from the mean softmax of the closest class that is predicted for held-out images."""
    known = softmax(held["logits"].astype(float), axis=1)
    means = np.stack([known[held["prediction"] == label].mean(axis=0) for label in range(10)])
    return np.min([rel_entr(p, mean).sum(axis=1) for mean in means], axis=0)


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length one."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def grood(
    train: dict[str, np.ndarray], val: dict[str, np.ndarray], query: dict[str, np.ndarray]
) -> np.ndarray:
    """GROOD from the paper's definition, differentiated by autograd, with the OOD prototype of `val`."""
    means = [train["feature"][train["label"] == label].mean(axis=0) for label in range(10)]
    classes = torch.tensor(np.stack(means))

    def gradients(rows: np.ndarray) -> np.ndarray:
        found = []
        for row in torch.tensor(rows):
            ood = torch.tensor(val["feature"].mean(axis=0), requires_grad=True)
            distance = torch.linalg.vector_norm(torch.cat([classes, ood[None]]) - row, dim=1)
            torch.nn.functional.cross_entropy(-distance[None], torch.tensor([0])).backward()
            found.append(ood.grad.numpy())
        return np.stack(found)

    correct = train["label"] == train["prediction"]
    return cdist(gradients(query["feature"]), gradients(train["feature"][correct])).min(axis=1)


def check_contract(folder: Path) -> None:
    """What other tools rely on in a finished run folder."""
    record = files.read_json(folder / "manifest.json")
    for name, dataset in record["datasets"].items():
        assert dataset["rows"] == dataset["features"] + dataset["errors"], name
    assert record["stages"]["extract"]["forward_images"] == sum(
        d["rows"] for d in record["datasets"].values()
    )
    scored = sum(dataset["features"] for dataset in record["datasets"].values() if dataset["role"] != "train")
    assert record["costs"].keys() == record["detectors"].keys()
    assert all(cost["scores"] == scored and cost["seconds"] > 0 for cost in record["costs"].values())
    flagged = [name for name, detector in record["detectors"].items() if detector["uses_ood"]]
    assert flagged == ["grood_val"]
    thresholds = files.read_json(folder / "thresholds.json")
    inside, production = scores(folder, "test"), scores(folder, "production")
    for name, threshold in thresholds.items():
        assert np.mean(inside[name] <= threshold) >= 0.95
        np.testing.assert_array_equal(production[f"is_ood.{name}"], production[name] > threshold)
    groups = set(pq.read_table(folder / "metrics.parquet")["group"].to_pylist())
    assert groups == {"id", "shifted_id", "near_ood", "far_ood", "fs_near_ood", "fs_far_ood"}
    assert yaml.safe_load((folder / "config.yaml").read_text())["name"] == "small"


def test_a_second_run_makes_no_forward_pass_and_gives_the_same_files(settings, load, execute) -> None:
    loaded = load(settings)
    folder = execute(loaded).folder
    before = {path: path.read_bytes() for path in folder.glob("scores/*/*.parquet")}
    metrics = (folder / "metrics.json").read_bytes()
    earlier = files.read_json(folder / "manifest.json")
    execute(loaded)
    manifest = files.read_json(folder / "manifest.json")
    first, second = manifest.pop("executions")
    assert [first] == earlier.pop("executions")
    assert second["stages"]["extract"]["forward_images"] == 0
    assert (first["status"], second["status"]) == ("finished", "finished")
    assert manifest == earlier  # costs and dates are those of the execution that did the work
    assert {path: path.read_bytes() for path in folder.glob("scores/*/*.parquet")} == before
    assert (folder / "metrics.json").read_bytes() == metrics


def test_a_report_that_was_not_finished_never_leaves_the_old_one(
    settings, load, execute, monkeypatch
) -> None:
    settings["detectors"] = ["msp"]
    loaded = load(settings)
    folder = execute(loaded).folder
    page = folder / "report" / "index.html"
    assert page.is_file()
    (folder / "metrics.csv").unlink()
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(report, "write", lambda *_: 1 / 0)
        execute(loaded)
    assert not page.exists()
    execute(loaded)
    assert page.is_file()


def test_detectors_without_neighbours_need_no_faiss(settings, load, execute, monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "pipeline.stages.faiss_shard", raising=False)
    monkeypatch.setitem(sys.modules, "faiss", None)
    settings["detectors"] = ["msp"]
    assert (execute(load(settings)).folder / "metrics.json").is_file()
    settings["detectors"] = ["knn"]
    with pytest.raises(UserError, match=r"^FAISS is not installed\."):
        execute(load(settings))


def test_a_run_of_a_protocol_records_it_and_reports_published_numbers_beside_its_own(
    settings, load, execute
) -> None:
    settings |= {"protocol": "OpenOOD v1.5 CIFAR-10", "published": "cifar10-resnet18"}
    settings["datasets"][2]["expected"] = 150
    folder = execute(load(settings)).folder
    manifest = files.read_json(folder / "manifest.json")
    assert (manifest["protocol"], manifest["published"]) == ("OpenOOD v1.5 CIFAR-10", "cifar10-resnet18")
    assert {name: entry["expected"] for name, entry in manifest["datasets"].items()} == {
        "train": None,
        "test": None,
        "animals": 150,
        "textures": None,
    }
    page = (folder / "report" / "index.html").read_text(encoding="utf-8")
    assert "near_ood is no mean over the protocol&#39;s datasets (id: test; near_ood: animals)." in page
    assert "Number of images not checked: train, test, textures." in page


def test_fresh_does_everything_again(settings, load, execute) -> None:
    loaded = load(settings)
    folder = execute(loaded, last="extract").folder
    execute(loaded, last="extract", fresh=True)
    assert files.read_json(folder / "manifest.json")["stages"]["extract"]["forward_images"] == 1080


def test_stages_run_one_by_one_and_refuse_to_skip_one(settings, load, execute) -> None:
    loaded = load(settings)
    for stage, reason in {
        "fit": "extract: not done for train, test",
        "score": "extract: not done for train, test",
        "evaluate": "extract: not done for train, test",
    }.items():
        with pytest.raises(UserError, match=reason):
            execute(loaded, first=stage, last=stage)
    execute(loaded, last="extract")
    with pytest.raises(UserError, match="fit: no detector in the workspace"):
        execute(loaded, first="score", last="score")
    execute(loaded, first="fit", last="fit")
    with pytest.raises(UserError, match="score: not done for test"):
        execute(loaded, first="evaluate", last="evaluate")
    execute(loaded, first="score", last="score")
    with pytest.raises(UserError, match="evaluate: not done"):
        execute(loaded, first="report", last="report")
    execute(loaded, first="evaluate", last="evaluate")
    assert execute(loaded, first="report", last="report").folder.joinpath("report/index.html").is_file()


def test_a_refused_command_leaves_a_finished_evaluation_as_it_is(settings, load, execute) -> None:
    folder = execute(load(settings)).folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    settings["detectors"] = [{"dice": {"p": 33}}]
    for stage in ("score", "evaluate", "report"):
        with pytest.raises(UserError, match="first"):
            execute(load(settings), first=stage, last=stage)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_changed_weight_transform_or_image_never_meets_an_old_cache(settings, load, tmp_path) -> None:
    def folders(raw: dict[str, Any]) -> set[str]:
        return {job.folder for job in prepare.prepare(load(raw)).jobs.values()}

    seen = folders(settings)
    changed = yaml.safe_load(yaml.safe_dump(settings))
    changed["model"]["weights"] = "random"
    assert not folders(changed) & seen
    changed = yaml.safe_load(yaml.safe_dump(settings))
    changed["model"]["transform"]["mean"] = [0.287]
    assert not folders(changed) & seen
    with np.load(settings["datasets"][0]["path"]) as arrays:
        touched = dict(arrays)
    touched["train_x"] = touched["train_x"].copy()
    touched["train_x"][7, 3, 3] ^= 1
    np.savez(tmp_path / "touched.npz", **touched)
    changed = yaml.safe_load(yaml.safe_dump(settings))
    for dataset in changed["datasets"]:
        dataset["path"] = str(tmp_path / "touched.npz")
    different = folders(changed) - seen
    assert [Path(folder).name.rpartition("-")[0] for folder in different] == ["train"]


def test_held_out_images_that_come_later_calibrate_without_another_extra_pass(
    settings, load, execute, tmp_path, monkeypatch
) -> None:
    def softened(dataset: str) -> np.ndarray:
        rows = features(tmp_path / "workspace", "textures")
        known = features(tmp_path / "workspace", dataset)
        return doubt(softmax(rows["logits"] / temperature(known), axis=1))

    settings["detectors"] = ["tempscale", {"featurenorm": {"samples": 64}}]
    trained = scores(execute(load(settings), last="score").folder, "textures")
    np.testing.assert_allclose(trained["tempscale"], softened("train"), rtol=1e-5)
    monkeypatch.delattr(passes.Runner, "run")
    settings["datasets"].append(settings["datasets"][1] | {"name": "held", "role": "id_val"})
    settings["datasets"][-1] |= {"images": "held_x", "labels": "held_y"}
    held_out = scores(execute(load(settings), last="score").folder, "textures")
    np.testing.assert_allclose(held_out["tempscale"], softened("held"), rtol=1e-5)
    assert abs(held_out["tempscale"] - trained["tempscale"]).max() > 1e-3
    np.testing.assert_array_equal(held_out["featurenorm"], trained["featurenorm"])


@pytest.fixture
def strange(settings, tmp_path) -> dict[str, bool]:
    """An OOD folder with files of every kind, added to the settings; which of them can be decoded."""
    folder = tmp_path / "strange"
    folder.mkdir()
    entry = {"name": "strange", "role": "far_ood", "format": "imagefolder", "path": str(folder)}
    settings["datasets"] = [*settings["datasets"][:2], entry]
    picture = Image.effect_noise((40, 40), 60).convert("RGB")
    picture.save(folder / "good.png")
    (folder / "empty.jpg").touch()
    picture.save(folder / "whole.jpg")
    content = (folder / "whole.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(content[: len(content) // 2])
    (folder / "text.png").write_text("this is no image")
    picture.convert("CMYK").save(folder / "cmyk.JPEG")
    Image.fromarray(np.full((40, 40), 30000, np.uint16)).save(folder / "deep.png")
    picture.convert("P").save(folder / "palette.png", transparency=b"\x00\x80\xff")
    picture.save(folder / "grün.png")
    (folder / "notes.txt").write_text("not one of the dataset's images")
    (folder / "eps.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n{} loop\n%%EOF\n")
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    good = ("good.png", "whole.jpg", "cmyk.JPEG", "deep.png", "palette.png", "grün.png")
    bad = ("empty.jpg", "cut.jpg", "text.png", "eps.jpg", "pipe.png", "zero.png")
    return {name: name in good for name in (*good, *bad)}


def test_every_file_of_a_folder_becomes_a_feature_row_or_an_error(
    strange, settings, load, execute, tmp_path
) -> None:
    settings["extract"] |= {"max_bad_fraction": 0.5, "shard_rows": 64}
    outcome = execute(load(settings))
    folder = outcome.folder
    record = files.read_json(folder / "manifest.json")["datasets"]["strange"]
    assert (record["rows"], record["features"], record["errors"]) == (12, 6, 6)
    listed = next(tmp_path.glob("workspace/features/strange-*/errors.parquet"))
    (told,) = outcome.unreadable
    assert re.match(
        r"strange: 6 of 12 images could not be used, first: cut\.jpg \(damaged or .*; empty\.jpg", told
    )
    assert told.endswith(f"They are in none of the numbers. All are listed in {listed}.")
    page = (folder / "report" / "index.html").read_text()
    assert (
        "could not be used, first: cut.jpg (damaged or incomplete JPEG file: image file is truncated" in page
    )
    assert record["notes"] == ["1 of 13 files not read: .txt 1 (first: notes.txt)"]
    assert set(scores(folder, "strange")["key"]) == {name for name, good in strange.items() if good}
    errors = pq.read_table(next(tmp_path.glob("workspace/features/strange-*/errors.parquet")))
    assert set(errors["key"].to_pylist()) == {name for name, good in strange.items() if not good}
    assert all(errors["reason"].to_pylist())


def test_metadata_that_is_changed_while_a_run_works_is_shown_as_it_was(
    settings, load, execute, tmp_path, monkeypatch
) -> None:
    table, evaluate = tmp_path / "cameras.csv", Run.evaluate
    table.write_text("key,camera\n" + "".join(f"test_x/{number:08},left\n" for number in range(300)))

    def meddled(self: Run) -> None:
        table.write_text("of another kind")
        evaluate(self)

    monkeypatch.setattr(Run, "evaluate", meddled)
    for entry in settings["datasets"]:
        entry["limit"] = 64
    settings |= {"detectors": ["msp"], "report": {"metadata": str(table)}}
    shown = pyarrow.csv.read_csv(execute(load(settings)).folder / "report" / "by-camera.csv")
    assert sorted(shown["value"].to_pylist()) == ["(none)", "left"]


@pytest.fixture
def unreadable(settings, tmp_path):
    """The small evaluation, cut to few images, and a folder of two files that are no images."""
    folder = tmp_path / "unreadable" / "0"
    folder.mkdir(parents=True)
    for name in ("a.png", "b.png"):
        (folder / name).write_text("this is no image")
    for entry in settings["datasets"]:
        entry["limit"] = 64
    settings["detectors"] = ["msp"]
    settings["extract"]["max_bad_fraction"] = 1.0
    return settings, {"format": "imagefolder", "path": str(folder.parent), "labels": "index"}


@pytest.mark.parametrize("role", ["train", "id", "near_ood"])
def test_a_dataset_of_which_no_image_can_be_read_is_refused_whatever_is_allowed(
    unreadable, load, execute, role
) -> None:
    settings, images = unreadable
    (at,) = (i for i, entry in enumerate(settings["datasets"]) if entry["role"] == role)
    settings["datasets"][at] = {"name": "broken", "role": role, **images}
    with pytest.raises(
        UserError, match=r"^datasets\.broken: none of its 2 images can be read\. First: 0/a\.png \(not a"
    ):
        execute(load(settings))


def test_a_run_that_finished_without_an_image_of_a_dataset_is_still_evaluated_and_reported(
    unreadable, load, execute, monkeypatch
) -> None:
    settings, images = unreadable
    settings["datasets"] = [entry for entry in settings["datasets"] if entry["role"] != "train"]
    settings["datasets"].append({"name": "broken", "role": "train", **images})
    with monkeypatch.context() as before:
        before.setattr(shards, "require_readable", lambda _: None)
        execute(load(settings))
    for first in ("evaluate", "report"):
        execute(load(settings), first=first)
    with pytest.raises(UserError, match=r"^datasets\.broken: none of its 2 images"):
        execute(load(settings))


def test_an_unlabelled_dataset_of_which_no_image_can_be_read_leaves_the_report_as_it_is(
    unreadable, load, execute
) -> None:
    settings, images = unreadable
    settings["datasets"].append({"name": "camera", "role": "unlabelled", **images})
    outcome = execute(load(settings))
    (told,) = outcome.unreadable
    assert told.startswith("camera: 2 of 2 images could not be used, first: 0/a.png (not a readable image")
    assert "2 of 2 images could not be used" in (outcome.folder / "report" / "index.html").read_text()
    assert len(Evaluation(outcome.folder).scores("camera")) == 0


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_a_run_that_is_interrupted_says_so(settings, load, execute, tmp_path, monkeypatch, end) -> None:
    with monkeypatch.context() as patch, pytest.raises(end):
        patch.setattr(Run, "fit", Mock(side_effect=end))
        execute(load(settings))
    assert files.read_json(newest(tmp_path / "workspace") / "manifest.json")["status"] == "interrupted"


def test_too_many_bad_images_stop_the_run_and_name_some(strange, settings, load, execute, tmp_path) -> None:
    with pytest.raises(
        UserError,
        match=r"strange: 6 of 12 images are bad.*max_bad_fraction.*cut\.jpg \(damaged or incomplete JPEG",
    ):
        execute(load(settings))
    assert not list(tmp_path.glob("workspace/features/strange-*/_manifest.json"))
    assert files.read_json(newest(tmp_path / "workspace") / "manifest.json")["status"] == "failed"
    for name in (name for name, good in strange.items() if not good):
        (tmp_path / "strange" / name).unlink()
        shutil.copy(tmp_path / "strange" / "good.png", tmp_path / "strange" / name)
        os.utime(tmp_path / "strange" / name, ns=(1, 1))
    assert execute(load(settings), last="extract").folder.is_dir()


def test_a_tracking_server_that_is_down_costs_no_result(settings, load, execute) -> None:
    settings["tracking"] = {"uri": "http://127.0.0.1:9", "enabled": True}
    outcome = execute(load(settings))
    assert "report CONFIG --track" in outcome.warning
    check = files.read_json(outcome.folder / "manifest.json")
    assert check["status"] == "finished"
    assert (outcome.folder / "metrics.parquet").is_file()


def test_a_mistake_that_only_a_worker_can_see_is_still_one_clear_error(settings, load, execute) -> None:
    settings["extract"]["device"] = "cuda"
    with pytest.raises(UserError, match=r"^extract\.device: cuda is not available on a worker"):
        execute(load(settings))


WITHOUT = """
import sys
from pipeline.cli.main import main
without = sys.argv.pop().split(",")
try:
    main()
finally:
    assert not set(without) & set(sys.modules), set(without) & set(sys.modules)
"""


def test_the_command_prints_a_table_and_where_everything_lies_and_imports_no_more_than_it_needs(
    settings, load, tmp_path
) -> None:
    settings["tracking"] = {"enabled": True}
    settings["detectors"] = [{"grood": {"prototype": "noise", "samples": 40}}, "dice"]
    path = tmp_path / "run.yaml"
    path.write_text(loading.dump(load(settings)))
    run = [sys.executable, "-c", WITHOUT, "run", str(path)]
    command = [*run, "--engine", "inline", "-v", "ray"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (found.returncode, found.stderr) == (0, "")
    for text in (
        "extract",
        "1,080 of 1,080 images forwarded",
        "Near-OOD",
        "grood",
        "report/index.html",
        "mlflow",
        "\nnotice   dice: p = 70 is the paper's for ImageNet, this network has 10 classes. ",
    ):
        assert text in found.stdout
    assert (tmp_path / "workspace" / "mlflow.db").is_file()
    log = (newest(tmp_path / "workspace") / "logs" / "workers.log").read_text("utf-8")
    assert "INFO" in log
    assert "part-00000.parquet: 128 images, 0 errors" in log
    page = newest(tmp_path / "workspace") / "report" / "index.html"
    written = page.stat().st_mtime_ns
    command = [*run, "torch,ray,faiss,mlflow,matplotlib,sklearn,scipy"]  # there is nothing to do
    again = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.partition("small\n")[2] == found.stdout.partition("small\n")[2]
    assert files.read_json(page.parents[1] / "manifest.json")["executions"][-1]["status"] == "finished"
    assert page.stat().st_mtime_ns == written
