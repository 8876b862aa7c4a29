from dataclasses import replace

import numpy as np
import pytest

from pipeline.columns import FEATURE, LOGITS
from pipeline.detectors.residual import Residual
from pipeline.detectors.vim import Vim
from pipeline.errors import UserError
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


@pytest.mark.parametrize("kind", [Vim, Residual])
@pytest.mark.parametrize(("count", "dim", "refused"), [(7, None, True), (60, 60, True), (60, 15, False)])
def test_rows_that_do_not_vary_beyond_the_subspace_are_refused(make_rows, kind, count, dim, refused):
    wide = make_rows(dim=128 if dim == 60 else 16)
    rows = replace(wide, train={name: column[:count] for name, column in wide.train.items()})
    detector = kind(dim=dim)
    if refused:
        message = f"dim is {dim or 8}, .* vary in more than .*; {count} rows were found to vary in {count} of"
        with pytest.raises(UserError, match=message):
            detector.fit(rows.training(detector))
    else:
        assert np.isfinite(rows.score(detector)).all()


def test_a_feature_of_few_directions_counts_as_those(make_rows):
    rows = make_rows()
    flat = rows.train[FEATURE].copy()
    flat[:, 5:] = 0
    few = replace(rows, train={**rows.train, FEATURE: flat}, bias=np.zeros_like(rows.bias))
    with pytest.raises(UserError, match="200 rows were found to vary in 5 of 16"):
        few.score(Vim())
    assert np.isfinite(few.score(Vim(dim=4))).all()
