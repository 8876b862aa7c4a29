from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from pipeline.metrics.numbering import FEWEST, suspicious


def network(labels: np.ndarray, classes: int, accuracy: float, seed: int = 0) -> np.ndarray:
    """Predictions that are right with a probability, else any class."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(len(labels)) < accuracy, labels, rng.integers(0, classes, len(labels)))


def test_labels_in_numeric_order_for_a_network_that_sorted_them_as_text_are_told():
    """Folders 0 to 11: as text, 10 and 11 come after 1."""
    text = np.argsort(np.argsort([str(number) for number in range(12)]))
    labels = np.repeat(np.arange(12), 10)
    found = suspicious(labels, text[labels], 12)
    assert found is not None
    assert (found.images, found.better) == (120, 1.0)
    assert found.accuracy == pytest.approx(2 / 12)
    assert dict(found.moved) == {label: text[label] for label in range(2, 12)}
    assert str(found) == (
        "the network is right on 16.67% of 120 labelled images, and would be on 100.00% if its classes were "
        "numbered otherwise: it knows label 2 as 4, 3 as 5, 4 as 6 and 7 more. The order of labels is not "
        "that of the network"
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_better_accuracy_is_the_best_of_all_numberings(seed):
    labels = np.random.default_rng(seed).integers(0, 5, 300)
    predictions = (network(labels, 5, 0.7, seed) + 1) % 5
    found = suspicious(labels, predictions, 5)
    best = max(np.mean(np.array(order)[labels] == predictions) for order in permutations(range(5)))
    assert found is not None
    assert found.better == best


def test_labels_that_count_from_one_are_told_for_a_thousand_classes():
    labels = np.repeat(np.arange(1000), 50)
    found = suspicious(labels[50:], (network(labels, 1000, 0.76)[50:] - 1) % 1000, 1000)
    assert found is not None
    assert found.better == pytest.approx(0.76, abs=0.01)


@pytest.mark.parametrize(("classes", "each"), [(2, 500), (10, 100), (1000, 1), (1000, 5), (1000, 50)])
@pytest.mark.parametrize("accuracy", [0.3, 0.6, 0.95])
def test_nothing_is_said_of_a_network_that_is_merely_wrong_now_and_then(classes, each, accuracy):
    """Of one image per class, any predictions would fit some numbering."""
    labels = np.repeat(np.arange(classes), each)
    assert suspicious(labels, network(labels, classes, accuracy), classes) is None


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_guessing_is_told(classes):
    labels = np.arange(500) % classes
    found = suspicious(labels, network(labels, classes, 0), classes)
    assert found is not None
    assert found.better is None
    assert "which is what guessing gives" in str(found)


def test_few_images_and_rows_without_a_label_say_nothing():
    labels = np.arange(FEWEST - 1)
    assert suspicious(labels, labels + 1, FEWEST) is None
    assert suspicious(np.full(500, -1), np.zeros(500, np.int64), 10) is None
