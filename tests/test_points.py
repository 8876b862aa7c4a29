from __future__ import annotations

import numpy as np

from pipeline.detectors.base import Training
from pipeline.detectors.energy import Energy
from pipeline.detectors.grood import Grood
from pipeline.detectors.knn import Knn
from pipeline.points import holders
from pipeline.statistics import Statistics

ROWS = Statistics.of(
    {"feature": np.eye(6), "label": np.arange(6) % 5, "prediction": np.zeros(6, np.int32)}, classes=5
)
TRAINING = Training(np.zeros((5, 6), np.float32), np.zeros(5, np.float32), train=ROWS, ood_val=ROWS)


def test_the_widest_bank_of_equal_vectors_serves_all():
    detectors = {
        **{f"knn{k}": Knn(k=k) for k in (5, 50, 20)},
        **{f"grood{k}": Grood(k=k, prototype="proto_mean") for k in (1, 2)},
        "shifted": Grood(prototype="ood_val"),
        "energy": Energy(),
    }
    scorers = {label: detector.fit(TRAINING) for label, detector in detectors.items()}
    assert holders(detectors, scorers) == {
        **dict.fromkeys(("knn5", "knn50", "knn20"), "knn50"),
        **dict.fromkeys(("grood1", "grood2"), "grood2"),
        "shifted": "shifted",
    }
