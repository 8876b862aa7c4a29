"""What may be kept as plain data, and what is refused when it is read back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest

from pipeline.detectors import plain
from pipeline.detectors.msp import MspScorer


def test_values_of_every_plain_kind_come_back() -> None:
    value = {
        "numbers": (1, -2.5, True, None, float("inf")),
        "texts": ["a", "\u00e4"],
        "one": np.float64(0.1),
        "scorer": MspScorer(2.0),
        "function": partial(np.minimum, np.float64(3)),
    }
    document, arrays = plain.encode(value)
    found = plain.decode(document, arrays)
    assert {name: found[name] for name in ("numbers", "texts", "one", "scorer")} == {
        name: value[name] for name in ("numbers", "texts", "one", "scorer")
    }
    assert found["function"](np.array([1, 9])).tolist() == [1, 3]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.bool_])
def test_arrays_keep_type_and_shape_however_they_lie_in_memory(dtype: Any) -> None:
    arrays = [np.array(1, dtype), np.zeros((0, 3), dtype), np.arange(12).reshape(3, 4).T[::2].astype(dtype)]
    document, kept = plain.encode(arrays)
    for before, after in zip(arrays, plain.decode(document, kept), strict=True):
        assert (before.dtype, before.shape) == (after.dtype, after.shape)
        np.testing.assert_array_equal(before, after)


@dataclass(frozen=True)
class Own:
    of: Any


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Own({"deep": [1, object()]}), r"^Own\.of\.deep\.1: got object; expected numbers"),
        (Own(np.array([object()])), r"^Own\.of: got ndarray; expected numbers"),
        (lambda: 1, "a function without a name in its module"),
    ],
)
def test_what_is_not_plain_is_refused_with_its_place(value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        plain.encode(value)


@pytest.mark.parametrize("document", [{"function": "os:system"}, {"object": f"{__name__}:Own", "fields": {}}])
def test_names_of_other_modules_are_never_imported(document: Any) -> None:
    with pytest.raises(ValueError, match="refused"):
        plain.decode(document, {})


def test_modules_that_are_allowed_are_read() -> None:
    document, arrays = plain.encode(Own((1, 2)))
    assert plain.decode(document, arrays, [__name__]) == Own((1, 2))
