"""The figures of the report: arrays in, PNG out.

Built from matplotlib's objects, so that no state of pyplot is touched. Sizes are in inches. Every panel is
narrow enough to be read on a phone; the page puts them side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from pipeline.columns import Float

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, made for colour-blind readers, without black and the faint yellow."""
DASHES = (
    "-",
    (0, (4, 1.5)),
    (0, (1, 1)),
    (0, (4, 1, 1, 1)),
    (0, (8, 2)),
    (0, (4, 1, 1, 1, 1, 1)),
    (0, (1, 3)),
)
INK, MUTED, FAINT = "#222222", "#666666", "#d9d9d9"
WIDTH, LEFT, RIGHT, TOP, BOTTOM, LINE = 4.0, 0.55, 0.12, 0.34, 0.45, 0.155
DPI = 170
COLOURS_OF_PNG = 128

_style = rc_context(
    {
        "font.family": "sans-serif",
        "font.size": 8.5,
        "text.color": INK,
        "text.parse_math": False,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": FAINT,
        "grid.linewidth": 0.5,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "lines.linewidth": 1.6,
        "legend.frameon": False,
        "legend.fontsize": 8,
    }
)


@dataclass(frozen=True)
class Curve:
    """The ROC curve of one detector on one dataset."""

    detector: str
    rank: int
    """Decides the style of the line: the same detector looks the same in every panel."""
    auroc: float
    fpr: Float
    """Share of ID rows called OOD, ascending."""
    tpr: Float
    """Share of OOD rows called OOD, ascending."""


def roc_points(inlier: Float, outlier: Float) -> tuple[Float, Float]:
    """(P,) false and true positive rate from (0, 0) to (1, 1), P <= N + M + 1; OOD is the positive class.

    Exact, and ties are one step.

    Args:
        inlier: (N,) finite scores of ID rows, higher = more OOD.
        outlier: (M,) finite scores of OOD rows.
    """
    scores = np.concatenate([inlier, outlier])
    order = np.argsort(-scores)
    last_of_ties = np.flatnonzero(np.diff(scores[order], append=-np.inf))
    hits = np.cumsum(order >= len(inlier))[last_of_ties]
    alarms = last_of_ties + 1 - hits
    tpr = np.concatenate([[0.0], hits / len(outlier)])
    fpr = np.concatenate([[0.0], alarms / len(inlier)])
    return fpr, tpr


def thinned(fpr: Float, tpr: Float, limit: int = 1000) -> tuple[Float, Float]:
    """At most `limit` >= 2 of the points of a ROC curve, both ends among them.

    A point that is left out lies within 2 / (limit - 1) of one that is kept, as the sum of the differences
    of the two rates.
    """
    if len(tpr) <= limit:
        return fpr, tpr
    kept = np.unique(np.searchsorted(fpr + tpr, np.linspace(0, 2, limit)))
    return fpr[kept], tpr[kept]


def densities(samples: Mapping[str, Float], bins: int = 40) -> tuple[Float, dict[str, Float]]:
    """(bins + 1,) common edges, and the density of each sample between them.

    The edges span the middle 99% of every sample; rows outside are left out but count in the total. They stay
    apart where all scores are equal, or differ in the last digit only.
    """
    quantiles = [np.quantile(sample, [0.005, 0.995]) for sample in samples.values()]
    low, high = np.min(quantiles), np.max(quantiles)
    margin = max(0.02 * (high - low), 1e-6 * abs(low)) or 0.5
    edges = np.linspace(low - margin, high + margin, bins + 1)
    width = edges[1] - edges[0]
    counts = {name: np.histogram(sample, edges)[0] for name, sample in samples.items()}
    return edges, {name: count / (len(samples[name]) * width) for name, count in counts.items()}


@_style
def roc(dataset: str, curves: Sequence[Curve]) -> bytes:
    """PNG with ROC curves of detectors on one OOD dataset; the legend is sorted by AUROC."""
    ordered = sorted(curves, key=lambda curve: -curve.auroc)
    names = [f"{curve.auroc:.3f}  {curve.detector}" for curve in ordered]
    figure, axes = _panel(dataset, WIDTH - LEFT - RIGHT, names)
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1)
    for curve, name in zip(ordered, names, strict=True):
        axes.plot(curve.fpr, curve.tpr, label=name, **line(curve.rank))
    axes.set(
        xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel="FPR: ID called OOD", ylabel="TPR: OOD called OOD"
    )
    return _png(figure, axes, names)


