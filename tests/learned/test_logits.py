from __future__ import annotations

import numpy as np
import pytest
import scipy.special

from pipeline.learned.logits import logsumexp, softmax


@pytest.mark.parametrize("scale", [1e-6, 1, 1e4])
@pytest.mark.parametrize("temperature", [0.5, 1, 1000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_they_equal_scipys_in_float64(scale: float, temperature: float, dtype: type) -> None:
    logits = (np.random.default_rng(0).normal(size=(50, 1000)) * scale).astype(dtype)
    before = logits.copy()
    expected = logits.astype(np.float64) / temperature
    np.testing.assert_allclose(
        softmax(logits, temperature), scipy.special.softmax(expected, axis=1), rtol=1e-13
    )
    np.testing.assert_allclose(
        logsumexp(logits, temperature), scipy.special.logsumexp(expected, axis=1), rtol=1e-13
    )
    np.testing.assert_array_equal(logits, before)
    assert softmax(logits).dtype == logsumexp(logits).dtype == np.float64
