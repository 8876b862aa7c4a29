"""Everything that can be known before long work starts: data opened, model loaded, needs checked.

Starts no Ray and makes no forward pass over a dataset; every mistake of the user's surfaces here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import detectors
from pipeline.columns import BLOCK_NORM, LABEL
from pipeline.config import published
from pipeline.config.schema import Config, Dataset, Extract, Index
from pipeline.data import filters, metadata
from pipeline.data.manifest import Manifest, compile_manifest
from pipeline.data.metadata import Metadata
from pipeline.data.places import require_there
from pipeline.detectors._combination import Combination
from pipeline.detectors.base import Detector, Extra, Jigsaw, Mixup
from pipeline.errors import UserError, unknown
from pipeline.learned import statistics
from pipeline.metrics.metrics import LEVEL
from pipeline.network.description import NO_BLOCKS, WRONG_SIZE, Description
from pipeline.network.known import Network
from pipeline.stages import calibration, identity, index, memory, shards
from pipeline.stages.progress import SILENT, Stage
from pipeline.workspace import artifacts, files, runs
from pipeline.workspace.files import Place
from pipeline.workspace.patience import Unavailable

if TYPE_CHECKING:
    from pipeline.network.classifier import Classifier


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start."""

    config: Config
    workspace: Place
    network: Description
    detectors: dict[str, Detector]
    jobs: dict[str, shards.Job]
    """Extraction jobs by dataset name."""
    not_applicable: dict[str, str] = field(default_factory=dict)
    """Why optional detectors were left out, by label."""
    note: str = ""
    """Name of the note about the network."""
    fresh: bool = False
    """Whether everything is to be made again."""
    metadata: Metadata | None = None
    """What the report tells images apart by, as it was when all was checked."""

    @property
    def plan(self) -> shards.Plan:
        """What all forward passes share."""
        settings = self.config
        return shards.Plan(
            settings.model,
            settings.extract,
            settings.seed,
            self.network.digest,
            self.network.transform,
            self.network.probe,
            {extra.column: extra for job in self.jobs.values() for extra in job.extras},
        )

    @property
    def images(self) -> int:
        """How many all datasets have."""
        return sum(job.manifest.rows for job in self.jobs.values())

    @property
    def plain(self) -> bool:
        """Whether no work asks for more than one CPU."""
        indexed = any(detector.neighbours for detector in self.detectors.values())
        return self.config.extract.plain and (self.config.index.plain or not indexed)

    @property
    def banks(self) -> index.Sizes:
        """Of the banks of all detectors that look up neighbours, at most: not every row has to enter one."""
        searching = [each for each in self.detectors.values() if each.neighbours]
        different = {artifacts.digest(self.learned(each, {"k"})) for each in searching}
        rows = sum(job.manifest.rows for job in self.of_role("train"))
        return [(rows, self.network.head[0].shape[1])] * len(different)

    @cached_property
    def folder(self) -> Place:
        """The run folder."""
        return runs.folder_of(self.workspace, self.config.name, self.fingerprint, self.fresh)

    def of_role(self, *roles: str) -> list[shards.Job]:
        """Jobs of the datasets with these roles."""
        return [self.jobs[dataset.name] for dataset in self.config.of_role(*roles)]

    def uses_ood(self, label: str) -> bool:
        """Whether a detector is fitted to OOD images, or its parameters were chosen on some."""
        detector = self.detectors[label]
        members = detector.members if isinstance(detector, Combination) else ()
        tuned = any(entry.tuned_on_ood for entry in self.config.detectors if entry.label == label)
        return tuned or detector.uses_ood() or any(map(self.uses_ood, members))

    def names(self, *roles: str) -> list[str]:
        """Names of the features of the datasets with these roles."""
        return [job.name for job in self.of_role(*roles)]

    def learned(self, detector: Detector, without: Collection[str] = ()) -> dict[str, Any]:
        """What a fitted detector depends on: itself, the network, and the rows that it learns from.

        Args:
            detector: which.
            without: parameters that do not count.
        """
        parts: dict[str, Any] = {"detector": detectors.identity(detector, without)}
        parts["network"] = identity.described(self.network)
        if detector.needs_train():
            parts["train"] = self.names("train")
        if detector.calibrates():
            parts["held out"] = self.names("id_val") or self.names("train")
        if detector.uses_ood():
            parts["ood_val"] = self.names("ood_val")
        if detector.passes():
            parts["seed"] = self.config.seed
        wanted = [*detector.statistics(), *detector.calibration(), *detector.ood_statistics()]
        made = [each.identity for each in wanted]
        made += [{"pass": type(each).__name__, "version": each.version} for each in detector.passes()]
        made += [{"extra": each.kind, "version": each.version} for each in detector.extras()]
        return parts | {"made of": made}

    def scoring(self, label: str) -> dict[str, Any]:
        """What the scores of a detector depend on besides the rows that are scored."""
        detector, settings = self.detectors[label], self.config.index
        if isinstance(detector, Combination):
            return {
                "detector": detectors.identity(detector, {"members"}),
                "members": [self.scoring(member) for member in detector.members],
                "calibration": calibration.identity(
                    self.config, self.names(calibration.role_of(self.config))
                ),
            }
        approximate = detector.neighbours and settings.kind != "flat"
        if not approximate:
            return self.learned(detector)
        cut: list[Any] = [settings.kind, settings.shards]  # they depend on it
        if settings.shards == "auto":  # which the sizes of all banks decide
            others = [other for other in self.detectors.values() if other.neighbours]
            cut += sorted({artifacts.digest(self.learned(other, {"k"})) for other in others})
        return self.learned(detector) | {"index": cut}

    @cached_property
    def fingerprint(self) -> str:
        """Digest of what the results depend on."""
        roles = [
            (dataset.role, dataset.name, self.jobs[dataset.name].name) for dataset in self.config.datasets
        ]
        scored = {label: self.scoring(label) for label in self.detectors}
        level = self.config.metrics.fpr_level
        measured: list[dict[str, Any]] = [] if level == LEVEL else [{"fpr_level": level}]
        wanted = self.config.thresholds
        measured += [] if wanted is None else [{"thresholds": wanted.model_dump(mode="json")}]
        return artifacts.digest([scored, roles, self.config.seed, *measured])


