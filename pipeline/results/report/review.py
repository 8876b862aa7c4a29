"""Images to look at: what a detector missed, what it took for OOD, and on what detectors disagree.

Chosen by the scores of a run; pictures are read again from where the dataset has them, so an image that is
gone has none.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.columns import KEY, LABEL, PREDICTION, Float
from pipeline.data.decode import thumbnail
from pipeline.data.fetch import fetch
from pipeline.errors import UserError, redact
from pipeline.results import calibrated
from pipeline.results.report.tables import OOD, Results
from pipeline.workspace import runs, tables
from pipeline.workspace.files import Place

SIDE = 96
"""Pixels of the longer side of a picture."""

BUDGET = 3 * 2**19
"""Bytes of all pictures of a page together."""

RIVALS = 3
"""Detectors, best first, whose disagreement is looked for."""

Why = Literal["missed", "caught", "false alarm", "disputed"]
TITLES: Mapping[Why, str] = {
    "false alarm": "Most OOD of the ID images",
    "missed": "Least OOD",
    "caught": "Most OOD",
    "disputed": "Detectors disagree",
}


@dataclass(frozen=True)
class Shown:
    """One image."""

    dataset: str
    why: Why
    row: int
    """Of the rows that are tested."""
    score: float
    percentile: float
    """Share of the ID images that score lower, in [0, 1]."""
    key: str = ""
    label: int = -1
    prediction: int = -1
    uri: str = ""
    """Where it lies, without credentials; empty for raw pixels inside an array."""
    picture: bytes = b""
    """A JPEG file; empty if the image could not be read again."""

    @property
    def source(self) -> str:
        """The picture as a data URL."""
        return "data:image/jpeg;base64," + b64encode(self.picture).decode()


@dataclass(frozen=True)
class Review:
    """The images of a run that are worth a look."""

    detector: str = ""
    """Whose scores decide."""
    rivals: tuple[str, ...] = ()
    images: tuple[Shown, ...] = ()

    def groups(self) -> dict[str, dict[str, list[Shown]]]:
        """The images by dataset and by the title of what they are."""
        found: dict[str, dict[str, list[Shown]]] = {}
        for image in self.images:
            found.setdefault(image.dataset, {}).setdefault(TITLES[image.why], []).append(image)
        return found

    def table(self) -> pa.Table:
        """All images but for their pictures, with the detector."""
        names = ("dataset", "why", "key", "uri", "label", "prediction", "score", "percentile")
        columns = {name: [getattr(image, name) for image in self.images] for name in names}
        return pa.table({"detector": [self.detector] * len(self.images), **columns})


def review(results: Results, count: int) -> Review:
    """What is `chosen`, with places and pictures."""
    found = chosen(results, count)
    located = [
        image
        for dataset, images in groupby(found.images, attrgetter("dataset"))
        for image in _located(results, dataset, [*images])
    ]
    return replace(found, images=tuple(_within(located, BUDGET)))


def chosen(results: Results, count: int) -> Review:
    """The images that a run's best detector has most wrong and most right, and those that are disputed.

    Holds the scores of a few detectors on one dataset at a time.

    Args:
        results: of the run.
        count: how many images of each kind and dataset; 0 = none.

    Returns:
        Dataset by dataset, without places and pictures.
    """
    ranked = results.unaided
    if not count or not ranked:
        return Review()
    inside = {name: np.sort(results.scores(results.datasets("id"), name)) for name in ranked[:RIVALS]}
    found: list[Shown] = []
    for dataset in results.datasets("id", *OOD, "unlabelled"):
        found += _named(results, dataset, _extreme(results, dataset, inside, count))
    return Review(ranked[0], tuple(inside), tuple(found))


def _extreme(results: Results, dataset: str, inside: Mapping[str, Float], count: int) -> list[Shown]:
    """Rows of a dataset, with why, score and percentile."""
    columns = {name: results.column(dataset, name) for name in inside}
    best = next(iter(inside))
    scores = columns[best]
    percentiles = {
        name: np.searchsorted(inside[name], column) / max(len(inside[name]), 1)
        for name, column in columns.items()
    }
    kinds: dict[Why, Float] = {"false alarm": scores}
    if results.manifest["datasets"][dataset]["role"] != "id":
        kinds = {"missed": -scores, "caught": scores}
    if len(columns) > 1:
        spread = np.ptp(np.stack(list(percentiles.values())), axis=0)
        kinds["disputed"] = np.where(np.all(np.isfinite(list(columns.values())), axis=0), spread, np.nan)
    return [
        Shown(dataset, why, int(row), float(scores[row]), float(percentiles[best][row]))
        for why, values in kinds.items()
        for row in _highest(values, count)
    ]


def _highest(values: Float, count: int) -> NDArray[np.int64]:
    """Rows of the highest values, in their order; of equal ones the first."""
    there = np.flatnonzero(np.isfinite(values))
    return there[np.argsort(-values[there], kind="stable")[:count]]


def _named(results: Results, dataset: str, chosen: Sequence[Shown]) -> list[Shown]:
    """The same with key, label and prediction."""
    rows = np.array([image.row for image in chosen], np.int64)
    found = list(chosen)
    start = 0
    for table in calibrated.columns(results.folder, results.manifest, dataset, [KEY, LABEL, PREDICTION]):
        for number in np.flatnonzero((rows >= start) & (rows < start + len(table))).tolist():
            own = table.slice(int(rows[number]) - start, 1).to_pylist()[0]
            found[number] = replace(found[number], key=own[KEY], label=own[LABEL], prediction=own[PREDICTION])
        start += len(table)
    return found


def _located(results: Results, dataset: str, chosen: Sequence[Shown]) -> Iterator[Shown]:
    """The same with their places and pictures, as far as they can be read."""
    found = places(results.folder, results.manifest, dataset, {image.key for image in chosen})
    for image in chosen:
        place = found.get(image.key, {})
        uri = redact(place.get("uri") or "")
        yield replace(image, uri=uri, picture=place.get("picture", b""))


def places(
    run: Place, manifest: Mapping[str, Any], dataset: str, keys: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Where images of a dataset lie (`uri`), and small pictures of them (`picture`), as far as there are any.

    Args:
        run: its folder.
        manifest: its record.
        dataset: that they are in.
        keys: theirs.

    Returns:
        By key.
    """
    found: dict[str, dict[str, Any]] = {}
    try:
        rows = listed(run, manifest, dataset, keys)
        found = {place[KEY]: place for place in rows.select([KEY, "uri", "shape"]).to_pylist()}
        for place, content in zip(found.values(), fetch(rows), strict=True):
            if isinstance(content, bytes):
                place["picture"] = _picture(content, place["shape"])
    except (OSError, UserError, pa.ArrowException):  # moved, changed, or a store that does not answer
        pass
    return found


def listed(run: Place, manifest: Mapping[str, Any], dataset: str, keys: Collection[str]) -> pa.Table:
    """The rows of a dataset's listing that have some keys; arguments as of `places`.

    Raises:
        OSError: the listing is gone.
    """
    wanted = pa.array(sorted(keys), pa.string())
    name = f"{dataset}-{manifest['datasets'][dataset]['digest'][:16]}"
    with tables.parquet(runs.workspace_of(run) / "manifests" / name / "rows.parquet") as file:
        parts = [batch.filter(pc.is_in(batch[KEY], wanted)) for batch in file.iter_batches(tables.ROW_GROUP)]
        return pa.Table.from_batches(parts, file.schema_arrow)


def _picture(content: bytes, shape: Sequence[int] | None) -> bytes:
    try:
        return thumbnail(content, None if shape is None else tuple(shape), SIDE)
    except ValueError:
        return b""


def _within(images: Iterable[Shown], budget: int) -> Iterator[Shown]:
    """The same; those whose pictures would be too much have none."""
    for image in images:
        budget -= len(image.picture)
        yield image if budget >= 0 else replace(image, picture=b"")
