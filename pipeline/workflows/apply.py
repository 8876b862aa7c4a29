"""A bundle applied to images: listed, extracted, scored and put into a table by the stages of an evaluation.

What is done is kept in a workspace, so that a killed command goes on where it stopped.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from pipeline.cluster import engine
from pipeline.cluster.engine import Engine
from pipeline.cluster.logs import Logs
from pipeline.columns import IS_OOD, KEY, P_VALUE, PREDICTION
from pipeline.config import schema
from pipeline.config.explanations import explain
from pipeline.config.overrides import apply_override
from pipeline.data.dates import Dates, of_column, of_folders
from pipeline.data.guess import guessed
from pipeline.data.manifest import Manifest, compile_manifest
from pipeline.errors import UserError
from pipeline.network.description import Description
from pipeline.network.known import Network
from pipeline.results import applied
from pipeline.results.applied import Output, Tally
from pipeline.stages import bundle, decisions, ensembles, identity, index, shards
from pipeline.stages.bundle import Bundle
from pipeline.stages.calibration import Calibrated
from pipeline.stages.progress import LOOKS, SILENT
from pipeline.stages.score import Made, ScoreJob, Scoring, assemble, score_artifact
from pipeline.stages.score import run as run_scores
from pipeline.workflows.engines import engine_for
from pipeline.workflows.progress import Display, Stage
from pipeline.workspace import artifacts, files, storage, tables
from pipeline.workspace.artifacts import Artifact, Damaged
from pipeline.workspace.claims import Claims, opened
from pipeline.workspace.files import Place

WORKSPACE = "./workspace"
"""Where the state of unfinished work lies if nothing else is said, as that of evaluations does."""

_SETTABLE = {"extract": schema.Extract.model_fields, "index": schema.Index.model_fields}
_NUMERICS = {
    *("batch_size", "precision", "channels_last", "compile", "feature_dtype", "device", "decoder"),
    "max_image_mib",
}
"""Keys of `extract` that results depend on."""
_FIXED = {("index", "kind"), ("index", "shards"), ("extract", "max_bad_fraction")}


@dataclass(frozen=True)
class Options:
    """What is asked of the images beyond the bundle."""

    format: str | None = None
    """Of the images; None = guessed from their path."""
    images: str | None = None
    """Array, column or members that hold the images, as `images` of a dataset in a config."""
    time: str | None = None
    """Column of Parquet files with the time of each image; None = dates are those in the names of folders."""
    detectors: Sequence[str] = ()
    """Labels; none = all of the bundle."""
    false_alarm: float | None = None
    fdr: float | None = None
    alarm_above: float | None = None
    """Share of flagged images that is an alarm."""
    alarm_drift: bool = False
    """Whether a date that is out of control is an alarm."""
    trust_code: bool = False
    """Whether code that the bundle holds may run."""
    workspace: str = WORKSPACE
    overrides: Sequence[str] = ()
    """`extract.<key>=<value>` or `index.<key>=<value>`, for machines unlike those of the evaluation."""
    engine: engine.Asked = "auto"
    threads: int | None = None
    level: int = logging.WARNING


@dataclass(frozen=True)
class Outcome:
    """What the command line shows at the end."""

    output: Output
    summary: dict[str, Any]
    """As in the file beside the table."""
    alarms: Sequence[str]
    """What was asked to be told, and is the case."""


def execute(path: str, data: str, out: str, options: Options, display: Display) -> Outcome:
    """Apply a bundle to images and write the table of what its detectors say of each.

    Args:
        path: of the bundle, or its URI.
        data: the images, in any format of datasets.
        out: a folder, or a file that ends in .parquet or .csv.
        options: what else is asked.
        display: shows the stages.

    Raises:
        UserError: anything the user can mend; nothing is at `out` then.
    """
    with display.stage("prepare", "opens the bundle") as stage:
        ready = prepare(path, data, out, options, stage)
        stage.note = f"{ready.manifest.rows:,} images, {len(ready.bundle.labels)} detectors"
    for note in ready.manifest.notes:
        display.say(f"{data}: {note}")
    with (
        files.roomy(f"below {ready.workspace}", str(ready.workspace)),
        opened(ready.workspace, display.say) as claims,
        claims.alone(f"scores/{ready.table}", wait=True),
        engine_for(
            options,
            ready.manifest.rows,
            ready.bundle.plain,
            display,
            ready.workspace,
            Logs(ready.workspace / "logs", options.level),
            ready.bundle.detectors.values(),
            [ready.bundle.folder],
        ) as chosen,
    ):
        return Application(ready, options, display, chosen, claims).all()


@dataclass(frozen=True)
class Ready:
    """An application that is ready to start."""

    bundle: Bundle
    data: str
    output: Output
    workspace: Place
    network: Description
    dataset: schema.Dataset
    manifest: Manifest
    job: shards.Job
    calibrated: Calibrated | None
    made_of: Mapping[str, Any]
    """What the table at the end depends on, in words."""

    @property
    def plan(self) -> shards.Plan:
        """What all forward passes share."""
        known, network = self.bundle, self.network
        seed = known.document["run"]["seed"]
        return shards.Plan(
            known.model, known.extract, seed, network.digest, network.transform, network.probe, known.extras
        )

    @property
    def table(self) -> str:
        """Name of the table of all scores, below the scores of the features."""
        return f"{self.job.artifact.folder.name}/table-{artifacts.digest(dict(self.made_of))[:16]}"


def prepare(path: str, data: str, out: str, options: Options, stage: Stage = SILENT) -> Ready:
    """Open bundle, images and network, and check that they go together; starts no long work.

    Raises:
        UserError: the first thing found wrong.
    """
    whole = bundle.opened(path, options.trust_code)
    known = whole.only(options.detectors or whole.labels)
    known = replace(known, document=_changed(known.document, options.overrides))
    known.detectors  # noqa: B018 - refused before all else if their code changed
    calibrated = known.calibrated(options.false_alarm, options.fdr)
    _check_alarms(options, calibrated)
    made_of: dict[str, Any] = {"bundle": known.content, "detectors": known.labels}
    made_of |= {"false_alarm": calibrated and calibrated.settings.false_alarm[0], "fdr": options.fdr}
    numerics = known.extract.model_dump(mode="json", include=_NUMERICS)
    made_of |= {"numerics": numerics | identity.extra_numerics(known.extract)}
    output = Output(out)
    output.require_free(made_of)
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", storage.name_of(data.rstrip("/"))).strip("-._")[:100] or "images"
    kind = options.format or guessed(data, "--format")
    dataset = schema.Dataset(name=name, role="unlabelled", format=kind, path=data, images=options.images)
    files.require_writable(storage.parent(str(output.place)), "--out")
    files.require_writable(options.workspace, "--workspace")
    workspace = files.at(options.workspace)
    identity.require_decoder(known.extract.decoder)
    stage.doing("opens the network")
    network = Network(known.model, known.document["run"]["seed"], workspace)
    known.require_same(network.description)
    network.note()
    if known.banks:
        index.check(known.index.kind, network.description.head[0].shape[1])
    stage.doing("lists the images")
    manifest = _listed(dataset, workspace, known.extract.max_image_bytes)
    made_of["data"] = manifest.digest
    output.require_free(made_of)
    dates = _dates(manifest, options.time)
    if options.alarm_drift and not _is_dated(manifest, dates):
        where = (
            "lies in a folder or archive with a date in its name"
            if options.time is None
            else f"has a date in the column {options.time}"
        )
        raise UserError(f"--alarm-drift: no image of {data} {where}, as 2025-01-31.")
    parts = identity.identity(network.description, manifest, known.extract)
    probe = network.description.probe
    job = shards.job(dataset, manifest, parts, workspace, probe, known.extras.values())
    return Ready(
        known, data, output, workspace, network.description, dataset, manifest, job, calibrated, made_of
    )


def _check_alarms(options: Options, calibrated: Calibrated | None) -> None:
    if calibrated is None and (options.alarm_above is not None or options.alarm_drift):
        raise UserError("--alarm-above, --alarm-drift: the bundle has no calibration images to flag by.")
    if options.alarm_above is not None and not 0 <= options.alarm_above < 1:
        raise UserError(f"--alarm-above: got {options.alarm_above:g}; expected a share from 0 to below 1.")


def require_settable(overrides: Sequence[str]) -> None:
    """Refuse to set what a bundle fixes, or what is no value of a key.

    Raises:
        UserError: names what can be set, or the key and what is wrong with its value.
    """
    _changed({name: {} for name in _SETTABLE}, overrides)


def _changed(known: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A bundle's document with other settings of its work."""
    document = {**known}
    for override in overrides:
        section, _, key = override.partition("=")[0].partition(".")
        if key not in _SETTABLE.get(section, ()) or (section, key) in _FIXED:
            raise UserError(
                f"--set {override}: of a bundle only keys of extract and of index can be set, but for "
                "index.kind and index.shards."
            )
        document[section] = dict(document[section])
        apply_override(document, override)
    for name, model in (("extract", schema.Extract), ("index", schema.Index)):
        try:
            model(**document[name])
        except ValidationError as error:
            raise UserError("\n".join(explain(error, f"--set {name}.", model))) from None
    return document


