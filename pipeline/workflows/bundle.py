"""A finished run becomes a bundle: its fitted detectors in a folder that needs neither workspace nor data.

What is taken is what the run's scores were made of, by the digests in their records; nothing is computed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from numpy.typing import NDArray
from safetensors.numpy import load_file

from pipeline import beside, detectors, imports
from pipeline.columns import PREDICTION
from pipeline.config import schema
from pipeline.detectors._combination import Combination
from pipeline.detectors.base import Detector
from pipeline.errors import UserError, unknown
from pipeline.network.description import Description
from pipeline.network.known import Network
from pipeline.results import card
from pipeline.results.class_names import class_names
from pipeline.results.evaluation import Evaluation
from pipeline.results.evaluation import opened as open_run
from pipeline.stages import bundle, detect
from pipeline.stages.banks import FORMAT as BANK
from pipeline.stages.calibration import Calibrated
from pipeline.stages.decisions import SCORES
from pipeline.stages.index import FORMAT as INDEX
from pipeline.stages.prepare import tracking_uri
from pipeline.stages.progress import SILENT, Stage
from pipeline.workspace import artifacts, files, storage
from pipeline.workspace.artifacts import Artifact, Damaged, File
from pipeline.workspace.files import Place
from pipeline.workspace.runs import workspace_of

FALSE_ALARM = (0.05,)
"""Rates of runs that name none."""


@dataclass(frozen=True)
class Fit:
    """What the scores of a detector were made of."""

    scoring: dict[str, Any]
    """Identity of the scores but for the rows."""
    made_of: dict[str, str]
    """Content digests by name."""
    fit: str | None
    """None of a detector of the scores of others, and of one that is not kept as plain data."""
    bank: str | None
    shards: int | None
    """How many a trained index has; None for a flat one."""


@dataclass(frozen=True)
class Options:
    """What a bundle is to hold."""

    labels: Sequence[str] = ()
    """Of the detectors; none = all of the run."""
    weights: bool = False
    """Whether it holds the weights of the network."""
    false_alarm: Sequence[float] = ()
    """Rates that images are flagged at; none = those of the run, or 0.05."""
    code: bool = False
    """Whether it holds the code of detectors that are files of the config."""
    export: Sequence[str] = ()
    """Files that network and detectors are written to as one graph, too."""


def make(
    run: str | Place, out: str | Path, options: Options = Options(), stage: Stage = SILENT
) -> bundle.Bundle:
    """Write a bundle of a finished run; it appears when it is complete.

    The stage is told what is opened and written.

    Raises:
        UserError: no finished run, an unknown detector or one that cannot be kept as plain data, a model that
            is not the run's any more, too few images for a rate, something at `out`, or what cannot be
            exported; if that is found out by tracing it, the bundle is complete all the same.
    """
    evaluation, folder = open_run(run), files.at(str(out))
    parent = files.at(storage.parent(str(folder)))
    if folder.is_file() or folder.is_dir():
        raise UserError(f"--out: {out} exists already. Name another folder, or delete it.")
    settings = config_of(evaluation)
    chosen = detectors_of(evaluation, options.labels, settings)
    fits = {label: fit_of(evaluation, label, detector) for label, (_, detector) in chosen.items()}
    _require(chosen, fits, options.export)
    stage.doing("opens the network")
    network = _network(evaluation, settings)
    stage.doing("reads the scores of held-out images")
    held = _held(evaluation, settings, list(chosen), options.false_alarm)
    document = _document(evaluation, settings, chosen, fits, network) | held.document()
    code = _code(document) if options.code else {}
    files.require_writable(str(parent), "--out")
    stage.doing("writes the bundle")
    with files.scratch(parent) as scratch:
        draft = scratch / "bundle"
        made = dict(_written(draft, evaluation, fits, network, held, code))
        if options.weights:
            made |= _weights(draft, settings, document)
        made[bundle.DOCUMENT] = artifacts.write(draft / bundle.DOCUMENT, partial(files.dump_json, document))
        text = card.text(document, evaluation)
        made[bundle.CARD] = artifacts.write(draft / bundle.CARD, partial(Path.write_text, data=text))
        kind, identity = f"{bundle.KIND} {bundle.VERSION}", {"run": document["run"]}
        Artifact(draft, kind, identity).finish(made, alone=False)
        if options.weights:
            stage.doing("tries the bundle")
            _try(bundle.opened(draft), settings.seed)
        files.replace_folder(draft, folder, artifacts.RECORD)
    for path in options.export:
        stage.doing(f"exports {path}")
        detect.load(str(folder), "cpu", trust_code=options.code).export(path)
    return bundle.opened(str(folder), options.code)


def _require(
    chosen: Mapping[str, tuple[schema.DetectorEntry, Detector]],
    fits: Mapping[str, Fit],
    exported: Sequence[str],
) -> None:
    """Refuse detectors that cannot be kept, or exported to files of these names."""
    for label, (_, detector) in chosen.items():
        if fits[label].fit is None and not isinstance(detector, Combination):
            raise UserError(
                f"detectors.{label}: its fitted form is not kept as plain data, so that a bundle cannot hold "
                "it. Leave it out (--detectors); docs/add-a-detector.md says what is plain."
            )
    if exported:
        from pipeline.network import graph

        graph.require({label: detector for label, (_, detector) in chosen.items()}, exported)
    for path in exported:
        if files.at(path).is_file():
            raise UserError(f"--export: {path} exists already. Name another file, or delete it.")
        files.require_writable(storage.parent(path), "--export")


def log_model(made: bundle.Bundle, run: str | Place, register: str | None = None) -> str:
    """Log a bundle as a model of its run in MLflow; returns the URI of the model.

    Raises:
        UserError: the run is not in MLflow, or MLflow failed; the bundle is complete all the same.
    """
    from pipeline.results.mlflow import model, tracking

    evaluation = open_run(run)
    try:
        return model.log(made, evaluation.folder, tracking_uri(config_of(evaluation)), register)
    except tracking.TrackingError as error:
        raise UserError(str(error)) from None


def config_of(evaluation: Evaluation) -> schema.Config:
    """The config of a run, with absolute paths."""
    text = (evaluation.folder / "config.yaml").read_text("utf-8")
    return schema.Config.model_validate(yaml.safe_load(text))


def detectors_of(
    evaluation: Evaluation, labels: Sequence[str], settings: schema.Config
) -> dict[str, tuple[schema.DetectorEntry, Detector]]:
    """The detectors, and their entries in the config, by label."""
    known = list(evaluation.record["detectors"])
    for label in labels:
        if label not in known:
            raise UserError(f"--detectors: {unknown('detector', label, known)}")
    entries = {entry.label: entry for entry in settings.detectors}
    built = {label: entries[label].build() for label in known}
    return {label: (entries[label], built[label]) for label in bundle.with_members(labels or known, built)}


def fit_of(evaluation: Evaluation, label: str, detector: Detector) -> Fit:
    """What a detector's scores of the ID images were made of.

    Raises:
        UserError: files that are gone.
    """
    workspace, names = workspace_of(evaluation.folder), evaluation.record["datasets"].items()
    dataset = next(name for name, entry in names if entry["role"] == "id")
    try:
        table = artifacts.read_record(evaluation.folder / "scores" / dataset)
        scores = artifacts.read_record(workspace / "scores" / table.identity["scores"][label])
        made_of = {name: each for name, each in scores.inputs.items() if name.startswith(f"{bundle.FITS}/")}
        records = {name: artifacts.read_record(workspace / name) for name in made_of}
        remade = [name for name, content in made_of.items() if records[name].content != content]
        if scores.content != table.inputs[label]:
            remade.append(f"scores/{table.identity['scores'][label]}")
    except (FileNotFoundError, Damaged) as error:
        raise UserError(
            f"detectors.{label}: what it was fitted to is not in the workspace any more ({error}). Run the "
            "evaluation again."
        ) from None
    if remade:
        raise UserError(
            f"{workspace / remade[0]}: it was made again since, of other data; the run's numbers are of what "
            "was there before. Run the evaluation again."
        )
    scoring = {name: each for name, each in scores.identity.items() if name != "features"}
    if isinstance(detector, Combination):
        return Fit(scoring, {}, None, None, None)
    fitted = next((name for name, record in records.items() if bundle.is_scorer(record)), None)
    banks = [name for name, record in records.items() if record.kind == BANK]
    indexes = [record for record in records.values() if record.kind == INDEX]
    shards = indexes[0].identity["shard"][1] if indexes else None
    return Fit(scoring, made_of, fitted, next(iter(banks), None), shards)


def _network(evaluation: Evaluation, settings: schema.Config) -> Description:
    """The network of the run, as it is now.

    Raises:
        UserError: it is another one than in the run.
    """
    found = Network(settings.model, settings.seed, workspace_of(evaluation.folder)).description
    if found.digest != evaluation.record["model"]["weights_digest"]:
        raise UserError(
            f"model: {settings.model.weights or settings.model.name} is another network than in the run. "
            "Bring its weights back, or run the evaluation again."
        )
    return found


@dataclass(frozen=True)
class Held:
    """Scores of ID images that were neither trained nor tested on."""

    datasets: Sequence[str]
    scores: Mapping[str, NDArray[np.float64]]
    predictions: NDArray[np.int32]
    settings: schema.Thresholds

    def document(self) -> dict[str, Any]:
        """What a bundle says of them."""
        if not self.datasets:
            return {"calibration": None, "false_alarm": []}
        known = {
            "datasets": list(self.datasets),
            "role": self.settings.calibrate_on,
            "images": len(self.predictions),
            "per_class": self.settings.per_class,
        }
        return {"calibration": known, "false_alarm": list(self.settings.false_alarm)}


def _held(
    evaluation: Evaluation, settings: schema.Config, labels: Sequence[str], rates: Sequence[float]
) -> Held:
    """The scores of the images that the run's thresholds come from; without, of the images of role id_val.

    Raises:
        UserError: too few for a rate, or none where one was given.
    """
    for rate in rates:
        bundle.require_rate(rate, "--false-alarm")
    given = settings.thresholds or schema.Thresholds(false_alarm=FALSE_ALARM)
    wanted = given.model_copy(update={"false_alarm": tuple(rates) or given.false_alarm})
    names = [dataset.name for dataset in settings.of_role(wanted.calibrate_on)]
    if not names:
        if rates:
            raise UserError("--false-alarm: the run has no dataset of role id_val to calibrate on. Add one.")
        return Held((), {}, np.empty(0, np.int32), wanted)
    if settings.thresholds is None:
        table = pa.concat_tables([evaluation.scores(name, list(labels)) for name in names])
        arrays = {name: table[name].to_numpy() for name in (*labels, PREDICTION)}
    else:
        with files.local(evaluation.folder / SCORES) as file:
            arrays = load_file(file)
    held = Held(names, {label: arrays[label] for label in labels}, arrays[PREDICTION], wanted)
    calibrated = Calibrated(wanted, held.scores, held.predictions, None, "")
    for rate in wanted.false_alarm:
        bundle.require_enough(calibrated.of, rate, "--false-alarm")
    return held


def _written(
    draft: Path,
    evaluation: Evaluation,
    fits: Mapping[str, Fit],
    network: Description,
    held: Held,
    code: Mapping[str, Path],
) -> Iterator[tuple[str, File]]:
    """The files of a bundle but for those that describe it, by name."""
    for name, file in code.items():
        yield name, artifacts.write(draft / name, partial(shutil.copyfile, file))
    workspace = workspace_of(evaluation.folder)
    for name in dict.fromkeys(name for fit in fits.values() for name in fit.made_of):
        yield from _copied(workspace / name, draft, name)
    yield (
        bundle.NETWORK,
        artifacts.write(draft / bundle.NETWORK, artifacts.saved(network.arrays())),
    )
    if held.datasets:
        arrays = bundle.calibration_arrays(held.scores, held.predictions)
        yield bundle.CALIBRATION, artifacts.write(draft / bundle.CALIBRATION, artifacts.saved(arrays))


def _copied(folder: Place, draft: Path, name: str) -> Iterator[tuple[str, File]]:
    """All files of an artifact."""
    for each, file in artifacts.read_record(folder).files.items():
        with artifacts.opened(folder / each, file.sha256) as source:
            copy = partial(shutil.copyfile, source)
            yield f"{name}/{each}", artifacts.write(draft / name / each, copy)
    with files.local(folder / artifacts.RECORD) as source:
        record = partial(shutil.copyfile, source)
        yield f"{name}/{artifacts.RECORD}", artifacts.write(draft / name / artifacts.RECORD, record)


def _weights(draft: Path, settings: schema.Config, document: dict[str, Any]) -> dict[str, File]:
    """Write the weights; the document then says that they are there."""
    from pipeline.network import kept

    name = bundle.PROGRAM if settings.model.source == "exported" else bundle.WEIGHTS
    document["model"] = kept.beside(settings.model).model_dump(mode="json")
    document["holds_weights"] = True
    return {name: artifacts.write(draft / name, kept.weights(settings.model, settings.seed))}


def _try(made: bundle.Bundle, seed: int) -> None:
    """Build the network from what the bundle holds.

    Raises:
        UserError: that gives another network.
    """
    from pipeline.network.classifier import load

    try:
        made.require_same(load(made.model, seed))
    except UserError as error:
        raise UserError(
            f"--weights: the model cannot be built from its weights alone: {error} Leave --weights out."
        ) from None


def _code(document: Mapping[str, Any]) -> dict[str, Path]:
    """The code of detectors that are files: where each file is, by its name in the bundle.

    The document names it there from now on.

    Raises:
        UserError: a detector of a module, which is installed with what belongs to it.
    """
    found, entries = dict[str, Path](), [entry["config"] for entry in document["detectors"].values()]
    for config in [*entries, *(step for entry in entries for step in entry["steps"])]:
        source, _, name = config["method"].rpartition(":")
        if not source:
            continue
        if not source.endswith(".py"):
            raise UserError(
                f"--code: detectors.{config['label']} is of the module {source}, which a bundle cannot hold. "
                "Name its file in the config, or install it where the bundle is used and leave --code out."
            )
        path = Path(source).resolve()
        root, modules = beside.companions(path)
        folder = f"{bundle.CODE}/{imports.digest_of(detectors.get(config['method']))[:16]}"
        own = {path, *(file for place in modules.values() for file in beside.files_of(place))}
        found |= {f"{folder}/{file.relative_to(root).as_posix()}": file for file in own}
        config["method"] = f"{folder}/{path.relative_to(root).as_posix()}:{name}"
    return found


def _document(
    evaluation: Evaluation,
    settings: schema.Config,
    chosen: Mapping[str, tuple[schema.DetectorEntry, Detector]],
    fits: Mapping[str, Fit],
    network: Description,
) -> dict[str, Any]:
    """`bundle.json`, but for what is calibrated."""
    record = evaluation.record
    shards = next((fit.shards for fit in fits.values() if fit.shards), "auto")
    index = settings.index.model_copy(update={"shards": shards})
    return {
        "run": {name: record[name] for name in ("name", "id", "fingerprint", "finished", "protocol", "seed")},
        "versions": record["versions"],
        "machines": sorted({kind for entry in record["datasets"].values() for kind in entry["machines"]}),
        "model": settings.model.model_dump(mode="json"),
        "holds_weights": False,
        "network": network.document(),
        "classes": record.get("class_names") or class_names(settings, len(network.head[1])),
        "extract": settings.extract.model_dump(mode="json"),
        "index": index.model_dump(mode="json"),
        "detectors": {
            label: {
                "config": entry.model_dump(mode="json"),
                "identity": artifacts.digest(detectors.identity(detector)),
                "scoring": fits[label].scoring,
                "made_of": fits[label].made_of,
                "fit": fits[label].fit,
                "bank": fits[label].bank,
                **{name: record["detectors"][label][name] for name in ("title", "reading", "uses_ood")},
                "learned_on_held": bool(detector.calibrates() and settings.of_role("id_val")),
                "notices": record["notices"].get(label, []),
            }
            for label, (entry, detector) in chosen.items()
        },
        "data": {
            name: {each: entry[each] for each in ("role", "rows", "digest")}
            for name, entry in record["datasets"].items()
        },
        "input": {
            "image": "an encoded image file, or uint8 pixels (height, width) or (height, width, 3)",
            "transform": network.transform.model_dump(mode="json"),
        },
        "output": {
            "key": "string: path of the image, or its number",
            "prediction": "int32: the class with the largest logit",
            "<detector>": "float64: its score; higher = more OOD",
            "p.<detector>": "float64 in (0, 1]: p-value among held-out ID images; null without such images",
            "is_ood.<detector>": "bool: whether the p-value is at most the false-alarm rate",
        },
    }
