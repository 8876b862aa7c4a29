"""Fashion-MNIST as it is published, and the quickstart's config on as much of it as a benchmark wants."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from pipeline.config import loading

IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
_IMAGES_HEADER, _LABELS_HEADER = 16, 8


def images(folder: Path, count: int) -> NDArray[np.uint8]:
    """The first training images, (count, 28, 28)."""
    content = gzip.decompress((folder / IMAGES).read_bytes())
    return np.frombuffer(content, np.uint8, offset=_IMAGES_HEADER).reshape(-1, 28, 28)[:count]


def dataset(folder: Path, count: int, scratch: Path, name: str, role: str) -> dict[str, Any]:
    """Config entry of the first training images, written to `scratch` as IDX files of that length."""
    content = gzip.decompress((folder / LABELS).read_bytes())[_LABELS_HEADER:][:count]
    length = count.to_bytes(4, "big")
    side = (28).to_bytes(4, "big")
    paths = {"path": scratch / f"images-{count}.idx", "labels": scratch / f"labels-{count}.idx"}
    paths["path"].write_bytes(b"\0\0\x08\3" + length + side * 2 + images(folder, count).tobytes())
    paths["labels"].write_bytes(b"\0\0\x08\1" + length + content)
    return {"name": name, "role": role, "format": "idx", **{key: str(path) for key, path in paths.items()}}


def quickstart() -> dict[str, Any]:
    """The quickstart's config, to be changed."""
    found: dict[str, Any] = yaml.safe_load(loading.locate("quickstart").read_text())
    return found
