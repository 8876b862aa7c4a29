"""The extra passes against slow code written from the papers, on the shipped network and real images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.columns import FEATURE
from pipeline.config import schema
from pipeline.data import decode, manifest
from pipeline.detectors.base import Jigsaw, Mixup, Noise, Perturbed, Pooled, Samples
from pipeline.errors import UserError
from pipeline.network import extras
from pipeline.network.classifier import Classifier
from pipeline.network.classifier import load as load_classifier
from pipeline.stages import passes
from pipeline.stages.shards import Plan
from tests.full import each_line

SAMPLES = 40


@pytest.fixture
def plan(settings, load) -> Plan:
    loaded = load(settings)
    classifier = load_classifier(loaded.model, loaded.seed)
    chosen = schema.Extract(batch_size=16, actors=2)
    return Plan(loaded.model, chosen, 3, classifier.digest, classifier.transform, classifier.probe)


@pytest.fixture
def train(settings, tmp_path) -> manifest.Manifest:
    return manifest.compile_manifest(schema.Dataset(**settings["datasets"][0]), tmp_path / "manifests")


@pytest.fixture
def runner(engine, plan, train) -> passes.Runner:
    return passes.Runner(engine, train, plan, "layer3.0", held_out=[train])


@pytest.fixture
def network(plan) -> torch.nn.Module:
    return load_classifier(plan.model, 0).module


@pytest.fixture
def pixels(images: Path) -> np.ndarray:
    with np.load(images) as arrays:
        return arrays["train_x"]


def normalised(pixels: np.ndarray) -> torch.Tensor:
    return (torch.tensor(pixels)[:, None].float() / 255 - 0.286) / 0.353


def after_layer3(network: torch.nn.Module, maps: torch.Tensor) -> torch.Tensor:
    return network.avgpool(network.layer4(maps)).flatten(1)


def upto_layer3(network: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    stem = network.relu(network.bn1(network.conv1(batch)))
    return network.layer3(network.layer2(network.layer1(stem)))


def test_mixup_is_the_mean_feature_of_images_mixed_with_their_runner_up(
    runner, network, pixels, train
) -> None:
    spec = Mixup(samples=SAMPLES, weight=0.7, class_samples=None)
    result = runner.run(spec)
    labels, total = train.labels(), torch.zeros(128, dtype=torch.float64)
    rows = runner.sample(spec, SAMPLES)
    with torch.inference_mode():
        prototypes = {
            label: upto_layer3(network, normalised(pixels[labels == label])).double().mean(dim=0).float()
            for label in range(10)
        }
        for row in rows.tolist():
            maps = upto_layer3(network, normalised(pixels[row : row + 1]))
            logits = network.fc(after_layer3(network, maps))[0]
            runner_up = int(torch.topk(logits, 2).indices[1])
            mixed = 0.7 * maps + 0.3 * prototypes[runner_up]
            total += after_layer3(network, mixed)[0].double()
    assert int(result["samples"]) == SAMPLES
    np.testing.assert_allclose(result["mean"], (total / SAMPLES).numpy(), rtol=1e-4, atol=1e-6)


def test_tokens_are_mixed_as_maps_are(settings, load, train, pixels) -> None:
    settings["model"] |= {
        "source": "timm",
        "name": "vit_tiny_patch16_224",
        "weights": "random",
        "options": {
            "img_size": 28, "patch_size": 7, "in_chans": 1, "num_classes": 10,
            "depth": 4, "embed_dim": 24, "num_heads": 3,
        },
    }  # fmt: skip
    loaded = load(settings)
    classifier = load_classifier(loaded.model, 3)
    extract = schema.Extract(batch_size=16)
    worker = passes.Worker(
        Plan(loaded.model, extract, 3, classifier.digest, classifier.transform, classifier.probe), 1
    )
    assert classifier.taps.early == "blocks.2"
    network, rows = classifier.module, np.arange(20)

    def upto(batch: torch.Tensor) -> torch.Tensor:
        tokens = network._pos_embed(network.patch_embed(batch))
        return network.blocks[2](network.blocks[1](network.blocks[0](network.norm_pre(tokens))))

    with torch.inference_mode():
        tokens = upto(normalised(pixels[rows]))
        mean = tokens.double().mean(dim=0).float()
        mixed = network.norm(network.blocks[3](0.8 * tokens + 0.2 * mean))
        feature = network.pool(mixed).double().sum(dim=0)
    (found,) = worker.mean_maps(train, [rows], "blocks.2")
    np.testing.assert_allclose(found, mean.numpy(), atol=1e-6)
    group = passes.Group(rows, rows)
    total, count = worker.mixed_sum(train, [group], Mixup(block="blocks.2", weight=0.8))
    assert count == 20
    np.testing.assert_allclose(total, feature.numpy(), rtol=1e-4, atol=1e-4)


def test_mixup_uses_no_more_images_of_a_class_than_asked_for(runner) -> None:
    some = runner.run(Mixup(samples=SAMPLES, class_samples=3))["mean"]
    more = runner.run(Mixup(samples=SAMPLES, class_samples=None))["mean"]
    assert not np.array_equal(some, more)
    np.testing.assert_allclose(some, more, rtol=0.5, atol=0.3)


def test_mean_maps_come_in_full_batches_and_do_not_depend_on_what_stands_beside(
    runner, plan, train, monkeypatch
) -> None:
    forwarded, forward = [], Classifier.forward

    def counted(self: Classifier, pixels: Any, *more: Any) -> Any:
        forwarded.append(len(pixels))
        return forward(self, pixels, *more)

    spec = Mixup(samples=SAMPLES, class_samples=10)
    monkeypatch.setattr(Classifier, "forward", counted)
    together = runner.run(spec)
    assert len(forwarded) <= 3 + 7 + 3 + 1, "16 each: runners-up, 10 images of up to 10 classes, mixed ones"
    monkeypatch.setattr(passes, "MAPS", 1)
    alone = runner.run(spec)
    np.testing.assert_allclose(alone["mean"], together["mean"], rtol=1e-6)
    worker = passes.Worker(plan, 1)
    some = [np.arange(0, 30, 3), np.arange(1, 30, 3)]
    for number, rows in enumerate(some):
        np.testing.assert_array_equal(
            worker.mean_maps(train, some, "layer3")[number], worker.mean_maps(train, [rows], "layer3")[0]
        )


def test_decoders_change_nothing_and_share_the_cpus_where_decoding_is_separate(plan, train) -> None:
    rows = np.arange(0, 60, 2)
    one, three = (passes.Worker(plan, 1, decoders).mean_maps(train, [rows], "layer3") for decoders in (1, 3))
    np.testing.assert_array_equal(one, three)
    found = []
    engine = SimpleNamespace(
        cpus=lambda: 12.0,
        capacity=lambda *_: 4,
        holds=lambda *_: True,
        threads=lambda needs: 1,
        pool=lambda kind, needs, count, plan, threads, decoders: found.append(decoders),
    )
    on_gpus = {"gpus_per_actor": 1, "device": "cpu", "actors": 4}
    for more in ({}, on_gpus, on_gpus | {"actors": 1}):
        chosen = replace(plan, settings=plan.settings.model_copy(update=more))
        passes.Runner(engine, train, chosen, None, [])._pool()
    assert found == [1, 3, 12]


def test_a_class_without_training_images_is_no_runner_up(plan, train, runner) -> None:
    worker, rows = passes.Worker(plan, 1), np.arange(20)
    _, all_of_them = worker.runners_up(train, rows, np.arange(10))
    lacking = all_of_them[0]
    _, others = worker.runners_up(train, rows, np.delete(np.arange(10), lacking))
    assert lacking not in others
    np.testing.assert_array_equal(others[all_of_them != lacking], all_of_them[all_of_them != lacking])


def test_a_call_has_several_batches_and_their_number_changes_no_bit(
    runner, train, moved, monkeypatch
) -> None:
    monkeypatch.setattr(runner, "_count", 2)
    rows = np.arange(200)

    def results() -> dict[str, np.ndarray]:
        calls = [(train, piece, np.arange(10)) for piece in runner.pieces(rows)]
        pairs = zip(*runner.each("runners_up", calls), strict=True)
        found = {f"runners-up {number}": np.concatenate(side) for number, side in enumerate(pairs)}
        for spec in (Jigsaw(samples=SAMPLES), moved):
            found |= {f"{spec} {name}": values for name, values in runner.run(spec).items()}
        return found

    assert [len(piece) for piece in runner.pieces(rows)] == [7 * 16, 5 * 16 + 8]
    together = results()
    monkeypatch.setattr(passes, "BATCHES", 1)
    assert [len(piece) for piece in runner.pieces(rows)] == [16] * 12 + [8]
    for name, values in results().items():
        np.testing.assert_array_equal(values, together[name], err_msg=name)


def slow_norm(maps: torch.Tensor) -> float:
    """FeatureNorm of one image's maps by a loop over channels, in float64."""
    return sum(float(channel.clamp(min=0).double().square().sum().sqrt()) for channel in maps) / len(maps)


