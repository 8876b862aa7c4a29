"""One evaluation from config to report: every stage reuses what is already in the workspace.

Extract, fit, score, evaluate, report. A killed run is continued by running it again.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pipeline.cluster import engine, usage
from pipeline.cluster.engine import Engine
from pipeline.cluster.logs import Logs
from pipeline.columns import BLOCK_NORM, FEATURE, KEY, LABEL, LOGITS, PREDICTION, Mask
from pipeline.config import loading, schema
from pipeline.data import contents
from pipeline.data.manifest import contents_of
from pipeline.detectors._combination import Combination
from pipeline.detectors.base import Detector, Jigsaw, Pass, Scorer, Training, bank_of
from pipeline.errors import UserError
from pipeline.learned.statistics import Head, Statistic, Statistics
from pipeline.results import report, unreadable
from pipeline.results.cautions import Found, cautions
from pipeline.results.evaluation import Evaluation
from pipeline.results.mlflow import tracking
from pipeline.results.mlflow.apart import Apart
from pipeline.results.record import Record, added
from pipeline.results.unscored import sentences
from pipeline.stages import calibration, decisions, duplicates, ensembles, evaluate, index, shards
from pipeline.stages.calibration import Calibrated
from pipeline.stages.fit import Fitted, fit_detectors
from pipeline.stages.prepare import Prepared, prepare, require_members, tracking_uri
from pipeline.stages.progress import FIRST, LOADS, LOOKS
from pipeline.stages.score import (
    Made,
    ScoreJob,
    Scoring,
    Unscored,
    assemble,
    require_few_unscored,
    score_artifact,
)
from pipeline.stages.score import run as run_scores
from pipeline.stages.statistics import Rows, Stored, fit_statistics
from pipeline.workflows.engines import engine_for
from pipeline.workflows.progress import Display, Quiet, Stage
from pipeline.workspace import artifacts, files, leftovers, runs, storage, tables
from pipeline.workspace.artifacts import Arrays, Artifact, Damaged, Kept, Store
from pipeline.workspace.claims import Claims, opened
from pipeline.workspace.files import Place

if TYPE_CHECKING:
    from pipeline.stages import passes

StageName = Literal["extract", "fit", "score", "evaluate", "report"]
STAGES: tuple[StageName, ...] = ("extract", "fit", "score", "evaluate", "report")

J = TypeVar("J", shards.Job, ScoreJob)

INTERRUPTED = (KeyboardInterrupt, SystemExit)
"""Ends of a run that are nobody's mistake."""

_RECALL_QUERIES = 1024

TELL = 10.0
"""Seconds between two words to MLflow about the progress of a stage."""


@dataclass(frozen=True)
class Options:
    """What a command asks for beyond the config."""

    first: StageName = "extract"
    """Stages before this one must be done already."""
    last: StageName = "report"
    fresh: bool = False
    """Do everything again."""
    wait: bool = False
    """For a run of the same evaluation that is under way, rather than refuse."""
    publish: Literal["as configured", "always", "never"] = "as configured"
    """Whether to send the results to MLflow."""
    engine: engine.Asked = "auto"
    threads: int | None = None
    """Of the inline engine; None = as many as there are CPUs."""
    level: int = logging.WARNING
    """What workers log."""


@dataclass
class Outcome:
    """What the command line shows at the end."""

    folder: Place
    link: str = ""
    warning: str = ""
    not_applicable: Mapping[str, str] = field(default_factory=dict)
    """Why detectors were left out, by label."""
    unscored: Sequence[str] = ()
    """What is to be said of detectors that could not score all images."""
    unreadable: Sequence[str] = ()
    """What is to be said of datasets with images that could not be used."""
    cautions: Sequence[str] = ()
    """What must be known before the numbers are believed."""
    notices: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """What is to be known of detectors, by label."""


def execute(
    settings: schema.Config,
    options: Options,
    display: Display,
    prepared: Prepared | None = None,
    background: Apart | None = None,
) -> Outcome:
    """Run the stages from `options.first` to `options.last`.

    Args:
        settings: the config.
        options: what a command asks for beyond it.
        display: shows the stages.
        prepared: what `prepare` made of the config, where that is known already.
        background: what talks to MLflow, for several runs.

    Raises:
        UserError: anything the user can mend; earlier results stay as they are.
    """
    with nullcontext(background) if background else Apart() as apart:
        return _execute(settings, options, display, prepared, apart)


