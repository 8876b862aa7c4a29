"""Whole evaluations on a GPU: the results of a CPU up to rounding, and the same bits however they came."""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from pipeline.config import loading
from pipeline.stages import extract
from pipeline.workflows import run
from pipeline.workflows.progress import Quiet
from pipeline.workspace import files
from tests.conftest import everything, small
from tests.workflows.test_run import scores

pytestmark = pytest.mark.gpu

_log = logging.getLogger(__name__)

CLOSE, ROWS = 1e-3, 0.95
"""Scores of so many rows of a dataset differ by no more than so many standard deviations: features do by some
1e-6. Detectors that prune features, move pixels by signs or fit tails may choose otherwise where two values
are equal to rounding, which concerns few rows."""

AUROC = 5e-3
"""A pair of 100 ID and 64 OOD images that changes its order is 1.6e-4; the rows that may change are few."""

REDRAWN, AUROC_REDRAWN = ("gram",), 0.05
"""Detectors that hold out training rows by a hash of their features: with the last bits the sample changes,
as with another seed. Their scores are not compared."""

NEIGHBOURS = 1e-5
"""Relative difference of scores that are distances to neighbours: see `TIE` in test_index."""

DATASETS = ("test", "animals", "textures", "shifted", "val", "production")


@pytest.fixture(scope="module")
def raw(images: Path) -> dict[str, Any]:
    """Every detector, statistic, pass and bank on the shipped network; on a GPU, the index on the CPU."""
    settings = everything(small(images), images)
    settings["extract"] |= {"gpus_per_actor": 1}
    return settings


@pytest.fixture
def changed(raw: dict[str, Any]) -> dict[str, Any]:
    return deepcopy(raw)


def evaluated(raw: dict[str, Any], folder: Path, **options: Any) -> Path:
    """Folder of a run in a workspace of its own."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    settings = loading.load(str(folder / "config.yaml"), [f"workspace={folder / 'workspace'}"])
    chosen = {"engine": "inline", "threads": 1, **options}
    outcome = run.execute(settings, run.Options(last="evaluate", **chosen), Quiet())
    assert isinstance(outcome.folder, Path)
    return outcome.folder


@pytest.fixture(scope="module")
def on_gpu(raw: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluated(raw, tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def on_cpu(raw: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {**raw, "extract": {**raw["extract"], "device": "cpu"}}
    return evaluated(settings, tmp_path_factory.mktemp("cpu"))


def labels(folder: Path) -> list[str]:
    return [name for name in scores(folder, "animals") if name not in ("key", "label", "prediction")]


def test_scores_of_all_detectors_are_those_of_the_cpu(on_cpu: Path, on_gpu: Path) -> None:
    wrong = []
    for dataset in DATASETS:
        expected, found = scores(on_cpu, dataset), scores(on_gpu, dataset)
        assert found["key"].tolist() == expected["key"].tolist()
        for label in set(labels(on_cpu)) - set(REDRAWN):
            spread = max(float(np.std(expected[label])), np.finfo(np.float64).tiny)
            difference = np.abs(found[label] - expected[label]) / spread
            share = float((difference <= CLOSE).mean())
            message = "%s %s: at most %.1e standard deviations, %.1f %% of rows close"
            _log.info(message, dataset, label, difference.max(), 100 * share)
            if not share >= ROWS:
                wrong.append(f"{dataset} {label}: {share:.1%}")
    assert wrong == []


def aurocs(folder: Path) -> dict[tuple[str, str], float]:
    rows = files.read_json(folder / "metrics.json")
    return {(row["detector"], row["dataset"]): row["value"] for row in rows if row["metric"] == "auroc"}


def test_aurocs_are_those_of_the_cpu(on_cpu: Path, on_gpu: Path) -> None:
    expected, found = aurocs(on_cpu), aurocs(on_gpu)
    assert set(found) == set(expected)
    different = {key: found[key] - value for key, value in expected.items()}
    _log.info("the largest difference of an AUROC is %.1e", max(map(abs, different.values())))
    limit = dict.fromkeys(REDRAWN, AUROC_REDRAWN)
    assert [key for key, value in different.items() if not abs(value) <= limit.get(key[0], AUROC)] == []


def same(one: Path, other: Path, but: dict[str, float] | None = None) -> list[str]:
    """Detectors whose scores are not the same bits, or not within the tolerance they have in `but`."""
    wrong = []
    for dataset in DATASETS:
        left, right = scores(one, dataset), scores(other, dataset)
        for label in labels(one):
            limit = (but or {}).get(label, 0.0)
            if not close(left[label], right[label], limit):
                wrong.append(f"{dataset} {label}")
    return wrong


def close(left: NDArray[np.float64], right: NDArray[np.float64], limit: float) -> bool:
    return bool((np.abs(left - right) <= limit * np.abs(left).max()).all())


def test_a_run_that_was_interrupted_goes_on_to_the_same_bits(
    on_gpu: Path, changed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, done = extract.Extractor.__call__, list[dict[str, Any]]()

    def stopping(self: extract.Extractor, row: dict[str, Any]) -> Callable[[], dict[str, Any]]:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(row)
        return whole(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(extract.Extractor, "__call__", stopping)
        with pytest.raises(KeyboardInterrupt):
            evaluated(changed, tmp_path)
    assert len(list((tmp_path / "workspace" / "features").glob("*/part-*.parquet"))) == 5
    assert same(on_gpu, evaluated(changed, tmp_path)) == []


def test_workers_that_share_a_gpu_in_threads_give_the_same_bits(
    on_gpu: Path, changed: dict[str, Any], tmp_path: Path
) -> None:
    changed["extract"] |= {"gpus_per_actor": 0.5, "actors": 2}
    assert same(on_gpu, evaluated(changed, tmp_path, threads=4)) == []


def test_other_shards_give_the_same_bits(on_gpu: Path, changed: dict[str, Any], tmp_path: Path) -> None:
    """Images stand at other places of a batch then."""
    changed["extract"]["shard_rows"] = 96
    assert same(on_gpu, evaluated(changed, tmp_path)) == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_actors_of_ray_that_share_a_gpu_give_the_same_bits(
    on_gpu: Path, changed: dict[str, Any], tmp_path: Path, ray_session: None, device: str
) -> None:
    """Neighbours that are looked up on the GPU are the same up to ties."""
    changed["extract"] |= {"gpus_per_actor": 0.5, "actors": 2}
    changed["index"] = {"shards": 2, "cpus_per_shard": 0.5, "gpus_per_shard": 0.25, "device": device}
    folder = evaluated(changed, tmp_path, engine="ray", threads=None)
    built = loading.load(str(tmp_path / "config.yaml")).built()
    looked_up = {label: NEIGHBOURS for label, detector in built.items() if detector.neighbours}
    assert looked_up
    assert same(on_gpu, folder, looked_up if device == "cuda" else None) == []