@_style
def histograms(detector: str, inlier: str, samples: Mapping[str, Float], threshold: float) -> bytes:
    """PNG with the score densities of one detector.

    Args:
        detector: the title.
        inlier: key of the ID scores in `samples`; drawn as an area.
        samples: dataset -> (N,) finite scores.
        threshold: score at which 95% of the ID rows are accepted.
    """
    edges, heights = densities(samples)
    names = [*heights, "95% of ID"]
    figure, axes = _panel(detector, 2.2, names)
    axes.stairs(heights.pop(inlier), edges, label=inlier, fill=True, color=MUTED, alpha=0.35)
    for rank, (name, height) in enumerate(heights.items()):
        style = line(rank)
        axes.stairs(
            height, edges, label=name, color=style["color"], linestyle=style["linestyle"], linewidth=1.4
        )
    axes.axvline(threshold, color=INK, linewidth=1, linestyle=(0, (2, 1.5)), label=names[-1])
    axes.set(xlim=(edges[0], edges[-1]), xlabel="score (higher = more OOD)", ylabel="density", yticks=[])
    return _png(figure, axes, names)


@_style
def norm_ratio(blocks: Sequence[str], ratio: Float, stderr: Float) -> bytes:
    """PNG with NormRatio +- standard error of every block, the largest marked.

    Args:
        blocks: (B,) names, in the order the model runs them.
        ratio: (B,) FeatureNorm of the images over that of their jigsaws; left out where not finite.
        stderr: (B,) standard errors.
    """
    names_height = 0.068 * max(map(len, blocks))
    width, bottom = max(WIDTH, LEFT + RIGHT + 0.24 * len(blocks)), names_height + 0.16
    figure, axes = _axes(width, 2.2, bottom)
    at, top = np.arange(len(blocks)), largest(ratio)
    finite = np.isfinite(ratio)
    axes.axhline(1, color=MUTED, linewidth=0.8)
    axes.errorbar(
        at[finite],
        ratio[finite],
        stderr[finite],
        fmt="o",
        color=COLOURS[0],
        markersize=4.5,
        elinewidth=1.2,
        capsize=2.5,
    )
    axes.plot(
        top, ratio[top], "o", color=COLOURS[1], markersize=9, markerfacecolor="none", markeredgewidth=1.8
    )
    axes.set_title(f"Largest at {blocks[top]}: {ratio[top]:.3f}")
    axes.set_xticks(at, blocks, rotation=90)
    axes.margins(y=0.1)
    axes.set(xlim=(-0.6, len(blocks) - 0.4), ylabel="NormRatio")
    axes.grid(visible=False, axis="x")
    return _encode(figure)


def largest(ratio: Float) -> int:
    """Position of the largest finite ratio."""
    return int(np.argmax(np.where(np.isfinite(ratio), ratio, -np.inf)))


def line(rank: int) -> dict[str, Any]:
    """Colour first, then dashes: 42 lines that can be told apart."""
    return {
        "color": COLOURS[rank % len(COLOURS)],
        "linestyle": DASHES[rank // len(COLOURS) % len(DASHES)],
    }


def _axes(width: float, height: float, bottom: float) -> tuple[Figure, Axes]:
    """A figure of a width, with axes of a height above a margin; far cheaper than a layout engine."""
    total = bottom + height + TOP
    figure = Figure(figsize=(width, total), dpi=DPI)
    box = (LEFT / width, bottom / total, (width - LEFT - RIGHT) / width, height / total)
    return figure, figure.add_axes(box)


def _panel(title: str, height: float, names: Sequence[str]) -> tuple[Figure, Axes]:
    """A titled panel with room for a legend below."""
    rows = -(-len(names) // _legend_columns(names))
    figure, axes = _axes(WIDTH, height, BOTTOM + LINE * rows + 0.06)
    axes.set_title(title)
    return figure, axes


def _legend_columns(names: Sequence[str]) -> int:
    return 2 if max(map(len, names)) <= 24 else 1


def _png(figure: Figure, axes: Axes, names: Sequence[str]) -> bytes:
    """The panel with its legend below, as PNG."""
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="lower left",
        bbox_to_anchor=(LEFT / WIDTH - 0.03, 0),
        ncols=_legend_columns(names),
        borderaxespad=0.3,
        labelspacing=0.35,
        handlelength=2.2,
    )
    return _encode(figure)


def _encode(figure: Figure) -> bytes:
    """PNG of few colours: a quarter of the bytes."""
    figure.set_dpi(DPI)
    canvas, buffer = FigureCanvasAgg(figure), BytesIO()
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image.quantize(COLOURS_OF_PNG, dither=Image.Dither.NONE).save(buffer, "PNG")
    return buffer.getvalue()
