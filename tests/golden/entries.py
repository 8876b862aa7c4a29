"""Arrays as entries of the golden files, and what is wrong where an array does not fit its entry.

An exact array is a digest. Of another one the first values are kept, and two sums over all: of the entries,
and of their sizes with weights that grow with the position.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.golden.tolerances import EXACT

FIRST = 12
"""Values that are kept of an array that is not exact."""

_TEXT = {"object": "string"}
_FIXED = ("shape", "dtype", "flags", "values", "sha256")
_ROUNDED = ("first", "sum", "weighted")

Entry = dict[str, Any]


def describe(values: NDArray[Any], tolerance: float) -> Entry:
    """The entry of an array."""
    entry: Entry = {"shape": list(values.shape), "dtype": _TEXT.get(str(values.dtype), str(values.dtype))}
    if values.dtype == np.bool_:
        return entry | {"flags": "".join("01"[flag] for flag in values.tolist())}
    if values.dtype.kind in "iu" and values.size <= FIRST:
        return entry | {"values": values.tolist()}
    if tolerance == EXACT:
        entry["sha256"] = _digest(values)
    if values.dtype.kind == "f":
        flat = values.astype(np.float64).ravel()
        entry |= {"first": flat[:FIRST].tolist(), "sum": float(flat.sum())}
        entry["weighted"] = float((_weights(flat) * np.abs(flat)).sum())
    return entry


def differences(golden: Entry, values: NDArray[Any], tolerance: float) -> list[str]:
    """What is not as in the golden entry; nothing if all is."""
    found = describe(values, tolerance)
    wrong = [name for name in _FIXED if golden.get(name) != found.get(name)]
    if wrong:
        wrong += [name for name in _ROUNDED if golden.get(name) != found.get(name)]
    elif tolerance != EXACT and "sum" in golden:
        wrong = _far(golden, found, values.astype(np.float64).ravel(), tolerance)
    return [f"{name}: golden {golden.get(name)}, found {found.get(name)}" for name in wrong]


def _far(golden: Entry, found: Entry, flat: NDArray[np.float64], tolerance: float) -> list[str]:
    """Numbers that are further apart than rounding takes them."""
    room = tolerance * (np.abs(flat) + np.median(np.abs(flat)))
    allowed = {"first": room[:FIRST], "sum": room.sum(), "weighted": (_weights(flat) * room).sum()}
    return [
        name
        for name, most in allowed.items()
        if not (np.abs(np.subtract(golden[name], found[name])) <= most).all()
    ]


def equal(golden: list[float], found: list[float], tolerance: float) -> bool:
    """Whether two lists of numbers are equal to a share of their size, or of 1."""
    return len(golden) == len(found) and np.allclose(found, golden, rtol=tolerance, atol=tolerance)


def _weights(flat: NDArray[Any]) -> NDArray[np.float64]:
    """Weights between 0 and 1 that grow with the position."""
    return np.arange(1, len(flat) + 1) / max(len(flat), 1)


def _digest(values: NDArray[Any]) -> str:
    """SHA-256 of the bytes of an array, or of its strings."""
    if values.dtype == object:
        return hashlib.sha256("\n".join(values.tolist()).encode()).hexdigest()
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return hashlib.sha256(little.tobytes()).hexdigest()


def load(kind: str) -> dict[str, dict[str, Any]]:
    """The golden entries of a kind: by dataset, statistic or detector, and then by name."""
    found: dict[str, dict[str, Any]] = json.loads(_file(kind).read_text(encoding="utf-8"))
    return found


def store(kind: str, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Write golden entries, one a line."""
    groups = []
    for group, members in sorted(entries.items()):
        lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(members.items())]
        groups.append(f" {json.dumps(group)}: {{\n" + ",\n".join(lines) + "\n }")
    _file(kind).write_text("{\n" + ",\n".join(groups) + "\n}\n", encoding="utf-8")


def _file(kind: str) -> Path:
    return Path(__file__).parent / f"{kind.replace(' ', '_')}.json"
