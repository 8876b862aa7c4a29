"""Detector parameters chosen from grids, on cached rows of validation images alone.

ID images of role `id_val` and OOD images of role `ood_val` decide. Training images cannot stand for ID ones:
they lie in the banks, and the classifier is surer about them than about any new image. Test images must not:
their scores are the result. No image goes through the network here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from pipeline.config import loading
from pipeline.config.grids import Tune
from pipeline.config.schema import Config, Dataset, DetectorEntry
from pipeline.detectors.base import Pass, Scorer
from pipeline.errors import UserError
from pipeline.metrics.metrics import level_of, named
from pipeline.results.mlflow.apart import Apart
from pipeline.results.unscored import sentences
from pipeline.stages import evaluate, index, shards
from pipeline.stages.prepare import Prepared, prepare
from pipeline.stages.progress import FIRST, LOOKS
from pipeline.workflows.progress import Display, Stage
from pipeline.workflows.run import Options, Run, working
from pipeline.workspace import files, tables
from pipeline.workspace.artifacts import Damaged, Kept, Store, mend
from pipeline.workspace.claims import opened
from pipeline.workspace.files import Place
from pipeline.workspace.patience import Unavailable
from pipeline.workspace.runs import SEARCH

MOST = 1000
"""Points of one search: each is a column of 8 bytes a row on disk, and 64 KiB of memory in a scoring task."""

FROM_FIT = Options(first="fit")
"""Features must be there."""

_DECIDING = ("id_val", "ood_val")
_MEAN = "near_ood"
"""The group as which `evaluate` sees the OOD validation sets; its mean over them decides."""

Grids = Mapping[str, Mapping[str, DetectorEntry]]
"""Points by the label of their detector and their own."""


@dataclass(frozen=True)
class Point:
    """One combination of values and how well it did."""

    detector: str
    point: str
    parameters: dict[str, Any]
    values: dict[str, float]
    """The metric on every OOD validation set."""
    mean: float
    ci_low: float
    ci_high: float
    chosen: bool = False


@dataclass(frozen=True)
class Outcome:
    """All points of a search, and the files that hold what came of it."""

    metric: str
    points: tuple[Point, ...]
    table: Place
    config: Place
    unscored: Sequence[str] = ()
    """What is to be said of points that could not score all images."""


def target(source: str, output: str, force: bool) -> Place:
    """The file that the new config becomes: `output`, or NAME.tuned.yaml beside the old one.

    For a bundled config it lies in the current folder.

    Raises:
        UserError: if it is there already and must not be replaced, or its folder is not there.
    """
    path = Path(source)
    beside = path if path.is_file() else Path(path.name)
    file = files.at(output) if output else beside.with_name(f"{beside.stem}.tuned.yaml")
    if file.is_file() and not force:
        raise UserError(f"--output: {file} exists already. Name another file, or replace it with --force.")
    if isinstance(file, Path) and not file.absolute().parent.is_dir():
        raise UserError(f"--output: no such folder: {file.parent}. Make it, or name another file.")
    return file


def execute(settings: Config, output: Place, display: Display, options: Options = FROM_FIT) -> Outcome:
    """Try every point of the grids and write the table and the config with the best ones.

    Args:
        settings: the config; its section `tune` has the grids.
        output: the file that the new config becomes.
        display: shows the stages.
        options: engine and logs.

    Raises:
        UserError: anything the user can mend: no grids, no validation images, images that also train or
            test, features or extra passes that are not in the workspace.

    Cost:
        One pass over the cached validation rows. 8 bytes per row and point on disk; memory for the scores
        of one point and of 8192 rows of all points, and for one bank per set of vectors.
    """
    grids = settings.points()
    wanted = _checked(settings, grids)
    with display.stage("prepare", FIRST) as stage:
        ready = _prepared(settings, grids, stage)
        stage.note = f"{len(ready.detectors)} points of {len(grids)} detectors"
    with (
        opened(ready.workspace, display.say) as claims,
        claims.alone(f"runs/{ready.config.name}/{ready.folder.name}", options.wait),
        working(ready, options, display) as chosen,
        Apart() as background,
    ):
        search = Search(ready, options, display, background, chosen, claims)
        found = _chosen(grids, search.metrics(grids), wanted.metric)
        written = _write(ready, wanted.metric, found, search.refers_to())
        files.write_text(output, _text(_tuned(settings, grids, found), wanted.metric, written))
    return Outcome(wanted.metric, found, written, output, search.unscored)


def _checked(settings: Config, grids: Grids) -> Tune:
    """The section `tune`; an error if nothing can be tuned with this config."""
    if settings.tune is None or not grids:
        raise UserError(
            "tune.grids: none, so there is nothing to choose from. Add the values to try, e.g. "
            "tune: {grids: {knn: {k: [5, 20, 50]}}}."
        )
    count = sum(map(len, grids.values()))
    if count > MOST:
        raise UserError(f"tune.grids: {count:,} points; expected at most {MOST:,}. Try fewer values.")
    for role, what in zip(_DECIDING, ("ID", "OOD"), strict=True):
        if not settings.of_role(role):
            raise UserError(
                f"datasets: none has role {role!r}, whose {what} images decide which values are best. Add "
                "some that are neither trained nor tested on; test images must not decide."
            )
    return settings.tune


def _prepared(settings: Config, grids: Grids, stage: Stage) -> Prepared:
    """All points as detectors, and only the datasets that they may learn from and that decide."""
    entries = tuple(entry for tried in grids.values() for entry in tried.values())
    ready = prepare(settings.model_copy(update={"detectors": entries}), stage=stage)
    stage.doing("looks for images that several datasets have")
    _check_apart(ready)
    seen = tuple(ready.config.of_role("train", *_DECIDING))
    return replace(ready, config=ready.config.model_copy(update={"datasets": seen}))


def _check_apart(ready: Prepared) -> None:
    """Images that decide must not be among those of any other dataset."""
    for dataset in ready.config.of_role(*_DECIDING):
        own = set(_images(ready, dataset))
        for other in ready.config.datasets:
            count = sum(image in own for image in _images(ready, other)) if other != dataset else 0
            if count:
                raise UserError(
                    f"datasets.{dataset.name}: {count:,} of its images are also in {other.name} (role "
                    f"{other.role!r}); images that decide must be apart. Take them out of one of the two."
                )


def _images(ready: Prepared, dataset: Dataset) -> Iterator[int]:
    """Where each image comes from, hashed: its file and place there; for arrays, the array and the row."""
    source = (dataset.path, dataset.images)
    with tables.parquet(ready.jobs[dataset.name].manifest.path) as file:
        for batch in file.iter_batches(tables.ROW_GROUP, columns=["key", "uri", "offset"]):
            for key, uri, offset in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield hash((uri, offset) if uri else (source, key))


class Search(Run):
    """The stages that the points go through: those of a run, without its record and results."""

    unscored: Sequence[str] = ()
    """What is to be said of points that could not score all images."""

    def metrics(self, grids: Grids) -> pa.Table:
        """The same, with what is damaged of it made again, each file once."""
        mended = set[str]()
        while True:
            try:
                return self._metrics(grids)
            except Damaged as damaged:
                if damaged.path in mended or self._maker(damaged) == "extract":
                    raise
                mended.add(damaged.path)
                mend(damaged)

    def _metrics(self, grids: Grids) -> pa.Table:
        """Metrics of all points, with the OOD validation sets as one group.

        The points of a detector are measured on the rows that all of them have scores of.

        Raises:
            UserError: if features, or an extra pass that a point needs, are not in the workspace.
        """
        used = self.ready.of_role("train", *_DECIDING)
        self._require_features(used)
        with self.display.stage("fit", LOOKS) as shown:
            self.features = {job.dataset: job.table() for job in used}
            self._fit(shown)
            fitted = self.fitted
            assert fitted is not None
            banks = {bank.folder for bank in fitted.banks.values()}
            shown.note = f"{len(fitted.scorers)} points, {len(banks)} banks"
        jobs = {job.dataset: job for job in self._score_jobs(fitted)}
        rows = sum(job.features.rows for job in jobs.values() if not job.complete)
        with self.display.stage("score", LOOKS) as shown:
            unscored = self._score(list(jobs.values()), fitted, shown)
            shown.note = f"{rows:,} rows"
        datasets = {
            dataset.name: {"role": dataset.role, "features": jobs[dataset.name].features.rows}
            for dataset in self.ready.config.of_role(*_DECIDING)
        }
        self.unscored = list(sentences(unscored, datasets, [[role] for role in _DECIDING]).values())
        with self.display.stage("evaluate", "reads the scores") as shown:
            inside, outside = (
                [jobs[dataset.name] for dataset in self.ready.config.of_role(role)] for role in _DECIDING
            )
            scored = {"id": inside, _MEAN: outside}
            level = level_of(self.ready.config.tune.metric if self.ready.config.tune else "")
            table, _ = evaluate.run(self.engine, scored, shown, grids.values(), level, labelled=False)
        self._require_few_unscored(table, [job.features.rows for job in inside])
        return table

    def _require_few_unscored(self, table: pa.Table, inside: Sequence[int]) -> None:
        """Refuse points of a detector that have too few rows in common, though each has a score of most.

        Raises:
            UserError: names the first point, and the images.
        """
        limit = self.ready.config.score.max_unscored_fraction
        for row in table.filter(pc.equal(table["metric"], "auroc")).to_pylist():
            counts = {"ID": (row["n_id"], sum(inside))}
            if row["dataset"] in self.features:
                counts[row["dataset"]] = row["n_ood"], self.features[row["dataset"]].rows
            for what, (left, rows) in counts.items():
                if rows - left > limit * rows:
                    raise UserError(
                        f"tune.grids: {row['detector']} and the other points of its detector have no common "
                        f"score for {rows - left:,} of {rows:,} {what} images, more than "
                        f"score.max_unscored_fraction = {limit:g}. Take out the points that cannot score "
                        "them, or raise the limit."
                    )

    def _require_features(self, jobs: list[shards.Job]) -> None:
        """All columns of the datasets must be there; here no image goes through the network."""
        lacking = {extra for job in jobs if job.featured for extra in job.lacking()}
        detectors = self.ready.detectors.items()
        needy = [label for label, detector in detectors if lacking & set(detector.extras())]
        if needy:
            raise UserError(
                f"tune.grids: {_listed(needy)} columns that take passes through the network and are not in "
                "the workspace, and tuning makes none. Run `ood-pipeline extract` with these parameters "
                "first, or take them out of the grid."
            )
        self._unfinished("extract", jobs)

    def _passes(self, specs: list[Pass], store: Store, shown: Stage) -> dict[Pass, Kept]:
        """Results of extra passes, read back; here none goes through the network."""
        found, lacking = dict[Pass, Kept](), list[str]()
        for spec in specs:
            try:
                found |= super()._passes([spec], replace(store, mode="frozen"), shown)
            except Unavailable:
                raise
            except UserError:
                detectors = self.ready.detectors.items()
                label = next(label for label, detector in detectors if spec in detector.passes())
                lacking.append(f"{label} ({type(spec).__name__.lower()})")
        if lacking:
            raise UserError(
                f"tune.grids: {_listed(lacking)} passes through the network that are not in the workspace, "
                "and tuning makes none. Run `ood-pipeline fit` with these parameters first "
                "(--set detectors.LABEL.KEY=VALUE), or take them out of the grid."
            )
        return found

    def _describe_index(
        self, searched: index.Index, scorers: Mapping[str, Scorer], banks: Mapping[str, index.BankFiles]
    ) -> None:
        """Not for the record of a run."""


def _listed(labels: Sequence[str]) -> str:
    return f"{', '.join(labels)} need{'s' if len(labels) == 1 else ''}"


def _chosen(grids: Grids, table: pa.Table, metric: str) -> tuple[Point, ...]:
    """The points with their values; of each detector the best is chosen, of equal ones the first."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in table.to_pylist():
        if row["metric"] == metric:
            rows.setdefault(row["detector"], {})[row["dataset"]] = row
    sign = 1 if named(metric).higher_is_better else -1
    found: list[Point] = []
    for detector, tried in grids.items():
        points = [_point(detector, entry, rows[label]) for label, entry in tried.items()]
        best = max(points, key=lambda point: sign * point.mean)
        found += [replace(point, chosen=point is best) for point in points]
    return tuple(found)