@dataclass(frozen=True)
class Seen:
    """What one command has read of the user's data, each once for all of its configs."""

    manifests: dict[tuple[str, str, int | None, int], Manifest] = field(default_factory=dict)
    """By all that they depend on besides the files."""
    metadata: dict[str, Metadata] = field(default_factory=dict)
    """By path or URI."""

    def listed(self, dataset: Dataset, settings: Config) -> Manifest:
        """A dataset of a config, compiled."""
        limit = settings.extract.max_image_bytes
        seed = settings.seed if filters.sampled(dataset) else None
        known = settings.workspace, dataset.model_dump_json(), seed, limit
        if known not in self.manifests:
            folder = files.at(settings.workspace) / "manifests"
            self.manifests[known] = compile_manifest(dataset, folder, settings.seed, limit)
        return self.manifests[known]

    def told_apart(self, settings: Config) -> Metadata | None:
        """What the report of a config tells images apart by beside their classes."""
        path = settings.report.metadata
        if path is not None and path not in self.metadata:
            self.metadata[path] = metadata.read(path)
        return None if path is None else self.metadata[path]


def prepare(
    settings: Config,
    begin: Callable[[], object] = lambda: None,
    seen: Seen | None = None,
    stage: Stage = SILENT,
) -> Prepared:
    """Open the data, load the model and check that they go together.

    Args:
        settings: the config.
        begin: is called if there turns out to be much to do, before what takes seconds.
        seen: what was read for other configs of the same command, which is not read again; added to.
        stage: is told what is opened.

    Raises:
        UserError: the first thing found wrong, naming file, key or field and the fix.
    """
    seen = Seen() if seen is None else seen
    chosen = settings.built()
    _check_roles(settings)
    selection = Selection(chosen, settings.optional)
    selection.keep(lambda label, detector: check_members(label, detector, chosen))
    selection.keep(lambda label, detector: check_data(label, detector, settings))
    _check_published(settings)
    told_apart = seen.told_apart(settings)
    if settings.tracking.enabled:
        tracking_uri(settings)
    files.require_writable(settings.workspace, "workspace")
    workspace = files.at(settings.workspace)
    identity.require_decoder(settings.extract.decoder)
    for dataset in settings.datasets:
        require_there(dataset)
    stage.doing("opens the network")
    network = Network(settings.model, settings.seed, workspace, begin)
    known = network.description
    _check_precision(settings.extract, network)
    selection.keep(lambda label, detector: check_applies(label, detector, network))
    if any(detector.neighbours for detector in selection.detectors.values()):
        index.check(settings.index.kind, known.head[0].shape[1])
    network.note()
    manifests = _listed(settings, seen, stage)
    _check_metadata(settings, told_apart, manifests)
    stage.doing("checks labels and detectors")
    calibration.check(settings, _calibrating(settings, manifests))
    for dataset in settings.datasets:
        _check_count(dataset, manifests[dataset.name].rows, settings.protocol)
    selection.keep(lambda label, detector: check_training_labels(label, detector, settings, manifests))
    learned = any(_reads_labels(detector, settings) for detector in selection.detectors.values())
    for dataset in settings.datasets:
        _check_labels(dataset, manifests[dataset.name], len(known.head[1]), learned)
    held_out = {dataset.name: manifests[dataset.name] for dataset in settings.of_role("id_val")}
    selection.keep(lambda label, detector: check_calibration(label, detector, held_out))
    train = [manifests[dataset.name] for dataset in settings.of_role("train")]
    selection.keep(lambda label, detector: check_rows(label, detector, train, known))
    selection.keep(lambda label, detector: _check_k(label, detector, train, settings.index))
    if any(detector.neighbours for detector in selection.detectors.values()):
        index.check_rows(settings.index, known.head[0].shape[1], sum(manifest.rows for manifest in train))
    require_members(selection.detectors, selection.not_applicable)
    jobs = {}
    for dataset in settings.datasets:
        manifest = manifests[dataset.name]
        parts = identity.identity(known, manifest, settings.extract)
        wanted = _extras(dataset.role, selection.detectors.values())
        jobs[dataset.name] = shards.job(dataset, manifest, parts, workspace, known.probe, wanted)
    plain = Description.of(known.document(), known.arrays())  # what was loaded for it may be large
    return Prepared(
        settings,
        workspace,
        plain,
        selection.detectors,
        jobs,
        selection.not_applicable,
        network.name,
        metadata=told_apart,
    )


