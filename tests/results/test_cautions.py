"""Results that may mean nothing are told before the numbers, each kind where it is and nowhere else."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from pipeline.metrics.comparisons import compare
from pipeline.results.cautions import Found, cautions


def found(
    inside: np.ndarray,
    outside: np.ndarray,
    threshold: float = 1.0,
    train: int = 500,
    columns: str = "feature",
) -> Found:
    """A run of one detector on one OOD dataset."""
    images = {"train": train, "id": len(inside), "near_ood": len(outside)}
    datasets = {f"{role}_set": {"role": role, "features": rows} for role, rows in images.items()}
    manifest: dict[str, Any] = {
        "datasets": datasets,
        "model": {"feature_dim": 128},
        "detectors": {"knn": {"columns": [columns]}},
    }
    results = compare(inside, {"near_ood_set": outside}, {"near_ood": ["near_ood_set"]})
    rows = [{"detector": "knn", "group": "near_ood", **vars(each)} for each in results]
    return Found(manifest, rows, {"knn": threshold})


def scores(rows: int, mean: float) -> np.ndarray:
    return np.random.default_rng(rows).normal(mean, size=rows)


def test_a_sound_run_is_given_without_a_word() -> None:
    assert cautions(found(scores(50, 0), scores(60, 2))) == []


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (found(scores(49, 0), scores(60, 2)), "id_set has 49 images, fewer than 50"),
        (found(scores(60, 0), scores(15, 2)), "near_ood_set has 15 images"),
        (
            found(scores(60, 0), scores(70, 2), train=127),
            "127 training images for features of 128 dimensions",
        ),
        (found(scores(60, 2), scores(70, 0)), r"knn is worse than guessing .* on near_ood_set \(0\.\d+\)"),
        (
            found(np.ones(60), np.ones(70)),
            "knn does not tell near_ood_set from the ID images at any threshold",
        ),
        (found(scores(60, 0), scores(70, 2), threshold=-3e10), "knn has scores of the size 3e\\+10"),
        (found(scores(60, 0), scores(70, 2), threshold=float("nan")), "knn has scores of the size nan"),
    ],
    ids=["ID", "OOD", "training", "below chance", "constant", "huge", "not a number"],
)
def test_each_kind_is_told_with_what_it_is_about(run: Found, said: str) -> None:
    (sentence,) = cautions(run)
    assert re.search(said, sentence)


def test_an_auroc_below_one_half_by_chance_is_not_worse_than_guessing() -> None:
    given = found(np.arange(400.0), np.arange(400.0) - 3.5)
    (auroc,) = (row for row in given.metrics if row["metric"] == "auroc" and row["dataset"] == "near_ood_set")
    assert 0.49 < auroc["value"] < 0.5 < auroc["ci_high"]
    assert cautions(given) == []


def test_few_training_rows_matter_only_to_what_reads_the_feature() -> None:
    assert cautions(found(scores(60, 0), scores(70, 2), train=3, columns="logits")) == []


def test_labels_in_another_order_are_told_first() -> None:
    given = found(scores(20, 0), scores(60, 2))
    given.manifest["datasets"]["id_set"]["numbering"] = "labels are not the network's"
    assert cautions(given)[0] == "id_set: labels are not the network's: see `labels` of the dataset."
