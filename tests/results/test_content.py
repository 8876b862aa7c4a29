from __future__ import annotations

from pipeline.results.mlflow import content


def test_a_detector_without_parameters_has_none() -> None:
    detector = {"method": "maxlogit", "title": "MaxLogit (2022)", "parameters": {}, "uses_ood": False}
    manifest = {"detectors": {"maxlogit": detector}, "model": {"name": "net"}, "index": {}}
    found = content.of_detector("maxlogit", manifest, [], 0.5)
    assert found.params == {}
    assert found.metrics == {"threshold": 0.5}


def test_nested_parameters_are_flat_and_long_ones_cut_with_an_ellipsis() -> None:
    detector = {
        "method": "m",
        "title": "M",
        "parameters": {"a": {"b": [1, 2]}, "c": "x" * 7000},
        "uses_ood": True,
    }
    manifest = {"detectors": {"m": detector}, "model": {"name": "net"}, "index": {}}
    found = content.of_detector("m", manifest, [], 0.5)
    assert found.params == {"a.b": "[1, 2]", "c": "x" * 5999 + "…"}
    assert found.tags["uses_ood"] == "true"


def test_of_many_metrics_the_means_and_the_auroc_of_datasets_come_first() -> None:
    detector = {"method": "m", "title": "M", "parameters": {}, "uses_ood": False}
    manifest = {"detectors": {"m": detector}, "model": {"name": "net"}, "index": {}}
    datasets = {"a": "near_ood", "b": "near_ood", "c": "far_ood"}
    places = [(name, f"{fs}{group}") for fs in ("", "fs_") for name, group in datasets.items()]
    places += [(f"{fs}{group}", f"{fs}{group}") for fs in ("", "fs_") for group in ("near_ood", "far_ood")]
    rows = [
        {"detector": "m", "dataset": dataset, "group": group, "metric": metric, "value": 0.5}
        for dataset, group in places
        for metric in ("auroc", "aupr_in", "fpr95_id", "fpr95_ood", "oscr")
    ]
    found = content.of_detector("m", manifest, rows, 0.5).metrics
    means = [f"{metric}/{group}" for group in ("near_ood", "far_ood") for metric in content._FIRST]
    assert list(found)[: 1 + len(means)] == ["threshold", *means]
    assert {"auroc/a", "auroc/b", "auroc/c"} <= set(found)
    assert len(found) == content.MOST


def test_what_must_be_known_before_the_numbers_is_a_tag_of_the_run() -> None:
    manifest = {
        "fingerprint": "f",
        "git_commit": None,
        "model": {"name": "net", "weights_digest": "d"},
        "warnings": ["a has 3 images.", "knn is worse than guessing."],
        **{key: {} for key in ("datasets", "versions", "not_applicable", "stages", "detectors")},
    }
    found = content.of_run(manifest, {}, [])
    assert found.tags["warnings"] == "a has 3 images.\nknn is worse than guessing."
    assert "warnings" not in content.of_run(manifest | {"warnings": []}, {}, []).tags


def test_the_accuracy_on_shifted_images_leaves_the_name_of_that_on_id_images_alone() -> None:
    manifest = {
        "fingerprint": "f",
        "git_commit": None,
        "model": {"name": "net", "weights_digest": "d"},
        **{key: {} for key in ("datasets", "versions", "not_applicable", "stages", "detectors")},
    }
    row = {"detector": "classifier", "metric": "id_accuracy"}
    rows = [
        {**row, "dataset": "test", "group": "id", "value": 0.9},
        {**row, "dataset": "corrupted", "group": "shifted_id", "value": 0.6},
    ]
    assert content.of_run(manifest, {}, rows).metrics == {"id_accuracy": 0.9, "id_accuracy/corrupted": 0.6}