def _listed(dataset: schema.Dataset, workspace: Place, limit: int) -> Manifest:
    """The images, listed; whoever has no config is told of options."""
    try:
        return compile_manifest(dataset, workspace / "manifests", 0, limit)
    except UserError as error:
        field, text = f"datasets.{dataset.name}", str(error)
        for key, option in (("path: ", ""), ("format", "--format"), ("images", "--images")):
            text = text.replace(f"{field}.{key}", option)
        raise type(error)(text.replace(field, dataset.path)) from None


def _dates(manifest: Manifest, column: str | None) -> Dates:
    """What tells the dates of images."""
    return of_folders if column is None else of_column(manifest, column)


def _listed_of(manifest: Manifest, keys: pa.ChunkedArray) -> list[str]:
    """The same keys in the order in which they are listed."""
    known = keys.combine_chunks()
    with tables.parquet(manifest.path) as file:
        batches = file.iter_batches(tables.ROW_GROUP, columns=[KEY]) if len(keys) else ()
        return [
            key for batch in batches for key in batch[KEY].filter(pc.is_in(batch[KEY], known)).to_pylist()
        ]


def _is_dated(manifest: Manifest, dates: Dates) -> bool:
    """Whether an image has a date."""
    with tables.parquet(manifest.path) as file:
        batches = file.iter_batches(tables.ROW_GROUP, columns=[KEY])
        return any(any(dates(batch[KEY].to_pylist())) for batch in batches)