def test_jigsaw_gives_the_mean_ratio_and_its_standard_error_for_every_block(runner, network, pixels) -> None:
    spec = Jigsaw(samples=SAMPLES)
    result = runner.run(spec)
    ratios = []
    for row in runner.sample(spec, SAMPLES).tolist():
        pair = decode.jigsaw(pixels[row][:, :, None], 3, np.random.default_rng([3, row]))
        norms = []
        for side in pair:
            with torch.inference_mode():
                maps = network.relu(network.bn1(network.conv1(normalised(side[None, :, :, 0]))))
                found = []
                for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
                    maps = layer(maps)
                    found.append(slow_norm(maps[0]))
            norms.append(found)
        ratios.append(np.divide(norms[0], norms[1]))
    np.testing.assert_allclose(result["ratio"], np.mean(ratios, axis=0), rtol=1e-5)
    expected = np.std(ratios, axis=0, ddof=1) / np.sqrt(SAMPLES)
    np.testing.assert_allclose(result["stderr"], expected, rtol=1e-3)
    assert int(result["samples"]) == SAMPLES


def test_noise_keeps_the_images_the_classifier_is_least_sure_about(runner, plan) -> None:
    spec = Noise(samples=50, keep=0.2)
    result = runner.run(spec)
    worker = passes.Worker(plan, 1)
    pieces = [worker.noise(piece, min(16, 50 - 16 * piece)) for piece in range(4)]
    feature, energy = (np.concatenate(side) for side in zip(*pieces, strict=True))
    assert len(feature) == 50
    lowest = sorted(range(50), key=lambda row: energy[row])[:10]
    assert int(result["samples"]) == 10
    np.testing.assert_allclose(result["mean"], feature[lowest].astype(np.float64).mean(axis=0), rtol=1e-12)


