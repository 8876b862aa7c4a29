"""A config is checked to the last key before anything is done with it, and says what to mend."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import detectors
from pipeline.config import loading, schema
from pipeline.detectors._steps import combined
from pipeline.detectors.dice import Dice
from pipeline.detectors.msp import Msp
from pipeline.detectors.react import React
from pipeline.errors import UserError
from pipeline.workspace import artifacts

RAW = {
    "name": "small",
    "model": {
        "source": "factory",
        "name": "package.module:build",
        "transform": {"crop": 28, "mean": [0.3], "std": [0.3], "channels": 1},
    },
    "datasets": [
        {"name": "train", "role": "train", "format": "npz", "path": "train.npz"},
        {"name": "test", "role": "id", "format": "npz", "path": "test.npz"},
        {"name": "cifar-10", "role": "near_ood", "format": "npz", "path": "cifar.npz"},
    ],
    "detectors": ["msp", {"knn": {"k": 5}}, {"grood": None}],
}

Load = Callable[..., schema.Config]


def key(raw: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one key set."""
    changed = deepcopy(raw)
    node: Any = changed
    *parents, last = path.split(".")
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    node[int(last) if isinstance(node, list) else last] = value
    return changed


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Write a raw config to a file and load it."""

    def loaded(raw: Any = RAW, *overrides: str) -> schema.Config:
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(raw), encoding="utf-8")
        return loading.load(str(path), list(overrides))

    return loaded


def test_hardware_gpu_gives_a_gpu_to_all_that_have_not_said_otherwise(load: Load) -> None:
    assert (load().extract.needs["GPU"], load().index.needs["GPU"]) == (0, 0)
    found = load({**RAW, "extract": {"batch_size": 8}}, "hardware=gpu", "index.gpus_per_shard=0.5")
    assert (found.extract.batch_size, found.extract.needs["GPU"], found.index.needs["GPU"]) == (8, 1, 0.5)
    assert load(yaml.safe_load(loading.dump(found))) == found
    again = load(yaml.safe_load(loading.dump(load())), "hardware=gpu")
    assert (again.extract.needs["GPU"], again.index.needs["GPU"]) == (1, 1)


@pytest.fixture
def refusal(load: Load) -> Callable[..., str]:
    """The message with which a raw config is refused."""

    def message(raw: Any = RAW, *overrides: str) -> str:
        with pytest.raises(UserError) as caught:
            load(raw, *overrides)
        return str(caught.value)

    return message


def test_a_bundled_config_loads_by_name_and_by_path():
    by_name = loading.load("quickstart")
    by_path = loading.load(str(loading.bundled() / "quickstart.yaml"))
    assert by_name == by_path
    assert by_name.name == "quickstart"


def test_a_config_that_is_not_there_lists_the_bundled_ones():
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such config file.*bundled one: .*quickstart"):
        loading.load("nowhere.yaml")


@pytest.mark.parametrize("text", ["a: [", "\tname: x", "- a\n- b", "", "!!python/object/apply:os.getcwd []"])
def test_a_file_that_is_no_yaml_mapping_is_refused_by_name(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml: (not valid YAML|expected a mapping)"):
        loading.load(str(path))


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(UserError, match=r"bad\.yaml: not valid YAML"):
        loading.load(str(path))


@pytest.mark.parametrize(
    ("path", "closest", "other"),
    [
        ("workspce", "workspace", "tracking"),
        ("model.wieghts", "weights", "transform"),
        ("model.transform.crops", "crop", "interpolation"),
        ("datasets.1.paths", "path", "role"),
        ("extract.batchsize", "batch_size", "shard_rows"),
        ("index.kinds", "kind", "shards"),
        ("tracking.urii", "uri", "experiment"),
    ],
)
def test_an_unknown_key_is_refused_with_the_file_the_closest_key_and_all_others(
    refusal, path, closest, other
):
    message = refusal(key(RAW, path, 1))
    name = path.rpartition(".")[2]
    path = path.replace("datasets.1", "datasets.test")
    assert f"small.yaml: {path}: unknown key '{name}'. Did you mean '{closest}'?" in message
    assert other in message
    assert len(message.splitlines()) == 1


def test_an_unknown_parameter_of_a_detector_is_refused_with_the_file_and_the_closest_parameter(refusal):
    message = refusal(key(RAW, "detectors.1", {"near": {"method": "grood", "sample": 20}}))
    assert "small.yaml: detectors.near.sample: unknown key 'sample'. Did you mean 'samples'?" in message


def test_an_unknown_detector_is_refused_with_the_file_and_the_closest_detector(refusal):
    message = refusal(key(RAW, "detectors.0", "enrgy"))
    assert "small.yaml: detectors.enrgy: unknown detector 'enrgy'. Did you mean 'energy'?" in message


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("datasets.0.role", "trian", "datasets.train.role: Input should be 'train', 'id'"),
        ("seed", 2**64, "seed: Input should be less than"),
        ("workspace", "", "workspace: String should have at least 1 character"),
        ("model.transform.std", [float("inf")], "model.transform.std.0: Input should be a finite number"),
        ("model.transform.mean", [True], "model.transform.mean: YAML reads yes, no"),
        ("detectors.1", {"knn": {"k": True}}, "detectors.knn.k: YAML reads yes, no"),
        ("detectors.1", {"react": {"p": float("nan")}}, "detectors.react.p: Input should be"),
        ("seed", -1, "seed: Input should be greater than or equal to 0, got -1"),
        ("name", "a/b", "name: String should match pattern"),
        ("extract.batch_size", 0, "extract.batch_size: Input should be greater than or equal to 1, got 0"),
        ("extract.actors", 0, "extract.actors: Input should be 'auto', or Input should be greater than"),
        ("model.blocks", [3], "model.blocks.0: Input should be a valid string, got 3"),
        (
            "model.transform",
            3,
            "model.transform: Input should be a valid dictionary or instance of Transform",
        ),
        ("detectors", [], "detectors: List should have at least 1 item"),
        (
            "thresholds",
            {"false_alarm": 0.05},
            "thresholds.false_alarm: Input should be a list, as [...], got 0.05",
        ),
        (
            "thresholds",
            {"false_alarm": [0]},
            "thresholds.false_alarm.0: Input should be greater than 0, got 0",
        ),
        ("detectors.1", {"error": {"method": "energy"}}, "detectors: 'error' is a column of the results"),
        ("detectors.1", {"p.x": {"method": "energy"}}, "detectors: 'p.x' is a column of the results"),
        ("detectors", "msp", "detectors: expected 'all' or a list of detectors"),
        ("detectors.1", {"knn": 5}, "detectors: 'knn': expected its parameters"),
        (
            "detectors.1",
            {"label": "a", "method": "knn", "k": 3},
            "detectors: 'k': expected its parameters",
        ),
        ("detectors.1", {"knn": {"k": 0}}, "detectors.knn.k: Input should be greater than or equal to 1"),
        ("detectors.1", {"a b": {"method": "knn"}}, "detectors.1.label: String should match pattern"),
    ],
)
def test_a_wrong_value_is_refused_with_file_key_and_value(refusal, path, value, expected):
    message = refusal(key(RAW, path, value))
    assert f"small.yaml: {expected}" in message
    assert len(message.splitlines()) == 1


def test_a_missing_key_is_named(refusal):
    raw = deepcopy(RAW)
    del raw["model"]["transform"]["crop"]
    del raw["datasets"][1]["path"]
    assert [line.partition("small.yaml: ")[2] for line in refusal(raw).splitlines()] == [
        "model.transform.crop: Field required (line 21).",
        "datasets.test.path: Field required (line 6).",
    ]


MISTAKES = """\
extends: base.yaml
seed: 1
extract:
  batch_size: yes
  actors: .inf
