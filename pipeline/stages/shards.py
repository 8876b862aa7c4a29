"""What extraction has done and has still to do: datasets in numbered shards, a file for each and column.

A part with a receipt is complete. A dataset is complete when every row of its manifest is counted in a part,
as features or as an error; an extra column, when its parts have the rows of the features.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import pyarrow as pa
from safetensors.numpy import load_file

from pipeline.cluster import attempts
from pipeline.config import schema
from pipeline.data.manifest import Manifest
from pipeline.detectors.base import Extra
from pipeline.errors import AGAIN, UserError
from pipeline.network.description import Probe, same_network
from pipeline.workspace import artifacts, files, storage, tables
from pipeline.workspace.artifacts import Artifact, Damaged, File, Record, saved, write_part
from pipeline.workspace.files import Place

SHARD_ROWS, SHARD_PIXELS = 2048, 2**27
"""Most rows of a shard, and most bytes of pixels, if `extract.shard_rows` is auto."""

ERRORS = b"errors"
"""Key of the Parquet footer under which a part lists its bad rows as JSON [[key, reason], ...]."""

ERRORS_FILE = "errors.parquet"
"""File beside the features with key and reason of all bad rows."""

NAMED = 3
"""Bad rows that are named wherever their number is told."""

FORMAT = "features 1"
"""Kind and version: the number goes up when the bits of features change though their identity does not."""

DIGESTS, DIGESTS_FORMAT = "digests", "digests 1"
"""Folder beside the features with digests of the images' bytes; and its kind and version."""

PROBE = "probe.safetensors"
"""File beside the features with what the network answered to fixed noise."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What all extractions of a run share."""

    model: schema.Model
    settings: schema.Extract
    seed: int
    digest: str
    transform: schema.Transform
    probe: Probe
    """What the network answers to fixed noise."""
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
    """One dataset to extract, with its place in the workspace."""

    dataset: str
    manifest: Manifest
    artifact: Artifact
    """The features; its identity is everything they depend on."""
    extras: tuple[Extra, ...] = ()
    """Columns beyond the features."""

    @property
    def folder(self) -> str:
        """Where the features lie, and the other columns in folders in it."""
        return str(self.artifact.folder)

    @property
    def name(self) -> str:
        """What the features are called in the identity of what is made of them."""
        return self.artifact.name

    @property
    def complete(self) -> bool:
        """Whether all rows are there, with all columns."""
        features = self.record()
        return features is not None and not self._lacking(features) and not self.lacks_digests(features)

    @property
    def featured(self) -> bool:
        """Whether the features of all rows are there."""
        return self.record() is not None

    def record(self) -> Record | None:
        """The record of the features if they are complete; damaged ones are not."""
        return self.artifact.intact()

    def column(self, extra: Extra, features: Record) -> Artifact:
        """The artifact of a column beside some features."""
        identity = {"features": self.name, "extra": {"kind": extra.kind, **extra.model_dump(mode="json")}}
        folder = self.artifact.folder / extra.column
        return Artifact(folder, f"column {extra.version}", identity, {self.name: _keys(features)})

    def digests(self, features: Record) -> Artifact:
        """The digests of the images behind some features, a part for each of theirs."""
        folder, identity = self.artifact.folder / DIGESTS, {"features": self.name}
        return Artifact(folder, DIGESTS_FORMAT, identity, {self.name: _keys(features)})

    def digested(self) -> Record | None:
        """The record of the digests of a dataset that is complete; None for features of an earlier version.

        Raises:
            Damaged: a file that is not what was written.
        """
        return self.digests(self.artifact.require()).intact()

    def lacks_digests(self, features: Record) -> bool:
        """Whether digests were begun and are not complete; features of earlier versions have none."""
        digests = self.digests(features)
        return digests.intact() is None and digests.folder.is_dir()

    def artifacts(self) -> list[Artifact]:
        """The features, and the columns beside them by their folders alone."""
        folder = self.artifact.folder
        beside = [DIGESTS, *(extra.column for extra in self.extras)]
        return [self.artifact, *(Artifact(folder / name, "", {}) for name in beside)]

    def lacking(self) -> list[Extra]:
        """The extras that are not there for exactly the rows of the features."""
        features = self.record()
        return list(self.extras) if features is None else self._lacking(features)

    def _lacking(self, features: Record) -> list[Extra]:
        return [extra for extra in self.extras if self.column(extra, features).intact() is None]

    def table(self) -> tables.Table:
        """All columns of a dataset that is complete.

        Raises:
            Damaged: a file that is not what was written.
        """
        features = self.artifact.require()
        found = {extra.column: self.column(extra, features).record() for extra in self.extras}
        beside = {name: record for name, record in found.items() if record is not None}
        return tables.Table.of(self.artifact.folder, features, beside)


def _keys(features: Record) -> str:
    """Digest of the keys of all rows, part by part: what columns beside them must have, too."""
    return artifacts.digest([file.facts.get("keys") for _, file in sorted(features.files.items())])