def test_noise_is_blurred_5_pixels_wide_and_7_high(plan) -> None:
    worker, rows, seen = passes.Worker(plan, 1), 16, list[torch.Tensor]()
    worker.classifier.module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    worker.noise(0, rows)
    rng = np.random.default_rng([plan.seed, 0])
    uniform = rng.random((rows, 1, 28, 28), dtype=np.float32)
    for image, sigma, found in zip(uniform, rng.uniform(0.2, 5, rows), seen[0], strict=True):
        rows_of, columns = (np.exp(-0.5 * (np.arange(-n, n + 1) / sigma) ** 2) for n in (3, 2))
        padded = np.pad(image[0], ((3, 3), (2, 2)), mode="reflect")
        expected = np.zeros((28, 28))
        for y, above in enumerate(rows_of / rows_of.sum()):
            for x, beside in enumerate(columns / columns.sum()):
                expected += above * beside * padded[y : y + 28, x : x + 28]
        np.testing.assert_allclose(found[0].numpy(), (expected - 0.286) / 0.353, atol=1e-5)


def test_the_network_is_left_without_hooks(plan, train) -> None:
    worker = passes.Worker(plan, 1)
    worker.mixed_sum(train, [passes.Group(np.arange(4), np.arange(20))], Mixup(block="layer3"))
    for module in worker.classifier.module.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_samples_are_features_of_held_out_images_as_they_are_and_with_an_extra(
    plan, runner, network, pixels, train, settings, tmp_path
) -> None:
    settings["datasets"][1]["limit"] = 30
    held_out = manifest.compile_manifest(schema.Dataset(**settings["datasets"][1]), tmp_path / "manifests")
    runner.held_out = [held_out]
    spec = Samples(extra=Perturbed(objective="logit", step=0.2), samples=20)
    result = runner.run(spec)
    rows = runner.sample(spec, 20, held_out)
    assert (len(rows), int(result["samples"])) == (20, 20)
    stored = held_out.take(rows)["bytes"].to_pylist()
    for number, content in enumerate(stored):
        image = normalised(np.frombuffer(content, np.uint8).reshape(1, 28, 28)).requires_grad_()
        network(image).max().backward()
        moved = (image + 0.2 * image.grad.sign()).detach()
        with torch.inference_mode():
            expected = [network.avgpool(after(network, each)).flatten() for each in (image, moved)]
        for name, feature in zip(("feature", "extra"), expected, strict=True):
            np.testing.assert_allclose(result[name][number], feature, rtol=1e-3, atol=1e-4)


@pytest.fixture
def moved() -> Samples:
    return Samples(extra=Perturbed(objective="logit", step=0.2), samples=20)


