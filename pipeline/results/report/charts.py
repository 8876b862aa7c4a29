"""The data of the charts that answer to a pointer: all detectors, in whole numbers to keep the page small."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.columns import Float
from pipeline.results.report import plots

UNIT = 10_000
"""Shares are whole numbers of 1 / UNIT."""

RATES = np.concatenate([np.arange(50) / 1000, np.arange(10, 201) / 200])
"""False positive rates at which ROC curves are told: steps of 0.1 % up to 5 %, and of 0.5 % from there on."""


def tpr_at_rates(fpr: Float, tpr: Float) -> list[int]:
    """True positive rates at `RATES` on the curve through all points; the upper end of a vertical step.

    Args:
        fpr: (P,) from 0 to 1, ascending.
        tpr: (P,) from 0 to 1, ascending.
    """
    below = np.searchsorted(fpr, RATES, side="right") - 1
    above = np.minimum(below + 1, len(fpr) - 1)
    gap = fpr[above] - fpr[below]
    part = np.divide(RATES - fpr[below], gap, out=np.zeros_like(gap), where=gap > 0)
    return _shares(tpr[below] + part * (tpr[above] - tpr[below]))


def distribution(samples: Mapping[str, Float], threshold: float) -> dict[str, Any]:
    """Shares of the images of each dataset in equal steps of the score, and where these begin and end.

    Args:
        samples: dataset -> (N,) finite scores.
        threshold: score at which 95 % of the ID rows are accepted.
    """
    edges, heights = plots.densities(samples)
    width = edges[1] - edges[0]
    return {
        "low": float(edges[0]),
        "high": float(edges[-1]),
        "threshold": threshold,
        "shares": [_shares(height * width) for height in heights.values()],
    }


def lines(count: int) -> list[dict[str, Any]]:
    """Colours and dashes of a number of lines, those of the static figures; dashes in CSS pixels."""
    return [
        {"colour": style["color"], "dash": [] if style["linestyle"] == "-" else _dash(*style["linestyle"])}
        for style in map(plots.line, range(count))
    ]


def _dash(_: int, parts: tuple[float, ...]) -> list[float]:
    """Dashes as they are drawn; matplotlib counts them in widths of the line."""
    return [2 * part for part in parts]


def _shares(values: Float) -> list[int]:
    found: list[int] = np.rint(values * UNIT).astype(int).tolist()
    return found
