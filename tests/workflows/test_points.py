from __future__ import annotations

import numpy as np

from pipeline.detectors.base import Training
from pipeline.detectors.energy import Energy
from pipeline.detectors.grood import Grood
from pipeline.detectors.knn import Knn
from pipeline.learned import statistics
from pipeline.learned.statistics import Head
from pipeline.workflows.points import holders

ROWS = {"feature": np.eye(6), "label": np.arange(6) % 5, "prediction": np.zeros(6, np.int32)}
HEAD = Head(np.zeros((5, 6), np.float32), np.zeros(5, np.float32))


def test_the_widest_bank_of_equal_vectors_serves_all():
    detectors = {
        **{f"knn{k}": Knn(k=k) for k in (5, 50, 20)},
        **{f"grood{k}": Grood(k=k, prototype="proto_mean") for k in (1, 2)},
        "shifted": Grood(prototype="ood_val"),
        "energy": Energy(),
    }
    wanted = {need for each in detectors.values() for need in (*each.statistics(), *each.ood_statistics())}
    found = statistics.of(ROWS, wanted, HEAD)
    training = Training(HEAD.weight, HEAD.bias, train=found, ood_val=found)
    scorers = {label: detector.fit(training) for label, detector in detectors.items()}
    assert holders(detectors, scorers) == {
        **dict.fromkeys(("knn5", "knn50", "knn20"), "knn50"),
        **dict.fromkeys(("grood1", "grood2"), "grood2"),
        "shifted": "shifted",
    }
