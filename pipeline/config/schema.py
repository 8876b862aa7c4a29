"""One run, as a validated and frozen configuration: YAML in, pydantic models out.

Reads the config file and nothing else; whether paths exist and models fit is checked by the stages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)

from pipeline import detectors
from pipeline.columns import CALIBRATION, ERROR, IS_OOD, KEY, LABEL, P_VALUE, PREDICTION
from pipeline.config.explanations import explain
from pipeline.config.grids import Tune, points
from pipeline.detectors._combination import Combination
from pipeline.detectors._steps import combined
from pipeline.detectors.base import Detector
from pipeline.errors import UserError, unknown
from pipeline.metrics.metrics import HIGHEST, LEVEL, LOWEST
from pipeline.parameters import Frozen

Role = Literal["train", "id", "near_ood", "far_ood", "shifted_id", "id_val", "ood_val", "unlabelled"]
LABELLED_ROLES = ("id", "shifted_id")
"""Roles whose images all need a label."""
ID_ROLES = ("train", *LABELLED_ROLES, "id_val")
"""Roles whose labels, as far as there are any, are classes of the model; those of other roles are dropped."""
CLASS_FILES = (".txt", ".csv", ".json", ".yaml", ".yml")
"""Endings of files that say which index a class name has."""
MAX_IMAGE_MIB = 512
"""Default of `extract.max_image_mib`."""
Start = Literal["current", "file", "data"]
"""What a relative path starts from: the current folder, the config file's, or `data` if that is set."""
LARGEST_SIDE = 16384
"""Pixels along an image as a network may want it."""
Text = Annotated[str, Field(min_length=1)]
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Name = Annotated[str, Field(pattern=NAME, max_length=100)]
"""A name that is a folder, a column and an MLflow metric at once."""


def _are_own(resources: dict[str, float]) -> dict[str, float]:
    for name in resources:
        if name in ("CPU", "GPU", "memory", "object_store_memory"):
            raise ValueError(f"{name} is no resource of the cluster's own; there are keys for CPUs and GPUs")
    return resources


Resources = Annotated[dict[str, Annotated[float, Field(gt=0)]], AfterValidator(_are_own)]
"""Amounts by names that nodes declare (`ray start --resources`)."""
Rate = Annotated[float, Field(gt=0, lt=1)]


class Transform(Frozen):
    """From a decoded image to the network's input; the ID normalisation for every dataset."""

    resize: int | None = Field(
        default=None, ge=1, le=LARGEST_SIDE, description="shorter side in pixels; null keeps the size"
    )
    crop: int = Field(ge=1, le=LARGEST_SIDE, description="side of the central square that the network sees")
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, ...] = Field(description="per channel, for pixels scaled to [0, 1]")
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(description="per channel")
    channels: Literal[1, 3] = 3

    @model_validator(mode="after")
    def _one_value_per_channel(self) -> Transform:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(
                f"mean has {len(self.mean)} and std {len(self.std)} values, expected {self.channels} each"
            )
        return self


class Model(Frozen):
    """The classifier."""

    source: str = Field(
        description="torchvision, timm, exported or factory; a file of pipeline/network/sources"
    )
    name: Text = Field(
        description="torchvision or timm name; an exported program (.pt2); or 'package.module:function' or "
        "'./file.py:function'"
    )
    weights: str | None = Field(
        default=None,
        description="state dict (.safetensors, or .pt read with weights_only), published weights of "
        "torchvision (IMAGENET1K_V1), or 'random'; null keeps what a factory returns or a program holds",
    )
    options: dict[str, Any] = Field(
        default={}, description="keyword arguments for the model's constructor, e.g. {num_classes: 10}"
    )
    head: str = Field(default="auto", description="module name of the last linear layer")
    blocks: Literal["auto"] | tuple[str, ...] = Field(default="auto", description="FeatureNorm candidates")
    transform: Transform | str = Field(
        default="auto", description="auto, the name of a torchvision weights preset, or written out"
    )

    @model_validator(mode="after")
    def _weights_are_given_once(self) -> Model:
        twice = sorted(set(self.options) & {"weights", "pretrained", "checkpoint_path", "cache_dir"})
        if twice:
            raise ValueError(f"options: {twice[0]} would load weights; name them in weights")
        return self


