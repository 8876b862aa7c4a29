import numpy as np
import pytest

from pipeline.columns import FEATURE, LOGITS
from pipeline.detectors.vim import Vim
from tests import slow
from tests.detectors.test_residual import slow_residual


@pytest.mark.parametrize("dim", [1, 7, 15])
def test_the_score_is_the_virtual_logit_against_the_energy_of_the_others(rows, dim):
    outside = slow_residual(rows, dim, rows.train[FEATURE])
    factor = np.mean([max(row) for row in rows.train[LOGITS].tolist()]) / np.mean(outside)
    expected = [
        factor * length + slow.energy(logits)
        for length, logits in zip(
            slow_residual(rows, dim, rows.query[FEATURE]), rows.query[LOGITS].tolist(), strict=True
        )
    ]
    np.testing.assert_allclose(rows.score(Vim(dim=dim)), expected, rtol=1e-6)


def test_training_rows_without_a_residual_leave_the_energy(make_rows):
    rows = make_rows()
    scorer = Vim().fit(rows.training(Vim()))
    assert scorer.factor > 0
    flat = {**rows.train, FEATURE: np.zeros_like(rows.train[FEATURE])}
    alone = make_rows().__class__(**{**vars(rows), "train": flat, "bias": np.zeros_like(rows.bias)})
    assert np.isfinite(alone.score(Vim())).all()
