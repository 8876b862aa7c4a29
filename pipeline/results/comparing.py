"""Several runs beside each other: values, ranks, what the same images cannot tell apart, and what it cost.

Reads run folders alone, of any number of workspaces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import fmean, mean, stdev
from typing import Any

import yaml

from pipeline.errors import UserError, unknown
from pipeline.metrics.metrics import FAILURES, against_ood, named
from pipeline.metrics.pairs import LEVEL_OF_TESTS
from pipeline.results.evaluation import Evaluation, differences, other_data

_ALONE = ("seed", "workspace", "tracking", "tune", "published")
"""Keys of a config in which repeats of one evaluation may differ, besides the weights of the model."""


@dataclass(frozen=True)
class Column:
    """One run, or several repeats of one evaluation."""

    name: str
    runs: tuple[Evaluation, ...]
    foreign: str = ""
    """Why its images are not those of the first column; empty if they are."""

    def costs(self) -> dict[str, float | None]:
        """Seconds per million images by what they are spent on, mean over the runs that did the work.

        Of scores, runs that found none of them: neither in the workspace nor of a run that was killed.
        """
        found: dict[str, list[float]] = {"extraction": [], "scores of all detectors": []}
        for run in self.runs:
            extract, score = (run.record["stages"].get(name, {}) for name in ("extract", "score"))
            if extract.get("images_per_second"):
                found["extraction"].append(1e6 / extract["images_per_second"])
            every = score.get("rows", 0) * len(run.record["detectors"])
            if every and score.get("scores") == every:
                found["scores of all detectors"].append(1e6 * score["seconds"] / score["rows"])
        return {what: mean(values) if values else None for what, values in found.items()}

    def id_accuracy(self) -> tuple[float, float | None] | None:
        """Share of the ID images, of all such datasets, that the classifier has right.

        The mean over repeats and their deviation; nothing if no run knows it.
        """
        found = []
        for run in self.runs:
            rows = run.metrics.to_pylist()
            ours = [row for row in rows if (row["metric"], row["group"]) == ("id_accuracy", "id")]
            if ours:
                found.append(fmean([row["value"] for row in ours], [row["n_id"] for row in ours]))
        return (mean(found), stdev(found) if len(found) > 1 else None) if found else None


@dataclass(frozen=True)
class Cell:
    """A metric of a detector in a column, on a dataset or the mean over a group."""

    column: str
    detector: str
    dataset: str
    group: str
    metric: str
    value: float
    ci_low: float | None
    """95 % interval; None of a mean over repeats."""
    ci_high: float | None
    std: float | None
    """Sample standard deviation over repeats; None of a single run."""
    n: int
    """Number of runs that have it."""
    runs: int
    """Number of runs of the column."""
    rank: int | None
    """Among all detectors of all columns with the images of the first; None for those with others."""
    level: bool | None
    """Whether the same images cannot tell it from the best; None where that was not tested."""


_Place = tuple[str, str, str]
"""Metric, group and dataset."""
_Entry = tuple[str, str]
"""Column and detector."""
_Summary = tuple[float, float | None, float | None, float | None, int]
"""Value, interval, deviation and number of runs that have it."""
_Tests = Mapping[tuple[_Place, frozenset[Any]], float]


@dataclass(frozen=True)
class Comparing:
    """Columns, and a cell for each detector, place and column that has it."""

    columns: tuple[Column, ...]
    metrics: tuple[str, ...]
    datasets: tuple[str, ...]
    """Names of datasets and groups; none given: the groups, and the ID datasets."""

    @property
    def caption(self) -> str:
        """What stands beside the values, of single runs and of repeats."""
        single = [len(column.runs) == 1 for column in self.columns]
        said = ["95% intervals."] if any(single) else []
        said += [] if all(single) else ["± standard deviation over repeats."]
        said.append("(rank) among all.")
        if self._tested:
            said.append("= not told from the best on the same images (Holm, 5%).")
        return " ".join(said)

    @cached_property
    def notes(self) -> list[str]:
        """What a reader must know."""
        said = [
            f"{column.name}: {column.foreign}: no rank and no test."
            for column in self.columns
            if column.foreign
        ]
        if any(len(column.runs) > 1 for column in self.columns):
            said.append(
                "Means over repeats ± their standard deviation; where there are repeats, nothing is tested."
            )
        return said

    @cached_property
    def cells(self) -> list[Cell]:
        """By metric, place, detector and column.

        Raises:
            UserError: no run has one of the metrics or datasets.
        """
        values = self._values()
        tests = self._tests()
        return [cell for place, found in values.items() for cell in self._ranked(place, found, tests)]

    def require_same_data(self) -> None:
        """Refuse columns of other data than the first.

        Raises:
            UserError: names one, and how its data differ.
        """
        for column in self.columns:
            if column.foreign:
                raise UserError(
                    f"{column.name}: {column.foreign}: its values say nothing beside the others. Compare "
                    "runs on the same images; --other-data shows it, without ranks and tests."
                )

    def _ranked(self, place: _Place, found: Mapping[_Entry, _Summary], tests: _Tests) -> Iterator[Cell]:
        """The cells of one metric on one dataset or group."""
        metric, group, dataset = place
        sign = -1 if shown(metric)[1] else 1
        foreign = {column.name for column in self.columns if column.foreign}
        runs = {column.name: len(column.runs) for column in self.columns}
        ours = {entry: sign * each[0] for entry, each in found.items() if entry[0] not in foreign}
        best = min(ours, key=lambda entry: ours[entry], default=None)
        for entry, summary in found.items():
            rank = 1 + sum(other < ours[entry] for other in ours.values()) if entry in ours else None
            p = tests.get((place, frozenset({best, entry})))
            level = None if p is None else p >= LEVEL_OF_TESTS
            value, low, high, std, n = summary
            yield Cell(*entry, dataset, group, metric, value, low, high, std, n, runs[entry[0]], rank, level)

    def records(self) -> list[dict[str, Any]]:
        """One row per cell, for programs."""
        costs = {
            column.name: {
                f"{what.split()[0]}_seconds_per_million": each for what, each in column.costs().items()
            }
            for column in self.columns
        }
        return [asdict(cell) | costs[cell.column] for cell in self.cells]

    def _values(self) -> dict[_Place, dict[_Entry, _Summary]]:
        """Values by metric and dataset, and then by column and detector."""
        rows: dict[_Place, dict[_Entry, list[Mapping[str, Any]]]] = {}
        for column in self.columns:
            for row in (row for run in column.runs for row in run.metrics.to_pylist()):
                if self._is_wanted(row):
                    place = row["metric"], row["group"], row["dataset"]
                    rows.setdefault(place, {}).setdefault((column.name, row["detector"]), []).append(row)
        self._require(rows)
        return {
            place: {entry: _summary(each) for entry, each in found.items()} for place, found in rows.items()
        }

    def _is_wanted(self, row: Mapping[str, Any]) -> bool:
        if row["metric"] not in self.metrics:
            return False
        usual = row["dataset"] == row["group"] or row["group"] in ("id", "shifted_id")
        return row["dataset"] in self.datasets if self.datasets else usual

    def _require(self, found: Collection[_Place]) -> None:
        """Refuse a metric or a dataset of which nothing was found."""
        runs = [run for column in self.columns for run in column.runs]
        known = dict.fromkeys(name for run in runs for name in run.metrics["dataset"].to_pylist())
        for name in self.datasets:
            if name not in known:
                raise UserError(f"--dataset: {unknown('dataset', name, list(known))}")
        metrics, datasets = ({place[position] for place in found} for position in (0, 2))
        for metric in self.metrics:
            if metric not in metrics:
                where = ", ".join(self.datasets) or "any group or ID dataset"
                raise UserError(f"--metric: no run has a value of {metric} on {where}.")
        for name in self.datasets:
            if name not in datasets:
                raise UserError(f"--dataset: no run has a value of {', '.join(self.metrics)} on {name}.")

    @property
    def _tested(self) -> bool:
        """Whether all columns on the same images are single runs."""
        return all(len(column.runs) == 1 for column in self.columns if not column.foreign)

    def _tests(self) -> _Tests:
        """Corrected p-values of pairs of entries, where columns are single runs on the same images."""
        ours = [column for column in self.columns if not column.foreign]
        if not self._tested:
            return {}
        names = {column.runs[0]: column.name for column in ours}
        return {
            ((row.metric, group, row.dataset), frozenset({(names[a], one), (names[b], other)})): row.p_holm
            for (a, one), (b, other), group, row in differences(list(names))
            if row.metric in self.metrics
        }


def shown(metric: str) -> tuple[str, bool]:
    """Title of a metric, and whether higher is better.

    Raises:
        UserError: there is none of this name.
    """
    if metric == "id_accuracy":
        return "ID accuracy ↑", True
    try:
        found = named(metric)
    except KeyError:
        names = [each.name for each in (*against_ood(), *FAILURES)]
        raise UserError(f"--metric: {unknown('metric', metric, [*names, 'id_accuracy'])}") from None
    return f"{found.label} {found.arrow}", found.higher_is_better


def compared(
    runs: Sequence[Evaluation], metrics: Sequence[str], datasets: Sequence[str] = (), group: bool = True
) -> Comparing:
    """Several runs side by side.

    Args:
        runs: finished ones, at least one.
        metrics: names.
        datasets: names of datasets or groups; none: the groups, and the ID datasets.
        group: whether runs of one config that differ in their seed or their weights alone become one column;
            of those that differ in neither, each is in a column of its own.

    Raises:
        UserError: a run is given twice, or there is no metric of a name.
    """
    for metric in metrics:
        shown(metric)
    folders = [str(run.folder) for run in runs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError(f"{folder}: given twice. Name each run once.")
    together: dict[Any, list[Evaluation]] = {}
    times = Counter[Any]()
    for run in runs:
        alike = _repeated(run)
        once = alike, run.record["seed"], run.record["model"]["weights_digest"]
        together.setdefault((alike, times[once]) if group else run.folder, []).append(run)
        times[once] += 1
    names = _names([found[0] for found in together.values()])
    first = runs[0]
    columns = []
    for name, found in zip(names, together.values(), strict=True):
        foreign = other_data(first, found[0])
        columns.append(
            Column(f"{name} ({len(found)} runs)" if len(found) > 1 else name, tuple(found), foreign)
        )
    return Comparing(tuple(columns), tuple(metrics), tuple(datasets))


def _summary(rows: Sequence[Mapping[str, Any]]) -> _Summary:
    if len(rows) == 1:
        return rows[0]["value"], rows[0]["ci_low"], rows[0]["ci_high"], None, 1
    values = [row["value"] for row in rows]
    return mean(values), None, None, stdev(values), len(values)


def _repeated(run: Evaluation) -> str:
    """What repeats of one evaluation have in common."""
    config = yaml.safe_load((run.folder / "config.yaml").read_text("utf-8"))
    model = {key: value for key, value in config["model"].items() if key != "weights"}
    return repr({key: value for key, value in (config | {"model": model}).items() if key not in _ALONE})


def _names(runs: Sequence[Evaluation]) -> Iterator[str]:
    """Short names that tell runs apart."""
    short = [str(run.record["name"]) for run in runs]
    longer = [f"{run.record['name']}/{run.folder.name}" for run in runs]
    for run, name, more in zip(runs, short, longer, strict=True):
        yield name if short.count(name) == 1 else more if longer.count(more) == 1 else str(run.folder)