def test_features_of_samples_are_as_precise_as_stored_ones(engine, plan, train, runner, moved) -> None:
    """Else a shift would be larger for stored rows than for the samples it is compared with."""
    precise = runner.run(moved)
    half = replace(plan, settings=plan.settings.model_copy(update={"feature_dtype": "float16"}))
    found = passes.Runner(engine, train, half, "layer3.0", held_out=[train]).run(moved)
    np.testing.assert_array_equal(found["feature"], precise["feature"].astype(np.float16))
    np.testing.assert_array_equal(found["extra"], precise["extra"])


def test_samples_that_are_not_finite_are_left_out(runner, moved, monkeypatch) -> None:
    """The second image of every batch has no finite feature, the third no finite extra."""
    whole, forward, measure = runner.run(moved), passes.Worker._forward, extras.measure

    def spoiled(call: Any, row: int) -> Any:
        def spoil(*arguments: Any, **named: Any) -> Any:
            found = call(*arguments, **named)
            (found[FEATURE] if isinstance(found, dict) else found)[row] = np.nan
            return found

        return spoil

    monkeypatch.setattr(passes.Worker, "_forward", spoiled(forward, 1))
    monkeypatch.setattr(extras, "measure", spoiled(measure, 2))
    found = runner.run(moved)
    assert int(found["samples"]) == 16
    for name in ("feature", "extra"):
        np.testing.assert_array_equal(found[name], np.delete(whole[name], [1, 2, 17, 18], axis=0))


def test_samples_of_which_none_can_be_used_are_refused(runner, moved, monkeypatch) -> None:
    monkeypatch.setattr(extras, "measure", lambda _, __, pixels, ___: np.full((len(pixels), 128), np.nan))
    with pytest.raises(UserError, match="none of the sampled ID images can be read and has finite features"):
        runner.run(moved)


def test_samples_are_shared_among_datasets(runner, train) -> None:
    spec = Samples(extra=Perturbed(objective="logit", step=0.2), samples=8)
    alone = runner.run(spec.model_copy(update={"samples": 4}))
    runner.held_out = [train, train]
    both = runner.run(spec)
    assert int(both["samples"]) == 8
    for half in (slice(0, 4), slice(4, 8)):
        np.testing.assert_array_equal(both["extra"][half], alone["extra"])


def after(network: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return network.layer4(upto_layer3(network, batch))


def test_unreadable_training_images_are_left_out(plan, settings, tmp_path) -> None:
    worker = passes.Worker(plan, 1)
    rng = np.random.default_rng(0)
    folder = tmp_path / "class"
    folder.mkdir()
    for number in range(5):
        decode.Image.fromarray(rng.integers(0, 255, (28, 28), dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "2.png").write_bytes(b"broken")
    dataset = schema.Dataset(name="folder", role="train", format="imagefolder", path=str(tmp_path))
    listed = manifest.compile_manifest(dataset, tmp_path / "manifests")
    ratios = worker.norm_ratios(listed, np.arange(5), grid=3)
    assert ratios.shape == (4, 4)
    kept, _ = worker.runners_up(listed, np.arange(5), np.arange(10))
    np.testing.assert_array_equal(kept, [0, 1, 3, 4])


def test_stratified_draws_every_class_in_turns_without_replacement() -> None:
    labels = np.repeat([0, 1, 2], [100, 5, 50]).astype(np.int32)
    rows = passes.stratified(labels, 60, np.random.default_rng(0))
    assert len(set(rows.tolist())) == 60
    assert (np.diff(rows) > 0).all()
    counts = np.bincount(labels[rows])
    assert counts[1] == 5
    assert abs(counts[0] - counts[2]) <= 1
    assert len(passes.stratified(labels, 1000, np.random.default_rng(0))) == 155


def test_a_pass_that_does_not_fit_into_the_gpu_names_the_key_to_lower(plan, train) -> None:
    """Wherever it asks torch for something, also outside the network."""
    worker, rows = passes.Worker(plan, 1), np.arange(20)
    assert worker.classifier
    groups, extra = [passes.Group(rows[:9], rows), passes.Group(rows[9:], rows + 20)], Pooled()
    for work, own in (
        (lambda: worker.norm_ratios(train, rows, 2), 0),
        (lambda: worker.runners_up(train, rows, np.arange(10)), 0),
        (lambda: worker.mixed_sum(train, groups, Mixup(samples=20, block="layer1.0")), 5),
        (lambda: worker.features_and(train, rows, extra), 0),
        (lambda: worker.noise(0, 9), 1),
    ):
        lines = each_line(work, r"^extract\.batch_size: 16 images do not fit into the memory of the GPU")
        assert sum(file == passes.__file__ for file, _ in lines) == own
        assert len(lines) >= 10
