"""What came of applying a bundle to images: a table where it was asked for, and a summary beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.columns import IS_OOD, KEY, P_VALUE, PREDICTION
from pipeline.data.dates import Dates, of_folders
from pipeline.errors import UserError
from pipeline.metrics import drift
from pipeline.metrics.intervals import wilson
from pipeline.stages.calibration import Calibrated
from pipeline.workspace import files, storage, tables
from pipeline.workspace.files import Place

_OTHER = {
    "bundle": "another bundle",
    "detectors": "other detectors",
    "false_alarm": "another false-alarm rate",
    "fdr": "another false-discovery rate",
    "numerics": "other settings of extract",
    "data": "other images",
}
"""What a table is made of, where it is another one."""

TABLES = (".parquet", ".csv")
"""Endings of single files, in either case; anything else is a folder of Parquet parts."""


def schema(labels: Sequence[str]) -> pa.Schema:
    """Columns of the table: key, prediction, scores, p-values and flags; the last two may be null."""
    return pa.schema(
        [
            (KEY, pa.string()),
            (PREDICTION, pa.int32()),
            *((label, pa.float64()) for label in labels),
            *((P_VALUE + label, pa.float64()) for label in labels),
            *((IS_OOD + label, pa.bool_()) for label in labels),
        ]
    )


@dataclass(frozen=True)
class Output:
    """Where the table goes, and the files beside it."""

    out: str

    @cached_property
    def place(self) -> Place:
        """Of the table."""
        return files.at(self.out.rstrip("/"))

    @property
    def summary(self) -> Place:
        """Of the summary; it also says what the table was made of."""
        return self._beside("summary.json")

    @property
    def errors(self) -> Place:
        """Of key and reason of the images that could not be read."""
        return self._beside("errors.csv")

    def _beside(self, ending: str) -> Place:
        parent = files.at(storage.parent(str(self.place)))
        return parent / f"{self.place.name}.{ending}"

    def require_free(self, made_of: Mapping[str, Any]) -> None:
        """Refuse a place where something else lies than this table.

        Args:
            made_of: what the table is made of, as far as is known by now.

        Raises:
            UserError: there is something.
        """
        if not (self.place.is_file() or self.place.is_dir()):
            return
        known = dict(files.read_json(self.summary)["made_of"]) if self.summary.is_file() else {}
        other = [name for name, value in made_of.items() if known.get(name) != value]
        if other:
            what = f"with {_OTHER[other[0]]}" if known else "by something else"
            raise UserError(f"--out: {self.out} exists and was made {what}. Name another, or delete it.")

    def write(self, parts: Iterable[pa.Table], labels: Sequence[str]) -> None:
        """Write the table; it appears when it is complete."""
        columns = schema(labels)
        ending = self.place.name.lower()
        if ending.endswith(TABLES):
            written = _csv if ending.endswith(".csv") else _parquet
            with files.atomic(self.place) as draft, written(draft, columns) as writer:
                for part in parts:
                    writer.write_table(part)
            return
        parent = files.at(storage.parent(str(self.place)))
        with files.scratch(parent) as scratch:
            draft = scratch / "table"
            draft.mkdir()
            last = tables.part_name(0)
            for number, part in enumerate(_at_least_one(parts, columns)):
                last = tables.part_name(number)
                tables.written(part)(draft / last)
            files.replace_folder(draft, self.place, last)

    def write_errors(self, found: pa.Table) -> None:
        """Write key and reason of images that could not be read; without some there is no such file."""
        self.errors.unlink(missing_ok=True)
        if len(found):
            with files.atomic(self.errors) as draft:
                pyarrow.csv.write_csv(found, draft)


def _csv(draft: Path, columns: pa.Schema) -> Any:
    return pyarrow.csv.CSVWriter(draft, columns)


def _parquet(draft: Path, columns: pa.Schema) -> Any:
    return pq.ParquetWriter(draft, columns, compression="zstd")


def _at_least_one(parts: Iterable[pa.Table], columns: pa.Schema) -> Iterator[pa.Table]:
    count = 0
    for count, part in enumerate(parts, 1):  # noqa: B007
        yield part
    if not count:
        yield columns.empty_table()


@dataclass
class _Counts:
    """One detector's."""

    ranks: drift.Ranks | None
    scored: int = 0
    flagged: int = 0
    images: Counter[str] = field(default_factory=Counter)
    """With a score, by date."""
    alarms: Counter[str] = field(default_factory=Counter)
    """With a p-value of at most the false-alarm rate, by date."""


