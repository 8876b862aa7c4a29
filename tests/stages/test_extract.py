"""Extraction: one shard, its errors, its numerics, and the bookkeeping of a dataset."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

import pipeline.cluster.on_ray as cluster
from pipeline.cluster import attempts
from pipeline.columns import BLOCK_NORM, FEATURE, LOGITS
from pipeline.config import schema
from pipeline.data import manifest
from pipeline.detectors.base import ParameterGradient, Perturbed, Pooled, RankReduced
from pipeline.errors import UserError
from pipeline.network import extras
from pipeline.network.classifier import Classifier
from pipeline.network.classifier import load as load_classifier
from pipeline.network.known import settings_kept
from pipeline.stages import decoding, extract, identity, shards
from pipeline.stages.progress import Silent
from pipeline.workspace import artifacts, files, tables
from tests.full import each_line


@pytest.fixture
def classifier(settings, load) -> Classifier:
    return load_classifier(load(settings).model, 0)


@pytest.fixture
def job(settings, classifier, tmp_path: Path) -> shards.Job:
    dataset = schema.Dataset(**settings["datasets"][1])
    listed = manifest.compile_manifest(dataset, tmp_path / "manifests")
    parts = identity.identity(classifier, listed, schema.Extract())
    return shards.job(dataset, listed, parts, tmp_path, classifier.probe)


@pytest.fixture
def plan(settings, load, classifier) -> shards.Plan:
    chosen = schema.Extract(batch_size=64, shard_rows=90)
    model = load(settings).model
    return shards.Plan(model, chosen, 0, classifier.digest, classifier.transform, classifier.probe)


def rows_of(
    job: shards.Job, start: int, stop: int, plan: shards.Plan, size: int
) -> Iterator[decoding.Decoded]:
    return decoding.decode_rows(job.manifest.read(start, stop), plan).batches(size)


def write_all(job: shards.Job, plan: shards.Plan) -> None:
    extractor = extract.Extractor(plan, 1)
    for shard in shards.missing(job, plan):
        extractor(asdict(shard))()


def test_features_are_those_of_a_plain_forward_pass(job, plan, classifier, images) -> None:
    write_all(job, plan)
    shards.finish(job, plan)
    table = tables.Table.open(Path(job.folder))
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
    whole, _, _ = extract.extract_rows(classifier, rows_of(job, 0, 300, plan, 64), plan.settings)
    parts = [
        extract.extract_rows(classifier, rows_of(job, start, min(start + 37, 300), plan, 64), plan.settings)[
            0
        ]
        for start in range(0, 300, 37)
    ]
    offset = 0
    for part in parts:
        assert part.equals(whole.slice(offset, len(part)).combine_chunks())
        offset += len(part)


def test_rows_whose_output_is_not_finite_become_errors(job, classifier, plan) -> None:
    with torch.no_grad():
        classifier.module.fc.weight[3] = float("nan")
    features, errors, forwarded = extract.extract_rows(
        classifier, rows_of(job, 0, 20, plan, 64), plan.settings
    )
    assert len(features) == 0
    assert len(errors) == 20
    assert forwarded == 20
    assert errors[0][1] == "the network's output is not finite"


def test_rows_whose_feature_is_too_large_for_float16_become_errors_that_say_so(
    job, classifier, plan, monkeypatch
) -> None:
    whole = Classifier.begin

    def large(self: Classifier, pixels: NDArray[np.uint8], size: int) -> Any:
        output = whole(self, pixels, size)()
        output[FEATURE][3, 0] = 7e4
        return lambda: output

    monkeypatch.setattr(Classifier, "begin", large)
    for kind, expected in ("float32", []), ("float16", [["test_x/00000003", "a feature is too large for"]]):
        settings = plan.settings.model_copy(update={"feature_dtype": kind})
        found, errors, _ = extract.extract_rows(classifier, rows_of(job, 0, 20, plan, 64), settings)
        assert [[key, text.partition(" extract.")[0]] for key, text in errors] == expected
        assert len(found) == 20 - len(errors)


def test_of_several_accepted_labels_the_predicted_one_counts_else_the_first(job, classifier, plan) -> None:
    def extracted(rows: pa.Table) -> pa.Table:
        return extract.extract_rows(classifier, [decoding.decode_rows(rows, plan)], plan.settings)[0]

    rows = job.manifest.read(0, 20)
    plain = extracted(rows)
    prediction = plain["prediction"].to_pylist()
    others = [[(found + 1) % 10, (found + 2) % 10] for found in prediction]
    right, wrong, single = slice(0, 8), slice(8, 16), slice(16, 20)
    accepted = [*([*others[row], prediction[row]] for row in range(8)), *others[wrong], *[None] * 4]
    label = [found[0] for found in others]
    for name, values in (("accepted", accepted), ("label", label)):
        field = rows.schema.field(name)
        rows = rows.set_column(rows.schema.get_field_index(name), field, pa.array(values, field.type))
    found = extracted(rows)
    assert found["label"].to_pylist() == [*prediction[right], *label[wrong], *label[single]]
    assert found.drop_columns("label").equals(plain.drop_columns("label"))


def test_a_batch_that_kills_its_process_again_and_again_is_named(job, plan, monkeypatch) -> None:
    """Death is an interrupt here, in a process that stands in for a lost one; tests/cluster has real ones."""
    monkeypatch.setattr(attempts, "_replaces", ContextVar("replaces", default=True))
    begin, seen = Classifier.begin, []

    def dying(self: Classifier, *arguments: Any) -> Any:
        seen.append(arguments)
        if len(seen) % 2 == 0:
            raise KeyboardInterrupt
        return begin(self, *arguments)

    monkeypatch.setattr(Classifier, "begin", dying)
    shard = asdict(shards.cut(job, 90)[1])
    for _ in range(attempts.LIMIT):
        with pytest.raises(KeyboardInterrupt):
            extract.Extractor(plan, 1)(shard)
    message = (
        r"extracting: the process died .*, the last time at 26 images: \S*154, \S*155, \S*156, \.\.\.\. Look"
    )
    with pytest.raises(UserError, match=message):
        extract.Extractor(plan, 1)(shard)
    assert [file.name for file in Path(job.folder).iterdir()] == [
        ".attempts-extracting-part-00001.parquet.json"
    ]


@pytest.mark.parametrize("lost", [False, True])
def test_a_part_may_wait_for_the_next_shard_but_not_where_a_process_was_lost(job, plan, lost) -> None:
    """What ends that process again is then known to be this shard."""
    shard = shards.cut(job, 90)[1]
    with attempts.replacing(lost):
        finish = extract.Extractor(plan, 1)(asdict(shard))
    assert Path(shard.part).is_file() == lost
    assert (finish()["rows"], finish()["forwarded"]) == (90, 90)
    assert list(job.artifact.done()) == [Path(shard.part).name]


def test_a_dataset_is_complete_only_when_every_row_is_accounted_for(job, plan) -> None:
    write_all(job, plan)
    assert not job.complete
    shards.finish(job, plan)
    assert job.complete
    record = job.record()
    assert (record.facts["rows"], record.facts["features"], record.facts["errors"]) == (300, 300, 0)
    assert job.table().part_rows == (90, 90, 90, 30)
    assert record.identity["weights"] == plan.digest
    assert record.facts["machines"] == {extract.machine(plan.settings): 4}


def test_a_worker_looks_once_what_it_computes_on(job, plan, monkeypatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(extract, "version", lambda name: asked.append(name) or "1")
    worker = extract.Extractor(plan, 1)
    for shard in shards.cut(job, 90):
        worker(asdict(shard))()
    assert asked == ["torch", "pillow"]


def test_a_part_that_lost_rows_is_never_marked_complete(job, plan) -> None:
    write_all(job, plan)
    part = Path(shards.cut(job, 90)[1].part)
    facts = {**job.artifact.done()[part.name].facts, "rows": 89}
    artifacts.write_part(part, tables.written(pq.read_table(part).slice(1)), **facts)
    with pytest.raises(RuntimeError, match="do not add up"):
        shards.finish(job, plan)
    assert not job.complete


def test_only_missing_shards_are_done_again(job, plan) -> None:
    write_all(job, plan)
    Path(shards.cut(job, 90)[2].part).unlink()
    assert [shard.start for shard in shards.missing(job, plan)] == [180]


def test_parts_cut_to_another_size_are_not_mixed(job, plan) -> None:
    write_all(job, plan)
    assert len(shards.missing(job, variant(plan, shard_rows=50))) == 6
    assert not list(Path(job.folder).glob("part-*.parquet"))


def test_a_worker_refuses_weights_the_driver_did_not_see(plan) -> None:
    changed = replace(plan, digest="0" * 64)
    with pytest.raises(UserError, match="is not what the driver loaded"):
        extract.load_in_worker(changed, 1)


def test_cuda_is_used_only_if_the_config_says_so() -> None:
    assert identity.device("auto", 0) == "cpu"
    assert identity.device("auto", 0.5) == "cuda"
    assert identity.device("cpu", 1) == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_a_clear_error(plan) -> None:
    settings = plan.settings.model_copy(update={"gpus_per_actor": 1.0})
    with pytest.raises(UserError, match=r"extract\.device: cuda is not available"):
        extract.load_in_worker(replace(plan, settings=settings), 1)


def test_a_worker_sets_what_the_bits_of_a_gpu_depend_on(plan, monkeypatch) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    for where, name, value in ((matmul, "allow_tf32", True), (cudnn, "allow_tf32", True)):
        monkeypatch.setattr(where, name, value)
    monkeypatch.setattr(cudnn, "benchmark", True)
    monkeypatch.setattr(cudnn, "deterministic", False)
    with settings_kept():
        extract.load_in_worker(plan, 1)
        assert not (matmul.allow_tf32 or cudnn.allow_tf32 or cudnn.benchmark)
        assert cudnn.deterministic
    assert matmul.allow_tf32 and cudnn.allow_tf32 and cudnn.benchmark
    assert not cudnn.deterministic


class Ahead:
    """A classifier that extraction takes for one on a GPU, and what was asked of it in which order."""

    device = "cuda"

    def __init__(self, classifier: Classifier) -> None:
        self.classifier, self.asked = classifier, list[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.classifier, name)

    def begin(self, pixels: NDArray[np.uint8], size: int) -> Any:
        number = sum(one.startswith("begin") for one in self.asked)
        self.asked.append(f"begin {number}")
        output = self.classifier.begin(pixels, size)()
        output[LOGITS] = output[LOGITS].copy()
        output[LOGITS][number] = np.nan

        def fetch() -> dict[str, NDArray[np.float32]]:
            self.asked.append(f"fetch {number}")
            return output

        return fetch


def test_a_gpu_has_the_next_batch_before_results_are_looked_at_and_they_are_the_same(
    job, plan, classifier, tmp_path, monkeypatch
) -> None:
    """Also where a batch has no image, others have fewer, and rows are not finite."""
    some = unreadable(job, tmp_path, 0, 3, 89, *range(128, 192))
    tables_of, order, noted = [], [], list[Any]()
    monkeypatch.setattr(attempts.Attempt, "at", lambda _, keys: noted.append(keys))
    for device in ("cpu", "cuda"):
        found = Ahead(classifier)
        found.device = device
        others = extract.Others(found, [MOVED, POOLED])
        batches = extract.Extractor(plan, 1)._decode(shards.cut(some, 300)[0])
        noted.clear()
        features, errors, forwarded = extract.extract_rows(found, batches, plan.settings, others=others)
        keys = features["key"].to_pylist()
        tables_of.append([features, errors, forwarded, others.digests, *dict(others.columns(keys)).values()])
        order.append((found.asked, [len(keys) for keys in noted]))
    one, other = tables_of
    assert len(one[1]) == 67 + 4
    assert all(first == second for first, second in zip(one, other, strict=True))
    pairs = [(f"begin {number}", f"fetch {number}") for number in range(4)]
    assert order[0] == ([each for pair in pairs for each in pair], [62, 63, 64, 44])
    begun, fetched = zip(*pairs, strict=True)
    assert order[1][0] == [begun[0], begun[1], fetched[0], fetched[1], begun[2], begun[3], *fetched[2:]]
    assert order[1][1] == [62, 62 + 63, 64, 64 + 44], "what a GPU is at when its process ends"


def short_of_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which "
        "7.50 GiB is free. Including non-PyTorch memory, this process has 0.50 GiB memory in use."
    )


SHORT = (
    r"^extract\.(batch_size: 64|extras_batch_size: 24) images do not fit into the memory of the GPU "
    r"\(CUDA out of memory\. Tried to allocate 9\.00 GiB\. GPU 0 has a total capacity of "
    r"8\.00 GiB of which 7\.50 GiB is free\)\. Lower it; "
)


@pytest.mark.parametrize("decode", ["fused", "separate"])
def test_a_batch_that_does_not_fit_into_the_gpu_names_the_key_to_lower(
    engine, job, plan, monkeypatch, decode
) -> None:
    monkeypatch.setattr(Classifier, "_trace", short_of_memory)
    with pytest.raises(UserError, match=SHORT):
        extract.run(engine, [job], variant(plan, decode=decode))
    assert not list(Path(job.folder).glob("part-*"))


def test_a_shard_that_does_not_fit_into_the_gpu_says_so_wherever_it_asks_for_room(job, plan) -> None:
    specs = MOVED, POOLED, RankReduced(block="early"), ParameterGradient(layers=("layer4", "fc"))
    changes = {"batch_size": 4, "extras_batch_size": 2, "shard_rows": 4, "channels_last": True}
    job, plan = with_extras(job, variant(plan, **changes), *specs)
    extractor, shard = extract.Extractor(plan, 1), asdict(shards.missing(job, plan)[0])
    assert extractor.classifier
    message = r"^extract\.(batch_size: 4|extras_batch_size: 2) images do not fit into the memory of the GPU"
    lines = each_line(lambda: extractor(shard)(), message)
    assert {Path(file).name for file, _ in lines} >= {"classifier.py", "extras.py", "gradients.py", "taps.py"}


def test_a_copy_of_a_network_for_another_worker_that_does_not_fit_says_so(
    plan, classifier, monkeypatch
) -> None:
    monkeypatch.setattr(extract, "load", lambda *_: classifier)
    monkeypatch.setattr(extract, "deepcopy", short_of_memory)
    with settings_kept():
        assert extract.load_in_worker(plan, 1).module is classifier.module
        with pytest.raises(UserError, match=r"^model: the network does not fit into the memory of the GPU"):
            extract.load_in_worker(plan, 1)


def test_gradients_that_do_not_fit_into_the_gpu_name_the_key_to_lower(job, plan, monkeypatch) -> None:
    monkeypatch.setattr(extras.gradients, "per_image", short_of_memory)
    job, plan = with_extras(job, variant(plan, extras_batch_size=24), ParameterGradient(layers=("fc",)))
    with pytest.raises(UserError, match=SHORT):
        extract.Extractor(plan, 1)(asdict(shards.missing(job, plan)[0]))


def variant(plan: shards.Plan, **changes: object) -> shards.Plan:
    return replace(plan, settings=plan.settings.model_copy(update=changes))


def extracted(job: shards.Job, plan: shards.Plan, rows: int = 70) -> dict[str, NDArray[Any]]:
    classifier = extract.load_in_worker(plan, 1, compiled=plan.settings.compile)
    size = plan.settings.batch_size
    features, errors, _ = extract.extract_rows(classifier, rows_of(job, 0, rows, plan, size), plan.settings)
    assert not errors
    return tables.numpy_columns(features, features.column_names)


def unreadable(job: shards.Job, folder: Path, *lost: int) -> shards.Job:
    """The same dataset, but that some images cannot be read."""
    rows = job.manifest.read(0, 300).to_pylist()
    for row in lost:
        rows[row]["bytes"] = b"short"
    path = folder / "manifest.parquet"
    pq.write_table(pa.Table.from_pylist(rows, manifest.SCHEMA), path, row_group_size=tables.ROW_GROUP)
    return replace(job, manifest=replace(job.manifest, path=str(path)))


def test_decoding_in_a_stage_of_its_own_changes_no_bit(engine, job, plan, tmp_path) -> None:
    """Also where some images cannot be read, so that batches are cut differently."""
    fused, separate = (variant(plan, decode=mode, actors=1) for mode in ("fused", "separate"))
    found = []
    for chosen in (fused, separate):
        some = unreadable(job, tmp_path, 0, 3, 89, 200)
        todo = replace(some, artifact=replace(job.artifact, folder=tmp_path / chosen.settings.decode))
        todo, chosen = with_extras(todo, variant(chosen, max_bad_fraction=1.0), MOVED, POOLED)
        numbers = extract.run(engine, [todo], chosen)
        assert numbers["forward_images"] == 296
        assert numbers["perturbed_passes"] == 3 * 296
        assert "pooled_passes" not in numbers
        folders = [Path(todo.folder) / column for column in ("", MOVED.column, POOLED.column)]
        parts = [folder / tables.part_name(number) for folder in folders for number in range(4)]
        errors = pq.read_table(Path(todo.folder) / "errors.parquet")
        found.append(([pq.read_table(part) for part in parts], errors))
    assert found[0][1].num_rows == 4
    assert found[0][1].equals(found[1][1])
    assert all(one.equals(other) for one, other in zip(found[0][0], found[1][0], strict=True))


class Counted(Silent):
    """A stage that keeps what it is told."""

    def __init__(self) -> None:
        self.totals, self.told = list[tuple[int, int]](), list[int]()

    def count(self, what: str, total: int, there: int = 0) -> None:
        self.totals.append((total, there))

    def advance(self, count: int) -> None:
        self.told.append(count)


@pytest.mark.parametrize("mode", ["fused", "separate"])
def test_progress_moves_by_batches_and_ends_at_the_total(engine, job, plan, tmp_path, mode) -> None:
    """Also where images cannot be read, a part was there, and columns are made for features that are."""
    plan = variant(plan, max_bad_fraction=1.0, shard_rows=300, decode=mode)
    job = unreadable(elsewhere(job, mode), tmp_path, 0, 3, 89, 200)
    first, second, third = Counted(), Counted(), Counted()
    extract.run(engine, [job], plan, first)
    assert (first.totals, sum(first.told)) == ([(300, 0)], 300)
    assert len(first.told) == 5 and max(first.told) <= 64 + 4
    finer, parts = variant(plan, shard_rows=90), replace(job, artifact=elsewhere(job, "parts").artifact)
    extract.run(engine, [parts], finer)
    (Path(parts.folder) / tables.part_name(1)).unlink()
    (Path(parts.folder) / artifacts.RECORD).unlink()
    extract.run(engine, [parts], finer, second)
    assert (second.totals, sum(second.told), len(second.told)) == ([(90, 210)], 90, 2)
    later, asked = with_extras(parts, finer, POOLED)
    extract.run(engine, [later], asked, third)
    assert (third.totals, sum(third.told)) == ([(300, 0)], 300)
    assert len(third.told) > 4


def test_only_batches_of_their_own_give_extra_columns_and_features_another_identity(
    job, plan, classifier
) -> None:
    def parts(size: object) -> dict[str, Any]:
        chosen = variant(plan, extras_batch_size=size).settings
        return identity.identity(classifier, job.manifest, chosen)

    assert parts("auto") == parts(64) == parts(65)
    assert "extras_batch_size" not in parts("auto")["numerics"]
    assert parts(63)["numerics"]["extras_batch_size"] == 63


def test_decoding_is_separate_where_actors_have_gpus(plan) -> None:
    assert not plan.separate
    assert variant(plan, gpus_per_actor=0.5).separate
    assert not variant(plan, gpus_per_actor=1.0, decode="fused").separate
    assert variant(plan, decode="separate").separate


@pytest.mark.parametrize(("side", "batch", "rows"), [(28, 64, 2048), (224, 256, 768), (224, 5000, 5000)])
def test_automatic_shards_hold_whole_batches_and_bounded_pixels(plan, side, batch, rows) -> None:
    transform = plan.transform.model_copy(update={"crop": side, "channels": 3 if side == 224 else 1})
    chosen = replace(variant(plan, shard_rows="auto", batch_size=batch), transform=transform)
    assert chosen.shard_rows == rows


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"channels_last": True}, 1e-4),
        ({"feature_dtype": "float16"}, 1e-3),
        ({"precision": "bf16"}, 0.06),
        ({"precision": "fp16"}, 0.01),
    ],
)
def test_other_numerics_stay_close_and_have_a_cache_of_their_own(
    job, plan, classifier, changes, tolerance
) -> None:
    reference, other = extracted(job, plan), extracted(job, variant(plan, **changes))
    for name in (FEATURE, LOGITS, BLOCK_NORM):
        scale = np.abs(reference[name]).max()
        np.testing.assert_allclose(other[name], reference[name], atol=tolerance * scale)
        assert other[name].dtype == np.float32
    identities = [
        identity.identity(classifier, job.manifest, chosen.settings)
        for chosen in (plan, variant(plan, **changes))
    ]
    assert identities[0] != identities[1]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_logits_are_of_full_precision_whatever_the_body_is(job, plan, classifier, precision) -> None:
    found = extracted(job, variant(plan, precision=precision))
    weight, bias = classifier.head
    rebuilt = found[FEATURE].astype(np.float64) @ weight.T.astype(np.float64) + bias
    np.testing.assert_allclose(found[LOGITS], rebuilt, rtol=1e-5, atol=1e-5)
    assert len(np.unique(found[LOGITS])) > 0.99 * found[LOGITS].size  # half precision has many ties


@pytest.fixture
def graphs(monkeypatch) -> list[torch.fx.GraphModule]:
    """What is compiled, by the tracer alone, without the C++ compiler that the default backend needs."""
    compiler, found = torch.compile, []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda *given, **kept: compiler(*given, backend=backend, **kept))
    return found


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_features(job, plan, graphs) -> None:
    reference, other = extracted(job, plan, 200), extracted(job, variant(plan, compile=True), 200)
    assert len(graphs) == 1
    for name in (FEATURE, LOGITS, BLOCK_NORM):
        np.testing.assert_array_equal(other[name], reference[name])


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_extras_and_is_compiled_once(job, plan, classifier, graphs) -> None:
    specs = [MOVED, POOLED, RankReduced(block="early"), ParameterGradient(layers=("layer4", "fc"))]
    compiled = load_classifier(plan.model, 0).tuned(plan.settings, compiled=True)
    found = []
    for each in (classifier, compiled):
        others = extract.Others(each, specs)
        extract.extract_rows(each, rows_of(job, 0, 150, plan, 64), plan.settings, others=others)
        found.append(others.parts)
    assert len(graphs) == 1
    for spec in specs:
        for one, other in zip(found[0][spec], found[1][spec], strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_layer_that_the_compiler_leaves_alone_is_still_tapped(job, plan, classifier, graphs) -> None:
    other = load_classifier(plan.model, 0)
    other.module.layer3.forward = torch.compiler.disable(other.module.layer3.forward)
    other = other.tuned(plan.settings, compiled=True)
    pixels = next(rows_of(job, 0, 64, plan, 64)).pixels
    found, expected = other.forward(pixels), classifier.forward(pixels)
    assert len(graphs) > 1
    for name in (FEATURE, LOGITS, BLOCK_NORM):
        np.testing.assert_array_equal(found[name], expected[name])


def test_a_decoder_that_is_not_installed_is_refused(job, plan, classifier, monkeypatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(identity, "version", missing)
    settings = plan.settings.model_copy(update={"decoder": "simplejpeg"})
    with pytest.raises(UserError, match=r"extract\.decoder: simplejpeg is not installed"):
        identity.require_decoder(settings.decoder)


def test_what_decodes_asks_for_the_memory_of_the_largest_image_and_its_pixels(on_ray, plan) -> None:
    node = 2 * decoding.memory(plan, plan.settings.batch_size) + 1000
    assert node > 2 * (plan.settings.max_image_bytes + 7 * 100_000_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "nodes", lambda: {"one": {"resources": {"CPU": 8.0, "memory": float(node)}}})
        assert extract.actor_count(on_ray, variant(plan, actors="auto")) == 2
        assert extract.actor_needs(on_ray, variant(plan, actors=2))["memory"] == (node - 1000) / 2
        for actors in (3, 8):
            assert "memory" not in extract.actor_needs(on_ray, variant(plan, actors=actors))
            assert extract.actor_count(on_ray, variant(plan, actors=actors)) == actors
        assert extract.actor_needs(on_ray, variant(plan, decode="separate")) == plan.settings.needs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actors": 3}, "3 asked for, the cluster has room for 2 beside a CPU that decodes"),
        (
            {"cpus_per_actor": 3.0},
            "on one node beside 1 CPU for tasks; the cluster's nodes have 3 CPU and 2 GPU",
        ),
    ],
)
def test_model_actors_leave_a_cpu_to_the_tasks_that_decode(on_ray, plan, changes, message) -> None:
    assert extract.actor_count(on_ray, variant(plan, decode="separate")) == 2
    assert extract.actor_count(on_ray, plan) == 3
    with pytest.raises(UserError, match=message):
        extract.actor_count(on_ray, variant(plan, decode="separate", **changes))


def test_a_stricter_limit_holds_for_features_that_are_there(job, plan) -> None:
    write_all(job, plan)
    bad = Path(shards.cut(job, 90)[1].part)
    with_a_bad_row(bad)
    shards.finish(job, variant(plan, max_bad_fraction=0.01))
    assert job.complete
    shards.require_few_bad(job, variant(plan, max_bad_fraction=0.01))
    with pytest.raises(UserError, match="1 of 300 images are bad, more than"):
        shards.require_few_bad(job, variant(plan, max_bad_fraction=0.001))
    assert job.complete  # for others, whose limit is higher


def with_a_bad_row(part: Path) -> None:
    """The first row of a part of features becomes an error."""
    table = pq.read_table(part)
    keys = table["key"].to_pylist()
    facts = files.read_json(part.with_name(f".{part.name}.json"))["facts"]
    facts |= {"rows": len(keys) - 1, "errors": 1, "keys": shards.digest(keys[1:])}
    errors = {shards.ERRORS: json.dumps([[keys[0], "made up"]])}
    artifacts.write_part(part, tables.written(table.slice(1).replace_schema_metadata(errors)), **facts)
    digests = shards.beside(part, shards.DIGESTS)
    kept = {name: facts[name] for name in ("rows", "keys")}
    artifacts.write_part(digests, tables.written(pq.read_table(digests).slice(1)), **kept)


MOVED, POOLED = Perturbed(objective="logit", step=0.1), Pooled()


def with_extras(job: shards.Job, plan: shards.Plan, *extras: Any) -> tuple[shards.Job, shards.Plan]:
    return replace(job, extras=extras), replace(plan, extras={extra.column: extra for extra in extras})


def elsewhere(job: shards.Job, name: str) -> shards.Job:
    """The same with a folder of its own."""
    return replace(job, artifact=replace(job.artifact, folder=Path(f"{job.folder}-{name}")))


def columns_of(job: shards.Job) -> dict[str, NDArray[Any]]:
    table = job.table()
    return table.read(0, table.rows, ["key", FEATURE, *(extra.column for extra in job.extras)])


@pytest.mark.parametrize("size", ["auto", 24])
def test_extra_columns_are_the_same_with_the_features_and_later(engine, job, plan, tmp_path, size) -> None:
    """Also where some images cannot be read, one of them the first."""
    job = unreadable(job, tmp_path, 0, 3, 89, 200)
    plan = variant(plan, max_bad_fraction=0.1, extras_batch_size=size)
    at_once, asked = with_extras(elsewhere(job, "1"), plan, MOVED, POOLED)
    write_all(at_once, asked)
    shards.finish(at_once, asked)
    for extra in at_once.lacking():
        shards.finish_extra(at_once, extra)
    write_all(job, plan)
    shards.finish(job, plan)
    assert job.complete
    later = replace(job, extras=(MOVED, POOLED))
    assert not later.complete
    parts = [part.read_bytes() for part in sorted(Path(job.folder).glob("*.parquet"))]
    numbers = extract.run(engine, [later], asked)
    assert (numbers["forward_images"], numbers["perturbed_passes"], numbers["pooled_passes"]) == (0, 888, 296)
    assert parts == [part.read_bytes() for part in sorted(Path(job.folder).glob("*.parquet"))]
    assert later.complete and at_once.complete
    one, other = columns_of(at_once), columns_of(later)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    assert one[POOLED.column].shape == (296, 16 + 32 + 64 + 128)
    assert np.abs(one[MOVED.column] - one[FEATURE]).max() > 0.01


def test_an_interrupted_extra_goes_on_where_it_was(job, plan) -> None:
    job, plan = with_extras(job, plan, MOVED)
    write_all(job, plan)
    shards.finish(job, plan)
    folder = Path(job.folder)
    (folder / MOVED.column / tables.part_name(2)).unlink()
    (shard,) = shards.missing(job, plan)
    assert (shard.start, bool(shard.featured), shard.extras) == (180, True, MOVED.column)
    with pytest.raises(RuntimeError, match="not those of the features"):
        shards.finish_extra(job, MOVED)
    assert extract.Extractor(plan, 1)(asdict(shard))()["forwarded"] == 0
    shards.finish_extra(job, MOVED)
    assert job.complete


def test_features_of_other_rows_make_an_extra_be_computed_again(job, plan) -> None:
    job, plan = with_extras(job, plan, MOVED)
    write_all(job, plan)
    shards.finish(job, plan)
    shards.finish_extra(job, MOVED)
    with_a_bad_row(Path(shards.cut(job, 90)[1].part))
    shards.finish(job, variant(plan, max_bad_fraction=0.1))
    assert job.featured and job.lacking() == [MOVED]
    assert [shard.start for shard in shards.missing(job, plan)] == [90]
    with pytest.raises(RuntimeError, match="not those of the features"):
        shards.finish_extra(job, MOVED)
    write_all(job, plan)
    shards.finish_extra(job, MOVED)
    assert job.complete
    assert columns_of(job)[MOVED.column].shape == (299, 128)


def test_an_image_that_is_gone_since_its_features_were_extracted_is_named(job, plan, tmp_path) -> None:
    write_all(job, plan)
    shards.finish(job, plan)
    changed, plan = with_extras(unreadable(job, tmp_path, 95), plan, MOVED)
    shard = shards.missing(changed, plan)[1]
    key = job.manifest.read(95, 96)["key"][0].as_py()
    with pytest.raises(UserError, match=f"^{key}: it was read when its features were extracted"):
        extract.Extractor(plan, 1)(asdict(shard))


def test_rows_without_features_have_no_extras(engine, job, plan, monkeypatch) -> None:
    """An image whose output is not finite is an error, and is left out of every column; the others stay."""
    job, plan = with_extras(job, variant(plan, max_bad_fraction=0.1), MOVED, POOLED)
    expected = elsewhere(job, "whole")
    extract.run(engine, [expected], plan)
    whole = Classifier.begin

    def broken(self: Classifier, pixels: NDArray[np.uint8], size: int) -> Any:
        output = whole(self, pixels, size)()
        output[LOGITS][3] = np.nan
        return lambda: output

    monkeypatch.setattr(Classifier, "begin", broken)
    write_all(job, plan)
    shards.finish(job, plan)
    for extra in job.lacking():
        shards.finish_extra(job, extra)
    found = columns_of(job)
    lost = [start + place for start in range(0, 300, 90) for place in (3, 67) if start + place < 300]
    for name, values in columns_of(expected).items():
        np.testing.assert_array_equal(found[name], np.delete(values, lost, axis=0), err_msg=name)


def test_an_extra_that_is_not_finite_names_the_image(job, plan, monkeypatch) -> None:
    """Before other images are looked at: no detector could score it."""

    def broken(*_: Any) -> NDArray[np.float32]:
        values = np.zeros((64, 128), np.float32)
        values[5, 7] = np.inf
        return values

    monkeypatch.setattr(extract.extras, "measure", broken)
    job, plan = with_extras(job, plan, MOVED)
    with pytest.raises(
        UserError, match=r"^test_x/0.*5: perturbed is not finite. Remove the image, or drop the"
    ):
        extract.Extractor(plan, 1)(asdict(shards.missing(job, plan)[0]))
