"""The files of a run and its workspace, read so that a damaged one is a finding and no traceback."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import BaseModel, TypeAdapter, ValidationError

from pipeline.columns import CALIBRATION
from pipeline.results.verify._findings import Finding, Tally, Unreadable
from pipeline.workspace import artifacts, storage, tables
from pipeline.workspace.files import Place
from pipeline.workspace.patience import Unavailable

T = TypeVar("T")
K = TypeVar("K", bound="Kept")

Rows = Mapping[str, NDArray[Any]]
"""Columns of some rows."""

NULL = "null "
"""Prefix of the column that tells where another one is null."""


class Dataset(BaseModel):
    """What `manifest.json` says of a dataset."""

    role: str
    rows: int
    features: int | None
    """None until its features are complete; so are the errors."""
    errors: int | None
    hash: str
    digest: str
    extras: dict[str, int]
    """Columns beyond the features, and how wide they are."""
    accuracy: float | None


class Unscored(BaseModel):
    """What `manifest.json` says of the rows of a dataset that a detector could not score."""

    rows: int
    first: dict[str, str]
    """Keys, and what came instead of a score."""


class Model(BaseModel):
    """What `manifest.json` says of the classifier."""

    weights_digest: str
    classes: int
    feature_dim: int
    head: str
    blocks: list[str]


class Measured(BaseModel):
    """How detectors were measured."""

    fpr_level: float = 0.95

    @property
    def level(self) -> Fraction:
        """The share that FPR is measured at."""
        return Fraction(str(self.fpr_level))


class Thresholds(BaseModel):
    """When images are called OOD."""

    false_alarm: list[float]
    calibrate_on: str
    share: float | None
    per_class: bool
    fdr: float | None


class Record(BaseModel):
    """What is recounted of `manifest.json`."""

    name: str
    fingerprint: str
    status: str
    seed: int
    metrics: Measured = Measured()
    thresholds: Thresholds | None = None
    model: Model
    datasets: dict[str, Dataset]
    detectors: dict[str, dict[str, Any]]
    not_applicable: dict[str, str]
    """Detectors that were left out, with the reason."""
    unscored: dict[str, dict[str, Unscored]] = {}
    """By dataset and detector."""
    artifacts: list[str]
    """Folders in the workspace of all that the run refers to."""


class Written(BaseModel):
    """A file as its artifact's record has it."""

    size: int
    sha256: str
    facts: dict[str, Any]


class Kept(BaseModel):
    """`_manifest.json` of an artifact."""

    kind: str
    identity: dict[str, Any]
    files: dict[str, Written]
    facts: dict[str, Any]

    @property
    def part_rows(self) -> list[int]:
        """Rows of each part."""
        parts = sorted(name for name in self.files if name.startswith("part-"))
        return [int(self.files[name].facts.get("rows", 0)) for name in parts]


class Counts(BaseModel):
    """What a record of features counts."""

    rows: int
    features: int
    errors: int
    machines: dict[str, int]
    """Parts by the kind of machine that made them."""


class Cached(Kept):
    """`_manifest.json` of a folder of features."""

    facts: Counts  # type: ignore[assignment]


@dataclass(frozen=True)
class Run:
    """A run folder, the workspace it lies in, and its record."""

    folder: Place
    workspace: Place
    record: Record

    def of(self, *roles: str) -> list[str]:
        """Names of the datasets with these roles, role by role."""
        datasets = self.record.datasets.items()
        return [name for role in roles for name, dataset in datasets if dataset.role == role]

    @property
    def scored(self) -> list[str]:
        """Names of the datasets that must have scores."""
        return [name for name, dataset in self.record.datasets.items() if dataset.role != "train"]

    def features(self, name: str) -> Place:
        """Folder of a dataset's features."""
        return self.workspace / "features" / f"{name}-{self.record.datasets[name].hash}"

    def scores(self, name: str) -> Place:
        """Folder of a dataset's scores."""
        return self.folder / "scores" / name

    def compiled(self, name: str) -> Place:
        """Folder of the list of a dataset's images."""
        return self.workspace / "manifests" / f"{name}-{self.record.datasets[name].digest[:16]}"

    def column(self, detector: str, names: Sequence[str]) -> Iterator[NDArray[Any]]:
        """The scores of a detector on some datasets, in pieces, without the rows that have none."""
        for name in names:
            for rows in self.tested(name, [detector], nullable=[detector]):
                yield rows[detector][~rows[NULL + detector]]

    def split(self, name: str) -> bool:
        """Whether thresholds come from a part of a dataset's rows."""
        wanted, role = self.record.thresholds, self.record.datasets[name].role
        return wanted is not None and wanted.calibrate_on == role == "id"

    def tested(self, name: str, wanted: Sequence[str], nullable: Collection[str] = ()) -> Iterator[Rows]:
        """Some columns of a dataset's scores, in pieces, without the rows that thresholds come from."""
        marks = [CALIBRATION] if self.split(name) else []
        for path in parts(self.scores(name), kept(self.scores(name), Kept).part_rows):
            for rows in columns(path, [*wanted, *marks], nullable):
                yield (
                    {column: values[~rows[CALIBRATION]] for column, values in rows.items()} if marks else rows
                )


