"""What extraction has done and has still to do: datasets in numbered shards, a file for each and column.

A part that is there is complete. A dataset is complete when every row of its manifest is counted in a part,
as features or as an error; an extra column, when its parts have the rows of the features. Markers say so, and
are written last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from pipeline.cluster import attempts
from pipeline.config import schema
from pipeline.data.manifest import Manifest
from pipeline.detectors.base import Extra
from pipeline.errors import UserError
from pipeline.workspace import artifacts, files, storage, tables
from pipeline.workspace.files import Place

SHARD_ROWS, SHARD_PIXELS = 2048, 2**27
"""Most rows of a shard, and most bytes of pixels, if `extract.shard_rows` is auto."""

ERRORS = b"errors"
"""Key of the Parquet footer under which a part lists its bad rows as JSON [[key, reason], ...]."""

KEYS = b"keys"
"""Key of the Parquet footer with the digest of a part's keys: equal in features and extras of equal rows."""


@dataclass(frozen=True)
class Plan:
    """What all extractions of a run share."""

    model: schema.Model
    settings: schema.Extract
    seed: int
    digest: str
    transform: schema.Transform
    extras: Mapping[str, Extra] = field(default_factory=dict)
    """All that a dataset of the run needs, by column."""

    @property
    def separate(self) -> bool:
        """Whether tasks of their own decode for the model actors."""
        if self.settings.decode == "auto":
            return self.settings.gpus_per_actor > 0
        return self.settings.decode == "separate"

    @property
    def shard_rows(self) -> int:
        """Rows of a shard: as configured, or as many whole batches as `SHARD_PIXELS` has room for."""
        settings, transform = self.settings, self.transform
        if settings.shard_rows != "auto":
            return settings.shard_rows
        room = min(SHARD_ROWS, SHARD_PIXELS // (transform.crop**2 * transform.channels))
        return max(room - room % settings.batch_size, settings.batch_size)


@dataclass(frozen=True)
class Job:
    """One dataset to extract, with its place in the cache."""

    dataset: str
    manifest: Manifest
    folder: str
    identity: dict[str, Any]
    """Everything the features depend on; its digest is part of the folder's name."""
    extras: tuple[Extra, ...] = ()
    """Columns beyond the features."""

    @property
    def complete(self) -> bool:
        """Whether all rows are there, with all columns."""
        return self.featured and not self.lacking()

    @property
    def featured(self) -> bool:
        """Whether the features of all rows are there."""
        return (files.at(self.folder) / artifacts.RECORD).is_file()

    def lacking(self) -> list[Extra]:
        """The extras that are not there for exactly the rows of the features."""
        keys = files.read_json(files.at(self.folder) / artifacts.RECORD)["keys"] if self.featured else None
        return [extra for extra in self.extras if keys is None or self._keys(extra) != keys]

    def _keys(self, extra: Extra) -> str | None:
        marker = files.at(self.folder) / extra.column / artifacts.RECORD
        return str(files.read_json(marker)["keys"]) if marker.is_file() else None

    def table(self) -> tables.Table:
        """All columns of a dataset that is complete."""
        return tables.Table.open(files.at(self.folder), [extra.column for extra in self.extras])


def job(
    dataset: schema.Dataset,
    manifest: Manifest,
    parts: dict[str, Any],
    workspace: Place,
    wanted: Iterable[Extra] = (),
) -> Job:
    """The job of one dataset; its folder is named by the digest of its identity."""
    folder = workspace / "features" / f"{dataset.name}-{artifacts.digest(parts)[:16]}"
    return Job(dataset.name, manifest, str(folder), parts, tuple(wanted))


@dataclass(frozen=True)
class Shard:
    """Rows [start, stop) of a manifest and the part they become."""

    dataset: str
    manifest: str
    start: int
    stop: int
    part: str
    featured: bool = False
    """Whether the part is there, and only extras are missing."""
    extras: str = ""
    """Columns beyond the features that are to be computed, separated by spaces."""

    def images(self) -> pa.Table:
        """The rows of the manifest."""
        return tables.read_rows(self.manifest, self.start, self.stop)


def digest(keys: Iterable[str]) -> str:
    """SHA-256 of keys in their order."""
    return hashlib.sha256("\0".join(keys).encode()).hexdigest()


def beside(part: Place, column: str) -> Place:
    """Where the extra column of a part lies."""
    return files.at(storage.parent(str(part))) / column / part.name


def cut(job: Job, shard_rows: int) -> list[Shard]:
    """All shards of a dataset, in manifest order."""
    return [
        Shard(
            dataset=job.dataset,
            manifest=job.manifest.path,
            start=start,
            stop=min(start + shard_rows, job.manifest.rows),
            part=str(files.at(job.folder) / tables.part_name(number)),
        )
        for number, start in enumerate(range(0, job.manifest.rows, shard_rows))
    ]


def missing(job: Job, shard_rows: int) -> list[Shard]:
    """The shards still to do; parts that were cut differently by an interrupted run are removed."""
    folder = files.at(job.folder)
    plan, columns = folder / "_plan.json", [extra.column for extra in job.lacking()]
    if job.featured:
        shard_rows = files.read_json(plan)["shard_rows"]
    elif not plan.is_file() or files.read_json(plan) != {"shard_rows": shard_rows}:
        for part in (*folder.glob("part-*.parquet"), *_parts(folder, columns)):
            part.unlink()
    attempts.forget(folder)
    files.write_json(plan, {"shard_rows": shard_rows})
    planned, done = cut(job, shard_rows), _digests(folder.glob("part-*.parquet"))
    for column in columns:
        (folder / column / artifacts.RECORD).unlink(missing_ok=True)
    extra = {column: _digests((folder / column).glob("part-*.parquet")) for column in columns}
    todo = []
    for shard in planned:
        keys, name = done.get(shard.part), storage.name_of(shard.part)
        lacking = [
            column
            for column in columns
            if keys is None or extra[column].get(str(folder / column / name)) != keys
        ]
        if keys is None or lacking:
            todo.append(replace(shard, featured=keys is not None, extras=" ".join(lacking)))
    return todo


def _parts(folder: Place, columns: Iterable[str]) -> Iterator[Place]:
    for column in columns:
        yield from (folder / column).glob("part-*.parquet")


def _digests(parts: Iterable[Place]) -> dict[str, str]:
    """Digest of the keys of every part that is there, by its path."""
    paths = sorted(map(str, parts))
    return {
        path: found.metadata[KEYS].decode() for path, found in zip(paths, tables.metadata(paths), strict=True)
    }


def reopen(job: Job, plan: Plan) -> None:
    """Take the mark off a dataset that has more bad images than are allowed by now; `finish` then says so."""
    marker = files.at(job.folder) / artifacts.RECORD
    if (
        job.featured
        and files.read_json(marker)["errors"] > plan.settings.max_bad_fraction * job.manifest.rows
    ):
        marker.unlink()


def finish(job: Job, plan: Plan) -> None:
    """Count every row, write `errors.parquet`, and mark the dataset complete.

    Raises:
        UserError: if more than `max_bad_fraction` of the images are bad; names the first of them.
    """
    folder, limit = files.at(job.folder), plan.settings.max_bad_fraction
    part_rows, keys, errors, bad_parts = [], list[str](), list[list[str]](), list[Place]()
    planned = cut(job, plan.shard_rows)
    for shard, metadata in zip(planned, tables.metadata(shard.part for shard in planned), strict=True):
        part_rows.append(metadata.num_rows)
        keys.append(metadata.metadata[KEYS].decode())
        found = json.loads(metadata.metadata[ERRORS])
        errors += found
        bad_parts += [files.at(shard.part)] if found else []
        if metadata.num_rows + len(found) != shard.stop - shard.start:
            raise RuntimeError(
                f"{shard.part}: {metadata.num_rows} features and {len(found)} errors do not add up"
            )
    if len(errors) > limit * job.manifest.rows:
        for part in bad_parts:  # so that mended files are read again
            part.unlink()
        first = "; ".join(f"{key} ({reason})" for key, reason in errors[:3])
        raise UserError(
            f"datasets.{job.dataset}: {len(errors)} of {job.manifest.rows} images are bad, more than "
            f"extract.max_bad_fraction = {limit:g}. First: {first}. "
            "Mend or remove them, or raise the limit."
        )
    columns = [[error[position] for error in errors] for position in (0, 1)]
    schema = pa.schema([("key", pa.string()), ("reason", pa.string())])
    tables.write_table(folder / "errors.parquet", pa.table(columns, schema))
    artifacts.remove_drafts(folder)
    record = {
        "dataset": job.dataset,
        "rows": job.manifest.rows,
        "features": sum(part_rows),
        "errors": len(errors),
        "part_rows": part_rows,
        "keys": artifacts.digest(keys),
        "identity": job.identity,
    }
    files.write_json(folder / artifacts.RECORD, record)


def finish_extra(job: Job, extra: Extra) -> None:
    """Mark an extra of a dataset as complete, if it has the rows of the features."""
    folder = files.at(job.folder)
    features = files.read_json(folder / artifacts.RECORD)
    names = [tables.part_name(number) for number in range(len(features["part_rows"]))]
    found = list(_digests(folder / extra.column / name for name in names).values())
    if artifacts.digest(found) != features["keys"]:
        raise RuntimeError(f"{folder / extra.column}: its rows are not those of the features")
    artifacts.remove_drafts(folder / extra.column)
    record = {"extra": extra.kind, **extra.model_dump(mode="json"), "keys": features["keys"]}
    files.write_json(folder / extra.column / artifacts.RECORD, record)
