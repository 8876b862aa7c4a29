"""What the quickstart runs on: a small trained classifier and real images. See NOTICE for their origin."""

import numpy as np
from numpy.typing import NDArray


def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """scikit-learn's handwritten digits: (1797, 8, 8) uint8 and their labels (1797,)."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    scaled = np.rint(images.reshape(-1, 8, 8) * (255 / 16))
    return scaled.astype(np.uint8), labels