def job(
    dataset: schema.Dataset,
    manifest: Manifest,
    identity: dict[str, Any],
    workspace: Place,
    probe: Probe,
    wanted: Iterable[Extra] = (),
) -> Job:
    """The job of one dataset.

    Args:
        dataset: its config.
        manifest: its images.
        identity: what features depend on.
        workspace: where they are kept.
        probe: what the network answers; features of one that answers otherwise are left alone, these become
            another variant.
        wanted: columns beyond the features.
    """
    base = f"{dataset.name}-{artifacts.digest([FORMAT, identity])[:16]}"
    for number in count():
        folder = workspace / "features" / (f"{base}.{number}" if number else base)
        known = _probe_of(folder)
        if known is None or same_network(known, probe):
            variant = {"variant": number} if number else {}
            return Job(dataset.name, manifest, Artifact(folder, FORMAT, identity | variant), tuple(wanted))
        _log.warning(
            "%s: the network answers otherwise than the one whose features lie in %s, though weights and "
            "sources are the same: something that its source imports was changed. Its features become %s.%d",
            *(dataset.name, folder, base, number + 1),
        )
    raise AssertionError


def _probe_of(folder: Place) -> Probe | None:
    """What the network answered whose features lie in a folder; None if nobody knows."""
    written = artifacts.receipt_of(folder / PROBE)
    if written is None:
        return None
    try:
        with artifacts.opened(folder / PROBE, written.sha256) as file:
            return load_file(file)["logits"]
    except Damaged as damaged:
        artifacts.mend(damaged)
        return None


@dataclass(frozen=True)
class Shard:
    """Rows [start, stop) of a manifest and the part they become."""

    dataset: str
    manifest: str
    start: int
    stop: int
    part: str
    featured: str = ""
    """Digest of the keys of the part if it is there, and only extras are missing."""
    extras: str = ""
    """Columns beside the features that are to be made, separated by spaces; digests come with features."""

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
    starts = range(0, job.manifest.rows, shard_rows)
    return [_shard(job, number, start, start + shard_rows) for number, start in enumerate(starts)]


def _shard(job: Job, number: int, start: int, stop: int) -> Shard:
    return Shard(
        dataset=job.dataset,
        manifest=job.manifest.path,
        start=start,
        stop=min(stop, job.manifest.rows),
        part=str(job.artifact.folder / tables.part_name(number)),
    )


def missing(job: Job, plan: Plan) -> list[Shard]:
    """The shards still to do; of an interrupted run that cut them differently nothing is kept."""
    features = job.record()
    attempts.forget(job.artifact.folder)
    if features is None:
        planned, done = cut(job, plan.shard_rows), _begun(job, plan)
    else:
        parts = sorted((name, file) for name, file in features.files.items() if name.startswith("part-"))
        cuts = [(file.facts["start"], file.facts["stop"]) for _, file in parts]
        planned = [_shard(job, number, *rows) for number, rows in enumerate(cuts)]
        done = dict(parts)
    columns = {extra.column: _column_begun(job, extra.column, done) for extra in job.lacking()}
    if features is not None and job.lacks_digests(features):
        columns[DIGESTS] = _column_begun(job, DIGESTS, done)
    todo = []
    for shard in planned:
        name = storage.name_of(shard.part)
        lacking = [column for column, there in columns.items() if name not in there]
        if name not in done:
            todo.append(replace(shard, extras=" ".join(columns)))
        elif lacking:
            todo.append(replace(shard, featured=done[name].facts["keys"], extras=" ".join(lacking)))
    return todo


def _begun(job: Job, plan: Plan) -> dict[str, File]:
    """Parts of features that are there, cut as they are to be; the others are deleted, and the record."""
    artifact = job.artifact
    (artifact.folder / artifacts.RECORD).unlink(missing_ok=True)
    planned = {storage.name_of(shard.part): shard for shard in cut(job, plan.shard_rows)}
    found = artifact.done()
    require_same_network(job, plan)
    if PROBE not in found:
        write_part(artifact.folder / PROBE, saved({"logits": plan.probe}))
    kept = {}
    for name, file in found.items():
        shard = planned.get(name)
        if shard is not None and (file.facts["start"], file.facts["stop"]) == (shard.start, shard.stop):
            kept[name] = file
        elif name != PROBE:
            artifacts.remove(artifact.folder / name)
    return kept


def _column_begun(job: Job, column: str, features: Mapping[str, File]) -> dict[str, File]:
    """Parts of a column that are there for the rows of features; its record is deleted."""
    folder = job.artifact.folder / column
    (folder / artifacts.RECORD).unlink(missing_ok=True)
    found = Artifact(folder, "", {}).done()
    return {
        name: file
        for name, file in found.items()
        if name in features and file.facts["keys"] == features[name].facts["keys"]
    }


def nothing(jobs: Iterable[Job]) -> dict[str, float]:
    """The numbers of an extraction that had nothing to do."""
    images = sum(job.manifest.rows for job in jobs)
    return {"images": images, "forward_images": 0, "steady_seconds": 0.0, "images_per_second": 0.0}