def _check_metadata(settings: Config, told_apart: Metadata | None, manifests: Mapping[str, Manifest]) -> None:
    names = [dataset.name for dataset in settings.of_role("id", "near_ood", "far_ood")]
    if told_apart is not None:
        told_apart.require_of({name: manifests[name] for name in names})


def _listed(settings: Config, seen: Seen, stage: Stage) -> dict[str, Manifest]:
    """All datasets, compiled, by name."""
    found = {}
    for dataset in settings.datasets:
        stage.doing(f"lists the images of {dataset.name}")
        found[dataset.name] = seen.listed(dataset, settings)
    return found


def obstacles(found: Mapping[str, Detector], settings: Config) -> dict[str, str]:
    """Why detectors do not apply to the model and the data of a config, by label; none for those that do.

    Raises:
        UserError: if model or training data cannot be opened.
    """
    network = Network(settings.model, settings.seed, files.at(settings.workspace))
    seen = Seen()
    manifests = {each.name: seen.listed(each, settings) for each in settings.of_role("train", "id_val")}
    train = [manifests[dataset.name] for dataset in settings.of_role("train")]
    held_out = {dataset.name: manifests[dataset.name] for dataset in settings.of_role("id_val")}
    selection = Selection(dict(found), found)
    selection.keep(lambda label, detector: check_members(label, detector, found))
    selection.keep(lambda label, detector: check_data(label, detector, settings))
    selection.keep(lambda label, detector: check_applies(label, detector, network))
    selection.keep(lambda label, detector: check_training_labels(label, detector, settings, manifests))
    selection.keep(lambda label, detector: check_calibration(label, detector, held_out))
    selection.keep(lambda label, detector: check_rows(label, detector, train, network.description))
    selection.keep(lambda label, detector: _check_k(label, detector, train, settings.index))
    return selection.not_applicable