class Dataset(Frozen):
    """One set of images and the part it plays."""

    name: Name
    role: Role
    expected: int | None = Field(
        default=None,
        ge=1,
        description="images that the protocol has here; another number is refused unless a sample "
        "(limit, limit_per_class, include_labels) is wanted",
    )
    format: str
    path: Text = Field(
        description="file or folder, local or a URI; webdataset, parquet: also `*` in the last part, and "
        "ranges as {000..012}; 'package://module/file' for data inside a package"
    )
    root: str | None = Field(
        default=None, description="imagelist: folder the listed paths are relative to; null = the list's own"
    )
    images: str | None = Field(
        default=None,
        description="npz: image array; parquet: image column; webdataset: ending of the image members, "
        "as input.png",
    )
    labels: str | None = Field(
        default=None,
        description="imagefolder, imagelist: what a class name means: 'imagenet1k', 'index' (the name is the "
        "number), or a .txt, .csv, .json or .yaml file; null = class folders numbered "
        "in the order of their names as text (0, 1, 10, 2), as torchvision's ImageFolder does. "
        "npz: label array; idx: label file; parquet: label column; webdataset: key in the .json members",
    )
    identity: Literal["stat", "content"] = Field(
        default="stat",
        description="what an image is known by besides its key: size and time stamp of its file (stat), or "
        "its bytes (content), which a copy of the dataset has, too; listing then reads every image once",
    )
    include_labels: tuple[int | str, ...] | None = Field(
        default=None, min_length=1, description="keeps the images of these classes (indices or names)"
    )
    limit_per_class: int | None = Field(
        default=None, ge=1, description="keeps a seeded uniform sample of so many images of each class"
    )
    limit: int | None = Field(
        default=None, ge=1, description="keeps a seeded uniform sample of so many images"
    )


class Extract(Frozen):
    """The forward pass."""

    batch_size: int = Field(default=256, ge=1, le=1_000_000)
    extras_batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        default="auto",
        description="images at once in extra passes, such as those with gradients, which take several times "
        "the memory of the forward pass; no more than batch_size, which is auto",
    )
    shard_rows: Literal["auto"] | Annotated[int, Field(ge=1, le=100_000_000)] = Field(
        default="auto",
        description="images per output file, the unit of resume; auto = 2048, less where pixels are many",
    )
    actors: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        default="auto", description="model copies; auto = as many as the cluster has room for"
    )
    cpus_per_actor: float = Field(default=1, gt=0)
    gpus_per_actor: float = Field(default=0, ge=0)
    resources: Resources = Field(
        default={}, description="resources of the cluster's own that each actor needs, e.g. {a100: 1}"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto = cuda where gpus_per_actor > 0"
    )
    decode: Literal["auto", "fused", "separate"] = Field(
        default="auto",
        description="fused: a model actor decodes its own images; separate: tasks on any CPU of the cluster "
        "decode for it; auto = separate where gpus_per_actor > 0",
    )
    decoder: Literal["pillow", "simplejpeg"] = Field(
        default="pillow", description="simplejpeg is faster on JPEG files; Pillow still reads all others"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="of the network's body; norms, logits and all that follows stay in fp32"
    )
    channels_last: bool = Field(
        default=False, description="memory layout of images and maps; often faster for convolutions"
    )
    compile: bool = Field(default=False, description="run the network through torch.compile")
    feature_dtype: Literal["float32", "float16"] = Field(
        default="float32", description="of stored features; float16 halves the cache and rounds them"
    )
    max_image_mib: int = Field(
        default=MAX_IMAGE_MIB,
        ge=1,
        description="size in MiB of an encoded image above which it is not read but listed as unreadable",
    )
    max_bad_fraction: float = Field(
        default=0.01, ge=0, le=1, description="share of unreadable images above which the run fails"
    )

    @property
    def extras_size(self) -> int:
        """Images at once in a pass for an extra column."""
        asked = self.batch_size if self.extras_batch_size == "auto" else self.extras_batch_size
        return min(asked, self.batch_size)

    @property
    def max_image_bytes(self) -> int:
        """Size of an encoded image above which it is not read."""
        return self.max_image_mib * 2**20

    @property
    def needs(self) -> dict[str, float]:
        """What a model actor needs, by the names of Ray's resources."""
        return {"CPU": self.cpus_per_actor, "GPU": self.gpus_per_actor, **self.resources}

    @property
    def plain(self) -> bool:
        """Whether a model actor asks for no more than one CPU."""
        return _plain(self.needs, self.device)


