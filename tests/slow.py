"""Scores by definition, one image at a time, to compare detectors with."""

import math
from decimal import Decimal, localcontext

import numpy as np

from pipeline.columns import FEATURE, LABEL


def energy(logits):
    """-log Σ exp z."""
    largest = max(logits)
    return -largest - math.log(math.fsum(math.exp(z - largest) for z in logits))


def probabilities(logits, temperature=1):
    """Softmax of one image with 60 digits, and 1 - p of each class as the sum of the others."""
    largest = Decimal(float(max(logits)))
    powers = [((Decimal(float(z)) - largest) / Decimal(temperature)).exp() for z in logits]
    total = sum(powers)
    rest = [sum(powers[:c] + powers[c + 1 :]) / total for c in range(len(powers))]
    return [power / total for power in powers], rest


def msp(logits, temperature=1):
    """Log(1 - p) of the largest probability p."""
    with localcontext(prec=60):
        return float(min(probabilities(logits, temperature)[1]).ln())


def entropy(logits, temperature=1):
    """Log(-Σ p log p)."""
    with localcontext(prec=60):
        pairs = zip(*probabilities(logits, temperature), strict=True)
        return float(sum(-p * (p.ln() if p < 0.9 else _log1p(-rest)) for p, rest in pairs).ln())


def gen(logits, gamma, m):
    """Log Σ (p (1 - p))^γ over the m largest."""
    with localcontext(prec=60):
        pairs = sorted(zip(*probabilities(logits), strict=True), reverse=True)[:m]
        return float(sum((Decimal(gamma) * (p * rest).ln()).exp() for p, rest in pairs).ln())


def _log1p(x):
    """Log(1 + x) by its series, for |x| < 0.1."""
    return sum((-1) ** (n + 1) * x**n / n for n in range(1, 60))


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
    return float(np.percentile(rows.train[FEATURE].astype(np.float64), p))


def mahalanobis(rows, unit=False):
    """Smallest distance to a class mean, and distance to the mean of all; one row, one class at a time."""

    def prepared(feature):
        feature = feature.astype(np.float64)
        return feature / np.linalg.norm(feature, axis=1, keepdims=True) if unit else feature

    train, label, query = prepared(rows.train[FEATURE]), rows.train[LABEL], prepared(rows.query[FEATURE])
    classes = np.unique(label)
    means = [train[label == c].mean(axis=0) for c in classes]
    within, total = np.zeros((train.shape[1],) * 2), np.zeros((train.shape[1],) * 2)
    for row, c in zip(train, label, strict=True):
        offset = row - means[np.searchsorted(classes, c)]
        within += np.outer(offset, offset) / len(train)
        total += np.outer(row - train.mean(axis=0), row - train.mean(axis=0)) / len(train)
    floor = 1e-12 * np.trace(total)
    inverse, common = (
        np.linalg.pinv(each, rcond=floor / (np.linalg.norm(each, 2) + 1e-300), hermitian=True)
        for each in (within, total)
    )
    own, background = [], []
    for row in query:
        own.append(min((row - mean) @ inverse @ (row - mean) for mean in means))
        background.append((row - train.mean(axis=0)) @ common @ (row - train.mean(axis=0)))
    return np.array(own), np.array(background)