class Tally:
    """Counts what goes by."""

    def __init__(
        self, labels: Sequence[str], calibrated: Calibrated | None, dates: Dates = of_folders
    ) -> None:
        self.labels, self.calibrated, self._dates = labels, calibrated, dates
        self.rows = 0
        self._read, self._lost = Counter[str](), Counter[str]()
        self._of = {
            label: _Counts(drift.Ranks(calibrated.scores[label]) if calibrated else None) for label in labels
        }

    def counting(self, parts: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """The parts of the table of all scores as they are written, each counted."""
        columns = schema(self.labels)
        for part in parts:
            nothing = {each.name: pa.nulls(len(part), each.type) for each in columns}
            given = {name: part[name] for name in part.column_names if name in nothing}
            table = pa.table({**nothing, **given}, columns)
            self._count(table)
            yield table

    def _count(self, table: pa.Table) -> None:
        dates = np.array(self._dates(table[KEY].to_pylist()), dtype=str)
        self.rows += len(table)
        _add(self._read, dates)
        for label, counts in self._of.items():
            scores = table[label].to_numpy()
            there = np.isfinite(scores)
            counts.scored += int(there.sum())
            _add(counts.images, dates[there])
            if self.calibrated is not None and counts.ranks is not None:
                counts.ranks.add(scores)
                counts.flagged += int(np.sum(table[IS_OOD + label].fill_null(False).to_numpy()))
                hits = table[P_VALUE + label].to_numpy() <= self.calibrated.settings.false_alarm[0]
                _add(counts.alarms, dates[hits])

    def lose(self, dates: Sequence[str]) -> None:
        """Count images that could not be read, by their dates."""
        _add(self._lost, np.array(dates, dtype=str))

    def dated(self) -> dict[str, Any]:
        """What the summary says of dates; nothing where no image has one."""
        if not (self._read or self._lost):
            return {}
        lost = sorted(self._lost.keys() - self._read.keys())
        return {"undated": self.rows - int(self._read.total()), "dates_lost": lost}

    def detectors(self) -> dict[str, dict[str, Any]]:
        """What the summary says of each detector."""
        return {label: self._detector(counts, label) for label, counts in self._of.items()}

    def _detector(self, counts: _Counts, label: str) -> dict[str, Any]:
        found: dict[str, Any] = {"scored": counts.scored, "unscored": self.rows - counts.scored}
        if self.calibrated is None or counts.ranks is None or not counts.scored:
            return found
        share = counts.flagged / counts.scored
        low, high = wilson(share, counts.scored)
        distance, p_value = counts.ranks.distance()
        interval = {"ci_low": min(low, share), "ci_high": max(high, share)}
        found |= {"flagged": counts.flagged, "share": share, **interval}
        found["scores"] = {
            "ks_distance": distance,
            "ks_p_value": p_value,
            "above_calibration_median": counts.ranks.above(),
        }
        if self._read:
            found["dates"] = [
                asdict(point) | {"signals": point.signals} for point in self._chart(counts, label)
            ]
        return found

    def _chart(self, counts: _Counts, label: str) -> list[drift.Point]:
        assert self.calibrated is not None
        dates = sorted(counts.images)
        images, alarms = (np.array([each[date] for date in dates]) for each in (counts.images, counts.alarms))
        # by class, any date may show the class whose threshold is known least
        size = min(len(group) for group in self.calibrated.of[label].groups.values())
        middle = drift.centre(self.calibrated.settings.false_alarm[0], size)
        return drift.chart(dates, images, alarms, middle)


def _add(counter: Counter[str], dates: Any) -> None:
    counter.update(dict(zip(*np.unique(dates[dates != ""], return_counts=True), strict=True)))


def alarms(
    detectors: Mapping[str, Mapping[str, Any]],
    above: float | None,
    over_time: bool,
    lost: Sequence[str] = (),
) -> list[str]:
    """Which of the alarms that were asked for are raised, in sentences; one of no scores whichever it was.

    Args:
        detectors: what the summary says of each.
        above: share of flagged images that is too large.
        over_time: whether dates that are out of control count, and those that are lost.
        lost: dates of which no image could be read.
    """
    found = [f"no image of {_listed(lost)} could be read"] if over_time and lost else []
    for label, entry in detectors.items():
        if not entry["scored"] and (above is not None or over_time):
            found.append(f"{label} has a score of none of the images")
        if above is not None and entry.get("share", 0.0) > above:
            found.append(f"{label} flags {entry['share']:.2%} of the images, more than {above:.2%}")
        signals = [point["date"] for point in entry.get("dates", ()) if point["signals"]]
        if over_time and signals:
            found.append(f"{label} is out of control on {_listed(signals)}")
    return found


def _listed(dates: Sequence[str]) -> str:
    return dates[0] + (f" and {len(dates) - 1} dates more" if len(dates) > 1 else "")


def sentences(summary: Mapping[str, Any]) -> Iterator[str]:
    """The summary for the terminal, a line for each detector."""
    images = summary["images"]
    yield (
        f"{images['listed']:,} images, {images['features']:,} read, {images['errors']:,} could not be read"
    )
    alarm, fdr = summary["made_of"]["false_alarm"], summary["made_of"]["fdr"]
    if fdr is not None:
        charted = any("dates" in entry for entry in summary["detectors"].values())
        charts = f"; the charts of dates count p-values of at most {alarm:g}" if charted else ""
        yield f"flagged at a false-discovery rate of {fdr:g}{charts}"
    elif alarm is not None:
        yield f"flagged at a false-alarm rate of {alarm:g}"
    if lost := images.get("dates_lost"):
        yield f"no image of {_listed(lost)} could be read: it is on no chart"
    if images.get("undated"):
        yield f"{images['undated']:,} images have no date and are on no chart"
    for label, entry in summary["detectors"].items():
        yield f"{label}: {_sentence(entry)}"


def _sentence(entry: Mapping[str, Any]) -> str:
    """The summary of a detector."""
    if "share" not in entry:
        why = "no calibration images to flag by" if entry["scored"] else "nothing to flag"
        lost = f", {entry['unscored']:,} images have none" if entry["unscored"] else ""
        return f"{entry['scored']:,} scores{lost}; {why}"
    interval, scores = f"{entry['ci_low']:.2%} to {entry['ci_high']:.2%}", entry["scores"]
    line = (
        f"{entry['flagged']:,} flagged, {entry['share']:.2%} ({interval}); "
        f"distance from the calibration scores {scores['ks_distance']:.3f}"
    )
    if scores["ks_p_value"] is not None:
        line += f" (p = {scores['ks_p_value']:.2g})"
    if entry["unscored"]:
        line += f"; {entry['unscored']:,} images have no score and no flag"
    if "dates" in entry:
        signals = sum(point["signals"] for point in entry["dates"])
        line += f"; {signals} of {len(entry['dates'])} dates out of control"
    return line
