"""What must be known before a number is believed: results that may mean nothing, a sentence each.

Whoever knows of one more kind adds a function of `Found` to `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FEW = 50
"""Images of a dataset below which its numbers are little more than a guess."""
HUGE = 1e10
"""Size of a score beyond which float64 arithmetic has usually lost what distinguished the images."""
COMPARED = ("id", "shifted_id", "near_ood", "far_ood")
"""Roles of datasets that are in the metrics."""


@dataclass(frozen=True)
class Found:
    """A run that has been evaluated."""

    manifest: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    """Rows of `metrics.json`."""
    thresholds: Mapping[str, float]
    """By detector."""

    def by_dataset(self, detector: str, metric: str) -> dict[str, Mapping[str, Any]]:
        """The rows of a metric of a detector, of every OOD dataset against the ID data."""
        return {
            row["dataset"]: row
            for row in self.metrics
            if (row["detector"], row["metric"]) == (detector, metric) and row["group"] in COMPARED
            if row["dataset"] != row["group"]
        }


def numbering(found: Found) -> Iterator[str]:
    """Labels in another order than the network's, and networks that guess."""
    for name, entry in found.manifest["datasets"].items():
        if entry.get("numbering"):
            yield f"{name}: {entry['numbering']}: see `labels` of the dataset."


def few_images(found: Found) -> Iterator[str]:
    """Datasets with too few images for any number to mean much."""
    for name, entry in found.manifest["datasets"].items():
        if entry["role"] in COMPARED and entry["features"] is not None and entry["features"] < FEW:
            yield (
                f"{name} has {entry['features']} images, fewer than {FEW}: numbers on it say little; "
                "read the intervals."
            )


def duplicates(found: Found) -> Iterator[str]:
    """Images that are in two datasets that must be apart."""
    datasets = found.manifest["datasets"]
    for each in found.manifest.get("duplicates", {}).get("shared", ()):
        name, other = each["dataset"], each["other"]
        keys = ", ".join(each["first"]) + ", ..." * (each["images"] > len(each["first"]))
        yield (
            f"{each['images']:,} of {datasets[name]['features']:,} images of {name} "
            f"({datasets[name]['role']}) are also in {other} ({datasets[other]['role']}), the same bytes "
            f"({keys}). Take them out of one of the two."
        )


def few_training_rows(found: Found) -> Iterator[str]:
    """Fewer training rows than dimensions, where a detector reads the feature."""
    entries = found.manifest["datasets"].values()
    rows = [entry["features"] for entry in entries if entry["role"] == "train"]
    width = found.manifest["model"]["feature_dim"]
    fitted = any("feature" in entry["columns"] for entry in found.manifest["detectors"].values())
    if fitted and rows and None not in rows and sum(rows) < width:
        yield (
            f"{sum(rows):,} training images for features of {width:,} dimensions: detectors that fit "
            "a covariance or a subspace are not determined. Use more training images."
        )


def below_chance(found: Found) -> Iterator[str]:
    """Detectors that rank OOD images below ID images, and not by the draw of the images alone."""
    for detector in found.manifest["detectors"]:
        rows = found.by_dataset(detector, "auroc")
        below = [f"{name} ({row['value']:.3f})" for name, row in rows.items() if row["ci_high"] < 0.5]
        if below:
            yield (
                f"{detector} is worse than guessing (AUROC below 0.5, with its whole interval) on "
                f"{', '.join(below)}."
            )


def no_information(found: Found) -> Iterator[str]:
    """Detectors no threshold of which separates anything, as of constant scores."""
    for detector in found.manifest["detectors"]:
        errors = found.by_dataset(detector, "detection_error")
        aurocs = found.by_dataset(detector, "auroc")
        names = [name for name, row in errors.items() if row["value"] == aurocs[name]["value"] == 0.5]
        if names:
            yield (
                f"{detector} does not tell {', '.join(names)} from the ID images at any threshold; "
                "its scores may all be equal."
            )


def huge_thresholds(found: Found) -> Iterator[str]:
    """Thresholds that no sensible score has."""
    for detector, threshold in found.thresholds.items():
        if not abs(threshold) < HUGE:
            yield (
                f"{detector} has scores of the size {abs(threshold):.0e} (threshold {threshold:.3g}): its "
                "numbers may be rounding. Check its parameters and the number of training images."
            )


KINDS: tuple[Callable[[Found], Iterator[str]], ...] = (
    numbering,
    few_images,
    duplicates,
    few_training_rows,
    below_chance,
    no_information,
    huge_thresholds,
)
"""What is looked for, in the order in which it is told."""


def cautions(found: Found) -> list[str]:
    """All that is to be said of a run before its numbers."""
    return [sentence for kind in KINDS for sentence in kind(found)]
