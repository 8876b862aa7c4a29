"""What holds for every detector: the files are found by themselves."""

from __future__ import annotations

import json
import pickle
import re
import tracemalloc
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import load_file, save_file
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from pipeline import columns, detectors
from pipeline.columns import BLOCK_NORM, FEATURE, LABEL, LOGITS, PREDICTION
from pipeline.detectors import plain
from pipeline.detectors.base import Detector, bank_of
from pipeline.errors import UserError

FEATURE_TABLE = {columns.KEY, columns.LABEL, columns.PREDICTION, FEATURE, LOGITS, BLOCK_NORM}


@pytest.fixture(params=detectors.names())
def kind(request) -> type[Detector]:
    return detectors.get(request.param)


@pytest.fixture
def detector(kind) -> Detector:
    return kind()


def declared_by(detector: Detector) -> list[str]:
    return [*detector.columns, *(extra.column for extra in detector.extras())]


def test_one_sentence_tells_how_to_read_a_score(kind):
    assert len(kind.reading) > 60
    assert kind.reading.endswith(".") and ". " not in kind.reading
    assert re.search(r"from -?\d|at (least|most)|unbounded|without", kind.reading, re.IGNORECASE), "its range"


def test_scores_are_one_finite_float64_per_row(detector, rows):
    score = rows.score(detector)
    assert score.shape == (len(rows.query[FEATURE]),)
    assert score.dtype == np.float64
    assert np.isfinite(score).all()


def test_separated_ood_rows_score_higher(detector, blobs):
    assert roc_auc_score(blobs.is_ood, blobs.score(detector)) >= 0.95


def test_learning_takes_no_number_for_every_pair_of_classes(detector, make_rows):
    classes = 3000
    rows = make_rows(rows=2 * classes, classes=classes, dim=8)
    rows = replace(rows, train={**rows.train, LABEL: np.arange(2 * classes, dtype=np.int32) % classes})
    if detector.table(classes, 8, rows.stages) >= classes**2:
        return  # says so, and is refused where there are too many
    training = rows.training(detector)
    tracemalloc.start()
    try:
        detector.fit(training)
        detector.notices(training)
        held = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert held < 4 * classes**2


def test_a_split_batch_scores_like_the_whole_batch(detector, rows):
    scorer = detector.fit(rows.training(detector))
    batch = rows.with_neighbours(scorer, rows.query)
    parts = [
        {name: column[part] for name, column in batch.items()}
        for part in np.split(np.arange(200), [1, 8, 77])
    ]
    whole = scorer({name: column[:200] for name, column in batch.items()})
    # Some scores are small differences of what is large.
    size = np.median(np.abs(whole))
    split = np.concatenate([scorer(part) for part in parts])
    np.testing.assert_allclose(split, whole, rtol=1e-12, atol=1e-12 * size)


def test_split_rows_are_embedded_like_whole_ones(detector, rows):
    bank = bank_of(detector.fit(rows.training(detector)))
    if bank is None:
        return
    parts = [
        {name: column[part] for name, column in rows.query.items()} for part in (slice(0, 3), slice(3, None))
    ]
    for embed in (bank.embed, bank.queries):
        split = np.concatenate([embed(part) for part in parts])
        assert split.dtype == np.float32
        np.testing.assert_allclose(split, embed(rows.query), rtol=2e-7)


def test_permuted_rows_get_permuted_scores(detector, rows):
    scorer = detector.fit(rows.training(detector))
    batch = rows.with_neighbours(scorer, rows.query)
    order = np.random.default_rng(1).permutation(len(batch[FEATURE]))
    permuted = scorer({name: column[order] for name, column in batch.items()})
    np.testing.assert_allclose(permuted, scorer(batch)[order], rtol=1e-12)


def test_an_empty_batch_gives_no_scores(detector, rows):
    scorer = detector.fit(rows.training(detector))
    batch = rows.with_neighbours(scorer, rows.query)
    assert scorer({name: column[:0] for name, column in batch.items()}).shape == (0,)


