"""What `validate` tells about the cost of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.cluster.engine import opened
from pipeline.columns import LOGITS
from pipeline.config import schema
from pipeline.errors import UserError
from pipeline.network.classifier import fitting
from pipeline.stages import estimate, prepare


@pytest.fixture
def ready(settings, load) -> prepare.Prepared:
    settings["detectors"] = ["msp", "knn", {"featurenorm": {"samples": 40}}, {"grood": {"samples": 100}}]
    return prepare.prepare(load(settings))


def test_the_cost_counts_what_is_still_to_do(ready) -> None:
    rows = {name: job.manifest.rows for name, job in ready.jobs.items()}
    cost = estimate.Cost.of(ready)
    assert cost.images == sum(rows.values())
    assert cost.extra == 2 * 40 + 2 * 100 + min(100 * 10, rows["train"])
    assert cost.shards == sum(-(-count // 128) for count in rows.values())
    assert cost.cache_bytes == sum(rows.values()) * 4 * (128 + 10 + 4)
    assert cost.index_bytes == 2 * rows["train"] * 128 * 4


def test_finished_datasets_and_small_features_cost_less(ready, settings, load, execute) -> None:
    settings["detectors"] = ["msp"]
    settings["extract"]["feature_dtype"] = "float16"
    halved = prepare.prepare(load(settings))
    whole = estimate.Cost.of(ready)
    assert estimate.Cost.of(halved).cache_bytes == whole.cache_bytes // (128 + 14) * (64 + 14)
    execute(load(settings), last="extract")
    assert estimate.Cost.of(halved).images == 0


def test_the_probe_measures_some_images_of_every_dataset(engine, ready) -> None:
    found = estimate.probe(engine, ready, [32, 64])
    assert 100 <= found.images < 110
    assert found.errors == []
    assert list(found.forward) == [32, 64]
    assert found.products is not None and found.products.classes > 0
    seconds, actors = estimate.forwarding(engine, ready, found)
    assert actors == 1
    cost = estimate.Cost.of(ready)
    images = cost.images + cost.extra
    assert seconds == pytest.approx(images / found.forward[64] + images / found.decode)


def test_workers_that_take_turns_on_one_core_are_measured_beside_each_other(ready, monkeypatch) -> None:
    beside, most = [], []

    def measure(self: estimate.Prober, tables: object, sizes: list[int]) -> estimate.Probe:
        beside.append(self)
        time.sleep(0.2)
        most.append(len(beside))
        beside.pop()
        return estimate.Probe(100, [], 1000.0, {size: 100.0 * most[-1] for size in sizes})

    monkeypatch.setattr(estimate.Prober, "measure", measure)
    auto = ready.config.extract.model_copy(update={"actors": "auto"})
    many = replace(ready, config=ready.config.model_copy(update={"extract": auto}))
    with opened("inline", threads=3) as engine:
        found = estimate.probe(engine, many, [64])
    assert sorted(most) == [1, 2]
    assert found.forward == {64: 150.0}


def test_looking_for_room_for_the_index_is_no_part_of_the_start_of_a_worker(
    engine, ready, monkeypatch
) -> None:
    monkeypatch.setattr(estimate.index, "require", lambda *_: time.sleep(0.3))
    assert estimate.probe(engine, ready, [64]).opening >= 0.3


def test_the_estimate_covers_starting_fit_and_score(engine, ready, settings, load, execute) -> None:
    products = estimate.Products(classes=0.1, features=0.2, softmax=0.3)
    probe = estimate.Probe(100, [], 1000.0, {64: 100.0}, products=products, opening=1.0, start=2.0)
    found = estimate.times(engine, ready, probe)
    train = ready.jobs["train"].manifest.rows
    scored = sum(job.manifest.rows for job in ready.jobs.values()) - train
    assert found.start == pytest.approx(4 + 1 + 2 * (2.4 + 1.8 + 0.3))
    assert found.forward == estimate.forwarding(engine, ready, probe)[0]
    passes = 10 * 0.3 / 10 / 1024  # of a value
    kept = 5 * 0.2 * 10 / 1024  # class sums and four detectors
    banks = 2 * train * passes * (128 + 10)
    assert found.fit == pytest.approx(train * passes * (128 + 1) + kept + banks)
    row = passes * (3 + 4 + 128 + 10) + (2 * 0.1 + 0.1 * 4 / 128 + 0.3) / 1024
    batches = 1024 * (len(ready.jobs) - 1)
    neighbours = 1.2 * 2 * train * scored * 0.2 / (2 * 128) / 1024
    assert found.score == pytest.approx(batches * row + neighbours)
    assert found.total == found.start + found.forward + found.fit + found.score + found.rest
    settings["detectors"] = ["msp"]
    execute(load(settings), last="extract")
    assert estimate.times(engine, prepare.prepare(load(settings)), probe).start == 4


def test_a_search_on_gpus_is_counted_at_their_rate_and_says_whose_it_is(engine, ready) -> None:
    probe = estimate.Probe(100, [], 1000.0, {64: 100.0}, products=estimate.Products(0.0, 0.2, 0.0))
    assert len(estimate.borrowed(ready)) == 1
    settings = ready.config.index.model_copy(update={"gpus_per_shard": 1})
    on_gpu = replace(ready, config=ready.config.model_copy(update={"index": settings}))
    assert estimate.borrowed(on_gpu)[1] == (
        "search for neighbours: at the rate of an NVIDIA H100 80GB HBM3 (benchmarks/gpu.md)"
    )
    train = ready.jobs["train"].manifest.rows
    scored = sum(job.manifest.rows for job in ready.jobs.values()) - train
    searched = 2 * (2 * 128 * train * scored / 4.6e13 + 4 * 128 * train / 6e8)
    assert estimate.times(engine, on_gpu, probe).score == pytest.approx(searched)
    assert estimate.times(engine, ready, probe).score > 100 * searched


def test_as_many_threads_search_as_the_shards_have(ready) -> None:
    probe = estimate.Probe(100, [], 1000.0, {64: 100.0}, products=estimate.Products(0.0, 0.2, 0.0))

    def score(shards: int | str) -> float:
        index = ready.config.index.model_copy(update={"shards": shards})
        placed = replace(ready, config=ready.config.model_copy(update={"index": index}))
        with opened("inline", threads=64) as wide:
            return estimate.times(wide, placed, probe).score

    assert score(1) == pytest.approx(4 * score(4)) == pytest.approx(16 * score("auto"))
    assert score(99) == pytest.approx(score(1) / 64)


def test_held_out_and_ood_images_are_learned_from(engine, settings, load) -> None:
    probe = estimate.Probe(100, [], 1000.0, {64: 100.0}, products=estimate.Products(0.1, 0.2, 0.3))

    def fit(role: str, detector: Any) -> float:
        more = settings["datasets"][1] | {"name": "more", "role": role}
        chosen = settings | {"datasets": [*settings["datasets"], more], "detectors": [detector]}
        return estimate.times(engine, prepare.prepare(load(chosen)), probe).fit

    mean, ood = ({"grood": {"prototype": name}} for name in ("proto_mean", "ood_val"))
    assert fit("ood_val", ood) > 1.1 * fit("ood_val", mean)
    assert fit("id_val", "tempscale") < 0.9 * fit(
        "id", "tempscale"
    )  # of fewer images than there are to train


def test_scores_of_many_images_take_longer_to_evaluate(engine, ready) -> None:
    probe = estimate.Probe(100, [], 1000.0, {64: 100.0}, products=estimate.Products(0.1, 0.2, 0.3))
    rest = 3 + 4 * (4 * 0.03 + 580 * 2e-6)
    assert estimate.times(engine, ready, probe).rest == pytest.approx(rest)
    with opened("inline", threads=16) as wide:  # each detector is one task
        rest = 3 + 4 * (4 * 0.03 + 580 * 2e-6 / 4)
        assert estimate.times(wide, ready, probe).rest == pytest.approx(rest)


def test_decoding_elsewhere_is_limited_by_the_slower_side(on_ray, ready) -> None:
    given = estimate.Probe(100, [], decode=10.0, forward={64: 1000.0})
    settings = ready.config.extract.model_copy(update={"decode": "separate"})
    apart = replace(ready, config=ready.config.model_copy(update={"extract": settings}))
    seconds, _ = estimate.forwarding(on_ray, apart, given)
    cost = estimate.Cost.of(apart)
    assert seconds == pytest.approx((cost.images + cost.extra) / (2 * 10))


def test_images_that_cannot_be_read_are_named(engine, settings, load, tmp_path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "one.png").write_bytes(b"no image")
    Image.new("L", (28, 28)).save(folder / "two.png")
    settings["datasets"] = [
        settings["datasets"][1],
        {"name": "broken", "role": "far_ood", "format": "imagefolder", "path": str(folder)},
    ]
    settings["detectors"] = ["msp"]
    found = estimate.probe(engine, prepare.prepare(load(settings)), [64])
    assert [key for key, _ in found.errors] == ["one.png"]
    (folder / "two.png").write_bytes(b"no image")
    message = r"^datasets\.broken: none of 2 sampled images can be read; the first is one\.png: .* is 0\.01\."
    with pytest.raises(UserError, match=message):
        estimate.probe(engine, prepare.prepare(load(settings)), [64])
    settings["extract"]["max_bad_fraction"] = 1.0
    assert len(estimate.probe(engine, prepare.prepare(load(settings)), [64]).errors) == 2


def test_nothing_readable_is_an_error(ready) -> None:
    table = ready.jobs["test"].manifest.read(0, 3)
    short = [{**row, "bytes": b"short"} for row in table.to_pylist()]
    tables = {"test": table.from_pylist(short, table.schema)}
    settings = ready.plan.settings.model_copy(update={"max_bad_fraction": 1.0})
    with pytest.raises(UserError, match=r"^none of 3 sampled images can be read; the first is"):
        estimate.Prober(replace(ready.plan, settings=settings), 1).measure(tables, [64])


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_a_batch_that_does_not_fit_ends_the_search(ready, monkeypatch, kind) -> None:
    def forward(self: Any, pixels: Any) -> dict[str, Any]:
        with fitting(len(pixels)):
            if len(pixels) > limit:
                raise kind("out of memory")
        return {LOGITS: np.zeros((len(pixels), 10))}

    monkeypatch.setattr(estimate.extract.Classifier, "forward", forward)
    monkeypatch.setattr(estimate, "_SECONDS", 0.0)
    table = ready.jobs["test"].manifest.read(0, 10)
    limit = 32
    assert list(estimate.Prober(ready.plan, 1).measure({"test": table}, [16, 32, 64, 128]).forward) == [
        16,
        32,
    ]
    limit = 8
    with pytest.raises(UserError, match=r"extract\.batch_size: 16 images do not fit"):
        estimate.Prober(ready.plan, 1).measure({"test": table}, [16])


def test_a_configured_number_of_actors_that_does_not_fit_is_refused(on_ray, ready) -> None:
    plan = replace(ready.plan, settings=schema.Extract(actors=99))
    with pytest.raises(UserError, match=r"extract\.actors: 99 asked for, the cluster has room for 3"):
        estimate.extract.actor_count(on_ray, plan)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inline", "ray"])
def test_the_quickstart_takes_about_as_long_as_estimated(name, tmp_path, capsys) -> None:
    """Within a factor of 1.5 where nothing else runs; of 3 where others do, who come and go meanwhile."""
    others = os.getloadavg()[0]
    command = [str(Path(sys.executable).parent / "ood-pipeline")]
    options = ["quickstart", "--workspace", str(tmp_path), "--engine", name, "-q"]
    told = subprocess.run([*command, "validate", *options, "--json"], capture_output=True, check=True)
    estimated = sum(json.loads(told.stdout)["seconds"].values())
    started = time.perf_counter()
    subprocess.run([*command, "run", *options], capture_output=True, check=True)
    took = time.perf_counter() - started
    with capsys.disabled():
        sys.stdout.write(
            f"\n{name}: estimated {estimated:.1f} s, took {took:.1f} s, beside {others:.1f} others\n"
        )
    factor = 1.5 if others < 0.5 else 3
    assert 1 / factor < took / estimated < factor