class Score(Frozen):
    """What every detector says of every image."""

    max_unscored_fraction: float = Field(
        default=0.01,
        ge=0,
        lt=1,
        description="share of the images of a dataset without a finite score of a detector, above which the "
        "run fails",
    )


class Metrics(Frozen):
    """How detectors are measured."""

    fpr_level: float = Field(
        default=LEVEL,
        ge=LOWEST,
        le=HIGHEST,
        description="share of the positive images that FPR is measured at; 0.95 gives fpr95_id and fpr95_ood",
    )


class Report(Frozen):
    """The page about a run."""

    images: int = Field(
        default=6,
        ge=0,
        le=50,
        description="images of each dataset that the page shows: what the best detector missed, caught, or "
        "took for OOD, and that detectors disagree on; 0 = none",
    )
    metadata: Text | None = Field(
        default=None,
        description="table (.csv or .parquet) with the columns key, dataset where keys repeat, and others "
        "that the page tells errors by, e.g. camera",
    )


class Thresholds(Frozen):
    """When an image is called OOD: by how rarely an ID image may be."""

    false_alarm: Annotated[tuple[Rate, ...], Field(min_length=1)] = Field(
        description="false-alarm rates, shares of ID images that may be flagged; the first one flags the "
        "images of role unlabelled"
    )
    calibrate_on: Literal["id_val", "id"] = Field(
        default="id_val",
        description="ID images that the thresholds come from: those of role id_val, or a part of those of "
        "role id, which is then left out of all metrics",
    )
    share: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="calibrate_on id: share of the images that calibrate, drawn by seed and key; null = 0.5",
    )
    per_class: bool = Field(
        default=False, description="a threshold for each predicted class, from images of the same prediction"
    )
    fdr: Rate | None = Field(
        default=None,
        description="flags the images of role unlabelled together instead, by Benjamini and Hochberg, at "
        "this false-discovery rate",
    )

    @model_validator(mode="after")
    def _meant(self) -> Thresholds:
        if len(set(self.false_alarm)) < len(self.false_alarm):
            raise ValueError("false_alarm: a rate is given twice")
        if self.share is not None and self.calibrate_on != "id":
            raise ValueError("share is of the images of role id; set calibrate_on: id, or leave it out")
        return self

    @property
    def smallest(self) -> float:
        """The rate that takes most calibration images."""
        return min(*self.false_alarm, self.fdr or 1.0)


class Index(Frozen):
    """The nearest-neighbour index over training rows."""

    kind: str = Field(
        default="flat",
        description="'flat' (exact) or a FAISS factory string: 'SQfp16' holds half the bytes, "
        "'IVF4096,SQ8' a quarter",
    )
    shards: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        default="auto",
        description="auto = as many as there is work and room for, of an approximate kind one for every 8 "
        "GiB of vectors; a flat index of at most 64 MiB lies in each process that scores instead",
    )
    cpus_per_shard: float = Field(
        default=0.5,
        gt=0,
        description="what each reserves; it computes with as many threads, at least one. Half a CPU, as "
        "those that score wait for it while it searches",
    )
    gpus_per_shard: float = Field(default=0, ge=0)
    resources: Resources = Field(
        default={}, description="resources of the cluster's own that each shard needs, e.g. {highmem: 1}"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto = cuda where gpus_per_shard > 0"
    )

    @property
    def needs(self) -> dict[str, float]:
        """What the actor of a shard needs, by the names of Ray's resources."""
        return {"CPU": self.cpus_per_shard, "GPU": self.gpus_per_shard, **self.resources}

    @property
    def plain(self) -> bool:
        """Whether the actor of a shard asks for no more than one CPU."""
        return _plain(self.needs, self.device)


