"""Metrics that need labels, by their definitions: exact fractions, in loops over thresholds."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

import numpy as np


def oscr(inside: list[int], right: list[bool], outside: list[int]) -> Fraction:
    """Trapezoids under the points (FPR, CCR) of all thresholds."""
    points = [(Fraction(0), Fraction(0))]
    for t in sorted({*inside, *outside}):
        ccr = Fraction(sum(r and s <= t for s, r in zip(inside, right, strict=True)), len(inside))
        points.append((Fraction(sum(s <= t for s in outside), len(outside)), ccr))
    return area(points)


def augrc(scores: list[int], right: list[bool]) -> Fraction:
    """Trapezoids under the points (coverage, generalised risk) of all thresholds."""
    points = [(Fraction(0), Fraction(0))]
    for t in sorted(set(scores)):
        wrong = sum(not r and s <= t for s, r in zip(scores, right, strict=True))
        points.append((Fraction(sum(s <= t for s in scores), len(scores)), Fraction(wrong, len(scores))))
    return area(points)


def aurc(scores: list[int], right: list[bool]) -> Fraction:
    """Mean of the error rates of the first k rows; of equal rows, each is there with its share."""
    total, before, errors = Fraction(0), 0, Fraction(0)
    for t in sorted(set(scores)):
        tied = [r for s, r in zip(scores, right, strict=True) if s == t]
        for taken in range(1, len(tied) + 1):
            expected = errors + Fraction(taken * tied.count(False), len(tied))
            total += expected / (before + taken)
        before, errors = before + len(tied), errors + tied.count(False)
    return total / len(scores)


def area(points: list[tuple[Fraction, Fraction]]) -> Fraction:
    return sum(((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points)), Fraction(0))


def cases() -> Iterator[tuple[list[int], list[bool], list[int]]]:
    """Integer scores, from all tied to nearly distinct, and none to all of the classes right."""
    rng = np.random.default_rng(0)
    for number in range(80):
        n, m = rng.integers(1, 30, size=2)
        levels = int(rng.choice([1, 2, 3, 10, 1000]))
        share = (0, 1, 0.2, 0.7)[number % 4]
        yield (
            rng.integers(0, levels, n).tolist(),
            (rng.random(n) < share).tolist(),
            rng.integers(0, levels, m).tolist(),
        )
