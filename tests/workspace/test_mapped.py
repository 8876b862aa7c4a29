"""Arrays of a file are read as pages of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.workspace import artifacts
from pipeline.workspace.artifacts import mapped, saved


@pytest.mark.parametrize("large", [0, artifacts._LARGE])
def test_mapped_arrays_are_those_that_were_saved_and_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    monkeypatch.setattr(artifacts, "_LARGE", large)
    kinds = ("f8", "f4", "f2", "i8", "i4", "u8", "u4", "u1", "?")
    arrays = {kind: np.arange(6).reshape(2, 3).astype(kind) for kind in kinds}
    arrays |= {"number": np.asarray(3), "none": np.zeros((0, 4))}
    saved(arrays)(tmp_path / "arrays")
    found, loaded = mapped(tmp_path / "arrays"), load_file(tmp_path / "arrays")
    (tmp_path / "arrays").unlink()  # as the copy of a remote file is
    assert found.keys() == loaded.keys()
    for name, value in loaded.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert type(found[name]) is np.ndarray
        np.testing.assert_array_equal(found[name], value)
        assert not found[name].flags.writeable
        assert found[name].flags.owndata == (large > 0)
