"""Scores by definition, one image at a time, to compare detectors with."""

import math

import numpy as np


def energy(logits):
    """-log Σ exp z."""
    largest = max(logits)
    return -largest - math.log(math.fsum(math.exp(z - largest) for z in logits))


def logits(rows, feature, weight=None):
    """W h + b of one feature, one class at a time."""
    weight = rows.weight.tolist() if weight is None else weight
    bias = rows.bias.tolist()
    return [
        math.fsum([b, *(w * h for w, h in zip(row, feature, strict=True))])
        for row, b in zip(weight, bias, strict=True)
    ]


def percentile(rows, p):
    """Percentile of all entries of the training features."""
    return float(np.percentile(rows.train["feature"].astype(np.float64), p))