datasets:
- {name: train, role: train, format: npz, path: train.npz}
- name: test
  role: id
  format: npz
  path: test.npz
  limt: 3
detectors:
- msp
- knn:
    k: 0
- near: {method: enrgy}
"""


def test_all_mistakes_are_told_at_once_each_with_its_line_and_the_file_if_it_is_another(tmp_path):
    base = {"name": "x", "model": RAW["model"] | {"transform": {"crop": 10**9, "mean": [0.3], "std": [0.3]}}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    path = tmp_path / "mine.yaml"
    path.write_text(MISTAKES)
    with pytest.raises(UserError) as caught:
        loading.load(str(path), ["index.shards=0"])
    lines = [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()]
    for line, (start, end) in zip(
        lines,
        [
            ("model.transform.crop: Input should be less than", "got 1000000000 (base.yaml, line 5)."),
            ("datasets.test.limt: unknown key 'limt'. Did you mean 'limit'?", "(line 12)."),
            ("extract.batch_size: YAML reads yes, no, on", "got True (line 4)."),
            ("extract.actors: Input should be 'auto', or", "got inf (line 5)."),
            ("index.shards: Input should be 'auto', or", "got 0 (--set)."),
            ("detectors.knn.k: Input should be greater", "got 0 (line 16)."),
            ("detectors.near: unknown detector 'enrgy'", "(line 17)."),
        ],
        strict=True,
    ):
        assert line.startswith(start), line
        assert line.endswith(end), line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nname: x\nseed: 2\n", r"the key 'seed' stands here twice, first in line 1\n.*line 3"),
        ("a: {b: 1, b: 1}", "the key 'b' stands here twice"),
        (f"seed: {'7' * 5000}", r"4300 digits.*\n.*line 1"),
        ("a: 2020-13-45", r"month must be in 1\.\.12\n.*line 1"),
        ("[" * 3000, "nested too deeply"),
        ("a: " + "x" * 2**20, "larger than 1,048,576 bytes"),
    ],
)
def test_what_yaml_readers_swallow_or_die_of_is_one_clear_error(tmp_path, text, expected):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"^{path}: .*{expected}"):
        loading.load(str(path))


@pytest.mark.parametrize(
    "change",
    [{"mean": [0.3, 0.3]}, {"std": [0.3, 0.3, 0.3]}, {"channels": 3}],
    ids=["mean", "std", "channels"],
)
def test_a_transform_needs_one_mean_and_std_per_channel(refusal, change):
    message = refusal(key(RAW, "model.transform", RAW["model"]["transform"] | change))
    assert "small.yaml: model.transform: mean has " in message
    assert f"expected {change.get('channels', 1)} each" in message


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("datasets.1.name", "train", "datasets: the name 'train' is used twice"),
        ("detectors.0", {"knn": {"k": 6}}, "detectors: the name 'knn' is used twice"),
    ],
)
def test_a_name_that_is_used_twice_is_refused(refusal, path, value, expected):
    assert expected in refusal(key(RAW, path, value))


@pytest.mark.parametrize("group", ["near_ood", "far_ood", "fs_near_ood", "fs_far_ood"])
def test_a_dataset_cannot_have_the_name_of_a_group(refusal, group):
    assert f"'{group}' is the name of a group" in refusal(key(RAW, "datasets.1.name", group))


@pytest.mark.parametrize("label", ["key", "prediction", "classifier", "is_ood.msp"])
def test_a_detector_cannot_have_the_name_of_a_column_of_the_results(refusal, label):
    message = refusal(key(RAW, "detectors.0", {label: {"method": "msp"}}))
    assert f"'{label}' is a column of the results" in message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("tracking.uri", "https://anna:s3cret@mlflow.example/x"),
        ("tracking.uri", "postgresql://anna:s3cret@db/mlflow"),
        ("tracking", "https://anna:s3cret@mlflow.example"),
        ("tracking.experiment.uri", "https://anna:s3cret@mlflow.example"),
        ("trackin.uri", "https://anna:s3cret@mlflow.example"),
        ("tracking.uri", "http://mlflow.example/?token=s3cret"),
        ("tracking.uri", "ftp://mlflow.example/?a=1&Api-Key=s3cret"),
        ("workspace", "s3://anna:s3cret@bucket/prefix"),
        ("data", "s3://s3cret@bucket/prefix"),
        ("datasets.0.path", "s3://bucket/x.npz?access_key=anna&secret_key=s3cret"),
        ("datasets.0.role", "s3://bucket/x.npz?secret_key=s3cret"),
        ("model.weights", "https://host/w.pt?X-Amz-Signature=s3cret"),
        ("model.transform", "https://host/w.pt?X-Amz-Credential=s3cret"),
    ],
)
def test_credentials_are_refused_and_never_shown(refusal, path, value):
    assert "s3cret" not in refusal(key(RAW, path, value))
    assert "s3cret" not in refusal(RAW, f"{path}={value}")


def test_credentials_point_to_the_variables_that_hold_them(refusal):
    message = refusal(key(RAW, "tracking.uri", "https://anna:s3cret@mlflow.example"))
    assert (
        "small.yaml: tracking.uri: a config must not hold credentials; set them in the environment" in message
    )
    assert "MLFLOW_TRACKING_USERNAME" in message


@pytest.mark.parametrize("uri", ["https://mlflow.example/~anna@work", "sqlite:////home/anna@work/mlflow.db"])
def test_an_at_sign_in_a_path_is_no_credential(load, uri):
    assert load(key(RAW, "tracking.uri", uri)).tracking.uri == uri


@pytest.mark.parametrize(
    "uri", ["abfss://container@account.dfs.core.windows.net/x", "gs://anonymous@bucket/x"]
)
def test_a_container_and_nobody_are_no_credentials(load, uri):
    assert load(key(RAW, "workspace", uri)).workspace == uri


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("seed=7", lambda c: c.seed == 7),
        ("extract.batch_size=64", lambda c: c.extract.batch_size == 64),
        (
            "extract={batch_size: 32, actors: 2}",
            lambda c: (c.extract.batch_size, c.extract.actors) == (32, 2),
        ),
        ("model.transform.mean=[0.5]", lambda c: c.model.transform.mean == (0.5,)),
        ("model.transform.mean.0=0.5", lambda c: c.model.transform.mean == (0.5,)),
        ("model.transform.resize=32", lambda c: c.model.transform.resize == 32),
        ("tracking.enabled=false", lambda c: c.tracking.enabled is False),
        ("tracking.uri=http://a:5000/?b=c", lambda c: c.tracking.uri == "http://a:5000/?b=c"),
        ("datasets.1.name=other", lambda c: [d.name for d in c.datasets] == ["train", "other", "cifar-10"]),
        ("datasets.cifar-10.role=far_ood", lambda c: c.datasets[2].role == "far_ood"),
        ("datasets.2={name: a, role: id, format: idx, path: b}", lambda c: c.datasets[2].name == "a"),
        ("detectors.knn.k=9", lambda c: c.built()["knn"].k == 9),
        ("detectors.1.knn.k=9", lambda c: c.built()["knn"].k == 9),
        ("detectors.grood.k=2", lambda c: c.built()["grood"].k == 2),
        ("detectors.knn={k: 3}", lambda c: c.built()["knn"].k == 3),
        ("detectors.knn=energy", lambda c: list(c.built()) == ["msp", "energy", "grood"]),
        ("detectors.0=energy", lambda c: list(c.built()) == ["energy", "knn", "grood"]),
        ("detectors.msp={method: knn, k: 2}", lambda c: c.detectors[0].parameters == {"k": 2}),
        ("detectors.msp.method=energy", lambda c: c.detectors[0].method == "energy"),
        ("detectors=all", lambda c: list(c.built()) == detectors.names()),
    ],
)
def test_set_changes_one_value(load, override, read):
    assert not read(load())
    assert read(load(RAW, override))


def test_the_last_set_wins(load):
    assert load(RAW, "seed=1", "seed=2").seed == 2


def test_set_reads_a_dumped_config_like_a_written_one(load):
    dumped = yaml.safe_load(loading.dump(load()))
    assert load(dumped, "detectors.knn.parameters.k=9").built()["knn"].k == 9


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "--set seed: expected key.path=value"),
        ("=3", "expected key.path=value"),
        ("seed=[", "--set seed: the value is not valid YAML"),
        ("name.x=1", "--set name.x: 'name' is a value, not a section"),
        ("datasets.tset.role=id", "--set datasets.tset.role: unknown item 'tset'. Did you mean 'test'?"),
        ("datasets.9.role=id", "--set datasets.9.role: unknown item '9'"),
        ("detectors.kn.k=1", "--set detectors.kn.k: unknown item 'kn'. Did you mean 'knn'?"),
        ("detectors.0.k=1", "--set detectors.0.k: '0' is a value, not a section"),
        ("extract.batchsize=1", "unknown key 'batchsize'. Did you mean 'batch_size'?"),
        ("extract.batch_size=many", "extract.batch_size: Input should be a valid integer"),
    ],
)
def test_a_set_that_cannot_be_done_is_refused(refusal, override, expected):
    assert expected in refusal(RAW, override)


def test_a_dumped_config_loads_back_equal(load, tmp_path):
    raw = key(key(RAW, "model.weights", "weights.pt"), "model.transform.mean", [1e-07])
    raw = key(raw, "datasets.0.path", "Bücher/#1: x.npz")
    first = load(key(raw, "name", "1e3"))
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "elsewhere" / "config.yaml"
    path.write_text(loading.dump(first), encoding="utf-8")
    assert loading.load(str(path)) == first


def test_with_data_datasets_and_weights_start_from_that_folder_and_code_from_the_file(
    load, tmp_path, monkeypatch
):
    current = tmp_path / "current"
    current.mkdir()
    monkeypatch.chdir(current)
    raw = key(RAW, "model", {"source": "factory", "name": "./nets/a.py:build", "weights": "../results/w.pt"})
    raw["datasets"] = [
        {"name": "a", "role": "id", "format": "imagelist", "path": "lists/a.txt", "root": "images"},
        {"name": "b", "role": "id", "format": "imagelist", "path": "/lists/b.txt", "root": "/images"},
        {"name": "c", "role": "id", "format": "python", "path": "./c.py:images"},
        {"name": "d", "role": "id", "format": "npz", "path": "package://pipeline.quickstart/images.npz"},
    ]
    raw["data"] = "./mine"
    for overrides, folder in ((), current / "mine"), ((f"data={tmp_path}/all",), tmp_path / "all"):
        loaded = load(raw, *overrides)
        assert loaded.data == str(folder)
        assert loaded.model.name == f"{tmp_path}/nets/a.py:build"
        assert loaded.model.weights == f"{folder.parent}/results/w.pt"
        assert [(dataset.path, dataset.root) for dataset in loaded.datasets] == [
            (f"{folder}/lists/a.txt", f"{folder}/images"),
            ("/lists/b.txt", "/images"),
            (f"{tmp_path}/c.py:images", None),
            ("package://pipeline.quickstart/images.npz", None),
        ]


def test_data_may_be_on_other_storage(load, tmp_path):
    dataset = {"name": "a", "role": "id", "format": "imagelist", "path": "lists/a.txt", "root": "images"}
    raw = key(key(RAW, "datasets", [dataset]), "model.weights", str(tmp_path / "w.pt"))
    loaded = load(raw, "data=s3://bucket/all/")
    assert (loaded.datasets[0].path, loaded.datasets[0].root) == (
        "s3://bucket/all/lists/a.txt",
        "s3://bucket/all/images",
    )
    assert loaded.model.weights == str(tmp_path / "w.pt")


def test_a_config_that_extends_another_is_dumped_whole(load, tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(RAW | {"protocol": "Mine", "data": "./data"}))
    loaded = load({"extends": "base.yaml", "seed": 4}, "name=other")
    assert (loaded.name, loaded.seed, loaded.protocol) == ("other", 4, "Mine")
    assert [dataset.name for dataset in loaded.datasets] == ["train", "test", "cifar-10"]
    path = tmp_path / "elsewhere" / "config.yaml"
    path.parent.mkdir()
    path.write_text(loading.dump(loaded), encoding="utf-8")
    assert loading.load(str(path)) == loaded


def test_a_config_cannot_be_changed(load):
    with pytest.raises(ValueError, match="frozen"):
        load().seed = 3


def test_paths_are_relative_to_the_file_and_the_workspace_to_the_current_folder(load, tmp_path, monkeypatch):
    current = tmp_path / "current"
    current.mkdir()
    monkeypatch.chdir(current)
    raw = key(RAW, "model", {"source": "factory", "name": "./nets/a.py:build", "weights": "w.pt"})
    raw["datasets"] = [
        {"name": "a", "role": "id", "format": "idx", "path": "../a.idx", "labels": "b.idx"},
        {"name": "b", "role": "id", "format": "npz", "path": "/data/b.npz", "images": "x", "labels": "y"},
        {"name": "c", "role": "id", "format": "python", "path": "./c.py:images"},
        {"name": "d", "role": "id", "format": "python", "path": "package.c:images"},
        {"name": "e", "role": "id", "format": "npz", "path": "package://pipeline.quickstart/images.npz"},
        {"name": "f", "role": "id", "format": "imagefolder", "path": "s3://b/f", "labels": "imagenet1k"},
        {"name": "g", "role": "id", "format": "imagefolder", "path": "g", "labels": "g.yaml"},
        {"name": "h", "role": "id", "format": "parquet", "path": "h/*.parquet", "labels": "label.json"},
    ]
    loaded = load(raw)
    assert loaded.workspace == str(current / "workspace")
    assert loaded.model.name == f"{tmp_path}/nets/a.py:build"
    assert loaded.model.weights == f"{tmp_path}/w.pt"
    assert [(dataset.path, dataset.labels) for dataset in loaded.datasets] == [
        (f"{tmp_path.parent}/a.idx", f"{tmp_path}/b.idx"),
        ("/data/b.npz", "y"),
        (f"{tmp_path}/c.py:images", None),
        ("package.c:images", None),
        ("package://pipeline.quickstart/images.npz", None),
        ("s3://b/f", "imagenet1k"),
        (f"{tmp_path}/g", f"{tmp_path}/g.yaml"),
        (f"{tmp_path}/h/*.parquet", "label.json"),
    ]


def test_the_root_of_a_list_is_relative_to_the_file(load, tmp_path):
    dataset = {"name": "a", "role": "id", "format": "imagelist", "path": "a.txt", "root": "images"}
    assert load(key(RAW, "datasets", [dataset])).datasets[0].root == f"{tmp_path}/images"
    dataset["root"] = "s3://bucket/images"
    assert load(key(RAW, "datasets", [dataset])).datasets[0].root == "s3://bucket/images"


def test_what_is_no_file_name_stays_as_it_is(load):
    loaded = load(key(key(RAW, "model.weights", "random"), "model.name", "package.module:build"))
    assert (loaded.model.weights, loaded.model.name) == ("random", "package.module:build")


@pytest.mark.parametrize(
    ("given", "weights", "name"),
    [
        ({"source": "torchvision", "name": "a", "weights": "IMAGENET1K_V1"}, "IMAGENET1K_V1", "a"),
        ({"source": "timm", "name": "a.b_c", "weights": "w/a.pt"}, "{}/w/a.pt", "a.b_c"),
        ({"source": "timm", "name": "a", "weights": "./w"}, "{}/w", "a"),
        ({"source": "exported", "name": "a.pt2"}, None, "{}/a.pt2"),
        ({"source": "exported", "name": "package://p/a.pt2"}, None, "package://p/a.pt2"),
    ],
)
def test_weights_and_programs_are_files_beside_the_config_and_names_stay(
    load, tmp_path, given, weights, name
):
    loaded = load(key(RAW, "model", given)).model
    assert loaded.weights == (weights and weights.format(tmp_path))
    assert loaded.name == name.format(tmp_path)


@pytest.mark.parametrize("path", ["package://no_such_package/a", "package://", "package://pipeline.errors/a"])
def test_data_in_a_package_that_is_not_there_is_refused(path):
    with pytest.raises(UserError, match="no package named"):
        loading.resolve(path)


def test_steps_come_before_a_score_and_survive_a_dump(load):
    entry = {"clipped": {"method": "msp", "temperature": 2, "steps": [{"react": {"p": 80}}, "dice"]}}
    found = load(key(RAW, "detectors.0", entry))
    built = found.built()["clipped"]
    assert built == combined(Msp(temperature=2), [React(p=80), Dice()])
    assert found.detectors[0].methods == "react + dice + msp"
    assert load(yaml.safe_load(loading.dump(found))) == found
    assert load(key(RAW, "detectors.0", {"energy": {"steps": ["ash"]}})).built()["energy"].caption


@pytest.mark.parametrize(
    ("score", "steps", "expected"),
    [
        ("msp", ["knn"], "detectors.a.steps: knn is no step"),
        ("knn", ["react"], "detectors.a.steps: knn cannot follow steps"),
        ("msp", [{"react": {"q": 9}}], "detectors.a.steps.react.q: unknown key 'q'"),
        ("msp", [{"react": {"p": 101}}], "detectors.a.steps.react.p: Input should be less than"),
        ("msp", ["raect"], "detectors.a.steps.raect: unknown detector 'raect'. Did you mean 'react'?"),
    ],
)
def test_steps_that_do_not_fit_are_refused(refusal, score, steps, expected):
    assert expected in refusal(key(RAW, "detectors.0", {"a": {"method": score, "steps": steps}}))


def test_all_detectors_run_with_their_defaults(load):
    built = load(key(RAW, "detectors", "all")).built()
    assert built == {name: detectors.get(name)() for name in detectors.names()}
    assert len(built) >= 9


def test_of_all_detectors_each_may_be_left_out_also_after_a_dump_but_named_ones_may_not(load):
    every = load(RAW, "detectors=all")
    assert load(yaml.safe_load(loading.dump(every))) == every
    assert every.optional == set(detectors.names())
    assert load().optional == set()


def test_a_detector_with_a_grid_may_not_be_left_out(load):
    loaded = load(RAW | {"tune": {"grids": {"knn": {"k": [1, 2]}}}}, "detectors=all")
    assert [entry.optional for entry in loaded.points()["knn"].values()] == [False, False]


def test_one_method_may_run_under_several_labels(load):
    entries = [{"near": {"method": "knn", "k": 1}}, {"far": {"method": "knn", "k": 50}}, "knn"]
    built = load(key(RAW, "detectors", entries)).built()
    assert [(label, type(detector), detector.k) for label, detector in built.items()] == [
        ("near", detectors.get("knn"), 1),
        ("far", detectors.get("knn"), 50),
        ("knn", detectors.get("knn"), detectors.get("knn")().k),
    ]


def test_the_mark_of_a_tuned_detector_is_no_parameter_and_survives_a_dump(load):
    entries = ["msp", {"knn": {"k": 5, "tuned_on_ood": True}}]
    loaded = load(key(RAW, "detectors", entries))
    again = load(yaml.safe_load(loading.dump(loaded)))
    for found in (loaded, again):
        assert [entry.tuned_on_ood for entry in found.detectors] == [False, True]
        assert found.detectors[1].parameters == {"k": 5}


def test_the_points_of_the_grids_keep_the_other_parameters(load):
    raw = RAW | {
        "detectors": [{"mine": {"method": "grood", "samples": 64}}],
        "tune": {"grids": {"mine": {"k": [1, 2]}}},
    }
    points = load(raw).points()["mine"]
    assert {name: entry.parameters for name, entry in points.items()} == {
        "mine[k=1]": {"samples": 64, "k": 1},
        "mine[k=2]": {"samples": 64, "k": 2},
    }


def test_an_unknown_metric_to_tune_by_is_refused(load):
    with pytest.raises(UserError, match=r"tune\.metric: unknown metric 'aurok'. Did you mean 'auroc'"):
        load(RAW, "tune.metric=aurok")
    with pytest.raises(UserError, match="unknown metric 'oscr'"):
        load(RAW, "tune.metric=oscr")  # images to tune by need no labels
    with pytest.raises(UserError, match=r"unknown metric 'fpr0\.95_id'\. Did you mean 'fpr95_id'"):
        load(RAW, "tune.metric=fpr0.95_id")
    assert load(RAW, "tune.metric=fpr99.5_id").tune.metric == "fpr99.5_id"
    for level in (95, 0.0095, 0.99999):
        with pytest.raises(UserError, match=r"metrics\.fpr_level"):
            load(RAW, f"metrics.fpr_level={level}")


def test_datasets_of_a_role_come_in_config_order(load):
    loaded = load(key(RAW, "datasets.2.role", "id"))
    assert [dataset.name for dataset in loaded.of_role("id", "train")] == ["train", "test", "cifar-10"]
    assert loaded.of_role("ood_val") == []


def test_a_digest_depends_on_content_and_not_on_the_order_of_keys():
    assert artifacts.digest({"a": 1, "b": [2]}) == artifacts.digest({"b": [2], "a": 1})
    assert artifacts.digest({"a": 1}) != artifacts.digest({"a": 2})
