"""Everything that can be known before long work starts: data opened, model loaded, needs checked.

Starts no Ray and makes no forward pass over a dataset; every mistake of the user's surfaces here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import __version__, cluster, config, detectors, extract, index, places, published
from pipeline.columns import BLOCK_NORM, LABEL
from pipeline.config import Config, Dataset
from pipeline.datasets import Manifest, compile_manifest
from pipeline.detectors.base import Detector, Jigsaw, Mixup
from pipeline.errors import UserError, unknown
from pipeline.model import WRONG_SIZE, Classifier, load
from pipeline.places import Place


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start."""

    config: Config
    workspace: Place
    classifier: Classifier
    detectors: dict[str, Detector]
    jobs: dict[str, extract.Job]
    """Extraction jobs by dataset name."""

    @property
    def plan(self) -> extract.Plan:
        """What all forward passes share."""
        settings = self.config
        return extract.Plan(
            settings.model,
            settings.extract,
            settings.seed,
            self.classifier.digest,
            self.classifier.transform,
        )

    @property
    def folder(self) -> Place:
        """The run folder."""
        return self.workspace / "runs" / self.config.name

    def of_role(self, *roles: str) -> list[extract.Job]:
        """Jobs of the datasets with these roles."""
        return [self.jobs[dataset.name] for dataset in self.config.of_role(*roles)]

    def uses_ood(self, label: str) -> bool:
        """Whether a detector is fitted to OOD images, or its parameters were chosen on some."""
        tuned = any(entry.tuned_on_ood for entry in self.config.detectors if entry.label == label)
        return tuned or self.detectors[label].uses_ood()

    @property
    def training(self) -> dict[str, Any]:
        """What fitted detectors depend on besides their own parameters."""
        return {
            "train": [job.identity for job in self.of_role("train")],
            "id_val": [job.identity for job in self.of_role("id_val")],
            "ood_val": [job.identity for job in self.of_role("ood_val")],
            "seed": self.config.seed,
        }

    @property
    def scoring(self) -> str:
        """Digest of what scores depend on besides the rows that are scored."""
        entries = {label: detectors.identity(detector) for label, detector in self.detectors.items()}
        kind, shards = self.config.index.kind, self.config.index.shards
        cut = [kind] if kind == "flat" else [kind, shards]  # approximate ones depend on the cut
        return config.digest([entries, self.training, cut, __version__])

    @property
    def fingerprint(self) -> str:
        """Digest of what the results depend on."""
        roles = [(dataset.role, self.jobs[dataset.name].identity) for dataset in self.config.datasets]
        names = [dataset.name for dataset in self.config.datasets]
        return config.digest([self.scoring, roles, names])


def prepare(settings: Config) -> Prepared:
    """Open the data, load the model and check that they go together.

    Raises:
        UserError: the first thing found wrong, naming file, key or field and the fix.
    """
    chosen = settings.built()
    for detector in chosen.values():
        for part in detector.parts():
            cluster.carry(type(part))
    _check_roles(settings, chosen)
    _check_published(settings)
    if settings.tracking.enabled:
        tracking_uri(settings)
    places.require_writable(settings.workspace, "workspace")
    workspace = places.at(settings.workspace)
    classifier = load(settings.model, settings.seed)
    for label, detector in chosen.items():
        check_applies(label, detector, classifier)
    if any(detector.neighbours for detector in chosen.values()):
        index.made(settings.index.kind, classifier.head[0].shape[1])
    manifests = {
        dataset.name: compile_manifest(dataset, workspace / "manifests", settings.seed)
        for dataset in settings.datasets
    }
    for dataset in settings.datasets:
        _check_count(dataset, manifests[dataset.name].rows, settings.protocol)
        _check_labels(dataset, manifests[dataset.name], len(classifier.head[1]))
        _check_calibration(dataset, manifests[dataset.name], chosen)
    jobs = {}
    for dataset in settings.datasets:
        manifest = manifests[dataset.name]
        parts = extract.identity(classifier, manifest, settings.extract)
        jobs[dataset.name] = extract.job(dataset, manifest, parts, workspace)
    prepared = Prepared(settings, workspace, classifier, chosen, jobs)
    _check_neighbours(prepared)
    return prepared


def tracking_uri(settings: Config) -> str:
    """The MLflow store: the one configured, or an SQLite file in the workspace.

    Raises:
        UserError: if none is configured and the workspace cannot hold a database.
    """
    if settings.tracking.uri:
        return settings.tracking.uri
    workspace = places.at(settings.workspace)
    if isinstance(workspace, places.Remote):
        raise UserError(
            f"tracking.uri: not set, and {workspace} cannot hold MLflow's database. Name a server "
            "(tracking.uri=http://host:5000), or set tracking.enabled=false."
        )
    return f"sqlite:///{workspace / 'mlflow.db'}"


def _check_roles(settings: Config, chosen: dict[str, Detector]) -> None:
    if not settings.of_role("id"):
        raise UserError("datasets: none has role 'id'; add the ID test images.")
    if len(settings.of_role("train")) > 1:
        raise UserError("datasets: several have role 'train'; expected at most one. Put the images together.")
    for label, detector in chosen.items():
        check_data(label, detector, settings)