def test_stored_float32_columns_are_computed_with_in_float64(detector, rows):
    scorer = detector.fit(rows.training(detector))
    batch = rows.with_neighbours(scorer, rows.query)
    wide = {name: column.astype(np.float64) for name, column in batch.items() if name in FEATURE_TABLE}
    np.testing.assert_array_equal(scorer({**batch, **wide}), scorer(batch))


def test_only_the_declared_columns_are_read(detector, rows):
    scorer = detector.fit(rows.training(detector))
    declared = {name: rows.query[name] for name in declared_by(detector)}
    np.testing.assert_array_equal(scorer(rows.with_neighbours(scorer, declared)), rows.score(detector))


def test_a_missing_column_is_an_error(detector, rows):
    scorer = detector.fit(rows.training(detector))
    for missing in declared_by(detector):
        batch = {name: column for name, column in rows.query.items() if name != missing}
        with pytest.raises(KeyError, match=missing):
            scorer(rows.with_neighbours(scorer, batch))


def test_a_pickled_scorer_gives_identical_bits(detector, rows):
    scorer = detector.fit(rows.training(detector))
    copy = pickle.loads(pickle.dumps(scorer))
    batch = rows.with_neighbours(scorer, rows.query)
    assert copy(batch).tobytes() == scorer(batch).tobytes()
    copied_bank, bank = pickle.loads(pickle.dumps(bank_of(scorer))), bank_of(scorer)
    if bank is not None:
        assert copied_bank.embed(rows.query).tobytes() == bank.embed(rows.query).tobytes()
        assert copied_bank.queries(rows.query).tobytes() == bank.queries(rows.query).tobytes()
        assert copied_bank.keep(rows.train).tobytes() == bank.keep(rows.train).tobytes()


def test_a_scorer_that_is_kept_as_plain_data_gives_identical_bits(detector, rows, tmp_path):
    document, arrays = plain.encode(detector.fit(rows.training(detector)))
    save_file(arrays, tmp_path / "arrays.safetensors")
    text, stored = json.dumps(document), load_file(tmp_path / "arrays.safetensors")
    scorer = plain.decode(json.loads(text), stored)
    again, others = plain.encode(scorer)
    assert (json.dumps(again), others.keys()) == (text, arrays.keys())
    assert all(others[name].tobytes() == arrays[name].tobytes() for name in arrays)
    batch = rows.with_neighbours(scorer, rows.query)
    np.testing.assert_allclose(scorer(batch), rows.score(detector), rtol=1e-12, atol=1e-12)


def test_a_bank_keeps_some_training_rows(detector, rows):
    bank = bank_of(detector.fit(rows.training(detector)))
    if bank is not None:
        keep = bank.keep(rows.train)
        assert keep.shape == (len(rows.train[FEATURE]),)
        assert keep.dtype == np.bool_
        assert keep.sum() >= bank.k >= 1


@pytest.mark.parametrize(("classes", "dim"), [(2, 1), (2, 16), (7, 1)])
def test_the_smallest_classifiers_get_finite_scores(detector, make_rows, classes, dim):
    assert np.isfinite(make_rows(classes=classes, dim=dim).score(detector)).all()


def test_dead_rows_get_finite_scores(detector, make_rows):
    normal = make_rows()
    dead = {
        **normal.query,
        FEATURE: np.zeros_like(normal.query[FEATURE]),
        LOGITS: np.full_like(normal.query[LOGITS], 3),
        BLOCK_NORM: np.zeros_like(normal.query[BLOCK_NORM]),
        **{extra.column: np.zeros_like(normal.query[extra.column]) for extra in detector.extras()},
    }
    scorer = detector.fit(normal.training(detector))
    assert np.isfinite(scorer(normal.with_neighbours(scorer, dead))).all()


