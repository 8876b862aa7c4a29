"""The page of the report and its figures."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import pyarrow.csv
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.config import published
from pipeline.data.metadata import Metadata
from pipeline.data.notes import harmless
from pipeline.metrics.metrics import FAILURES, named
from pipeline.results import calibrated, class_names, unreadable
from pipeline.results.report import charts, plots
from pipeline.results.report.by_group import SHOWN, by_group
from pipeline.results.report.compare import comparisons, deviations
from pipeline.results.report.review import Review, review
from pipeline.results.report.tables import (
    GROUPS,
    OOD,
    Results,
    compared,
    failure_board,
    leaderboard,
    metric_boards,
)
from pipeline.results.report.verdict import verdict
from pipeline.results.unscored import sentences
from pipeline.workspace import files
from pipeline.workspace.files import Place

STATIC = 8
"""Detectors, best first, that have figures for a page without scripts; charts draw the others."""


@dataclass(frozen=True)
class Picture:
    """A figure, and what is said about it."""

    file: str
    png: bytes
    alt: str
    caption: str

    @property
    def source(self) -> str:
        """The image as a data URL."""
        return "data:image/png;base64," + b64encode(self.png).decode()

    @property
    def width(self) -> int:
        """Width on the page in CSS pixels: two dots of the image each."""
        return int.from_bytes(self.png[16:20]) // 2


def write(run: Place, images: int = 0, metadata: Metadata | None = None) -> Place:
    """Write the folder `report` of a finished run: `index.html`, `*.png`, `review.csv`, `classes.csv`, ...

    An earlier report stays as it is until the new one is complete; in an object store the page is replaced
    last.

    Args:
        run: its folder.
        images: how many to show of each kind and dataset, see `review`.
        metadata: what else images are told apart by.

    Returns:
        The page.

    Raises:
        UserError: if the run is not finished, or the published numbers it names are not there.
    """
    results, target = Results.read(run), run / "report"
    with files.scratch(run) as scratch:
        draft = scratch / "new"
        draft.mkdir()
        drawn = _drawn(results)
        pictures = {**drawn.pictures, "norm_ratio": _norm_ratio_pictures(results)}
        for picture in (picture for section in pictures.values() for picture in section):
            (draft / picture.file).write_bytes(picture.png)
        reviewed, groups = review(results, images), by_group(results, metadata)
        pyarrow.csv.write_csv(reviewed.table(), draft / "review.csv")
        for each in groups:
            pyarrow.csv.write_csv(each.table(), draft / f"{each.name}.csv")
        page = _page(results, pictures, reviewed, charts=drawn.charts, groups=groups)
        (draft / "index.html").write_text(page, encoding="utf-8")
        files.replace_folder(draft, target, last="index.html")
    return target / "index.html"


@dataclass(frozen=True)
class Drawn:
    """ROC curves and score distributions: figures of the best detectors, and the data of all."""

    pictures: Mapping[str, list[Picture]]
    charts: Mapping[str, Any]
    """What `report.js` draws."""


def _drawn(results: Results) -> Drawn:
    """ROC curves for each OOD dataset and score distributions for each detector.

    Holds the scores of one detector at a time.
    """
    aurocs = {
        (row["detector"], row["dataset"]): row["value"]
        for row in results.metrics.to_pylist()
        if row["metric"] == "auroc" and row["group"] in OOD
    }
    inliers, datasets, detectors = results.datasets("id"), results.datasets(*OOD), results.detectors
    inlier = " + ".join(inliers)
    curves: dict[str, list[plots.Curve]] = {dataset: [] for dataset in datasets}
    panels = {
        dataset: {"auroc": [aurocs[detector, dataset] for detector in detectors], "tpr": []}
        for dataset in datasets
    }
    histograms, distributions = [], []
    for rank, detector in enumerate(detectors):
        scores = {inlier: results.scores(inliers, detector)}
        scores |= {dataset: results.scores([dataset], detector) for dataset in datasets}
        threshold = results.thresholds[detector]
        distributions.append(charts.distribution(scores, threshold))
        for dataset in datasets:
            points = plots.roc_points(scores[inlier], scores[dataset])
            panels[dataset]["tpr"].append(charts.tpr_at_rates(*points))
            if rank < STATIC:
                own = plots.Curve(detector, rank, aurocs[detector, dataset], *plots.thinned(*points))
                curves[dataset].append(own)
        if rank < STATIC:
            png = plots.histograms(detector, inlier, scores, threshold)
            alt = f"Densities of the {detector} scores of {', '.join(scores)}"
            histograms.append(Picture(f"scores-{detector}.png", png, alt, detector))
    return Drawn(
        {"roc": [_roc_picture(results, *item) for item in curves.items()], "scores": histograms},
        {
            "detectors": detectors,
            "lines": charts.lines(max(len(detectors), len(datasets))),
            "rates": charts.RATES.tolist(),
            "roc": [
                {"title": _title(results, dataset), "dataset": dataset, **panel}
                for dataset, panel in panels.items()
            ],
            "samples": [inlier, *datasets],
            "scores": distributions,
        },
    )


def _title(results: Results, dataset: str) -> str:
    return f"{dataset} ({GROUPS[results.manifest['datasets'][dataset]['role']]})"


def _roc_picture(results: Results, dataset: str, curves: list[plots.Curve]) -> Picture:
    best = max(curves, key=lambda curve: curve.auroc)
    alt = f"ROC curves on {dataset}; the largest area is {best.auroc:.3f}, of {best.detector}"
    return Picture(f"roc-{dataset}.png", plots.roc(dataset, curves), alt, _title(results, dataset))


def _norm_ratio_pictures(results: Results) -> list[Picture]:
    """One chart for each jigsaw pass."""
    passes = [entry for entry in results.manifest["passes"] if entry["kind"] == "jigsaw"]
    pictures = []
    for number, entry in enumerate(passes, start=1):
        ratio, stderr = np.asarray(entry["ratio"], float), np.asarray(entry["stderr"], float)
        png = plots.norm_ratio(entry["blocks"], ratio, stderr)
        alt = f"NormRatio of {len(ratio)} blocks, largest at {entry['blocks'][plots.largest(ratio)]}"
        caption = f"{entry['samples']:,} images, {_parameters(entry['spec'])}"
        pictures.append(Picture(f"norm-ratio-{number}.png", png, alt, caption))
    return pictures


def _page(results: Results, pictures: Mapping[str, list[Picture]], reviewed: Review, **more: Any) -> str:
    """The page; `more` are names that only the template reads."""
    manifest, unlabelled = results.manifest, results.datasets("unlabelled")
    known = published.read(manifest["published"]) if manifest["published"] else []
    return (
        _environment()
        .get_template("template.html")
        .render(
            run=manifest,
            unreadable=unreadable.sentences(manifest["datasets"]),
            cautions=manifest.get("warnings", []),
            verdict=verdict(results),
            unscored=sentences(manifest.get("unscored", {}), manifest["datasets"]).values(),
            finished=datetime.fromisoformat(manifest["finished"]).astimezone(UTC),
            accuracies=[row for row in results.metrics.to_pylist() if row["metric"] == "id_accuracy"],
            metrics=compared(results.metrics) | {metric.name: metric for metric in FAILURES},
            costs={
                label: 1e6 * cost["seconds"] / cost["scores"]
                for label, cost in manifest.get("costs", {}).items()
            },
            summary=leaderboard(results.metrics, results.differences, GROUPS),
            failures=failure_board(results.metrics, results.differences),
            boards=metric_boards(results.metrics, results.differences),
            comparisons=comparisons(results, known),
            deviations=deviations(manifest["datasets"], known[0].protocol) if known else [],
            known=known,
            conventions={name: named(name) for name in ("fpr95_id", "fpr95_ood")},
            pictures=pictures,
            static=STATIC,
            groups_shown=SHOWN,
            uplot={name: _vendored(name) for name in ("LICENSE", "uPlot.iife.min.js", "uPlot.min.css")},
            review=reviewed,
            class_names=class_names.known(manifest),
            detectors=results.detectors,
            thresholds=results.thresholds,
            unlabelled=unlabelled,
            decided=dict(sorted(results.decided().items())),
            calibrated=calibrated.sentence(manifest, results.decisions) if results.decisions else "",
            flagging=calibrated.flagging(manifest),
            flagged={
                detector: [results.flagged_share(dataset, detector) for dataset in unlabelled]
                for detector in results.detectors
            },
            ood=results.datasets(*OOD),
            **more,
        )
    )


@cache
def _vendored(name: str) -> Markup:
    """A file of uPlot, unchanged."""
    return Markup((resources.files(__package__) / "uplot" / name).read_text(encoding="utf-8"))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(str(__package__), "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "plain": _plain,
        "parameters": _parameters,
        "percent": calibrated.percent,
        "class": class_names.shown,
    }
    environment.tests["harmless"] = harmless
    return environment


def _plain(value: Any) -> str:
    """A count or a measurement as a reader wants it: 5,800 and 12.3 and 0.9995."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _parameters(values: Mapping[str, Any]) -> str:
    """Parameters on one line."""
    return ", ".join(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in values.items())
