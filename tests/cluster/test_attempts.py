from __future__ import annotations

from contextvars import ContextVar

import pytest

from pipeline.cluster import attempts
from pipeline.errors import UserError


def test_the_first_start_leaves_no_trace(tmp_path) -> None:
    with attempts.begun(str(tmp_path / "part-00001.parquet"), "extracting") as attempt:
        attempt.at(["a", "b"])
        assert list(tmp_path.iterdir()) == []
    assert not attempt.last


def test_work_that_dies_again_and_again_is_given_up_with_the_images_it_was_at(tmp_path, monkeypatch) -> None:
    part = str(tmp_path / "part-00001.parquet")
    monkeypatch.setattr(attempts, "_replaces", ContextVar("replaces", default=True))
    for number in range(1, attempts.LIMIT + 1):
        with pytest.raises(KeyboardInterrupt), attempts.begun(part, "extracting") as attempt:
            attempt.at(["a", "b", "c", f"d{number}"])
            assert attempt.last == (number == attempts.LIMIT)
            raise KeyboardInterrupt
    with pytest.raises(UserError, match=r"at 4 images: a, b, c, \.\.\."), attempts.begun(part, "extracting"):
        raise AssertionError
    with attempts.begun(part, "decoding"):
        pass
    attempts.forget(tmp_path)
    with attempts.begun(part, "extracting") as attempt:
        assert attempt.number == 1
    assert list(tmp_path.iterdir()) == []