@dataclass
class Selection:
    """Detectors, some of which may turn out not to apply."""

    detectors: dict[str, Detector]
    """Those that nothing was found against."""
    optional: Collection[str]
    """Labels of those that may be left out; the others are refused."""
    not_applicable: dict[str, str] = field(default_factory=dict)
    """Why detectors were left out, by label."""

    def keep(self, check: Callable[[str, Detector], None]) -> None:
        """Leave out the optional detectors that do not pass a check.

        Raises:
            UserError: the check's, if another one does not; or a store does not answer.
        """
        for label, detector in list(self.detectors.items()):
            try:
                check(label, detector)
            except UserError as error:
                if label not in self.optional or isinstance(error, Unavailable):
                    raise
                self.not_applicable[label] = str(error).removeprefix(f"detectors.{label}").lstrip(".: ")
                del self.detectors[label]


def tracking_uri(settings: Config) -> str:
    """The MLflow store: the one configured, or an SQLite file in the workspace.

    Raises:
        UserError: if none is configured and the workspace cannot hold a database.
    """
    if settings.tracking.uri:
        return settings.tracking.uri
    workspace = files.at(settings.workspace)
    if isinstance(workspace, files.Remote):
        raise UserError(
            f"tracking.uri: not set, and {workspace} cannot hold MLflow's database. Name a server "
            "(tracking.uri=http://host:5000), or set tracking.enabled=false."
        )
    return f"sqlite:///{workspace / 'mlflow.db'}"


def _check_precision(settings: Extract, network: Network) -> None:
    """Whether the network runs in half precision; on CPUs, as what a GPU can do shows only there."""
    on_cpu = identity.device(settings.device, settings.gpus_per_actor) == "cpu"
    if settings.precision == "fp32" or not on_cpu:
        return

    def run(classifier: Classifier) -> None:
        side, channels = classifier.transform.crop, classifier.transform.channels
        try:
            half = replace(classifier, precision=settings.precision)
            half.forward(np.zeros((2, side, side, channels), np.uint8))
        except (*WRONG_SIZE, NotImplementedError) as error:
            raise UserError(
                f"extract.precision: the model does not run in {settings.precision} on a CPU ({error}). "
                "Set it to fp32, or choose another."
            ) from error

    network.check(["precision", settings.precision], run)


def _check_roles(settings: Config) -> None:
    if not settings.of_role("id"):
        raise UserError("datasets: none has role 'id'; add the ID test images.")
    calibration.check_roles(settings)
    if len(settings.of_role("train")) > 1:
        raise UserError("datasets: several have role 'train'; expected at most one. Put the images together.")


def _calibrating(settings: Config, manifests: Mapping[str, Manifest]) -> dict[str, tuple[int, int]]:
    """Images that thresholds are calibrated on, and all, by dataset."""
    split = calibration.Split.of(settings)
    found = {each.name: manifests[each.name] for each in settings.of_role(calibration.role_of(settings))}
    return {
        name: (
            manifest.rows if split is None else int(split.calibrates(manifest.keys()).sum()),
            manifest.rows,
        )
        for name, manifest in found.items()
    }


def check_data(label: str, detector: Detector, settings: Config) -> None:
    """Whether the config has the data a detector learns from.

    Raises:
        UserError: the role that no dataset plays.
    """
    if isinstance(detector, Combination) and not settings.of_role(calibration.role_of(settings)):
        raise UserError(
            f"detectors.{label}: it ranks the scores of its members among those of held-out ID images, but "
            "no dataset has role 'id_val'. Add one, or set thresholds.false_alarm, e.g. [0.05], and "
            "thresholds.calibrate_on: id."
        )
    if detector.needs_train() and not settings.of_role("train"):
        raise UserError(
            f"detectors.{label}: it learns from training images, but no dataset has role 'train'. "
            "Add one, or drop the detector."
        )
    if detector.calibrates() and not settings.of_role("id_val", "train"):
        raise UserError(
            f"detectors.{label}: it is calibrated on held-out ID images, or else on training images, but no "
            "dataset has role 'id_val' or 'train'. Add one, or drop the detector."
        )
    if detector.uses_ood() and not settings.of_role("ood_val"):
        raise UserError(
            f"detectors.{label}: it uses OOD validation images, but no dataset has role 'ood_val'. "
            "Add one, or choose other parameters."
        )


