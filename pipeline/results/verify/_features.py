"""Cached features against the list of images they were made from: identity, counts, keys, and every row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipeline.columns import BLOCK_NORM, FEATURE, KEY, LABEL, LOGITS, PREDICTION, Mask
from pipeline.config import schema
from pipeline.results.verify._files import (
    Cached,
    Kept,
    Rows,
    Run,
    columns,
    intact,
    kept,
    parts,
    recount,
    require,
)
from pipeline.results.verify._findings import Finding, Tally, Unreadable, same, shown
from pipeline.results.verify._listing import Listing
from pipeline.workspace import artifacts
from pipeline.workspace.files import Place
from pipeline.workspace.patience import Unavailable

_ERRORS = {KEY: pa.string(), "reason": pa.string()}


def listed(run: Run, name: str, listing: Listing) -> Iterator[Finding]:
    """Whether the list of a dataset's images is the one that the run used, with every key once."""
    yield same("digest", run.record.datasets[name].digest, listing.digest)
    yield listing.repeated().finding("repeated keys", f"none among {listing.rows:,}")


def examine(run: Run, name: str, listing: Listing, advance: Callable[[int], None]) -> Iterator[Finding]:
    """Everything about the features of a dataset.

    Args:
        run: the run that used them.
        name: the dataset.
        listing: its images.
        advance: called with the number of rows of every piece that was read.
    """
    folder = run.features(name)
    cached = kept(folder, Cached)
    yield from _identity(run, name, cached)
    yield intact(folder, cached)
    yield recount(folder, cached.part_rows)
    yield from _rows(run, name, cached, listing, advance)
    for column, width in run.record.datasets[name].extras.items():
        yield intact(folder / column, kept(folder / column, Kept))
        yield recount(folder / column, cached.part_rows)
        yield _beside(folder, column, width, cached.part_rows)


def _beside(folder: Place, column: str, width: int, part_rows: Sequence[int]) -> Finding:
    """Whether an extra column has the keys of the features in their order, and finite values."""
    wrong = Tally()
    for own, other in zip(parts(folder, part_rows), parts(folder / column, part_rows), strict=True):
        try:
            require(other, {KEY: pa.string(), column: pa.list_(pa.float32(), width)})
            for features, extra in zip(columns(own, [KEY]), columns(other, [KEY, column]), strict=True):
                bad = (features[KEY] != extra[KEY]) | ~np.isfinite(extra[column]).all(axis=1)
                wrong.add(extra[KEY][bad])
        except Unavailable:
            raise
        except (Unreadable, ValueError) as error:
            wrong.add([error])
    return wrong.finding(column, "keys of the features, finite values")


def _identity(run: Run, name: str, cached: Cached) -> Iterator[Finding]:
    """Whether the folder is named by what its features were made of, and that is what the run used."""
    entry, model = run.record.datasets[name], run.record.model
    own = {part: value for part, value in cached.identity.items() if part != "variant"}
    yield same(
        "hash of the identity", entry.hash.partition(".")[0], artifacts.digest([cached.kind, own])[:16]
    )
    used = {
        "images": entry.digest,
        "weights": model.weights_digest,
        "head": model.head,
        "blocks": model.blocks,
    }
    wrong = Tally()
    wrong.add(field for field, value in used.items() if cached.identity.get(field) != value)
    yield wrong.finding("identity", f"{', '.join(used)} of manifest.json")
    recorded = (cached.facts.rows, cached.facts.features, cached.facts.errors)
    yield same("recorded counts", _counts(entry.rows, entry.features, entry.errors), _counts(*recorded))
    yield _machines(cached)


def _machines(cached: Cached) -> Finding:
    """Whether it is known of every part what kind of machine made it; bits are the same within a kind."""
    made = Counter(str(file.facts["machine"]) for file in cached.files.values() if "machine" in file.facts)
    kinds = "; ".join(f"{count:,} parts on {kind}" for kind, count in sorted(made.items()))
    known = made == cached.facts.machines and made.total() == len(cached.part_rows)
    return Finding("kinds of machine", f"known of {len(cached.part_rows):,} parts", kinds or "none", known)


def _counts(rows: int, features: int | None, errors: int | None) -> str:
    return f"{rows:,} rows = {shown(features)} features + {shown(errors)} errors"