def _point(detector: str, entry: DetectorEntry, rows: dict[str, dict[str, Any]]) -> Point:
    values = {name: row["value"] for name, row in rows.items() if name != _MEAN}
    mean = rows[_MEAN]
    return Point(
        detector, entry.label, entry.parameters, values, mean["value"], mean["ci_low"], mean["ci_high"]
    )


def _write(ready: Prepared, metric: str, points: tuple[Point, ...], artifacts: list[str]) -> Place:
    """Write tune.json and tune.csv into the run folder; returns the path of the latter."""
    datasets = {dataset.name: dataset.role for dataset in ready.config.datasets}
    record = {
        "name": ready.config.name,
        "fingerprint": ready.fingerprint,
        "datasets": datasets,
        "artifacts": artifacts,
    }
    rows = [asdict(point) for point in points]
    files.write_json(ready.folder / SEARCH, {**record, "metric": metric, "points": rows})
    for row in rows:
        row["parameters"] = json.dumps(row["parameters"])
        row |= {f"{metric}/{name}": value for name, value in row.pop("values").items()}
        row |= {f"{metric}/{name}": row.pop(name) for name in ("mean", "ci_low", "ci_high")}
    with files.atomic(ready.folder / "tune.csv") as draft:
        pyarrow.csv.write_csv(pa.Table.from_pylist(rows), draft)
    return ready.folder / "tune.csv"