def test_dead_training_rows_get_finite_scores_or_are_refused(detector, make_rows):
    rows = make_rows()
    zero = (FEATURE, *(extra.column for extra in detector.extras()))
    train = {**rows.train, **{name: np.zeros_like(rows.train[name]) for name in zero}}
    results = {
        kind: {name: np.zeros_like(v) if name == "mean" else v for name, v in result.items()}
        for kind, result in rows.results.items()
    }
    dead = replace(rows, train=train, query=train, results=results)
    try:
        score = dead.score(detector)
    except UserError as error:  # what keeps directions needs some
        assert re.search("vary|variance", str(error))
    else:
        assert np.isfinite(score).all()


def test_detectors_that_need_the_same_eigenvectors_find_them_once(make_rows, monkeypatch):
    rows, eigh, decomposed = make_rows(), np.linalg.eigh, []
    monkeypatch.setattr(np.linalg, "eigh", lambda matrix: decomposed.append(matrix) or eigh(matrix))
    chosen = [detectors.get(name)() for name in detectors.names()]
    alone = [rows.score(each) for each in chosen]
    decomposed.clear()
    training = rows.training(*chosen)
    for each, score in zip(chosen, alone, strict=True):
        scorer = each.fit(training)
        batch = rows.with_neighbours(scorer, rows.query)
        np.testing.assert_allclose(scorer(batch), score, rtol=1e-12, err_msg=each.name)
    # Of all rows and within classes, both also of unit features; of standardised features; about 0 and -W⁺b;
    # two stages of pooled maps.
    assert len(decomposed) == 9
    pairs = combinations(decomposed, 2)
    assert all(abs(a - b).max() > 1e-6 for a, b in pairs if a.shape == b.shape)


def test_a_class_with_one_training_row_gets_finite_scores(detector, make_rows):
    rows = make_rows()
    label = np.where(rows.train[LABEL] == 3, 4, rows.train[LABEL])
    prediction = np.where(rows.train[PREDICTION] == 3, 4, rows.train[PREDICTION])
    label[0] = prediction[0] = 3
    single = replace(rows, train={**rows.train, LABEL: label, PREDICTION: prediction})
    assert np.isfinite(single.score(detector)).all()


def test_training_rows_that_are_all_there_twice_change_little(detector, make_rows):
    """Means, covariances, ranges and twice as many neighbours or tails are the same; draws are not."""
    rows = make_rows(rows=400)
    detector = detector.model_copy(update={"tail": 10} if hasattr(detector, "tail") else {})
    counts = {"k": 2 * detector.k} if hasattr(detector, "k") else {}
    counts |= {"tail": 20} if hasattr(detector, "tail") else {}
    other = detector.model_copy(update=counts)
    double = {name: np.concatenate([column, column]) for name, column in rows.train.items()}
    once, twice = rows.score(detector), replace(rows, train=double).score(other)
    assert np.isfinite(twice).all()
    assert spearmanr(once, twice).statistic > 0.95  # a share of a class rounds to other rows


def test_an_unknown_parameter_is_refused(kind):
    with pytest.raises(ValidationError, match="no_such_parameter"):
        kind(no_such_parameter=1)


def test_parameters_cannot_be_changed(detector):
    for name in type(detector).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(detector, name, getattr(detector, name))


def test_every_number_has_bounds(kind, detector):
    for name in kind.model_fields:
        if isinstance(getattr(detector, name), int | float):
            for outside in (-(10**9), float("inf"), float("nan")):
                with pytest.raises(ValidationError, match=name):
                    kind(**{name: outside})


def test_metadata_tell_the_reader_what_is_computed(kind):
    assert re.search(r"\((19|20)\d\d\)$", kind.title)
    assert re.search(r"\b(19|20)\d\d, (arXiv:\d{4}\.\d{4,5}|openreview:\w+)$", kind.paper)
    assert kind.formula.startswith("score = ")
    assert declared_by(kind())
    assert set(kind.columns) <= FEATURE_TABLE
    assert all(field.description for field in kind.model_fields.values())