def _execute(
    settings: schema.Config, options: Options, display: Display, prepared: Prepared | None, background: Apart
) -> Outcome:
    """The same, with MLflow in the background."""
    tracked = settings.tracking.enabled and options.last == "report" and options.publish != "never"
    with display.stage("prepare", FIRST) as stage:
        found = prepared or prepare(settings, background.start if tracked else lambda: None, stage=stage)
        ready = replace(found, fresh=options.fresh)
        stage.note = f"{len(ready.jobs)} datasets, {ready.images:,} images, {len(ready.detectors)} detectors"
        if ready.not_applicable:
            stage.note += f", {len(ready.not_applicable)} more do not apply"
    _tell(ready, display)
    with (
        files.roomy(f"below {ready.workspace}", str(ready.workspace)),
        opened(ready.workspace, display.say) as claims,
        claims.alone(f"runs/{ready.config.name}/{ready.folder.name}", options.wait),
        working(ready, options, display) as chosen,
    ):
        run = Run(ready, options, display, background, chosen, claims)
        try:
            run.all()
        except BaseException as error:
            with suppress(UserError, OSError):  # what came first is told
                run.record.close("interrupted" if isinstance(error, INTERRUPTED) else "failed")
            run.tracking.fail(error, background)
            raise
        if options.last != "report":
            run.record.close("partial")
        content = run.record.content
        unscored = list(sentences(content["unscored"], content["datasets"]).values())
        left_out = content["not_applicable"]
        lost = [f"{name}: {text}" for name, text in unreadable.sentences(content["datasets"]).items()]
        link, warning = run.tracking.publish(display, background)
        notices = content["notices"]
        return Outcome(ready.folder, link, warning, left_out, unscored, lost, content["warnings"], notices)


def _tell(ready: Prepared, display: Display) -> None:
    """Show what was noticed about the data and the workspace."""
    for job in ready.jobs.values():
        for note in job.manifest.notes:
            display.say(f"{job.dataset}: {note}")
    if found := leftovers.old(ready.workspace):
        size = sum(each.size for each in found) / 2**20
        display.say(
            f"{found[0].name} and {len(found) - 1} more folders ({size:,.1f} MiB) are of versions before 0.3 "
            "and not read; `ood-pipeline clean` lists and deletes them"
        )


def evaluated(
    settings: schema.Config,
    *,
    engine: engine.Asked = "auto",
    threads: int | None = None,
    fresh: bool = False,
    display: Display | None = None,
) -> Evaluation:
    """Run a whole evaluation and open its results; one that was interrupted goes on where it stopped.

    Args:
        settings: as `pipeline.load_config` gives it.
        engine: "ray", "inline" for this process alone, or "auto": Ray, but for up to 20,000 images where no
            cluster (RAY_ADDRESS), GPU or more than one CPU a worker is asked for. Results are the same.
        threads: of the inline engine; None = one per CPU, 1 = none but the caller's, for debuggers.
        fresh: do everything again.
        display: shows the stages; `pipeline.cli.progress.Display` draws bars. None shows nothing.

    Raises:
        UserError: anything the user can mend; earlier results stay as they are.
    """
    options = Options(fresh=fresh, engine=engine, threads=threads)
    outcome = execute(settings, options, display or Quiet())
    for text in filter(None, (*outcome.cautions, outcome.warning, *outcome.unscored)):
        warnings.warn(text, stacklevel=2)
    return Evaluation(outcome.folder)


def working(ready: Prepared, options: Options, display: Display) -> AbstractContextManager[Engine]:
    """The engine that a run was asked to take."""
    logs = Logs(ready.folder / "logs", options.level)
    return engine_for(
        options, ready.images, ready.plain, display, ready.workspace, logs, ready.detectors.values()
    )


