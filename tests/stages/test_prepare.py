"""What must be found before any long work starts, and what a cache must never miss."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import detectors
from pipeline.config.schema import Dataset, DetectorEntry
from pipeline.data.manifest import Manifest
from pipeline.errors import UserError
from pipeline.stages import index, memory, prepare
from pipeline.workspace.patience import Unavailable

NET = """
from torch import nn
import blocks

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = blocks.{module}()
        self.fc = nn.Linear(4 * 28 * 28, 10)

    def forward(self, x):
        return self.fc(self.block(x).flatten(1))

def build():
    return Net()
"""
BLOCK = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x).{activation}()
"""


@pytest.fixture
def flat(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The small evaluation with a network that takes 28 pixels and nothing else."""
    (tmp_path / "net.py").write_text(
        NET.format(module="Block")
        .replace("import blocks\n", BLOCK.format(activation="relu"))
        .replace("blocks.", "")
    )
    settings["model"] |= {"name": "./net.py:build", "weights": "random"}
    return settings


def test_configs_of_one_command_list_a_dataset_once_whatever_their_seed_and_the_next_command_anew(
    flat, load, monkeypatch
) -> None:
    asked: list[str] = []
    compiled = prepare.compile_manifest

    def counted(dataset: Dataset, *arguments: Any) -> Manifest:
        asked.append(dataset.name)
        return compiled(dataset, *arguments)

    monkeypatch.setattr(prepare, "compile_manifest", counted)
    names = [dataset["name"] for dataset in flat["datasets"]]
    seen = prepare.Seen()
    first = prepare.prepare(load(flat), seen=seen)
    second = prepare.prepare(load(flat | {"name": "other"}), seen=seen)
    assert asked == names
    assert [second.jobs[name].name for name in names] == [first.jobs[name].name for name in names]
    prepare.prepare(load(flat | {"seed": 1}), seen=seen)
    assert asked == names
    flat["datasets"][0]["limit"] = 5
    for seed in (0, 1, 1):
        prepare.prepare(load(flat | {"seed": seed}), seen=seen)
    assert asked == [*names, names[0], names[0]]
    prepare.prepare(load(flat))
    assert asked == [*names, names[0], names[0], *names]


def test_jigsaws_have_the_size_of_images_so_a_model_of_one_size_takes_them(flat, load) -> None:
    flat["model"]["blocks"] = ["block"]
    flat["detectors"] = ["featurenorm", {"selectednorm": {"grid": 5}}]
    prepare.prepare(load(flat))
    flat["detectors"] = [{"featurenorm": {"grid": 29}}]
    with pytest.raises(UserError, match=r"featurenorm\.grid is 29 but images have 28 pixels per side"):
        prepare.prepare(load(flat))


def test_a_model_without_blocks_says_which_detectors_do_not_apply(flat, load) -> None:
    flat["detectors"] = ["featurenorm"]
    with pytest.raises(UserError, match=r"detectors\.featurenorm: the model has no block with maps"):
        prepare.prepare(load(flat))
    flat["detectors"] = ["grood_norm"]
    with pytest.raises(UserError, match=r"detectors\.grood_norm: .* no block to mix .* with mixup_layer"):
        prepare.prepare(load(flat))
    flat["detectors"] = [{"grood_norm": {"mixup_layer": "block"}}, {"grood": {"prototype": "proto_mean"}}]
    prepare.prepare(load(flat))


def test_more_neighbours_than_faiss_finds_on_a_gpu_are_refused_before_any_work(
    flat, load, monkeypatch
) -> None:
    monkeypatch.setattr(index, "_MOST_ON_GPU", 11)
    flat["datasets"][0]["limit_per_class"] = 2  # 20 images
    flat["detectors"] = [{"knn": {"k": 12}}]
    prepare.prepare(load(flat))
    with pytest.raises(UserError, match=r"^detectors\.knn\.k is 12, but FAISS looks up 11 .* on a GPU"):
        prepare.prepare(load(flat | {"index": {"gpus_per_shard": 1}}))
    prepare.prepare(load(flat | {"index": {"gpus_per_shard": 1, "shards": 2}}))


def test_configs_of_one_command_share_one_table_of_metadata(flat, load, tmp_path: Path) -> None:
    (tmp_path / "cameras.csv").write_text("key,camera\ntest_x/00000000,left\n")
    flat["report"] = {"metadata": "cameras.csv"}
    seen = prepare.Seen()
    first, second = (prepare.prepare(load(flat | {"seed": seed}), seen=seen) for seed in (0, 1))
    assert first.metadata is not None
    assert first.metadata is second.metadata


def test_metadata_of_other_images_is_told_before_any_work(settings, load, tmp_path: Path) -> None:
    settings["report"] = {"metadata": str(tmp_path / "cameras.csv")}
    (tmp_path / "cameras.csv").write_text("key,camera\nsomewhere/else.png,a\n")
    message = (
        r"^report\.metadata: no image of .*test.* is in the table: an image is '.+', the first row somewh"
    )
    with pytest.raises(UserError, match=message):
        prepare.prepare(load(settings))


def test_metadata_that_is_not_there_is_told_before_any_work(settings, load, tmp_path: Path) -> None:
    settings["report"] = {"metadata": "cameras.csv"}
    with pytest.raises(UserError, match=rf"^report\.metadata: no such file: {tmp_path}/cameras\.csv"):
        prepare.prepare(load(settings))


def test_of_all_detectors_those_that_do_not_apply_are_left_out_with_the_reason(flat, load) -> None:
    flat["datasets"][0]["limit_per_class"] = 2
    flat["detectors"] = "all"
    ready = prepare.prepare(load(flat))
    assert {label: reason.partition(". ")[0] for label, reason in ready.not_applicable.items()} == {
        **dict.fromkeys(("featurenorm", "gram", "mahalanobis_ensemble", "rankfeat", "selectednorm"),
                        "the model has no block with maps or tokens whose channels are certain"),
        "mcdropout": "the model has no dropout layer with a rate above 0",
        **dict.fromkeys(("grood", "grood_norm"), "the model has no block to mix images at"),
        "knn": "k is 50 but there are 20 training images; lower k.",
        **dict.fromkeys(("mds", "mds_l2", "rmds", "rmds_l2"),
                        "a covariance in 3136 dimensions takes more rows than dimensions and classes "
                        "together, got 20 training rows of 10 classes; give the dataset with role train more "
                        "images."),
        **dict.fromkeys(("residual", "vim"),
                        "dim is 1000, which takes training features that vary in more than 1000 directions; "
                        "20 rows vary in 20 of 3136 at most"),
    }  # fmt: skip
    assert [*ready.detectors] == [name for name in detectors.names() if name not in ready.not_applicable]
    flat["detectors"] = list(ready.detectors)
    assert prepare.prepare(load(flat)).fingerprint == ready.fingerprint


def test_tables_of_pairs_of_classes_that_no_task_may_hold_are_foreseen(flat, load, monkeypatch) -> None:
    monkeypatch.setattr(memory, "MOST", 8 * 10 * 10 - 1)
    left_out = prepare.prepare(load({**flat, "detectors": "all"})).not_applicable
    large = {label for label, reason in left_out.items() if "GiB for the 10 classes of the model" in reason}
    assert large == {"fdbd", "klmatching", "openmax"}
    with pytest.raises(UserError, match=r"^detectors\.fdbd: fdbd holds .* Drop the detector"):
        prepare.prepare(load({**flat, "detectors": ["msp", "fdbd"]}))


def test_without_training_images_all_detectors_that_learn_nothing_are_left(settings, load) -> None:
    del settings["datasets"][0]
    settings["detectors"] = "all"
    ready = prepare.prepare(load(settings))
    every = {name: detectors.get(name)() for name in detectors.names() if name != "mcdropout"}
    learning = [name for name, each in every.items() if each.needs_train() or each.calibrates()]
    assert [*ready.detectors] == [name for name in every if name not in learning]
    assert {*map(type, ready.not_applicable.values())} == {str}
    assert ready.not_applicable["knn"].startswith("it learns from training images, but no dataset has role")


def test_held_out_images_do_for_what_is_only_calibrated(settings, load) -> None:
    settings["datasets"][0]["role"] = "id_val"
    settings["detectors"] = ["adascale", "tempscale"]
    assert [*prepare.prepare(load(settings)).detectors] == ["adascale", "tempscale"]
    del settings["datasets"][0]
    with pytest.raises(
        UserError, match=r"detectors\.adascale: it is calibrated on held-out ID images, or else"
    ):
        prepare.prepare(load(settings))


def test_only_detectors_that_read_the_labels_of_training_images_ask_for_them(settings, load) -> None:
    train = next(each for each in settings["datasets"] if each["role"] == "train")
    del train["labels"]
    settings["detectors"] = ["knn", "vim", "msp"]
    assert [*prepare.prepare(load(settings)).detectors] == ["knn", "vim", "msp"]
    settings["detectors"] = ["knn", "mds"]
    with pytest.raises(
        UserError, match=r"detectors\.mds: it reads the labels of training images, but (.+) of \1 "
    ):
        prepare.prepare(load(settings))
    settings["detectors"] = "all"
    found = prepare.prepare(load(settings)).not_applicable
    assert found["mds"].startswith("it reads the labels of training images")
    assert "knn" not in found


@pytest.mark.parametrize("label", ["vim", "residual", "neco"])
def test_more_directions_than_the_feature_has_are_refused(settings, load, label: str) -> None:
    settings["detectors"] = [{label: {"dim": 129}}]
    with pytest.raises(UserError, match=rf"detectors\.{label}: dim is 129 but the feature has 128"):
        prepare.prepare(load(settings))


@pytest.mark.parametrize(
    ("detector", "rows", "reason"),
    [
        (
            "mds",
            138,
            r"128 dimensions takes more rows than dimensions and classes together, got 138 .* 10 classes",
        ),
        ({"neco": {"dim": 60}}, 60, r"dim is 60, .* 60 rows vary in 59 of 128 at most"),
        (
            {"vim": {"dim": 60}},
            60,
            r"dim is 60, .* vary in more than 60 directions; 60 rows vary in 60 of 128 at",
        ),
        ({"openmax": {"tail": 30}}, 200, r"tail is 30, but 10 of 10 classes have fewer"),
    ],
)
def test_training_sets_that_are_too_small_are_foreseen_as_the_fit_refuses_them(
    settings, load, detector, rows, reason
) -> None:
    settings["datasets"][0] |= {"limit": rows}
    settings["detectors"] = [detector]
    with pytest.raises(UserError, match=rf"^detectors\.\w+: .*{reason}"):
        prepare.prepare(load(settings))


def test_missing_data_are_told_before_missing_weights(settings, load) -> None:
    settings["model"]["weights"] = "./gone.safetensors"
    settings["datasets"][1]["path"] = "./gone.npz"
    with pytest.raises(UserError, match=r"^datasets\.test\.path: no such file: .*gone\.npz"):
        prepare.prepare(load(settings))


def test_a_network_that_does_not_run_in_half_precision_is_refused(flat, load, tmp_path) -> None:
    net = tmp_path / "net.py"
    text = net.read_text().replace(
        "return self.fc(self.block(x).flatten(1))",
        "x = self.block(x).flatten(1)\n        x.numpy()  # knows no bfloat16\n        return self.fc(x)",
    )
    net.write_text(text)
    flat["detectors"] = ["msp"]
    prepare.prepare(load(flat))
    flat["extract"] = {**flat.get("extract", {}), "precision": "bf16"}
    with pytest.raises(UserError, match=r"extract\.precision: the model does not run in bf16 on a CPU"):
        prepare.prepare(load(flat))


def test_a_wrong_number_of_weights_for_the_stages_is_refused(settings, load) -> None:
    settings["detectors"] = [{"mine": {"method": "mahalanobis_ensemble", "weights": [1, 2]}}]
    with pytest.raises(UserError, match=r"detectors\.mine: weights: 2 given; expected one for each"):
        prepare.prepare(load(settings))


@pytest.mark.parametrize("layer", ["fc", "nowhere"])
def test_images_are_mixed_only_where_it_changes_the_feature(settings, load, layer: str) -> None:
    settings["detectors"] = [{"grood": {"mixup_layer": layer}}]
    with pytest.raises(UserError, match=rf"detectors\.grood: unknown layer '{layer}'"):
        prepare.prepare(load(settings))


def test_a_change_in_a_module_behind_the_factory_is_another_model(
    settings, load, tmp_path, monkeypatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "net.py").write_text(NET.format(module="Block"))
    settings["model"] |= {"name": "./net.py:build", "weights": "random"}
    seen = set()
    for activation in ("relu", "tanh"):
        (tmp_path / "blocks.py").write_text(BLOCK.format(activation=activation))
        sys.modules.pop("blocks", None)
        seen |= {job.folder for job in prepare.prepare(load(settings)).jobs.values()}
    assert len(seen) == 2 * len(settings["datasets"])


def test_another_number_of_images_than_the_protocol_has_is_refused(settings, load, tmp_path) -> None:
    settings["protocol"] = "Mine v2"
    settings["datasets"][2]["expected"] = 151
    with pytest.raises(
        UserError, match=r"datasets\.animals: 150 images .* but Mine v2 expects 151\."
    ) as caught:
        prepare.prepare(load(settings))
    assert "--set datasets.animals.expected=null" in str(caught.value)
    assert not (tmp_path / "workspace" / "features").exists()


@pytest.mark.parametrize("sample", [{"limit": 20}, {"limit_per_class": 2}, {"include_labels": [0, 1]}])
def test_a_sample_is_not_held_to_the_number_of_the_protocol(settings, load, sample: dict[str, Any]) -> None:
    settings["datasets"][1] |= sample | {"expected": 9000}
    assert prepare.prepare(load(settings)).jobs["test"].manifest.rows < 300


@pytest.mark.parametrize("expected", [150, None])
def test_the_right_number_of_images_and_a_removed_one_pass(settings, load, expected) -> None:
    settings["datasets"][2]["expected"] = expected
    prepare.prepare(load(settings))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"published": "cifar10-resnet81"}, r"published: unknown table .* Did you mean 'cifar10-resnet18'\?"),
        ({"published": "cifar10-resnet18"}, "are of OpenOOD v1.5 CIFAR-10, but protocol is None"),
        (
            {"published": "cifar10-resnet18", "protocol": "OpenOOD v1.5 CIFAR-100"},
            "are of OpenOOD v1.5 CIFAR-10, but protocol is OpenOOD v1.5 CIFAR-100. Set published=null",
        ),
    ],
)
def test_published_numbers_of_another_protocol_are_refused(settings, load, keys, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare.prepare(load(settings | keys))


def test_a_faiss_string_is_checked_before_any_work(settings, load) -> None:
    settings["index"] = {"kind": "IVFF10"}
    with pytest.raises(UserError, match=r"index\.kind: FAISS refuses 'IVFF10'"):
        prepare.prepare(load(settings))


@pytest.mark.parametrize(
    ("kind", "shards", "least", "rows"),
    [("IVF32,Flat", 2, 32, 63), ("OPQ8,IVF4,PQ8", "auto", 256, 255), ("PCA8,IVF4,PQ4x4", 3, 16, 47)],
)
def test_an_index_of_more_clusters_than_rows_is_foreseen(settings, load, kind, shards, least, rows) -> None:
    settings["index"] = {"kind": kind, "shards": shards}
    settings["datasets"][0]["limit"] = rows
    count = 1 if shards == "auto" else shards
    message = (
        rf"^index\.kind: '{kind}' takes {least} vectors to be trained, but {rows} .* are {rows // count} each"
    )
    with pytest.raises(UserError, match=message):
        prepare.prepare(load(settings))
    settings["datasets"][0]["limit"] = rows + 1
    prepare.prepare(load(settings))


def test_scores_of_approximate_indexes_depend_on_the_shards(settings, load) -> None:
    def scoring(**index: Any) -> dict[str, Any]:
        settings["index"] = index
        return prepare.prepare(load(settings)).scoring("knn")

    assert scoring(kind="flat", shards=1) == scoring(kind="flat", shards=3)
    assert scoring(kind="IVF4,Flat", shards=1) != scoring(kind="IVF4,Flat", shards=3)


def test_a_dataset_may_not_have_the_name_of_a_group(settings, load) -> None:
    settings["datasets"][1]["name"] = "id"
    with pytest.raises(UserError, match="'id' is the name of a group"):
        load(settings)


def image_list(folder: Path, lines: list[str]) -> dict[str, str]:
    """A dataset of images that are not there: preparing a run does not open them."""
    (folder / "list.txt").write_text("".join(f"{row}.png {line}\n" for row, line in enumerate(lines)))
    return {"name": "test", "role": "id", "format": "imagelist", "path": str(folder / "list.txt")}


def test_accepted_labels_must_be_classes_of_the_head(settings, load, tmp_path) -> None:
    settings["datasets"][1] = image_list(tmp_path, ["3", "1;9"])
    assert prepare.prepare(load(settings)).jobs["test"].manifest.class_count == {1: 1, 3: 1, 9: 1}
    settings["datasets"][1] = image_list(tmp_path, ["3", "1;10"])
    with pytest.raises(UserError, match=r"datasets\.test: label 10 is outside the head's classes 0\.\.9"):
        prepare.prepare(load(settings))
    settings["datasets"][1] |= {"include_labels": [3]}
    assert prepare.prepare(load(settings)).jobs["test"].manifest.rows == 1


def class_folders(folder: Path, classes: int) -> dict[str, Any]:
    for number in range(classes):
        (folder / f"n0{number}").mkdir(parents=True)
        (folder / f"n0{number}" / "1.png").touch()
    return {"name": "test", "role": "id", "format": "imagefolder", "path": str(folder)}


def test_folders_numbered_by_order_must_all_be_there_even_if_a_sample_is_taken(
    settings, load, tmp_path
) -> None:
    settings["datasets"][1] = class_folders(tmp_path / "nine", 9) | {"limit": 3}
    with pytest.raises(UserError, match=r"datasets\.test: 1 of the head's 10 classes have no images \(9\)"):
        prepare.prepare(load(settings))
    settings["datasets"][1] = class_folders(tmp_path / "ten", 10) | {"limit": 3}
    assert prepare.prepare(load(settings)).jobs["test"].manifest.rows == 3


def test_folders_with_an_index_need_not_all_be_there(settings, load, tmp_path) -> None:
    (tmp_path / "classes.txt").write_text("".join(f"n0{number}\n" for number in range(10)))
    settings["datasets"][1] = class_folders(tmp_path / "three", 3) | {"labels": "classes.txt"}
    assert prepare.prepare(load(settings)).jobs["test"].manifest.class_count == {0: 1, 1: 1, 2: 1}


def test_training_needs_every_class_after_the_filters(settings, load) -> None:
    settings["datasets"][0]["include_labels"] = list(range(9))
    prepare.prepare(load(settings))  # neither MSP nor k-NN asks for classes
    settings["detectors"] = ["mds"]
    with pytest.raises(UserError, match=r"datasets\.train: 1 of the head's 10 classes have no images \(9\)"):
        prepare.prepare(load(settings))


def test_samples_depend_on_the_seed_of_the_run(settings, load) -> None:
    settings["datasets"][1]["limit"] = 20
    digests = set()
    for seed in (0, 0, 1):
        settings["seed"] = seed
        digests.add(prepare.prepare(load(settings)).jobs["test"].manifest.digest)
    assert len(digests) == 2


def test_a_store_that_does_not_answer_makes_no_detector_inapplicable():
    entry = DetectorEntry(label="knn", method="knn", optional=True)
    selection = prepare.Selection({"knn": entry.build()}, {"knn"})

    def unanswered(label, detector):
        raise Unavailable("s3://bucket/x", "it does not answer")

    with pytest.raises(Unavailable):
        selection.keep(unanswered)
    assert (list(selection.detectors), selection.not_applicable) == (["knn"], {})