def check_members(label: str, detector: Detector, chosen: Mapping[str, Detector]) -> None:
    """Whether a detector that combines others names some of the run.

    Raises:
        UserError: too few, an unknown one, one twice, or one that combines others itself.
    """
    if not isinstance(detector, Combination):
        return
    where, members = f"detectors.{label}.members", detector.members
    alone = [name for name, each in chosen.items() if not isinstance(each, Combination)]
    if len(members) < 2:
        raise UserError(f"{where}: got {len(members)}; expected two detectors of the run or more. Name them.")
    for member in members:
        if member in chosen and member not in alone:
            raise UserError(f"{where}: {member} combines others itself. Name its members instead.")
        if member not in alone:
            raise UserError(f"{where}: {unknown('detector', member, alone)}")
        if members.count(member) > 1:
            raise UserError(f"{where}: {member} is named twice. Leave one out.")


def require_members(left: Mapping[str, Detector], not_applicable: Mapping[str, str]) -> None:
    """Refuse detectors that combine others of which one was left out.

    Raises:
        UserError: names both, and why it was left out.
    """
    for label, detector in calibration.combinations(left).items():
        for member in detector.members:
            if member in not_applicable:
                raise UserError(
                    f"detectors.{label}.members: {member} does not apply: {not_applicable[member]} Leave "
                    "it out."
                )


def check_applies(label: str, detector: Detector, network: Network) -> None:
    """Whether the model has what a detector looks at: blocks with maps, layers to mix images at.

    Raises:
        UserError: the reason why the detector does not apply, and what to do about it.
    """
    found = network.description.taps
    if BLOCK_NORM in detector.columns and not found.blocks:
        raise UserError(f"detectors.{label}: {NO_BLOCKS}")
    named = getattr(detector, "block", "auto")
    if named not in ("auto", *found.blocks):
        raise UserError(f"detectors.{label}.block: {unknown('block', named, found.blocks)}")
    _check_network(label, detector, network)
    for spec in detector.passes():
        if isinstance(spec, Mixup):
            _check_layer(label, spec, network.description)
        if isinstance(spec, Jigsaw):
            _check_grid(f"detectors.{label}.grid", spec.grid, network.description.transform.crop)


def _check_network(label: str, detector: Detector, network: Network) -> None:
    """Whether parameters suit the network, and it gives the extra columns."""
    known = network.description
    classes, width = known.head[0].shape
    try:
        for part in detector.parts():
            part.check(width, known.taps.stages)
            _check_table(part, 8 * part.table(classes, width, known.taps.stages), classes)
        for extra in detector.extras():
            network.check([type(extra).__name__, extra.model_dump(mode="json")], partial(_try, extra))
    except UserError as error:
        raise UserError(f"detectors.{label}: {error}") from None


def _check_table(detector: Detector, held: int, classes: int) -> None:
    """Whether a task may hold the largest array of a detector."""
    if held > memory.MOST:
        raise UserError(
            f"{detector.name} holds {held / 2**30:.1f} GiB for the {classes:,} classes of the model, more "
            f"than the {memory.MOST >> 30} GiB that a task may. Drop the detector."
        )


def _try(extra: Extra, classifier: Classifier) -> None:
    from pipeline.network import extras  # takes seconds to import

    extras.check(extra, classifier)


def _extras(role: str, chosen: Iterable[Detector]) -> list[Extra]:
    """Extra columns that a dataset needs: all to be scored, those that statistics and banks read to train."""
    needed: dict[Extra, None] = {}
    for detector in chosen:
        read = statistics.columns([*detector.statistics(), *detector.calibration()])
        whole = role != "train" or detector.neighbours
        needed |= {extra: None for extra in detector.extras() if whole or extra.column in read}
    return list(needed)