def require_same_network(job: Job, plan: Plan) -> None:
    """Refuse features that another network made since the run began.

    Raises:
        UserError: they are not this network's.
    """
    known = _probe_of(job.artifact.folder)
    if known is not None and not same_network(known, plan.probe):
        raise UserError(
            f"{job.folder}: another run began these features with a network that answers otherwise. {AGAIN}"
        )


def require_few_bad(job: Job, plan: Plan) -> None:
    """Refuse a dataset that has more bad images than are allowed by now.

    Raises:
        UserError: names the first of them.
    """
    features, limit = job.record(), plan.settings.max_bad_fraction
    if features is not None and features.facts["errors"] > limit * job.manifest.rows:
        raise _too_many(job, features.facts["errors"], first_errors(job), limit)


def require_readable(job: Job) -> None:
    """Refuse a dataset, which is complete, without a single image.

    Raises:
        UserError: names the first of those that are bad.
    """
    if not job.artifact.require().facts["features"]:
        raise UserError(
            f"datasets.{job.dataset}: none of its {job.manifest.rows} images can be read. First: "
            f"{_told(first_errors(job))}. Mend them, or leave the dataset out."
        )


def first_errors(job: Job) -> list[list[str]]:
    """[key, reason] of the first bad rows of a dataset that is complete."""
    with tables.parquet(job.artifact.folder / ERRORS_FILE) as file:
        batch = next(file.iter_batches(NAMED), None)
    return [] if batch is None else [[row["key"], row["reason"]] for row in batch.to_pylist()]


def _too_many(job: Job, count: int, errors: list[list[str]], limit: float) -> UserError:
    return UserError(
        f"datasets.{job.dataset}: {count} of {job.manifest.rows} images are bad, more than "
        f"extract.max_bad_fraction = {limit:g}. First: {_told(errors)}. "
        "Mend or remove them, or raise the limit."
    )


def _told(errors: list[list[str]]) -> str:
    return "; ".join(f"{key} ({reason})" for key, reason in errors[:NAMED])


def finish(job: Job, plan: Plan) -> Record:
    """Count every row, write `errors.parquet`, and mark the dataset complete.

    Raises:
        UserError: if more than `max_bad_fraction` of the images are bad; names the first of them.
    """
    folder, limit, done = job.artifact.folder, plan.settings.max_bad_fraction, job.artifact.done()
    parts, errors, bad_parts = dict[str, File](), list[list[str]](), list[Place]()
    for shard in cut(job, plan.shard_rows):
        name = storage.name_of(shard.part)
        parts[name] = done[name]
        found = _errors(folder / name) if done[name].facts["errors"] else []
        errors += found
        bad_parts += [folder / name] if found else []
        if done[name].facts["rows"] + len(found) != shard.stop - shard.start:
            raise RuntimeError(
                f"{shard.part}: {done[name].facts['rows']} features and {len(found)} errors do not add up"
            )
    if len(errors) > limit * job.manifest.rows:
        for part in bad_parts:  # so that mended files are read again
            artifacts.remove(part)
        raise _too_many(job, len(errors), errors, limit)
    columns = [[error[position] for error in errors] for position in (0, 1)]
    schema = pa.schema([("key", pa.string()), ("reason", pa.string())])
    listed = artifacts.write(folder / ERRORS_FILE, tables.written(pa.table(columns, schema)))
    record = job.artifact.finish(
        {**parts, PROBE: done[PROBE], ERRORS_FILE: listed},
        aside=[PROBE],
        dataset=job.dataset,
        rows=job.manifest.rows,
        features=sum(file.facts["rows"] for file in parts.values()),
        errors=len(errors),
        machines=dict(Counter(file.facts["machine"] for file in parts.values())),
    )
    finish_digests(job)
    return record


def _errors(part: Place) -> list[list[str]]:
    """[key, reason] of the bad rows of a part."""
    with tables.parquet(part) as file:
        found: list[list[str]] = json.loads(file.metadata.metadata[ERRORS])
    return found


def finish_extra(job: Job, extra: Extra) -> Record:
    """Mark an extra of a dataset as complete, if it has the rows of the features."""
    features = job.artifact.record()
    assert features is not None
    column = job.column(extra, features)
    parts = _parts_beside(column, features)
    if parts is None:
        raise RuntimeError(f"{column.folder}: its rows are not those of the features")
    return column.finish(parts)


def finish_digests(job: Job) -> None:
    """Mark the digests of a dataset as complete; where an earlier version made some parts, there are none."""
    features = job.artifact.record()
    assert features is not None
    digests = job.digests(features)
    if parts := _parts_beside(digests, features):
        digests.finish(parts)
    else:
        artifacts.remove_folder(digests.folder)


def _parts_beside(column: Artifact, features: Record) -> dict[str, File] | None:
    """The parts of a column, if they have the rows of the features."""
    parts = {name: file for name, file in features.files.items() if name.startswith("part-")}
    done = column.done()
    if any(
        name not in done or done[name].facts["keys"] != file.facts["keys"] for name, file in parts.items()
    ):
        return None
    return {name: done[name] for name in parts}