@dataclass
class Application:
    """The stages of one application."""

    ready: Ready
    options: Options
    display: Display
    engine: Engine
    claims: Claims
    numbers: dict[str, float] = field(default_factory=dict)
    """What the extraction took."""

    def all(self) -> Outcome:
        """Every stage; what turns out to be damaged in the workspace is made again, each file once."""
        mended = set[str]()
        while True:
            try:
                self._extract()
                return self._write(self._score())
            except Damaged as damaged:
                if damaged.path in mended or damaged.path.startswith(str(self.ready.bundle.folder)):
                    raise
                mended.add(damaged.path)
                artifacts.mend(damaged)

    def _extract(self) -> None:
        """Features of every image."""
        ready, job = self.ready, self.ready.job
        with self.display.stage("extract", LOOKS) as shown:

            def make(_: set[str]) -> None:
                from pipeline.stages import extract

                banks, settings = index.sizes_of(ready.bundle.banks.values()), ready.bundle.index
                index.require(self.engine, banks, settings)
                self.engine.cpus()  # opens it
                self.numbers = extract.run(self.engine, [job], ready.plan, shown)

            self.claims.share(lambda: [] if job.complete else [job.name], make)
            shards.require_same_network(job, ready.plan)
            forwarded = int(self.numbers.get("forward_images", 0))
            shown.note = f"{forwarded:,} of {ready.manifest.rows:,} images forwarded"
            if forwarded:
                shown.note += f", {self.numbers['images_per_second']:,.0f} images/s once running"

    def _score(self) -> ScoreJob:
        """Scores of every row."""
        job = self._score_job()
        slices = set[tuple[str, int, int]]()  # each counts once, whichever detectors scored it
        with self.display.stage("score", LOOKS) as shown:
            self.claims.share(
                lambda: set(job.lacking_names()),
                lambda names: slices.update(self._score_ours(job.only(names), shown).slices),
            )
            job = self._combined(job, shown, slices)
            shown.note = f"{sum(stop - start for _, start, stop in slices):,} rows"
            return job

    def _score_job(self) -> ScoreJob:
        """Where the scores of the detectors of rows are kept."""
        known, features = self.ready.bundle, self.ready.job.table()
        scores = {}
        for label in known.scorers:
            extras = (extra.column for extra in known.detectors[label].extras())
            own = features.contents(self.ready.job.name, extras)
            scores[label] = self._artifact(label, {**known.scoring(label)[1], **own})
        return ScoreJob(self.ready.dataset.name, features, scores)

    def _combined(self, job: ScoreJob, shown: Stage, slices: set[tuple[str, int, int]]) -> ScoreJob:
        """The same with the scores of detectors that combine others; adds what they scored to the slices."""
        known, combined = self.ready.bundle, self.ready.bundle.combined
        if combined is None:
            return job

        def place(label: str, dataset: str, contents: Mapping[str, str]) -> Artifact:
            return self._artifact(label, {"bundle": known.content, **contents})

        def make(names: set[str]) -> None:
            ours = other.only(names)
            made = run_scores(self.engine, [ours], combined.only(ours.scores), shown, ensembles.ROWS)
            slices.update(made.slices)

        (other,) = ensembles.jobs([job], known.combinations, {}, place)
        self.claims.share(lambda: set(other.lacking_names()), make)
        (found,) = ensembles.merged([job], [other], known.labels)
        return found

    def _artifact(self, label: str, made_of: Mapping[str, str]) -> Artifact:
        """Where the scores of a detector are kept: as those of an evaluation are."""
        ready = self.ready
        detector, scoring = ready.bundle.detectors[label], ready.bundle.scoring(label)[0]
        return score_artifact(ready.workspace, ready.job, detector, scoring, made_of)

    def _score_ours(self, job: ScoreJob, shown: Stage) -> Made:
        """Scores that nobody else makes."""
        known, lacking = self.ready.bundle, set(job.lacking())
        banks = {label: bank for label, bank in known.banks.items() if label in lacking}
        if banks:
            shown.doing(f"loads the vectors of {', '.join(banks)}")
        searched = (
            index.start(self.engine, banks.values(), known.index, known.banks.values()) if banks else None
        )
        try:
            folders = {label: bank.folder for label, bank in banks.items()}
            scoring = Scoring(known.scorers, known.columns, folders, searched)
            return run_scores(self.engine, [job], scoring, shown)
        finally:
            if searched is not None:
                searched.stop()

    def _write(self, job: ScoreJob) -> Outcome:
        """The table with p-values and flags, and the summary of it."""
        ready, labels = self.ready, self.ready.bundle.labels
        folder = ready.workspace / "scores" / ready.table
        with self.display.stage("decide", "puts the table together") as shown:
            judge = None
            if ready.calibrated is not None and job.features.rows:
                judge = decisions.judge(self.engine, ready.calibrated, job, "unlabelled")
            assemble(self.engine, job, folder, judge=judge)
            names = [KEY, PREDICTION, *labels]
            names += [prefix + label for prefix in (P_VALUE, IS_OOD) for label in labels if judge]
            tally = Tally(labels, ready.calibrated, _dates(ready.manifest, self.options.time))
            files.write_json(ready.output.summary, {"made_of": dict(ready.made_of)})  # whose the table is
            with tables.parquet(ready.job.artifact.folder / shards.ERRORS_FILE) as file:
                errors = file.read()
            ready.output.write_errors(errors)
            lost = _listed_of(ready.manifest, errors[KEY])
            tally.lose(_dates(ready.manifest, self.options.time)(lost))
            ready.output.write(tally.counting(tables.Table.open(folder).columns(names)), labels)
            summary = self._summary(tally)
            files.write_json(ready.output.summary, summary)
            shown.note = str(ready.output.place)
        return Outcome(ready.output, summary, summary["alarms"])

    def _summary(self, tally: Tally) -> dict[str, Any]:
        ready, record = self.ready, self.ready.job.artifact.require()
        detectors, dated = tally.detectors(), tally.dated()
        errors = record.facts["errors"]
        return {
            "made_of": dict(ready.made_of),
            "bundle": ready.bundle.name,
            "run": dict(ready.bundle.document["run"]),
            "data": ready.data,
            "format": ready.dataset.format,
            "images": {
                "listed": ready.manifest.rows,
                "features": record.facts["features"],
                "errors": errors,
                "first_errors": shards.first_errors(ready.job) if errors else [],
                "left_out": list(ready.manifest.notes),
                **dated,
            },
            "detectors": detectors,
            "alarms": applied.alarms(
                detectors,
                self.options.alarm_above,
                self.options.alarm_drift,
                dated.get("dates_lost", ()),
            ),
        }