def _check_layer(label: str, spec: Mixup, known: Description) -> None:
    """Whether there is the layer at which images are to be mixed."""
    found = known.taps
    if spec.block == "auto" and found.early is None:
        raise UserError(
            f"detectors.{label}: the model has no block to mix images at. Name one of its layers with "
            "mixup_layer, or choose prototype noise or proto_mean."
        )
    if spec.block not in ("auto", *found.layers):
        raise UserError(f"detectors.{label}: {unknown('layer', spec.block, found.layers)}")


def _reads_labels(detector: Detector, settings: Config) -> bool:
    """Whether a detector reads the labels of training images."""
    calibrated = () if settings.of_role("id_val") else detector.calibration()
    return LABEL in statistics.columns([*detector.statistics(), *calibrated])


def check_training_labels(
    label: str, detector: Detector, settings: Config, manifests: Mapping[str, Manifest]
) -> None:
    """Whether training images have labels, where a detector reads them.

    Raises:
        UserError: the dataset that lacks some.
    """
    for dataset in settings.of_role("train") if _reads_labels(detector, settings) else ():
        manifest = manifests[dataset.name]
        count = manifest.class_count.get(-1, 0)
        if count:
            raise UserError(
                f"detectors.{label}: it reads the labels of training images, but {count:,} of "
                f"{manifest.rows:,} images of {dataset.name} have none. Name them "
                f"(datasets.{dataset.name}.labels) or use class folders, or drop the detector."
            )


def check_calibration(label: str, detector: Detector, held_out: Mapping[str, Manifest]) -> None:
    """Whether held-out images have labels, where a detector reads them.

    Raises:
        UserError: the dataset that has none.
    """
    if not any(LABEL in each.columns for each in detector.calibration()):
        return
    for name, manifest in held_out.items():
        count = manifest.class_count.get(-1, 0)
        if count:
            raise UserError(
                f"detectors.{label}: it is calibrated on labels, but {count:,} of {manifest.rows:,} images "
                f"of {name} (role 'id_val') have none. Name them (datasets.{name}.labels), or drop the "
                "detector."
            )


def check_rows(label: str, detector: Detector, train: Sequence[Manifest], known: Description) -> None:
    """Whether there are as many training images as neighbours are looked up, and as a fit takes.

    Raises:
        UserError: if there are fewer.
    """
    k = getattr(detector, "k", 0)
    rows = sum(manifest.rows for manifest in train)
    if detector.neighbours and k > rows:
        raise UserError(f"detectors.{label}.k is {k} but there are {rows} training images; lower k.")
    for manifest in train:
        try:
            for part in detector.parts():
                part.check_rows(known.head[0].shape[1], known.taps.stages, rows, manifest.class_count)
        except UserError as error:
            raise UserError(f"detectors.{label}: {error}") from None


def _check_k(label: str, detector: Detector, train: Sequence[Manifest], settings: Index) -> None:
    """Whether so many neighbours can be looked up, as far as the parameters say how many."""
    k = getattr(detector, "k", None)
    if detector.neighbours and isinstance(k, int):
        index.check_k(label, k, sum(manifest.rows for manifest in train), settings)


def _check_grid(where: str, grid: int, crop: int) -> None:
    """Whether tiles have a pixel at least."""
    if grid > crop:
        raise UserError(f"{where} is {grid} but images have {crop} pixels per side; lower grid.")


def _check_labels(dataset: Dataset, manifest: Manifest, classes: int, learned: bool) -> None:
    """Labels within the head's classes, and every class present where order or training depends on it.

    Args:
        dataset: its config.
        manifest: its images.
        classes: of the head.
        learned: whether a detector reads the labels of training images.
    """
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
    if absent and (learned if dataset.role == "train" else by_order):
        shown = ", ".join(map(str, absent[:5])) + (", ..." if len(absent) > 5 else "")
        raise UserError(
            f"datasets.{dataset.name}: {len(absent)} of the head's {classes} classes have no images "
            f"({shown}). Class folders are numbered in the order of their names, and training "
            "needs every class; add the missing ones."
        )


def _check_published(settings: Config) -> None:
    """Whether published numbers are of the same protocol."""
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
