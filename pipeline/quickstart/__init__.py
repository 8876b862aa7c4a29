"""What the quickstart runs on: a small trained classifier and real images. See NOTICE for their origin."""

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """scikit-learn's handwritten digits: (1797, 8, 8) uint8 and their labels (1797,).

    Read from its file: importing it takes longer than all else that a repeated run does.
    """
    package = find_spec("sklearn")
    assert package is not None and package.origin is not None
    with gzip.open(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    scaled = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16))
    return scaled.astype(np.uint8), table[:, -1].astype(np.int64)
