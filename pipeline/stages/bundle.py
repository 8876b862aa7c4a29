"""A bundle: a folder with fitted detectors and all that they need on new images, from which data may be gone.

* `_manifest.json`: SHA-256 of every other file; written last
* `README.md`: what it is, in words
* `bundle.json`: network, numerics and detectors; what goes in and what comes out
* `network.safetensors`: the last layer, and what the network answers to fixed noise
* `weights.safetensors`: if they were asked for; else `model` in `bundle.json` says where they are
* `calibration.safetensors`: scores of held-out ID images, if the run has some
* `code/<hash>/`: the code of detectors of one's own, if it was asked for
* `fits/<hash>/`: fitted detectors, banks and trained indexes, as a workspace keeps them
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from pipeline import detectors
from pipeline.columns import BLOCK_NORM, FEATURE, KEY, LABEL, LOGITS, PREDICTION, Float
from pipeline.columns import CALIBRATION as MARKED
from pipeline.config import loading, schema
from pipeline.detectors._combination import Combination
from pipeline.detectors.base import Detector, Extra, Scorer
from pipeline.errors import UserError, unknown
from pipeline.metrics.conformal import Calibration, needed
from pipeline.network.description import Description, same_network
from pipeline.stages.calibration import Calibrated, combinations
from pipeline.stages.fit import FORMAT as FITTED
from pipeline.stages.fit import read_scorer
from pipeline.stages.index import BankFiles
from pipeline.stages.score import Scoring
from pipeline.workspace import artifacts, files
from pipeline.workspace.artifacts import Artifact, Damaged, Record
from pipeline.workspace.files import Remote

KIND, VERSION = "bundle", 1
"""What the record calls it; the version goes up when an older program could not read it."""

DOCUMENT, NETWORK, CALIBRATION, CARD = (
    "bundle.json",
    "network.safetensors",
    "calibration.safetensors",
    "README.md",
)
WEIGHTS, PROGRAM = "weights.safetensors", "program.pt2"
"""The weights, or an exported program, of a bundle that holds them."""

FITS, CODE = "fits", "code"


@dataclass(frozen=True)
class Bundle:
    """A bundle whose every byte is the one that was written."""

    name: str
    """Path or URI."""
    folder: Path
    """Where it lies, or a copy that is gone with this process."""
    content: str
    """Digest of all its bytes."""
    document: Mapping[str, Any]
    trust_code: bool = False
    """Whether the code that it holds may run."""

    @property
    def labels(self) -> list[str]:
        """Labels of the detectors."""
        return list(self.document["detectors"])

    @property
    def false_alarm(self) -> tuple[float, ...]:
        """The false-alarm rates it was made for; none without calibration."""
        return tuple(self.document["false_alarm"])

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes by index, if they are known."""
        found: list[str] | None = self.document["classes"]
        return found

    @cached_property
    def model(self) -> schema.Model:
        """The network's config; files of the bundle are where the bundle is.

        Raises:
            UserError: it has no weights, and they are not where they were; or code that is not trusted.
        """
        model, here = schema.Model(**self.document["model"]), self.document["holds_weights"]
        self._allow(model.name, "model.name")
        exported = model.source == "exported"
        if here and exported:
            return model.model_copy(update={"name": str(self.folder / PROGRAM)})
        if here:
            return model.model_copy(update={"weights": str(self.folder / WEIGHTS)})
        path = model.name if exported else model.weights
        if path and not loading.is_name(path) and not loading.resolve(path).is_file():
            raise UserError(
                f"{self.name}: it does not hold the weights of the network, and {path} is gone. Bring it "
                "back, or make the bundle with --weights."
            )
        return model

    @cached_property
    def extract(self) -> schema.Extract:
        """How images go through the network; unreadable ones are counted, however many."""
        return schema.Extract(**self.document["extract"] | {"max_bad_fraction": 1.0})

    @property
    def plain(self) -> bool:
        """Whether no work asks for more than one CPU."""
        indexed = any(detector.neighbours for detector in self.detectors.values())
        return self.extract.plain and (self.index.plain or not indexed)

    @cached_property
    def index(self) -> schema.Index:
        """How neighbours are looked up."""
        return schema.Index(**self.document["index"])

    @cached_property
    def description(self) -> Description:
        """The network that the detectors were fitted to."""
        return Description.of(self.document["network"], load_file(self.folder / NETWORK))

    @cached_property
    def detectors(self) -> dict[str, Detector]:
        """The detectors by label.

        Raises:
            UserError: one whose code is another one by now, or is in the bundle and not trusted.
        """
        found = {}
        for label, entry in self.document["detectors"].items():
            detector = schema.DetectorEntry(**self._with_code(entry["config"], label)).build()
            if artifacts.digest(detectors.identity(detector)) != entry["identity"]:
                raise UserError(
                    f"detectors.{label}: it was fitted by another version of its code than is installed. "
                    "Make the bundle again, or install the version of ood-pipeline that made it: "
                    f"{self.document['versions']['ood-pipeline']}."
                )
            found[label] = detector
        return found

    def _with_code(self, config: Mapping[str, Any], label: str) -> dict[str, Any]:
        """The config of a detector, with paths to the code that the bundle holds."""
        method, steps = config["method"], [self._with_code(step, label) for step in config["steps"]]
        found = str(self.folder / method) if holds(method) else method
        self._allow(found, f"detectors.{label}")
        return {**config, "method": found, "steps": steps}

    def _allow(self, reference: str, where: str) -> None:
        """Refuse code that lies in the bundle, by whatever path it is named, if it is not trusted."""
        file = reference.rpartition(":")[0]
        inside = file.endswith(".py") and Path(file).resolve().is_relative_to(Path(self.folder).resolve())
        if inside and not self.trust_code:
            raise UserError(
                f"{self.name}: {where}: its code is in the bundle and would run here: {file}. Read it, and "
                "allow it with --trust-code (trust_code=True)."
            )

    @property
    def extras(self) -> dict[str, Extra]:
        """Columns beyond the features, by name."""
        return {extra.column: extra for each in self.detectors.values() for extra in each.extras()}

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of rows that are scored."""
        norms = (BLOCK_NORM,) if self.description.taps.blocks else ()
        return (KEY, LABEL, PREDICTION, FEATURE, LOGITS, *norms, *self.extras)

    @cached_property
    def scorers(self) -> dict[str, Scorer]:
        """The fitted detectors of rows by label; equal arrays are the same objects."""
        read, found = dict[str, NDArray[Any]](), {}
        for label, entry in self.document["detectors"].items():
            if entry["fit"] is None:
                continue
            artifact, record = self._fit(entry["fit"])
            scorer = read_scorer(artifact, record, self.detectors[label], read, load_file)
            assert not isinstance(scorer, UserError)
            found[label] = scorer
        return found

    @cached_property
    def combinations(self) -> dict[str, Combination]:
        """The detectors of the scores of others, by label."""
        return combinations(self.detectors)

    @cached_property
    def combined(self) -> Scoring | None:
        """How the scores of others are combined; None where none are."""
        if not self.combinations:
            return None
        held, _ = self._held
        members, scorers = dict[str, None](), dict[str, Scorer]()
        for label, detector in self.combinations.items():
            own = {member: held[member] for member in detector.members}
            there = np.all([np.isfinite(values) for values in own.values()], axis=0)
            scorers[label] = detector.calibrated({name: values[there] for name, values in own.items()})
            members |= dict.fromkeys(detector.members)
        return Scoring(scorers, (KEY, MARKED, *members))

    @cached_property
    def banks(self) -> dict[str, BankFiles]:
        """The banks of the detectors that look up neighbours, by label."""
        entries = self.document["detectors"].items()
        return {label: BankFiles.of(*self._fit(entry["bank"])) for label, entry in entries if entry["bank"]}

    def scoring(self, label: str) -> tuple[dict[str, Any], dict[str, str]]:
        """What scores of a detector depend on besides the rows: identity, and content digests by name."""
        entry = self.document["detectors"][label]
        return dict(entry["scoring"]), dict(entry["made_of"])

    def _fit(self, name: str) -> tuple[Artifact, Record]:
        folder = self.folder / name
        record = artifacts.read_record(folder)
        return Artifact(folder, record.kind, record.identity, record.inputs), record

    @cached_property
    def _held(self) -> tuple[dict[str, Float], NDArray[np.int32]]:
        """Scores of the calibration images by label, and their predictions."""
        arrays = load_file(self.folder / CALIBRATION)
        return {label: arrays[label] for label in self.labels}, arrays[PREDICTION]

    def calibrated(
        self, false_alarm: float | None = None, fdr: float | None = None, field: str = "--false-alarm"
    ) -> Calibrated | None:
        """What decides on an image; None without calibration images.

        Args:
            false_alarm: rate at which images are flagged; None = the first one it was made for.
            fdr: false-discovery rate at which the images of a dataset are flagged together instead.
            field: what the rate is called where it was given.

        Raises:
            UserError: rates that nothing, or too few images, were calibrated for, or that are none.
        """
        for name, rate in ((field, false_alarm), ("--fdr", fdr)):
            if rate is not None and self.document["calibration"] is None:
                raise UserError(
                    f"{name}: {self.name} has no scores of held-out images to decide by. Add a dataset of "
                    "role id_val to the config, run it, and make the bundle again."
                )
            if rate is not None:
                require_rate(rate, name)
        if self.document["calibration"] is None:
            return None
        settings = schema.Thresholds(
            false_alarm=(false_alarm or self.false_alarm[0],),
            per_class=self.document["calibration"]["per_class"],
            fdr=fdr,
        )
        made_of = artifacts.digest([self.content, settings.model_dump(mode="json"), self.labels])
        found = Calibrated(settings, *self._held, None, made_of)
        require_enough(found.of, settings.false_alarm[0], field)
        if fdr is not None:
            require_enough(found.of, fdr, "--fdr")
        return found

    def only(self, labels: Collection[str]) -> Bundle:
        """The same with some of the detectors, and those whose scores they combine.

        Raises:
            UserError: it has no detector of a label.
        """
        for label in labels:
            if label not in self.labels:
                raise UserError(f"{self.name}: {unknown('detector', label, self.labels)}")
        wanted = with_members(labels, self.detectors)
        kept = {label: self.document["detectors"][label] for label in wanted}
        return replace(self, document={**self.document, "detectors": kept})

    def require_same(self, network: Description) -> None:
        """Refuse a network that is not the one that the detectors were fitted to.

        Raises:
            UserError: other weights, other layers, or other answers.
        """
        known, where = self.description, f"{self.name}: model"
        told = self.model.weights or self.model.name
        if network.digest != known.digest:
            raise UserError(
                f"{where}: the weights in {told} have the digest {network.digest[:12]}, the detectors were "
                f"fitted to {known.digest[:12]}. Bring these weights back, or make the bundle with --weights."
            )
        if network.taps != known.taps or network.transform != known.transform:
            raise UserError(
                f"{where}: {self.document['model']['name']} has other layers or another transform than when "
                "the detectors were fitted. Install the same version of its code."
            )
        if not same_network(known.probe, network.probe):
            raise UserError(
                f"{where}: {self.document['model']['name']} answers otherwise than when the detectors were "
                "fitted, though its weights are the same. Install the same version of its code."
            )


def holds(method: str) -> bool:
    """Whether the code behind the method of a detector's config lies in its bundle."""
    return method.startswith(f"{CODE}/")