def _tuned(settings: Config, grids: Grids, points: tuple[Point, ...]) -> Config:
    """The config with the chosen values and the mark that OOD images chose them, under a name of its own."""
    best = {point.detector: grids[point.detector][point.point] for point in points if point.chosen}
    detectors = tuple(
        best[entry.label].model_copy(update={"label": entry.label, "tuned_on_ood": True})
        if entry.label in best
        else entry
        for entry in settings.detectors
    )
    return settings.model_copy(update={"name": f"{settings.name[:94]}-tuned", "detectors": detectors})


def _text(tuned: Config, metric: str, table: Place) -> str:
    """The new config as YAML, with a word on where its values come from."""
    deciding = ", ".join(dataset.name for dataset in tuned.of_role(*_DECIDING))
    return (
        f"# Parameters of the detectors with tuned_on_ood: true were chosen by {metric} on {deciding}.\n"
        f"# All points: {table}\n{loading.dump(tuned)}"
    )


def console_table(outcome: Outcome) -> Table:
    """All points for the terminal; the chosen ones in green."""
    shown = named(outcome.metric)
    table = Table(
        title=f"{shown.label} {shown.arrow} on OOD validation images",
        caption="Means decide, with 95% intervals. * chosen, and marked as using OOD data",
        box=SIMPLE,
    )
    table.add_column("Point", overflow="fold")
    for name in (*outcome.points[0].values, "mean"):
        table.add_column(name, justify="right")
    for point in outcome.points:
        style = "bold green" if point.chosen else ""
        interval = (f" {point.ci_low:.3f}–{point.ci_high:.3f}", "dim")
        table.add_row(
            Text(point.point + " *" * point.chosen, style),
            *(f"{value:.4f}" for value in point.values.values()),
            Text.assemble((f"{point.mean:.4f}", style), interval),
        )
    return table
