"""Datasets as manifests, in a folder of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import Dataset
from pipeline.datasets import Manifest, compile_manifest

Compile = Callable[..., Manifest]


@pytest.fixture
def compiled(tmp_path: Path) -> Compile:
    """Compile a dataset given by its format, path and whatever differs from an unlabelled one named `set`."""

    def compiled(kind: str, path: Path | str, role: str = "far_ood", **fields: Any) -> Manifest:
        dataset = Dataset(**{"name": "set", "role": role, "format": kind, "path": str(path)} | fields)
        return compile_manifest(dataset, tmp_path / "manifests")

    return compiled


@pytest.fixture
def pixels() -> Callable[[Manifest], np.ndarray]:
    """All images of a manifest of raw pixels, as one array."""

    def stacked(manifest: Manifest) -> np.ndarray:
        rows = manifest.read(0, manifest.rows).to_pylist()
        return np.stack([np.frombuffer(row["bytes"], np.uint8).reshape(row["shape"]) for row in rows])

    return stacked


@pytest.fixture(params=[(5, 4, 6), (5, 4, 6, 1), (5, 4, 6, 3)], ids=["grey", "one-channel", "colour"])
def images(request: pytest.FixtureRequest) -> np.ndarray:
    """Five random images, in every shape that is allowed."""
    return np.random.default_rng(0).integers(256, size=request.param, dtype=np.uint8)