def opened(path: str | Path, trust_code: bool = False) -> Bundle:
    """A bundle by path or URI; every file is read and compared with its digest.

    Args:
        path: of its folder.
        trust_code: whether code that it holds may run.

    Raises:
        UserError: no bundle, one of a newer version, or a file that is not what was written.
    """
    place = files.at(str(path))
    if not place.is_dir():
        raise UserError(f"{path}: no such folder. Name a bundle, as `ood-pipeline bundle` makes it.")
    try:
        record = artifacts.read_record(place)
        kind, _, version = record.kind.rpartition(" ")
        if kind != KIND:
            raise UserError(f"{path}: no bundle. Name a folder that `ood-pipeline bundle` made.")
        if int(version) > VERSION:
            raise UserError(
                f"{path}: a bundle of version {version}, and this program reads {VERSION}. Upgrade "
                "ood-pipeline."
            )
        folder = place.absolute() if isinstance(place, Path) else _copied(place, record.content)
        for name, file in record.files.items():
            with artifacts.opened(folder / name, file.sha256):
                pass
    except FileNotFoundError:
        raise UserError(
            f"{path}: no bundle, or one that was not finished: it has no {artifacts.RECORD}."
        ) from None
    except Damaged as damaged:
        raise UserError(
            f"{damaged.path} is damaged: {damaged.reason}. Copy the bundle again, or make it again."
        ) from None
    name = str(folder) if isinstance(place, Path) else place.uri
    return Bundle(name, folder, record.content, files.read_json(folder / DOCUMENT), trust_code)