@contextmanager
def reading(path: Place) -> Iterator[None]:
    """Turn whatever a damaged file leads to into `Unreadable`."""
    try:
        yield
    except FileNotFoundError:
        raise Unreadable(f"{path} is missing") from None
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise Unreadable(f"{path}: {place}: {problem['msg']}") from None
    except Unavailable:
        raise
    except artifacts.Damaged as damaged:
        raise Unreadable(f"{damaged.path}: {damaged.reason}") from None
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = str(error) or type(error).__name__
        raise Unreadable(f"{path} cannot be read: {reason.splitlines()[0]}") from None


def read(path: Place, kind: type[T]) -> T:
    """A JSON document of a known shape."""
    with reading(path):
        return TypeAdapter(kind).validate_python(json.loads(path.read_text(encoding="utf-8")))


def kept(folder: Place, kind: type[K]) -> K:
    """The record of an artifact."""
    with reading(folder / artifacts.RECORD):
        return kind.model_validate(asdict(artifacts.read_record(folder)))


def intact(folder: Place, record: Kept) -> Finding:
    """Whether every file of an artifact has the bytes that were written."""
    wrong = Tally()
    for name, written in record.files.items():
        try:
            with reading(folder / name), artifacts.opened(folder / name, written.sha256):
                pass
        except Unreadable as error:
            wrong.add([error])
    return wrong.finding("bytes", f"{len(record.files)} files with the recorded SHA-256")


def parts(folder: Place, part_rows: Sequence[int]) -> list[Place]:
    """Paths of the recorded parts of a folder."""
    return [folder / tables.part_name(number) for number in range(len(part_rows))]


def require(path: Place, types: Mapping[str, pa.DataType]) -> None:
    """Refuse a Parquet file with other columns than these."""
    with reading(path), tables.parquet(path) as file:
        schema = file.schema_arrow
    found = dict(zip(schema.names, schema.types, strict=True))
    if found != dict(types):
        wrong = [name for name in {**types, **found} if found.get(name) != types.get(name)]
        told = (
            f"{name} is {found.get(name, 'missing')}, not {types.get(name, 'expected')}" for name in wrong
        )
        raise Unreadable(f"{path} has other columns: {'; '.join(told)}")


def row_groups(path: Place, names: Sequence[str]) -> Iterator[pa.Table]:
    """Some columns of a Parquet file, one row group at a time."""
    with reading(path), tables.parquet(path) as file:
        absent = sorted(set(names) - set(file.schema_arrow.names))
        if absent:
            raise Unreadable(f"{path} has no column {absent[0]}")
        for number in range(file.num_row_groups):
            yield file.read_row_group(number, columns=list(names))


def columns(path: Place, names: Sequence[str], nullable: Collection[str] = ()) -> Iterator[Rows]:
    """Some columns of a Parquet file as arrays, one row group at a time.

    A null is refused, but in a `nullable` column becomes 0 or false, and true in a mask under `NULL` + name.
    """
    for table in row_groups(path, names):
        empty = [name for name in names if table[name].null_count and name not in nullable]
        if empty:
            raise Unreadable(f"{path} has nulls in column {empty[0]}")
        with reading(path):
            masks = {NULL + name: table[name].is_null().to_numpy() for name in nullable}
            for name in nullable:
                filled = pc.fill_null(table[name], pa.scalar(0).cast(table[name].type))
                table = table.set_column(table.column_names.index(name), name, filled)
            arrays = tables.numpy_columns(table, names)
        yield arrays | masks


def recount(folder: Place, part_rows: Sequence[int]) -> Finding:
    """Whether exactly the recorded parts are there, with the recorded numbers of rows."""
    expected = dict(zip(map(tables.part_name, range(len(part_rows))), part_rows, strict=True))
    wrong = Tally()
    wrong.add(sorted(f"{part.name} is not of it" for part in _strangers(folder, expected)))
    found = storage.ahead(_rows, parts(folder, part_rows), tables.AHEAD)
    for (name, rows), counted in zip(expected.items(), found, strict=True):
        if isinstance(counted, Unreadable):
            wrong.add([counted])
        elif counted != rows:
            wrong.add([f"{name} has {counted:,} rows, not {rows:,}"])
    return wrong.finding("parts", f"{len(part_rows)} with {sum(part_rows):,} rows")


def _strangers(folder: Place, expected: Mapping[str, int]) -> list[Place]:
    """Parts that are not recorded."""
    with reading(folder):
        return [part for part in folder.glob("part-*.parquet") if part.name not in expected]


def _rows(path: Place) -> int | Unreadable:
    """Rows of a Parquet file by its footer."""
    try:
        with reading(path), tables.parquet(path) as file:
            return int(file.metadata.num_rows)
    except Unreadable as error:
        return error
