"""Extraction without Ray: one shard, its errors, and the bookkeeping of a dataset."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline import config, datasets, extract, model, store
from pipeline.errors import UserError


@pytest.fixture
def classifier(settings, load) -> model.Classifier:
    return model.load(load(settings).model, 0)


@pytest.fixture
def job(settings, classifier, tmp_path: Path) -> extract.Job:
    dataset = config.Dataset(**settings["datasets"][1])
    manifest = datasets.compile_manifest(dataset, tmp_path / "manifests")
    parts = extract.identity(classifier, manifest, config.Extract())
    return extract.job(dataset, manifest, parts, tmp_path)


@pytest.fixture
def plan(settings, load, classifier) -> extract.Plan:
    return extract.Plan(
        load(settings).model, config.Extract(batch_size=64, shard_rows=90), 0, classifier.digest
    )


def write_all(job: extract.Job, plan: extract.Plan) -> None:
    extractor = extract.Extractor(plan)
    for shard in extract.missing(job, plan.settings.shard_rows):
        assert extractor(asdict(shard))["failure"] == ""


def test_features_are_those_of_a_plain_forward_pass(job, plan, classifier, images) -> None:
    write_all(job, plan)
    extract.finish(job, plan.settings)
    table = store.Table.open(Path(job.folder))
    names = ["key", "label", "prediction", "feature", "logits", "block_norm"]
    found = table.read(0, table.rows, names)
    with np.load(images) as arrays:
        batch = (torch.tensor(arrays["test_x"])[:, None].float() / 255 - 0.286) / 0.353
        np.testing.assert_array_equal(found["label"], arrays["test_y"])
    with torch.inference_mode():
        logits = classifier.module(batch).numpy()
    np.testing.assert_allclose(found["logits"], logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found["prediction"], found["logits"].argmax(axis=1))
    weight, bias = classifier.head
    np.testing.assert_allclose(found["feature"] @ weight.T + bias, found["logits"], rtol=1e-4, atol=1e-4)
    assert found["block_norm"].shape == (300, 4)
    assert (found["block_norm"] > 0).all()
    assert len(set(found["key"])) == 300


def test_bits_do_not_depend_on_shards(job, plan, classifier) -> None:
    whole, _, _ = extract.extract_rows(classifier, job.manifest.read(0, 300), 64)
    parts = [
        extract.extract_rows(classifier, job.manifest.read(start, min(start + 37, 300)), 64)[0]
        for start in range(0, 300, 37)
    ]
    offset = 0
    for part in parts:
        assert part.equals(whole.slice(offset, len(part)).combine_chunks())
        offset += len(part)


def test_rows_whose_output_is_not_finite_become_errors(job, classifier) -> None:
    with torch.no_grad():
        classifier.module.fc.weight[3] = float("nan")
    features, errors, forwarded = extract.extract_rows(classifier, job.manifest.read(0, 20), 16)
    assert len(features) == 0
    assert len(errors) == 20
    assert forwarded == 20
    assert errors[0][1] == "the network's output is not finite"


def test_a_dataset_is_complete_only_when_every_row_is_accounted_for(job, plan) -> None:
    write_all(job, plan)
    assert not job.complete
    extract.finish(job, plan.settings)
    assert job.complete
    record = store.read_json(Path(job.folder) / store.MANIFEST)
    assert (record["rows"], record["features"], record["errors"]) == (300, 300, 0)
    assert record["part_rows"] == [90, 90, 90, 30]
    assert record["identity"]["weights"] == plan.digest


def test_a_part_that_lost_rows_is_never_marked_complete(job, plan) -> None:
    write_all(job, plan)
    part = Path(extract.shards(job, 90)[1].part)
    store.write_table(part, pq.read_table(part).slice(1))
    with pytest.raises(RuntimeError, match="do not add up"):
        extract.finish(job, plan.settings)
    assert not job.complete


def test_only_missing_shards_are_done_again(job, plan) -> None:
    write_all(job, plan)
    Path(extract.shards(job, 90)[2].part).unlink()
    assert [shard.start for shard in extract.missing(job, 90)] == [180]


def test_parts_cut_to_another_size_are_not_mixed(job, plan) -> None:
    write_all(job, plan)
    assert len(extract.missing(job, 50)) == 6
    assert not list(Path(job.folder).glob("part-*.parquet"))


def test_a_worker_refuses_weights_the_driver_did_not_see(plan) -> None:
    changed = extract.Plan(plan.model, plan.settings, plan.seed, digest="0" * 64)
    with pytest.raises(UserError, match="is not what the driver loaded"):
        extract.load_in_worker(changed)


def test_cuda_is_used_only_if_the_config_says_so() -> None:
    assert extract.device("auto", 0) == "cpu"
    assert extract.device("auto", 0.5) == "cuda"
    assert extract.device("cpu", 1) == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_a_clear_error(plan) -> None:
    settings = plan.settings.model_copy(update={"gpus_per_actor": 1.0})
    with pytest.raises(UserError, match=r"extract\.device: cuda is not available"):
        extract.load_in_worker(extract.Plan(plan.model, settings, plan.seed, plan.digest))