@lru_cache
def _copied(place: Remote, content: str) -> Path:
    """A local copy of a bundle in an object store, made once in a process and gone with it.

    Raises:
        Damaged: a file that is missing or not what was written.
    """
    folder = Path(tempfile.mkdtemp(prefix="ood-pipeline-bundle-")).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, file in artifacts.read_record(place).files.items():
        target = (folder / name).resolve()
        if not target.is_relative_to(folder):
            raise Damaged(str(place / name), "its name leads out of the bundle")
        with artifacts.opened(place / name, file.sha256) as source:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(source, target)
    return folder


def with_members(labels: Collection[str], known: Mapping[str, Detector]) -> list[str]:
    """Labels, and those of the detectors whose scores they combine."""
    there = dict.fromkeys(labels)
    for label in labels:
        detector = known[label]
        there |= dict.fromkeys(detector.members if isinstance(detector, Combination) else ())
    return list(there)


def is_scorer(record: Record) -> bool:
    """Whether an artifact is a fitted detector that is kept as plain data."""
    return record.kind == FITTED and "scorer.json" in record.files


def require_rate(rate: float, field: str) -> None:
    """Refuse a number that is no rate.

    Raises:
        UserError: it is none.
    """
    if not 0 < rate < 1:
        raise UserError(f"{field}: got {rate:g}; expected a rate between 0 and 1, as 0.05.")


def require_enough(calibrations: Mapping[str, Calibration], rate: float, field: str) -> None:
    """Refuse a rate at which nothing could ever be flagged.

    Raises:
        UserError: too few calibration images, of a class if classes count.
    """
    least = needed(rate)
    for label, each in calibrations.items():
        fewest = min((len(group) for group in each.groups.values()), default=0)
        if fewest < least:
            of_class = "" if each.predictions is None else " of a predicted class"
            raise UserError(
                f"{field}: {rate:g} takes at least {least:,} calibration images, but {label} has scores of "
                f"{fewest:,}{of_class}. Raise it, or run with more of them."
            )


def calibration_arrays(
    scores: Mapping[str, NDArray[np.float64]], predictions: NDArray[np.int32]
) -> dict[str, NDArray[Any]]:
    """What `calibration.safetensors` holds: scores by label, NaN where there is none, and predictions."""
    return {**scores, PREDICTION: predictions.astype(np.int32)}