def check_data(label: str, detector: Detector, settings: Config) -> None:
    """Whether the config has the data a detector learns from.

    Raises:
        UserError: the role that no dataset plays.
    """
    if detector.needs_train() and not settings.of_role("train"):
        raise UserError(
            f"detectors.{label}: it learns from training images, but no dataset has role 'train'. "
            "Add one, or drop the detector."
        )
    if detector.calibration() and not settings.of_role("id_val", "train"):
        raise UserError(
            f"detectors.{label}: it is calibrated on held-out ID images, or else on training images, but no "
            "dataset has role 'id_val' or 'train'. Add one, or drop the detector."
        )
    if detector.uses_ood() and not settings.of_role("ood_val"):
        raise UserError(
            f"detectors.{label}: it uses OOD validation images, but no dataset has role 'ood_val'. "
            "Add one, or choose other parameters."
        )


def check_applies(label: str, detector: Detector, classifier: Classifier) -> None:
    """Whether the model has what a detector looks at: blocks with maps, layers to mix images at.

    Raises:
        UserError: the reason why the detector does not apply, and what to do about it.
    """
    found = classifier.taps
    if BLOCK_NORM in detector.columns and not found.blocks:
        raise UserError(
            f"detectors.{label}: the model has no block with maps or tokens whose channels are certain. "
            "Name some with model.blocks, or drop the detector."
        )
    named = getattr(detector, "block", "auto")
    if named not in ("auto", *found.blocks):
        raise UserError(f"detectors.{label}.block: {unknown('block', named, found.blocks)}")
    for spec in detector.passes():
        if isinstance(spec, Mixup) and spec.block == "auto" and found.early is None:
            raise UserError(
                f"detectors.{label}: the model has no block to mix images at. Name one of its layers with "
                "mixup_layer, or choose prototype noise or proto_mean."
            )
        if isinstance(spec, Mixup) and spec.block not in ("auto", *found.layers):
            raise UserError(f"detectors.{label}: {unknown('layer', spec.block, found.layers)}")
        if isinstance(spec, Jigsaw):
            _check_grid(f"detectors.{label}.grid", spec.grid, classifier)


def _check_grid(where: str, grid: int, classifier: Classifier) -> None:
    """Whether the network takes the slightly smaller images that jigsaws are."""
    crop, channels = classifier.transform.crop, classifier.transform.channels
    side = crop // grid * grid
    if side == 0:
        raise UserError(f"{where} is {grid} but images have {crop} pixels per side; lower grid.")
    if side == crop:
        return
    try:
        classifier.forward(np.zeros((2, side, side, channels), np.uint8))
    except WRONG_SIZE as error:
        raise UserError(
            f"{where}: jigsaws of {grid} x {grid} tiles have {side} pixels per side, which the model "
            f"does not take ({error}). Choose a grid that divides {crop}, or name the block."
        ) from None


def _check_labels(dataset: Dataset, manifest: Manifest, classes: int) -> None:
    """Labels within the head's classes, and every class present where order or training depends on it."""
    present = {label for label, count in manifest.class_count.items() if count and label != -1}
    if not present:
        return
    outside = sorted(label for label in present if not 0 <= label < classes)
    if outside:
        raise UserError(
            f"datasets.{dataset.name}: label {outside[0]} is outside the head's classes 0..{classes - 1}. "
            "Check that labels and model belong together."
        )
    by_order = dataset.format == "imagefolder" and dataset.labels is None
    found = present if dataset.role == "train" else set(manifest.class_count)
    absent = sorted(set(range(classes)) - found)
    if absent and (dataset.role == "train" or by_order):
        shown = ", ".join(map(str, absent[:5])) + (", ..." if len(absent) > 5 else "")
        raise UserError(
            f"datasets.{dataset.name}: {len(absent)} of the head's {classes} classes have no images "
            f"({shown}). Class folders are numbered in sorted order, and training needs every class; "
            "add the missing ones."
        )


def _check_calibration(dataset: Dataset, manifest: Manifest, chosen: dict[str, Detector]) -> None:
    """Labels of held-out images, where a detector reads them."""
    count = manifest.class_count.get(-1, 0)
    if dataset.role != "id_val" or not count:
        return
    for label, detector in chosen.items():
        if any(LABEL in statistic.columns for statistic in detector.calibration()):
            raise UserError(
                f"detectors.{label}: it is calibrated on labels, but {count:,} of {manifest.rows:,} images "
                f"of {dataset.name} (role 'id_val') have none. Name them (datasets.{dataset.name}.labels), "
                "or drop the detector."
            )


def _check_neighbours(prepared: Prepared) -> None:
    rows = sum(job.manifest.rows for job in prepared.of_role("train"))
    for label, detector in prepared.detectors.items():
        k = getattr(detector, "k", 0)
        if detector.neighbours and k > rows:
            raise UserError(f"detectors.{label}.k is {k} but there are {rows} training images; lower k.")


def _check_published(settings: Config) -> None:
    """Published numbers of another protocol would be compared with."""
    if settings.published is None:
        return
    protocols = {row.protocol for row in published.read(settings.published)}
    if settings.protocol not in protocols:
        raise UserError(
            f"published: the numbers of {settings.published} are of {', '.join(sorted(protocols))}, but "
            f"protocol is {settings.protocol}. Set published=null, or the protocol they belong to."
        )


def _check_count(dataset: Dataset, rows: int, protocol: str | None) -> None:
    """Results on more or fewer images than a protocol has are not results of it; a wanted sample says so."""
    sampled = dataset.limit or dataset.limit_per_class or dataset.include_labels
    if sampled or dataset.expected in (None, rows):
        return
    raise UserError(
        f"datasets.{dataset.name}: {rows:,} images in {dataset.path}, but {protocol or 'the config'} expects "
        f"{dataset.expected:,}. Complete the data; or, to run on these images anyway, remove the key or "
        f"--set datasets.{dataset.name}.expected=null. It does not apply to a sample (limit)."
    )
