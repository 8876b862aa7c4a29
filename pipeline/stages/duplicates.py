"""Images that are in two datasets that must be apart, found by the digests of their bytes.

Reads no image: extraction, which has the bytes in hand, left the digests beside the features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cluster.engine import Engine
from pipeline.columns import DIGEST, KEY
from pipeline.stages.shards import DIGESTS, Job
from pipeline.workspace import tables

APART = (
    *product(("train", "id_val", "ood_val"), ("id", "shifted_id", "near_ood", "far_ood")),
    *product(("id", "shifted_id"), ("near_ood", "far_ood")),
)
"""Roles of datasets that must not share images: of what is learned from or ID, and of what is measured."""

NAMED = 3
"""Images that are named."""

Words = NDArray[np.uint64]


@dataclass(frozen=True)
class Shared:
    """Images of one dataset whose bytes are also in another."""

    dataset: str
    other: str
    images: int
    """Of `dataset`."""
    first: tuple[str, ...]
    """Keys of the first of them."""


def found(engine: Engine, jobs: Mapping[str, Sequence[Job]]) -> dict[str, Any]:
    """What is `shared` by datasets that must be apart, and the datasets of `unknown` images.

    Args:
        engine: does the work, a task for each dataset that is measured on.
        jobs: the datasets by role, extracted.
    """
    digests, unknown = dict[str, tables.Table](), list[str]()
    for job in (job for members in jobs.values() for job in members):
        record = job.digested()
        if record is None:
            unknown.append(job.dataset)
        else:
            digests[job.dataset] = tables.Table.of(job.artifact.folder / DIGESTS, record)
    names = {
        role: [job.dataset for job in members if job.dataset in digests] for role, members in jobs.items()
    }
    against: dict[str, list[str]] = {}
    for role, measured in APART:
        for name in names.get(measured, ()):
            against.setdefault(name, []).extend(names.get(role, ()))
    work = (
        (name, digests[name], {other: digests[other] for other in others})
        for name, others in against.items()
        if others
    )
    shared = [asdict(each) for task in engine.in_order(_compare, work) for each in task]
    return {"shared": shared, "unknown": unknown}


def _compare(name: str, own: tables.Table, others: Mapping[str, tables.Table]) -> list[Shared]:
    """What others have of a dataset. Memory: 32 bytes for each of its images, and a part of another."""
    words = np.concatenate([np.empty(0, np.uint64), *(_words(part) for part in own.columns([DIGEST]))])
    distinct, place = np.unique(words, return_inverse=True)
    results = []
    for other, table in others.items():
        seen = np.zeros(len(distinct), np.bool_)
        for part in table.columns([DIGEST]):
            given = _words(part)
            starts, stops = (distinct.searchsorted(given, side) for side in ("left", "right"))
            seen[starts[starts < stops]] = True
        hit = seen[place]
        if hit.any():
            results.append(
                Shared(name, other, int(hit.sum()), tuple(_keys(own, np.flatnonzero(hit)[:NAMED])))
            )
    return results


def _keys(table: tables.Table, rows: Iterable[int]) -> Iterator[str]:
    for row in rows:
        yield str(table.read(int(row), int(row) + 1, [KEY])[KEY][0])


def _words(part: Any) -> Words:
    """(N,) first halves of (N,) digests: of a billion pairs of images, two agree by chance in one of 1e10."""
    column = part[DIGEST].combine_chunks()
    whole = np.frombuffer(column.buffers()[1], np.uint64).reshape(-1, 2)
    return whole[column.offset : column.offset + len(column), 0]