def _plain(needs: Mapping[str, float], device: str) -> bool:
    return device != "cuda" and not any(amount > (name == "CPU") for name, amount in needs.items())


class Tracking(Frozen):
    """Where MLflow finds the results."""

    uri: str | None = Field(default=None, description="null = SQLite file in the workspace")
    experiment: str = "ood-evaluation"
    enabled: bool = True

    @model_validator(mode="after")
    def _a_store(self) -> Tracking:
        if self.uri is not None and not re.match(r"(sqlite:///|https?://).", self.uri):
            raise ValueError(
                f"{self.uri} is no MLflow store; give sqlite:///<path>.db or http(s)://<host>:<port>"
            )
        return self


class DetectorEntry(Frozen):
    """A detector under the name its column has."""

    label: Name
    method: str = Field(
        description="name of a detector; 'package.module:Class' or './file.py:Class' for one of your own"
    )
    parameters: dict[str, Any] = Field(default={})
    tuned_on_ood: bool = Field(
        default=False,
        description="parameters were chosen on OOD images; marked wherever a result is shown",
    )
    optional: bool = Field(
        default=False,
        description="left out, and listed with the reason, where it does not apply; set by 'detectors: all'",
    )
    steps: Annotated[tuple[DetectorEntry, ...], BeforeValidator(lambda given: _entries(given))] = Field(
        default=(), description="changes of the feature or the last layer before the score, in their order"
    )

    @property
    def methods(self) -> str:
        """The method and the steps before it, in order."""
        return " + ".join([*(step.method for step in self.steps), self.method])

    def build(self) -> Detector:
        """The detector with its parameters validated.

        Raises:
            UserError: unknown method or parameter, a value out of range, or steps that do not fit.
        """
        return self._built(f"detectors.{self.label}")

    def _built(self, where: str) -> Detector:
        steps = [step._built(f"{where}.steps.{step.label}") for step in self.steps]
        try:
            method = detectors.get(self.method)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        try:
            detector = method.model_validate(self.parameters)
            return combined(detector, steps) if steps else detector
        except ValidationError as error:
            raise UserError("\n".join(explain(error, f"{where}.", method))) from None
        except UserError as error:
            raise UserError(f"{where}.steps: {error}") from None


def _entries(value: Any) -> Any:
    """Accept 'all', a list of names, and {name: parameters} with an optional `method` and `steps`."""
    if value == "all":
        return [{"label": name, "method": name, "optional": True} for name in detectors.names()]
    if not isinstance(value, list):
        raise ValueError("expected 'all' or a list of detectors")
    entries: list[Any] = []
    for item in value:
        if isinstance(item, str):
            entries.append({"label": item, "method": item})
        elif isinstance(item, dict) and not set(item) <= set(DetectorEntry.model_fields):
            entries += [_entry(label, given) for label, given in item.items()]
        else:
            entries.append(item)
    return entries


def sound(value: Any) -> list[DetectorEntry]:
    """The detectors of a config that has mistakes elsewhere, as far as they can be checked without it."""
    try:
        given = _entries(value)
    except ValueError:
        return []
    found = []
    for entry in given:
        with suppress(ValidationError):
            found.append(DetectorEntry.model_validate(entry))
    return [entry for entry in found if ":" not in entry.method]  # files start from the config's folder


def _entry(label: str, given: Any) -> dict[str, Any]:
    """`label: {method: name, steps: [...], parameter: value, ...}` as a detector entry."""
    if not isinstance(given, dict | None):
        raise ValueError(f"{label!r}: expected its parameters, e.g. {{knn: {{k: 50}}}}, got {given!r}")
    parameters = dict(given or {})
    own = {name: parameters.pop(name) for name in ("method", "steps", "tuned_on_ood") if name in parameters}
    return {"label": label, "method": label, **own, "parameters": parameters}


