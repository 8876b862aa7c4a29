"""From rows of a manifest to pixels, on any CPU: what decodes needs no network, and loads no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import columns
from pipeline.cluster import attempts
from pipeline.cluster.attempts import FIRST, Attempt
from pipeline.columns import DIGEST, KEY, LABEL
from pipeline.data import decode
from pipeline.data.fetch import fetch
from pipeline.stages.shards import Plan, Shard

OTHERS = "rows and errors"
"""Column beside `pixels` that holds the rest of a `Decoded` on its way to a model actor, as JSON."""

ACCEPTED = "accepted"
"""Column of a manifest with the labels that are right, where there are several."""


_PIXEL = 7
"""Bytes of a pixel while an image is decoded: four as it is stored, and three of its conversion to RGB."""


@dataclass(frozen=True)
class Decoded:
    """Images of some manifest rows, ready for the network."""

    pixels: columns.Pixels
    """(n, H, W, channels) of the readable ones."""
    rows: list[dict[str, Any]]
    """Key, label, accepted labels and digest (as hexadecimal text) of each."""
    errors: list[list[str]]
    """[key, reason] of the others."""

    def batches(self, size: int) -> Iterator[Decoded]:
        """The same in batches of at most `size` images; the errors come with the first."""
        for start in range(0, max(len(self.rows), 1), size):
            stop = start + size
            errors = [] if start else self.errors
            yield Decoded(self.pixels[start:stop], self.rows[start:stop], errors)


def decode_shard(row: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """The decoded images of a shard as columns beside those that describe it."""
    shard = Shard(**row)
    with attempts.begun(shard.part, "decoding") as attempt:
        found = decode_rows(shard.images(), plan, attempt)
    return {"pixels": found.pixels, OTHERS: json.dumps([found.rows, found.errors])}


def memory(plan: Plan, rows: int) -> int:
    """Bytes that decoding may hold: the largest image, and twice the pixels of so many, to stack them."""
    side, channels = plan.transform.crop, plan.transform.channels
    return plan.settings.max_image_bytes + _PIXEL * decode.MAX_PIXELS + 2 * rows * side * side * channels


def decode_rows(
    table: pa.Table,
    plan: Plan,
    attempt: Attempt = FIRST,
    contents: Iterator[bytes | Exception] | None = None,
) -> Decoded:
    """Decode rows of a manifest, from the next ones of a `fetch` under way or from one of their own."""
    pixels, good, errors = [], [], []
    rows = table.select([KEY, LABEL, ACCEPTED, "shape"]).to_pylist()
    contents = contents or fetch(table, plan.settings.max_image_bytes)
    for row, content in zip(rows, contents, strict=False):
        if attempt.last:
            attempt.at([row[KEY]])
        found = _decoded(content, row.pop("shape"), plan)
        if isinstance(found, Exception):
            errors.append([row[KEY], reason(found)])
        else:
            assert isinstance(content, bytes)
            pixels.append(found)
            good.append(row | {DIGEST: hashlib.sha256(content).hexdigest()[:32]})
    side, channels = plan.transform.crop, plan.transform.channels
    empty = np.empty((0, side, side, channels), np.uint8)
    return Decoded(np.stack(pixels) if pixels else empty, good, errors)


def _decoded(content: bytes | Exception, shape: list[int] | None, plan: Plan) -> columns.Pixels | Exception:
    """Pixels of one image, or why there are none."""
    if isinstance(content, Exception):
        return content
    try:
        raw = None if shape is None else tuple(shape)
        return decode.decode(content, raw, plan.transform, plan.settings.decoder)
    except Exception as error:  # any byte string may come along; the row is counted as an error
        return error


def reason(error: Exception) -> str:
    """Why an image cannot be used, in words for people."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file: it was moved or deleted, or is a link to nowhere"
    if isinstance(error, PermissionError):
        return "no permission to read the file"
    text = str(getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, ValueError | EOFError):  # of our own, see `fetch` and `decode`
        return text
    return f"cannot be read: {text}"
