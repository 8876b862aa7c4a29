"""One evaluation from config to report: every stage reuses what is already in the workspace.

Extract, fit, score, evaluate, report. A killed run is continued by running it again.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from numpy.typing import NDArray

from pipeline.cluster import engine, usage
from pipeline.cluster.engine import Engine
from pipeline.cluster.logs import Logs
from pipeline.columns import BLOCK_NORM, FEATURE, KEY, LABEL, LOGITS, PREDICTION
from pipeline.config import loading, schema
from pipeline.detectors.base import Jigsaw, Pass, Training, bank_of
from pipeline.errors import UserError
from pipeline.learned.statistics import Head, Statistic, Statistics
from pipeline.network.classifier import settings_kept
from pipeline.results import report
from pipeline.results.evaluation import Evaluation
from pipeline.results.mlflow import tracking
from pipeline.results.record import Record
from pipeline.stages import evaluate, extract, index, passes, shards
from pipeline.stages.fit import Fitted, fit_detectors
from pipeline.stages.prepare import Prepared, prepare, tracking_uri
from pipeline.stages.score import ScoreJob, Scoring, flag
from pipeline.stages.score import run as run_scores
from pipeline.stages.statistics import Rows, fit_statistics
from pipeline.workflows.progress import Display, Quiet, Stage
from pipeline.workspace import artifacts, files
from pipeline.workspace.artifacts import Cache
from pipeline.workspace.claims import alone
from pipeline.workspace.files import Place

StageName = Literal["extract", "fit", "score", "evaluate", "report"]
STAGES: tuple[StageName, ...] = ("extract", "fit", "score", "evaluate", "report")

J = TypeVar("J", shards.Job, ScoreJob)

_EVALUATED = "_evaluated.json"
_RESULTS = ("metrics.parquet", "metrics.csv", "metrics.json", "thresholds.json")
_RECALL_QUERIES = 1024


@dataclass(frozen=True)
class Options:
    """What a command asks for beyond the config."""

    first: StageName = "extract"
    """Stages before this one must be done already."""
    last: StageName = "report"
    fresh: bool = False
    """Do everything again."""
    publish: Literal["as configured", "always", "never"] = "as configured"
    """Whether to send the results to MLflow."""
    engine: engine.Name = "ray"
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


def execute(settings: schema.Config, options: Options, display: Display) -> Outcome:
    """Run the stages from `options.first` to `options.last`.

    Raises:
        UserError: anything the user can mend; earlier results stay as they are.
    """
    with display.stage("prepare") as stage:
        ready = prepare(settings)
        images = sum(job.manifest.rows for job in ready.jobs.values())
        stage.note = f"{len(ready.jobs)} datasets, {images:,} images, {len(ready.detectors)} detectors"
        if ready.not_applicable:
            stage.note += f", {len(ready.not_applicable)} more do not apply"
    with (
        alone(ready.workspace) as check,
        working(ready, options) as chosen,
        ThreadPoolExecutor(1) as background,
    ):
        if options.fresh:
            _forget(ready)
        run = Run(ready, options, display, background, chosen)
        try:
            for name in STAGES[: STAGES.index(options.last) + 1]:
                check()
                getattr(run, name)()
        except BaseException as error:
            run.record.close("failed")
            run.tracking.fail(error)
            raise
        if options.last != "report":
            run.record.close("partial")
        left_out = run.record.content["not_applicable"]
        return Outcome(ready.folder, *run.tracking.publish(display), not_applicable=left_out)


def evaluated(
    settings: schema.Config,
    *,
    engine: engine.Name = "ray",
    threads: int | None = None,
    fresh: bool = False,
    display: Display | None = None,
) -> Evaluation:
    """Run a whole evaluation and open its results; one that was interrupted goes on where it stopped.

    Args:
        settings: as `pipeline.load_config` gives it.
        engine: "ray", or "inline" for this process alone.
        threads: of the inline engine; None = one per CPU, 1 = none but the caller's, for debuggers.
        fresh: do everything again.
        display: shows the stages; `pipeline.cli.progress.Display` draws bars. None shows nothing.

    Raises:
        UserError: anything the user can mend; earlier results stay as they are.
    """
    options = Options(fresh=fresh, engine=engine, threads=threads)
    outcome = execute(settings, options, display or Quiet())
    if outcome.warning:
        warnings.warn(outcome.warning, stacklevel=2)
    return Evaluation(outcome.folder)


@contextmanager
def working(ready: Prepared, options: Options) -> Iterator[Engine]:
    """The engine that was asked for, with the code of all detectors, and torch as it was after the block."""
    logs = Logs(ready.folder / "logs", options.level)
    with settings_kept(), engine.opened(options.engine, ready.workspace, logs, options.threads) as chosen:
        chosen.carry(type(part) for detector in ready.detectors.values() for part in detector.parts())
        yield chosen


def _forget(ready: Prepared) -> None:
    """Drop the run folder and the features of its datasets."""
    for folder in (ready.folder, *(files.at(job.folder) for job in ready.jobs.values())):
        artifacts.remove_folder(folder)


@dataclass
class Run:
    """The stages of one evaluation; each leaves its results in the workspace and the record."""

    ready: Prepared
    options: Options
    display: Display
    background: ThreadPoolExecutor
    engine: Engine
    record: Record = field(init=False)
    tracking: Tracked = field(default_factory=lambda: Tracked(None))
    fitted: Fitted | None = None

    def __post_init__(self) -> None:
        self.record = Record(self.ready, keep_stages=self.options.first == "report")

    def begin(self) -> None:
        """Make the run folder this run's; a command that is refused never comes here.

        Results of another evaluation under the same name go, the marker that they are complete first.
        """
        folder, stale = self.ready.folder, not self.evaluated
        if not self.record.open:
            for name in (_EVALUATED, *_RESULTS) if stale else ():
                (folder / name).unlink(missing_ok=True)
            if stale:
                files.remove_folder(folder / "report")
            for scores in (folder / "scores").glob("*"):
                if scores.name not in self.ready.jobs:  # a dataset that is no longer in the config
                    files.remove_folder(scores)
            files.write_text(folder / "config.yaml", loading.dump(self.ready.config))
            self.record.open = True
            self.record.write()
            self.tracking = self._tracked()

    @property
    def evaluated(self) -> bool:
        """Whether the metrics of exactly this evaluation are there."""
        marker = self.ready.folder / _EVALUATED
        return marker.is_file() and files.read_json(marker) == self.ready.fingerprint

    @contextmanager
    def stage(self, name: StageName, total: int = 0) -> Iterator[Stage]:
        """Show a stage and record what it took."""
        if self.may_work(name):
            self.begin()
        started = time.perf_counter()
        with self.display.stage(name, total) as shown, usage.collect() as used:
            yield shown
        if self.may_work(name):
            numbers = self.record.content["stages"].setdefault(name, {})
            numbers |= {"seconds": round(time.perf_counter() - started, 3), **used.numbers()}
            nodes = self.engine.nodes(dead=True)
            self.record.content["nodes"] |= {node: nodes[node] for node in used.nodes & nodes.keys()}
            self.record.write()

    def may_work(self, name: StageName) -> bool:
        """Whether this stage may compute what is missing."""
        return STAGES.index(name) >= STAGES.index(self.options.first)

    def _tracked(self) -> Tracked:
        """The MLflow run of this evaluation, opened while the first stage works."""
        settings = self.ready.config.tracking
        wanted = {"always": True, "never": False}.get(self.options.publish, settings.enabled)
        if not wanted or self.options.last != "report":
            return Tracked(None)
        uri = tracking_uri(self.ready.config)
        name = self.ready.config.name
        folder = self.ready.folder
        opening = self.background.submit(
            tracking.begin, folder, uri, settings.experiment, name, self.ready.fingerprint
        )
        return Tracked(opening)

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
        rows = sum(job.manifest.rows for job in unfinished)
        with self.stage("extract", rows) as shown:
            numbers = extract.run(
                self.engine, jobs, self.ready.plan, lambda receipt: shown.advance(receipt["rows"])
            )
            if self.may_work("extract"):
                self.record.content["stages"]["extract"] = numbers
            self._describe_extras()
            for job in jobs:
                counted = files.read_json(files.at(job.folder) / artifacts.RECORD)
                entry = self.record.content["datasets"][job.dataset]
                entry |= {"features": counted["features"], "errors": counted["errors"]}
            shown.note = f"{numbers['forward_images']:,} of {numbers['images']:,} images forwarded"
            passes = sum(count for name, count in numbers.items() if name.endswith("_passes"))
            shown.note += f", {passes:,} passes for extra columns" * bool(passes)
            if numbers["forward_images"]:
                shown.note += f", {numbers['images_per_second']:,.0f} images/s once running"

    def _describe_extras(self) -> None:
        """Record over how many images the network was asked for more than features."""
        for extra in self.ready.plan.extras.values():
            if not extra.tapped or self.ready.plan.settings.compile:
                jobs = self.ready.jobs.values()
                images = sum(job.manifest.rows for job in jobs if extra in job.extras)
                entry = {"kind": extra.kind, "spec": extra.model_dump(mode="json"), "samples": images}
                self.record.content["passes"].append(entry)

    def fit(self) -> None:
        """Statistics, extra passes and banks; nothing is fitted that no detector needs."""
        detectors = self.ready.detectors
        mode: Literal["reuse", "frozen", "fresh"] = "fresh" if self.options.fresh else "reuse"
        cache = Cache(self.ready.workspace / "fits", mode if self.may_work("fit") else "frozen")
        with self.stage("fit") as shown:
            training = self._training(cache)
            trains = self.ready.of_role("train")
            source = (trains[0].table(), self.ready.training) if trains else None
            self.fitted = fit_detectors(
                self.engine, detectors, training, cache, source, self.ready.config.optional
            )
            self.record.leave_out(self.fitted.not_applicable)
            done = [type(spec).__name__.lower() for spec in training.passes]
            count = len(self.fitted.scorers)
            shown.note = ", ".join([f"{count} detectors", *(f"{name} pass" for name in done)])

    def _training(self, cache: Cache) -> Training:
        """All that detectors may learn from, as far as one of them needs it."""
        detectors = self.ready.detectors.values()
        stages = self.ready.classifier.taps.stages
        head = Head(*self.ready.classifier.head, tuple(stages.values()))
        specs = list(dict.fromkeys(spec for detector in detectors for spec in detector.passes()))
        learned = [wanted for detector in detectors for wanted in detector.statistics()]
        calibrating = [wanted for detector in detectors for wanted in detector.calibration()]
        ood = [wanted for detector in detectors for wanted in detector.ood_statistics()]
        held_out = bool(self.ready.of_role("id_val"))
        train = self._statistics(cache, "train", learned + ([] if held_out else calibrating), head)
        return Training(
            head.weight,
            head.bias,
            self.ready.classifier.taps.blocks,
            stages,
            train=train,
            id_val=self._statistics(cache, "id_val", calibrating, head) if held_out else train,
            ood_val=self._statistics(cache, "ood_val", ood, head),
            passes=self._passes(cache, specs) if specs else {},
        )

    def _statistics(self, cache: Cache, role: str, wanted: list[Statistic[Any]], head: Head) -> Statistics:
        jobs = self.ready.of_role(role)
        rows = Rows([job.table() for job in jobs], [job.identity for job in jobs])
        return fit_statistics(self.engine, cache, rows, wanted, head)

    def _passes(self, cache: Cache, specs: list[Pass]) -> dict[Pass, passes.Result]:
        """Results of the extra passes; the model actors start only if one is not in the cache."""
        ready = self.ready
        results: dict[Pass, passes.Result] = {}
        trains, held_out = (
            [job.manifest for job in ready.of_role(role) or ready.of_role(other)]
            for role, other in (("train", "id_val"), ("id_val", "train"))
        )
        with passes.Runner(
            self.engine, trains[0], ready.plan, ready.classifier.taps.early, held_out
        ) as runner:
            for spec in specs:
                kind = type(spec).__name__.lower()
                identity = {
                    "pass": spec.model_dump(),
                    "train": ready.training["train"],
                    "held out": ready.training["id_val"] if spec.held_out else None,
                    "seed": ready.config.seed,
                }

                def compute(spec: Pass = spec) -> Mapping[str, NDArray[Any]]:
                    return runner.run(spec)

                results[spec] = cache.get(f"{kind} pass", identity, compute)
                self.record.content["passes"].append(self._describe(kind, spec, results[spec]))
        return results

    def _describe(self, kind: str, spec: Pass, result: passes.Result) -> dict[str, Any]:
        entry = {"kind": kind, "spec": spec.model_dump(), "samples": int(result["samples"])}
        if isinstance(spec, Jigsaw):
            entry["blocks"] = list(self.ready.classifier.taps.blocks)
            entry |= {name: result[name].tolist() for name in ("ratio", "stderr")}
        return entry

    def score(self) -> None:
        """Scores of every row of every dataset but the training one."""
        fitted = self.fitted
        assert fitted is not None
        jobs = self._score_jobs()
        unfinished = self._unfinished("score", jobs)
        rows = sum(job.features.rows for job in unfinished)
        with self.stage("score", rows) as shown:
            if unfinished:
                self._score(unfinished, fitted, shown.advance)
            shown.note = f"{rows:,} rows"
            if self.may_work("score"):
                self.record.content["stages"]["score"] = {"rows": rows}

    def _score(self, jobs: list[ScoreJob], fitted: Fitted, progress: Callable[[int], None]) -> None:
        searched = index.start(self.engine, fitted.banks, self.ready.config.index) if fitted.banks else None
        try:
            if searched is not None:
                self._describe_index(searched, fitted)
            run_scores(self.engine, jobs, Scoring(fitted.scorers, self._columns(), searched), progress)
        finally:
            if searched is not None:
                searched.stop()

    def _describe_index(self, searched: index.Index, fitted: Fitted) -> None:
        """Record the banks, and for approximate ones how often the true neighbour is found."""
        kind = self.ready.config.index.kind
        rows = self.ready.of_role("id")[0].table().read(0, _RECALL_QUERIES, self._columns())
        for label, bank_files in fitted.banks.items():
            bank = bank_of(fitted.scorers[label])
            assert bank is not None
            exact = kind == "flat"
            self.record.content["index"][label] = {
                "rows": bank_files.rows,
                "dim": bank_files.width,
                "kind": kind,
                "shards": len(searched.shards),
                "recall_at_1": 1.0 if exact else index.recall(searched, label, bank.queries(rows)),
            }

    def _columns(self) -> tuple[str, ...]:
        norms = (BLOCK_NORM,) if self.ready.classifier.taps.blocks else ()
        return (KEY, LABEL, PREDICTION, FEATURE, LOGITS, *norms, *self.ready.plan.extras)

    def _score_jobs(self) -> list[ScoreJob]:
        jobs = []
        for dataset in self.ready.config.datasets:
            if dataset.role != "train":
                job = self.ready.jobs[dataset.name]
                inputs = artifacts.digest([self.ready.scoring, job.identity])
                folder = str(self._scores(dataset.name))
                jobs.append(ScoreJob(dataset.name, job.table(), folder, inputs))
        return jobs

    def _scores(self, dataset: str) -> Place:
        return self.ready.folder / "scores" / dataset

    def evaluate(self) -> None:
        """Metrics, thresholds, and flags on unlabelled data."""
        assert self.fitted is not None
        done, labels = self.evaluated, list(self.fitted.scorers)
        if not done and not self.may_work("evaluate"):
            raise UserError("evaluate: not done for this run. Run `ood-pipeline evaluate` first.")
        with self.stage("evaluate", 0 if done else len(labels)) as shown:
            if not done:
                roles: dict[str, dict[str, str]] = {}
                for dataset in self.ready.config.datasets:
                    roles.setdefault(dataset.role, {})[dataset.name] = str(self._scores(dataset.name))
                scores = evaluate.Scores(roles, self.ready.config.seed)
                table, thresholds = evaluate.run(self.engine, scores, labels, shown.advance)
                for folder in scores.of("unlabelled").values():
                    flag(self.engine, files.at(folder), thresholds)
                evaluate.write(self.ready.folder, table, thresholds)
                files.write_json(self.ready.folder / _EVALUATED, self.ready.fingerprint)
            self._note_accuracy()
            shown.note = self._accuracy_note()

    def _note_accuracy(self) -> None:
        for row in files.read_json(self.ready.folder / "metrics.json"):
            if row["metric"] == "id_accuracy":
                self.record.content["datasets"][row["dataset"]]["accuracy"] = row["value"]

    def _accuracy_note(self) -> str:
        datasets = self.record.content["datasets"].items()
        found = [(name, entry["accuracy"]) for name, entry in datasets if entry["accuracy"] is not None]
        return ", ".join(f"accuracy on {name} {value:.2%}" for name, value in found)

    def report(self) -> None:
        """The page with tables and charts."""
        self.begin()
        self.record.close("finished")
        with self.stage("report") as shown:
            shown.note = str(report.write(self.ready.folder))


@dataclass
class Tracked:
    """MLflow beside the run; what goes wrong with it is told, and costs no result."""

    opening: Future[tracking.Session] | None

    def publish(self, display: Display) -> tuple[str, str]:
        """Send the results; returns where to see them, and a warning if that failed."""
        if self.opening is None:
            return "", ""
        try:
            with display.stage("track"):
                session = self.opening.result()
                tracking.publish(session)
            return tracking.link(session), ""
        except tracking.TrackingError as error:
            return "", str(error)

    def fail(self, error: BaseException) -> None:
        """Mark the run as failed."""
        if self.opening is None:
            return
        try:
            tracking.fail(self.opening.result(), f"{type(error).__name__}: {error}")
        except (tracking.TrackingError, UserError):
            return