def _rows(
    run: Run, name: str, cached: Cached, listing: Listing, advance: Callable[[int], None]
) -> Iterator[Finding]:
    """One pass over all parts and the errors: every key accounted for, every row in order."""
    entry, folder, types = run.record.datasets[name], run.features(name), _types(run, cached)
    least = 0 if entry.role in schema.LABELLED_ROLES else -1
    seen = Seen(listing, range(least, run.record.model.classes if entry.role in schema.ID_ROLES else 0))
    features = sum(seen.part(path, types, advance) for path in parts(folder, cached.part_rows))
    errors = seen.part(folder / "errors.parquet", _ERRORS, advance)
    yield seen.damaged.finding("columns", ", ".join(map(_described, types.items())))
    recorded = _counts(entry.rows, entry.features, entry.errors)
    yield same("rows", recorded, _counts(listing.rows, features, errors))
    yield _accounted(listing, seen.unknown)
    for check, tally in seen.wrong.items():
        yield tally.finding(check, CHECKS[check].expected)


@dataclass
class Seen:
    """What a pass over the rows of a dataset has met so far."""

    listing: Listing
    labels: range
    """Labels that the dataset's role allows."""
    damaged: Tally = field(default_factory=Tally)
    unknown: Tally = field(default_factory=Tally)
    wrong: dict[str, Tally] = field(default_factory=lambda: {check: Tally() for check in CHECKS})

    def part(self, path: Place, types: Mapping[str, pa.DataType], advance: Callable[[int], None]) -> int:
        """Read a file of features or errors; returns how many rows it has."""
        count = 0
        try:
            require(path, types)
            for rows in columns(path, list(types)):
                count += len(rows[KEY])
                self.unknown.add(rows[KEY][self.listing.see(rows[KEY])])
                for check, tally in self.wrong.items() if FEATURE in types else ():
                    tally.add(rows[KEY][CHECKS[check].wrong(rows, self)])
                advance(len(rows[KEY]))
        except Unreadable as error:
            self.damaged.add([error])
        return count


def _accounted(listing: Listing, unknown: Tally) -> Finding:
    """Whether every key of the list was found exactly once, and no other."""
    tallies = {
        "missing": listing.missing(),
        "found more than once": listing.doubled(),
        "not in the list": unknown,
    }
    wrong = [f"{what}: {tally}" for what, tally in tallies.items() if tally.count]
    expected = f"each of {listing.rows:,} once, in features or errors.parquet"
    return Finding("keys", expected, "; ".join(wrong) or "no exception", not wrong)


def _types(run: Run, cached: Cached) -> dict[str, pa.DataType]:
    """Columns of a part, with their widths."""
    model, numerics = run.record.model, cached.identity.get("numerics", {})
    half = isinstance(numerics, Mapping) and numerics.get("feature_dtype") == "float16"
    types = {KEY: pa.string(), LABEL: pa.int32(), PREDICTION: pa.int32()}
    types[FEATURE] = pa.list_(pa.float16() if half else pa.float32(), model.feature_dim)
    types[LOGITS] = pa.list_(pa.float32(), model.classes)
    if model.blocks:
        types[BLOCK_NORM] = pa.list_(pa.float32(), len(model.blocks))
    return types


def _described(column: tuple[str, pa.DataType]) -> str:
    name, kind = column
    return f"{name}[{kind.list_size}]" if pa.types.is_fixed_size_list(kind) else name


@dataclass(frozen=True)
class Check:
    """What must hold for every row."""

    expected: str
    wrong: Callable[[Rows, Seen], Mask]
    """Which rows break it."""


def _not_finite(rows: Rows, seen: Seen) -> Mask:
    wrong: Mask = np.zeros(len(rows[KEY]), bool)
    for name in (FEATURE, LOGITS, BLOCK_NORM):
        if name in rows:
            wrong |= ~np.isfinite(rows[name]).all(axis=1)
    return wrong


def _not_the_argmax(rows: Rows, seen: Seen) -> Mask:
    wrong: Mask = rows[LOGITS].argmax(axis=1) != rows[PREDICTION]
    return wrong


def _label_out_of_range(rows: Rows, seen: Seen) -> Mask:
    wrong: Mask = (rows[LABEL] < seen.labels.start) | (rows[LABEL] >= seen.labels.stop)
    return wrong


def _label_not_accepted(rows: Rows, seen: Seen) -> Mask:
    return ~seen.listing.accepts(rows[KEY], rows[LABEL])


CHECKS: dict[str, Check] = {
    "finite": Check("every feature, logit and norm is finite", _not_finite),
    "predictions": Check("each is the argmax of its logits", _not_the_argmax),
    "label range": Check(
        "a class of the head where the role has labels, -1 where it needs none", _label_out_of_range
    ),
    "labels": Check("those of the list", _label_not_accepted),
}
"""Checks of every row of features, by name."""