BY_HARDWARE = (("extract", "gpus_per_actor"), ("index", "gpus_per_shard"))
"""Sections and keys that are 1 with `hardware: gpu` and 0 without, where they are not given."""


class Config(Frozen):
    """One run."""

    name: Name
    seed: int = Field(default=0, ge=0, lt=2**63)
    workspace: Text = "./workspace"
    protocol: str | None = Field(default=None, description="name of the benchmark that this is a run of")
    published: str | None = Field(
        default=None, description="table of published numbers of the protocol that the report compares with"
    )
    data: str | None = Field(
        default=None,
        description="folder, relative to the current one, or URI that relative paths of datasets and weights "
        "start from; null = the folder of the config file",
    )
    hardware: Literal["cpu", "gpu"] = Field(
        default="cpu",
        description="gpu = a GPU for each model actor and each shard of the index, where "
        "extract.gpus_per_actor and index.gpus_per_shard are not given",
    )
    model: Model
    datasets: tuple[Dataset, ...] = Field(min_length=1)
    detectors: Annotated[tuple[DetectorEntry, ...], BeforeValidator(_entries)] = Field(min_length=1)
    extract: Extract = Extract()
    index: Index = Index()
    score: Score = Score()
    metrics: Metrics = Metrics()
    report: Report = Report()
    thresholds: Thresholds | None = Field(
        default=None, description="null = one threshold per detector, which 95 % of the ID test images pass"
    )
    tracking: Tracking = Tracking()
    tune: Tune | None = None

    @model_validator(mode="before")
    @classmethod
    def _on_gpus(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("hardware") != "gpu":
            return given
        found = dict(given)
        for part, key in BY_HARDWARE:
            if isinstance(section := given.get(part, {}), dict):
                found[part] = {key: 1, **section}
        return found

    @model_validator(mode="after")
    def _names_are_unique(self) -> Config:
        wrong: list[str] = []
        for what, found in (
            ("datasets", [dataset.name for dataset in self.datasets]),
            ("detectors", [entry.label for entry in self.detectors]),
        ):
            twice = sorted({name for name in found if found.count(name) > 1})
            wrong += [f"{what}: the name {name!r} is used twice; give each its own" for name in twice]
        groups = {"id", "near_ood", "far_ood", "fs_near_ood", "fs_far_ood"}
        for dataset in self.datasets:
            if dataset.name in groups:
                wrong.append(f"datasets: {dataset.name!r} is the name of a group; choose another")
        for entry in self.detectors:
            reserved = (KEY, LABEL, PREDICTION, CALIBRATION, ERROR, "classifier")
            if entry.label in reserved or entry.label.startswith((IS_OOD, P_VALUE)):
                wrong.append(f"detectors: {entry.label!r} is a column of the results; choose another")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def built(self) -> dict[str, Detector]:
        """The detectors with validated parameters, by label."""
        return {entry.label: entry.build() for entry in self.detectors}

    @property
    def optional(self) -> set[str]:
        """Labels of the detectors that are left out where they do not apply."""
        return {entry.label for entry in self.detectors if entry.optional}

    def points(self) -> dict[str, dict[str, DetectorEntry]]:
        """The points of the grids of `tune`, by label of the detector and of the point, each validated.

        Raises:
            UserError: unknown detector or parameter, or a value out of range.
        """
        entries = {entry.label: entry for entry in self.detectors}
        found = {}
        for label, grid in self.tune.grids.items() if self.tune else ():
            if label not in entries:
                raise UserError(f"tune.grids.{label}: {unknown('detector', label, entries)}")
            entry = entries[label]
            if issubclass(detectors.get(entry.method), Combination):
                raise UserError(f"tune.grids.{label}: it combines others; tune its members.")
            tried = points(label, detectors.get(entry.method), entry.parameters, grid)
            found[label] = {
                name: entry.model_copy(update={"label": name, "parameters": parameters, "optional": False})
                for name, parameters in tried.items()
            }
        return found

    def of_role(self, *roles: str) -> list[Dataset]:
        """The datasets that play one of these parts, in config order."""
        return [dataset for dataset in self.datasets if dataset.role in roles]