@dataclass
class Run:
    """The stages of one evaluation; each leaves its results in the workspace and the record."""

    ready: Prepared
    options: Options
    display: Display
    background: Apart
    engine: Engine
    claims: Claims
    record: Record = field(init=False)
    tracking: Tracked = field(default_factory=lambda: Tracked(None))
    features: dict[str, tables.Table] = field(default_factory=dict)
    """What was extracted, by dataset."""
    fitted: Fitted | None = None
    scored: list[ScoreJob] = field(default_factory=list)
    """What was scored."""
    calibrating: dict[str, Mask] = field(default_factory=dict)
    """Which rows thresholds and ensembles are calibrated on, by dataset."""
    calibrated: Calibrated | None = None
    """What decides on an image, if the config has thresholds."""
    costs: dict[str, Any] = field(default_factory=dict)
    """What the stage under way says of itself."""
    worked: bool = False
    """Whether it did anything."""
    _afresh: set[str] = field(default_factory=set)
    _to_score: set[str] = field(default_factory=set)
    """Names of the scores of all detectors, once they are fitted."""
    _slices: set[tuple[str, int, int]] = field(default_factory=set)
    """Rows that were scored, each once: dataset, start and stop."""

    def __post_init__(self) -> None:
        self.record = Record(self.ready)

    def all(self) -> None:
        """Every stage that was asked for; what turns out to be damaged is made again, each file once.

        A damaged file is found when it is read. It is taken away, and the stage that makes it comes again.
        """
        names, mended = STAGES[: STAGES.index(self.options.last) + 1], set[str]()
        while names:
            try:
                getattr(self, names[0])()
                names = names[1:]
            except Damaged as damaged:
                maker = self._maker(damaged)
                if damaged.path in mended or not self.may_work(maker):
                    raise
                mended.add(damaged.path)
                artifacts.mend(damaged)
                names = STAGES[STAGES.index(maker) : STAGES.index(self.options.last) + 1]

    def _maker(self, damaged: Damaged) -> StageName:
        """The stage that makes a file of the workspace."""
        (_, path), (_, workspace) = (storage.located(str(p)) for p in (damaged.path, self.ready.workspace))
        place = path.removeprefix(workspace).lstrip("/").partition("/")[0]
        makers: dict[str, StageName] = {"features": "extract", "fits": "fit"}
        return makers.get(place, "score")

    def begin(self) -> None:
        """Make the run folder this run's; a command that is refused never comes here."""
        if self.record.open or (self.options.first == "report" and not self.record.worked):
            self._track()
            return
        folder = self.ready.folder
        if self.record.worked:
            files.write_text(folder / "config.yaml", loading.dump(self.ready.config))
        self.record.open = True
        self._refer()
        self.record.write()
        runs.mark_latest(folder)
        self._track()

    def _refer(self) -> None:
        """Record what this run refers to, so that nobody cleans it away."""
        content = self.record.content
        content["artifacts"] = sorted({*content["artifacts"], *self.refers_to()})

    def _old(self, artifact: Artifact) -> bool:
        """With --fresh: whether it is still to be made again."""
        return self.options.fresh and artifact.name not in self._afresh

    def _renew(self, artifacts: Iterable[Artifact]) -> None:
        """Delete what is to be made again, each once; it must be claimed."""
        for artifact in artifacts:
            if self._old(artifact):
                self._afresh.add(artifact.name)
                artifact.discard()

    @contextmanager
    def stage(self, name: StageName, doing: str, counted: bool = False) -> Iterator[Stage]:
        """Show a stage and record what it took; of one that is `counted` MLflow is told how far it is."""
        if self.may_work(name):
            self.begin()
        started, self.costs, self.worked = time.perf_counter(), {}, False
        with self.display.stage(name, doing) as shown, usage.collect() as used:
            yield self.tracking.watched(name, shown, self.background) if counted else shown
        if self.may_work(name):
            seconds = round(time.perf_counter() - started, 3)
            self.record.spend(name, {**self.costs, "seconds": seconds, **used.numbers()}, self.worked)
            nodes = self.engine.nodes(dead=True)
            self.record.content["nodes"] |= {node: nodes[node] for node in used.nodes & nodes.keys()}
            self._refer()
            self.record.write()
            self._track()

    def refers_to(self) -> list[str]:
        """Folders in the workspace of all that this run refers to so far."""
        jobs = self.ready.jobs.values()
        names = {job.name for job in jobs} | {job.manifest.name for job in jobs}
        names |= {self.ready.note, *self.fits.used}
        return sorted(names | self._to_score)

    def may_work(self, name: StageName) -> bool:
        """Whether this stage may compute what is missing."""
        return STAGES.index(name) >= STAGES.index(self.options.first)

    def _track(self) -> None:
        """Open the MLflow run of this evaluation while others work; one that holds all is left alone."""
        settings = self.ready.config.tracking
        wanted = {"always": True, "never": False}.get(self.options.publish, settings.enabled)
        if self.options.last != "report" or self.tracking.opening is not None:
            return
        if not wanted and (self.record.worked or not settings.enabled):
            return
        place = self.ready.folder, tracking_uri(self.ready.config), settings.experiment
        name = f"{self.ready.config.name}/{self.ready.folder.name}"
        fingerprint = self.ready.fingerprint
        again = self.record.worked or self.options.publish == "always"
        complete = None if again else tracking.complete(*place, fingerprint)
        if complete is None and wanted:
            self.tracking = Tracked(self.background.submit(tracking.begin, *place, name, fingerprint))
        else:
            self.tracking = Tracked(None, complete)

    def _unfinished(self, stage: StageName, jobs: list[J]) -> list[J]:
        """The jobs whose results are missing; an error if this command may not work on them."""
        unfinished = [job for job in jobs if not job.complete]
        if unfinished and not self.may_work(stage):
            names = ", ".join(job.dataset for job in unfinished)
            raise UserError(f"{stage}: not done for {names}. Run `ood-pipeline {stage}` first.")
        return unfinished

    def extract(self) -> None:
        """Features of every image of every dataset."""
        jobs = list(self.ready.jobs.values())
        unfinished = self._unfinished("extract", jobs)
        with self.stage("extract", LOOKS, counted=bool(unfinished)) as shown:
            self.costs = shards.nothing(jobs)

            def make(names: set[str]) -> None:
                from pipeline.stages import extract

                self.worked = True
                self._tell_of_gpus()
                self._require_index()
                ours = [job for job in jobs if job.name in names]
                self._renew(artifact for job in ours for artifact in job.artifacts())
                there = sum(job.manifest.rows for job in jobs if job.name not in names and job.complete)
                try:
                    numbers = extract.run(self.engine, ours, self.ready.plan, shown, there)
                except storage.Changed:
                    self._forget_contents()
                    raise
                self.costs = added(self.costs, numbers)

            self.claims.share(
                lambda: [job.name for job in jobs if self._old(job.artifact) or not job.complete], make
            )
            self._require_images(jobs)
            numbers = self.costs
            self._describe_extras()
            self.features = {job.dataset: job.table() for job in jobs}
            self._find_calibrating()
            for job in jobs:
                facts = job.artifact.require().facts
                counted = {name: facts[name] for name in ("features", "errors", "machines")}
                if facts["errors"]:
                    counted["first_errors"] = shards.first_errors(job)
                    counted["errors_in"] = str(job.artifact.folder / shards.ERRORS_FILE)
                self.record.content["datasets"][job.dataset] |= counted
            shown.note = f"{numbers['forward_images']:,} of {numbers['images']:,} images forwarded"
            passes = sum(count for name, count in numbers.items() if name.endswith("_passes"))
            shown.note += f", {passes:,} passes for extra columns" * bool(passes)
            if numbers["forward_images"]:
                shown.note += f", {numbers['images_per_second']:,.0f} images/s once running"

    def _require_images(self, jobs: Sequence[shards.Job]) -> None:
        """Refuse features of another network, and datasets with too few images to be of use."""
        flagged = {dataset.name for dataset in self.ready.config.of_role("unlabelled")}
        for job in jobs:
            shards.require_same_network(job, self.ready.plan)
            shards.require_few_bad(job, self.ready.plan)
            if job.dataset not in flagged and self.may_work("score"):  # what is scored needs none any more
                shards.require_readable(job)

    def _find_calibrating(self) -> None:
        """Which rows calibrate; too few, as of a class that is seldom predicted, are refused."""
        config, classes = self.ready.config, len(self.ready.network.head[1])
        if config.thresholds is not None or self._combinations:
            self.calibrating = calibration.calibrating(config, self.features)
        if config.thresholds is not None:
            calibration.require_predictions(config, self.features, self.calibrating, classes)

    def _tell_of_gpus(self) -> None:
        """Say that there are GPUs where the config leaves them idle."""
        config, there = self.ready.config, self.engine.gpus()
        asked = config.hardware == "gpu" or config.extract.needs["GPU"] > 0
        if there and not asked:
            self.display.say(f"GPUs: {there:g} there, none used; `--set hardware=gpu` uses them")

    def _require_index(self) -> None:
        """Refuse an index that would find no room hours later."""
        settings = self.ready.config.index
        begins: StageName = "score" if settings.kind == "flat" else "fit"
        if STAGES.index(self.options.last) >= STAGES.index(begins):
            index.require(self.engine, self.ready.banks, settings)

    def _forget_contents(self) -> None:
        """Have images that are known by their bytes be read anew when they are listed next."""
        for dataset in self.ready.config.datasets:
            if dataset.identity == "content":
                contents.forget(contents_of(dataset, self.ready.workspace / "manifests"))

    def _describe_extras(self) -> None:
        """Record over how many images the network was asked for more than features."""
        for extra in self.ready.plan.extras.values():
            if not extra.tapped or self.ready.plan.settings.compile:
                jobs = self.ready.jobs.values()
                images = sum(job.manifest.rows for job in jobs if extra in job.extras)
                entry = {"kind": extra.kind, "spec": extra.model_dump(mode="json"), "samples": images}
                self._note_pass(entry)

    def _note_pass(self, entry: dict[str, Any]) -> None:
        """Record a pass through the network beyond that for the features, once."""
        if entry not in self.record.content["passes"]:
            self.record.content["passes"].append(entry)

    def fit(self) -> None:
        """Statistics, extra passes and banks; nothing is fitted that no detector needs."""
        with self.stage("fit", LOOKS) as shown:
            training = self._fit(shown, self.ready.config.optional)
            assert self.fitted is not None
            self.record.leave_out(self.fitted.not_applicable)
            require_members(self.ready.detectors, self.fitted.not_applicable)
            told = calibration.notices(self.ready.config, self.ready.detectors)
            self.record.content["notices"] = {
                label: [*self.fitted.notices.get(label, ()), *filter(None, [told.get(label)])]
                for label in self._labels
                if label in self.fitted.notices or label in told
            }
            self.worked = bool(self.fits.made_now)
            done = [type(spec).__name__.lower() for spec in training.passes]
            count = len(self._labels)
            shown.note = ", ".join([f"{count} detectors", *(f"{name} pass" for name in done)])

    @cached_property
    def fits(self) -> Store:
        """What is learned from rows and by extra passes."""
        mode: Literal["reuse", "frozen", "fresh"] = "fresh" if self.options.fresh else "reuse"
        mode = mode if self.may_work("fit") else "frozen"
        return Store(self.ready.workspace / "fits", mode, claims=self.claims)

    def _fit(self, shown: Stage, optional: Collection[str] = ()) -> Training:
        """Fit the detectors; returns what they learned from, as far as one of them needs it."""
        chosen = {name: each for name, each in self.ready.detectors.items() if name not in self._combinations}
        detectors = chosen.values()
        stages = self.ready.network.taps.stages
        head = Head(*self.ready.network.head, tuple(stages.values()))
        specs = list(dict.fromkeys(spec for detector in detectors for spec in detector.passes()))
        learned = [wanted for detector in detectors for wanted in detector.statistics()]
        calibrating = [wanted for detector in detectors for wanted in detector.calibration()]
        ood = [wanted for detector in detectors for wanted in detector.ood_statistics()]
        held_out = bool(self.ready.of_role("id_val"))
        train = self._statistics("train", learned + ([] if held_out else calibrating), head, shown)
        id_val = self._statistics("id_val", calibrating, head, shown) if held_out else train
        ood_val = self._statistics("ood_val", ood, head, shown)
        made = self._passes(specs, self.fits, shown) if specs else {}
        training = Training(
            head.weight,
            head.bias,
            self.ready.network.taps.blocks,
            stages,
            train=Statistics(train),
            id_val=Statistics(id_val),
            ood_val=Statistics(ood_val),
            passes={spec: kept.arrays() for spec, kept in made.items()},
        )

        def made_of(detector: Detector, without: Collection[str]) -> tuple[dict[str, Any], dict[str, str]]:
            contents = self._rows_of(detector) | train.contents(detector.statistics())
            contents |= id_val.contents(detector.calibration()) | ood_val.contents(detector.ood_statistics())
            for spec in detector.passes():
                contents |= made[spec].content
            return self.ready.learned(detector, without), contents

        source = next(iter(self._tables("train")), None)
        self.fitted = fit_detectors(
            self.engine,
            chosen,
            training,
            self.fits,
            source,
            made_of,
            self.ready.config.index,
            optional,
            shown,
        )
        self._to_score = self._names_of_scores(self.fitted)
        return training

    def _rows_of(self, detector: Detector) -> dict[str, str]:
        """Content digests of the features that a detector is fitted to."""
        learned, contents = self.ready.learned(detector), dict[str, str]()
        names = {name for part in ("train", "held out", "ood_val") for name in learned.get(part, ())}
        for job in self.ready.jobs.values():
            if job.name in names:
                columns = [extra.column for extra in detector.extras()]
                contents |= self.features[job.dataset].contents(job.name, columns)
        return contents

    def _tables(self, *roles: str) -> list[tables.Table]:
        """What was extracted of the datasets with these roles."""
        return [self.features[job.dataset] for job in self.ready.of_role(*roles)]

    def _statistics(self, role: str, wanted: list[Statistic[Any]], head: Head, shown: Stage) -> Stored:
        rows = Rows(self._tables(role), self.ready.names(role))
        return fit_statistics(self.engine, self.fits, rows, wanted, head, shown)

    def _passes(self, specs: list[Pass], store: Store, shown: Stage) -> dict[Pass, Kept]:
        """Results of the extra passes; the model actors start only if one is not in the cache."""
        ready = self.ready
        results: dict[Pass, Kept] = {}
        trains, held_out = (
            [job.manifest for job in ready.of_role(role) or ready.of_role(other)]
            for role, other in (("train", "id_val"), ("id_val", "train"))
        )
        with ExitStack() as stack:

            @cache
            def runner() -> passes.Runner:
                from pipeline.stages import passes

                class Shown(passes.Runner):
                    def each(self, call: str, arguments: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
                        given = list(arguments)
                        shown.count(f"parts of the {kind} pass", len(given))
                        if self.workers is None:
                            shown.doing(LOADS)
                        for result in super().each(call, given):
                            shown.advance(1)
                            yield result

                early = ready.network.taps.early
                return stack.enter_context(Shown(self.engine, trains[0], ready.plan, early, held_out))

            for spec in specs:
                kind = type(spec).__name__.lower()
                identity = {
                    "pass": spec.model_dump(),
                    "train": ready.names("train"),
                    "held out": ready.names("id_val") if spec.held_out else None,
                    "seed": ready.config.seed,
                }

                def compute(_: Any, spec: Pass = spec) -> list[Arrays]:
                    return [runner().run(spec)]

                artifact = store.artifact(f"{kind} pass {spec.version}", identity)
                (results[spec],) = store.kept([artifact], compute)
                self._note_pass(self._describe(kind, spec, results[spec].arrays()))
        return results

    def _describe(self, kind: str, spec: Pass, result: Arrays) -> dict[str, Any]:
        entry = {"kind": kind, "spec": spec.model_dump(), "samples": int(result["samples"])}
        if isinstance(spec, Jigsaw):
            entry["blocks"] = list(self.ready.network.taps.blocks)
            entry |= {name: result[name].tolist() for name in ("ratio", "stderr")}
        return entry

    def score(self) -> None:
        """Scores of every row of every dataset but the training one."""
        fitted = self.fitted
        assert fitted is not None
        self.scored = jobs = self._score_jobs(fitted)
        self._unfinished("score", jobs)
        self._slices.clear()
        with self.stage("score", LOOKS, counted=True) as shown:
            self.record.content["unscored"] = self._score(jobs, fitted, shown)
            for label, bank in fitted.banks.items():  # scores that were there were searched, too
                self.record.content["index"].setdefault(label, self._bank(bank))
            if self._combinations:
                self.scored = jobs = self._combined(jobs, shown)
                limit = self.ready.config.score.max_unscored_fraction
                self.record.content["unscored"] = require_few_unscored(jobs, limit)
            shown.doing("puts the tables of scores together")
            self._require_kept(jobs)
            self.calibrated = self._calibrated(jobs)
            for job in jobs if self.may_work("score") else ():
                self._assemble(job, self._flagging(job.dataset))
            rows = sum(stop - start for _, start, stop in self._slices)
            self.costs = {"rows": rows, "scores": self.costs.get("scores", 0)}
            shown.note = f"{self.costs['scores']:,} scores of {rows:,} rows"

    @property
    def _combinations(self) -> dict[str, Combination]:
        """Detectors of the scores of others, by label."""
        return calibration.combinations(self.ready.detectors)

    @property
    def _labels(self) -> list[str]:
        """Labels of all detectors that apply."""
        assert self.fitted is not None
        there = {*self.fitted.scorers, *self._combinations}
        return [label for label in self.ready.detectors if label in there]

    def _combined(self, jobs: list[ScoreJob], shown: Stage) -> list[ScoreJob]:
        """The same with the scores of detectors that combine others."""
        chosen, rows = self._combinations, self.calibrating

        def place(label: str, dataset: str, contents: Mapping[str, str]) -> Artifact:
            return self._score_artifact(label, self.ready.jobs[dataset], contents)

        def score(ours: list[ScoreJob]) -> Made:
            labels = {label for job in ours for label in job.scores}
            how = ensembles.scoring(jobs, chosen, rows).only(labels)
            return run_scores(self.engine, ours, how, shown, ensembles.ROWS)

        combined = ensembles.jobs(jobs, chosen, rows, place)
        self._unfinished("score", combined)
        self._share(combined, score)
        return ensembles.merged(jobs, combined, self._labels)

    def _calibrated(self, jobs: Sequence[ScoreJob]) -> Calibrated | None:
        """What decides on an image, from the scores of those that calibrate."""
        if self.ready.config.thresholds is None:
            return None
        return calibration.gathered(
            self.ready.config, jobs, self.calibrating, len(self.ready.network.head[1])
        )

    @property
    def _tested(self) -> dict[str, Mask]:
        """Rows that are tested, of the datasets of which others calibrate."""
        if calibration.Split.of(self.ready.config) is None:
            return {}
        return {name: ~rows for name, rows in self.calibrating.items()}

    def _require_kept(self, jobs: Iterable[ScoreJob]) -> None:
        """Refuse to put other scores in the place of those that a finished run has its numbers of.

        Raises:
            UserError: some were made again, of other data, by another run.
        """
        for job in jobs if self.record.earlier.get("status") == "finished" else ():
            try:
                table = artifacts.read_record(self._scores(job.dataset))
            except (FileNotFoundError, Damaged):
                continue
            if other := job.remade(table):
                self.record.worked = False  # what it says of the run stays as it is, too
                raise UserError(
                    f"{self.ready.folder}: is finished, but its scores of {job.dataset} by {other[0]} were "
                    "made again since, of other data. `--fresh` makes a new run beside it; this one is kept."
                )

    def _assemble(self, job: ScoreJob, flagging: Mapping[str, float]) -> None:
        """Put the table of scores of a dataset together."""
        (role,) = (each.role for each in self.ready.config.datasets if each.name == job.dataset)
        judge = None
        if self.calibrated is not None:
            judge = decisions.judge(self.engine, self.calibrated, job, role)
        assemble(self.engine, job, self._scores(job.dataset), flagging, judge)

    def _flagging(self, dataset: str) -> dict[str, float]:
        """Thresholds for the flags in a table of scores: on unlabelled data, once there are some."""
        unlabelled = [job.dataset for job in self.ready.of_role("unlabelled")]
        if self.calibrated or dataset not in unlabelled or self._results().checked() is None:
            return {}
        return dict(files.read_json(self.ready.folder / "thresholds.json"))

    def _score(self, jobs: list[ScoreJob], fitted: Fitted, shown: Stage) -> Unscored:
        """Have all scores made that are lacking; returns the rows that detectors could not score."""
        self._share(jobs, lambda ours: self._score_ours(ours, fitted, shown))
        return require_few_unscored(jobs, self.ready.config.score.max_unscored_fraction)

    def _share(self, jobs: list[ScoreJob], score: Callable[[list[ScoreJob]], Made]) -> None:
        """Have all scores made that are lacking.

        Args:
            jobs: what is wanted.
            score: makes those of some jobs that nobody else makes.
        """

        def make(names: set[str]) -> None:
            self.worked = True
            ours = [job.only(names) for job in jobs]
            self._renew(artifact for job in ours for artifact in job.scores.values())
            made = score(ours)
            self._slices.update(made.slices)
            self.costs = added(self.costs, {"scores": made.scores})
            self.record.spend_on(made.costs)

        def lacking() -> list[str]:
            old = [each.name for job in jobs for each in job.scores.values() if self._old(each)]
            return old + [name for job in jobs for name in job.lacking_names()]

        self.claims.share(lambda: set(lacking()), make)

    def _score_ours(self, jobs: list[ScoreJob], fitted: Fitted, shown: Stage) -> Made:
        """Scores that nobody else makes."""
        lacking = {label for job in jobs for label in job.lacking()}
        banks = {label: bank for label, bank in fitted.banks.items() if label in lacking}
        settings = self.ready.config.index
        if banks:
            shown.doing(f"loads the vectors of {', '.join(banks)}")
        searched = (
            index.start(self.engine, banks.values(), settings, fitted.banks.values()) if banks else None
        )
        try:
            if searched is not None:
                self._describe_index(searched, fitted.scorers, banks)
            folders = {label: bank.folder for label, bank in banks.items()}
            scoring = Scoring(fitted.scorers, self._columns(), folders, searched)
            return run_scores(self.engine, jobs, scoring, shown)
        finally:
            if searched is not None:
                searched.stop()

    def _describe_index(
        self, searched: index.Index, scorers: Mapping[str, Scorer], banks: Mapping[str, index.BankFiles]
    ) -> None:
        """Record the banks, and for approximate ones how often the true neighbour is found.

        Written at once: a run that is killed later, when the scores are there, does not search again.
        """
        rows = self._tables("id")[0].read(0, _RECALL_QUERIES, self._columns())
        for label, bank_files in banks.items():
            bank = bank_of(scorers[label])
            assert bank is not None
            self.record.content["index"][label] = entry = self._bank(bank_files)
            entry["shards"] = len(searched.shards)
            if "recall_at_1" not in entry:
                entry["recall_at_1"] = index.recall(searched, bank_files.folder, bank.queries(rows))
        self._refer()
        self.record.write()

    def _bank(self, bank: index.BankFiles) -> dict[str, Any]:
        """What is known of a bank without a search."""
        kind = self.ready.config.index.kind
        entry = {"rows": bank.rows, "dim": bank.width, "kind": kind}
        return entry | ({"recall_at_1": 1.0} if kind == "flat" else {})

    def _columns(self) -> tuple[str, ...]:
        norms = (BLOCK_NORM,) if self.ready.network.taps.blocks else ()
        return (KEY, LABEL, PREDICTION, FEATURE, LOGITS, *norms, *self.ready.plan.extras)

    def _score_jobs(self, fitted: Fitted) -> list[ScoreJob]:
        """All datasets but the training one, and where the scores of the detectors on them are kept."""
        jobs = []
        for dataset in self.ready.config.datasets:
            if dataset.role != "train":
                job = self.ready.jobs[dataset.name]
                scores = {
                    label: self._score_artifact(label, job, contents)
                    for label, contents in fitted.contents.items()
                }
                jobs.append(ScoreJob(dataset.name, self.features[dataset.name], scores))
        return jobs

    def _names_of_scores(self, fitted: Fitted) -> set[str]:
        """Folders in the workspace of the scores of all detectors."""
        jobs = self._score_jobs(fitted)
        combined = [
            self._score_artifact(label, self.ready.jobs[job.dataset], {})
            for job in jobs
            for label in self._combinations
        ]
        made = [*combined, *(artifact for job in jobs for artifact in job.scores.values())]
        return {f"scores/{artifact.name}" for artifact in made}

    def _score_artifact(self, label: str, job: shards.Job, contents: Mapping[str, str]) -> Artifact:
        """Where the scores of a detector, that is made of some `contents`, on a dataset are kept."""
        detector = self.ready.detectors[label]
        columns = (extra.column for extra in detector.extras())
        made_of = {**contents, **self.features[job.dataset].contents(job.name, columns)}
        return score_artifact(self.ready.workspace, job, detector, self.ready.scoring(label), made_of)

    def _scores(self, dataset: str) -> Place:
        return self.ready.folder / "scores" / dataset

    def evaluate(self) -> None:
        """Metrics, thresholds, and flags on unlabelled data."""
        assert self.fitted is not None
        results = self._results()
        done = results.checked()
        if done is None and not self.may_work("evaluate"):
            raise UserError("evaluate: not done for this run. Run `ood-pipeline evaluate` first.")
        with self.stage("evaluate", "reads the scores", counted=done is None) as shown:
            if done is None:
                self.worked = True
                jobs = {job.dataset: job for job in self.scored}
                roles: dict[str, list[ScoreJob]] = {}
                for dataset in self.ready.config.datasets:
                    if dataset.name in jobs:
                        roles.setdefault(dataset.role, []).append(jobs[dataset.name])
                level, tested = self.ready.config.metrics.fpr_level, self._tested
                table, thresholds = evaluate.run(self.engine, roles, shown, level=level, tested=tested)
                pairs = evaluate.paired(self.engine, roles, self.ready.config.seed, level, tested, shown)
                shown.doing("decides on images, and looks for those in several datasets")
                written = evaluate.write(self.ready.folder, table, thresholds, pairs)
                if self.calibrated is None:
                    for job in roles.get("unlabelled", ()):
                        self._assemble(job, thresholds)
                else:
                    decided = decisions.decisions(self.engine, roles, self.calibrated, tested)
                    written |= decisions.write(self.ready.folder, self.calibrated, decided)
                duplicated = duplicates.found(self.engine, self._jobs_by_role())
                facts = {"numbering": self._numbering(), "duplicates": duplicated}
                done = results.finish(written, alone=False, **facts)
            for name in done.facts["duplicates"]["unknown"]:
                self.display.say(
                    f"{name}: not looked for images that are also in another dataset: its features were made "
                    "by an earlier version"
                )
            self.record.content["duplicates"] = done.facts["duplicates"]
            self._note_metrics(done.facts["numbering"])
            shown.note = self._accuracy_note()

    def _jobs_by_role(self) -> dict[str, list[shards.Job]]:
        roles = dict.fromkeys(each.role for each in self.ready.config.datasets)
        return {role: self.ready.of_role(role) for role in roles}

    def _results(self) -> Artifact:
        """The artifact of metrics and thresholds, in the run folder beside what is none."""
        contents = {
            f"{job.dataset}/{label}": table.content
            for job in self.scored
            for label, table in job.tables().items()
        }
        for job in self.ready.jobs.values():
            digests = job.digested()
            contents[f"{job.dataset}/{shards.DIGESTS}"] = "none" if digests is None else digests.content
        identity = {"fingerprint": self.ready.fingerprint}
        return Artifact(self.ready.folder, evaluate.FORMAT, identity, contents)

    def _numbering(self) -> dict[str, str]:
        """What is suspicious about the labels of the datasets of ID images, by their names."""
        classes = len(self.ready.network.head[1])
        names = [job.dataset for job in self.ready.of_role(*schema.ID_ROLES)]
        return {name: evaluate.numbering(self.features[name], classes) for name in names}

    def _note_metrics(self, numbering: Mapping[str, str]) -> None:
        """Record the classifier's accuracy and what must be known before the metrics are believed."""
        content, folder = self.record.content, self.ready.folder
        rows = files.read_json(folder / "metrics.json")
        for row in rows:
            if row["metric"] == "id_accuracy":
                content["datasets"][row["dataset"]]["accuracy"] = row["value"]
        for name, suspicion in numbering.items():
            content["datasets"][name]["numbering"] = suspicion
        content["warnings"] = cautions(Found(content, rows, files.read_json(folder / "thresholds.json")))

    def _accuracy_note(self) -> str:
        datasets = self.record.content["datasets"].items()
        found = [(name, entry["accuracy"]) for name, entry in datasets if entry["accuracy"] is not None]
        return ", ".join(f"accuracy on {name} {value:.2%}" for name, value in found)

    def report(self) -> None:
        """The page with tables and charts."""
        self.begin()
        page = self.ready.folder / "report" / "index.html"
        if self.record.worked:  # it shows other numbers, should the new one not be finished
            page.unlink(missing_ok=True)
        self.record.close("finished")
        with self.stage("report", "draws the page") as shown:
            if self.record.worked or self.options.first == "report" or not page.is_file():
                report.write(self.ready.folder, self.ready.config.report.images, self.ready.metadata)
            shown.note = str(page)
        self.record.close("finished")


@dataclass
class Tracked:
    """MLflow beside the run; what goes wrong with it is told, and costs no result."""

    opening: Future[tracking.Session] | None
    complete: tracking.Session | None = None
    """The session in which everything was sent before."""

    def publish(self, display: Display, background: Apart) -> tuple[str, str]:
        """Send the results; returns where to see them, and a warning if that failed."""
        if self.opening is None:
            return "" if self.complete is None else tracking.link(self.complete), ""
        try:
            with display.stage("track", "sends the results to MLflow"):
                session = self.opening.result()
                background.submit(tracking.publish, session).result()
            return tracking.link(session), ""
        except tracking.TrackingError as error:
            return "", str(error)

    def watched(self, name: str, shown: Stage, background: Apart) -> Stage:
        """A stage whose progress MLflow is told, too."""
        return shown if self.opening is None else Watched(shown, name, self.opening, background)

    def fail(self, error: BaseException, background: Apart) -> None:
        """Mark the run as failed."""
        if self.opening is None:
            return
        try:
            killed, text = isinstance(error, INTERRUPTED), f"{type(error).__name__}: {error}"
            background.submit(tracking.fail, self.opening.result(), text, killed).result()
        except (tracking.TrackingError, UserError):
            return


class Watched:
    """A stage that tells MLflow how much is done of what it counts first.

    A server that fails is not told again.
    """

    def __init__(self, shown: Stage, name: str, opening: Future[tracking.Session], background: Apart) -> None:
        self._shown, self._name, self._opening, self._background = shown, name, opening, background
        self._started, self._done, self._told = time.monotonic(), 0, -TELL
        self._telling: Future[None] | None = None
        self._first = self._what = ""

    @property
    def note(self) -> str:
        """What the closing line says."""
        return self._shown.note

    @note.setter
    def note(self, text: str) -> None:
        self._shown.note = text

    def doing(self, text: str) -> None:
        """Say what it does until work advances."""
        self._shown.doing(text)

    def count(self, what: str, total: int, there: int = 0) -> None:
        """Begin to count."""
        self._shown.count(what, total, there)
        self._first, self._what = self._first or what, what

    def advance(self, count: int) -> None:
        """Count work that is done."""
        self._shown.advance(count)
        if self._what != self._first:
            return
        self._done += count
        seconds = time.monotonic() - self._started
        last = self._telling or self._opening
        if seconds - self._told >= TELL and last.done():
            self._told = seconds if last.exception() is None else math.inf
            if last.exception() is None:
                progress = self._opening.result(), self._name, self._done, seconds
                self._telling = self._background.submit(tracking.progress, *progress)
