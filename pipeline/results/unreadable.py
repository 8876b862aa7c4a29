"""Images that could not be used, in words: for whoever reads the numbers that are without them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def sentences(datasets: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What is to be said of the datasets of a run that have unreadable images, by name.

    Args:
        datasets: as in `manifest.json`: `rows`, `errors`, key and reason of some in `first_errors`, and in
            `errors_in` where all of them are listed.
    """
    told = {}
    for name, entry in datasets.items():
        if entry["errors"]:
            first = "; ".join(f"{key} ({reason})" for key, reason in entry.get("first_errors", ()))
            told[name] = f"{entry['errors']:,} of {entry['rows']:,} images could not be used"
            told[name] += f", first: {first}" if first else ""
            told[name] += ". They are in none of the numbers."
            told[name] += f" All are listed in {entry['errors_in']}." if entry.get("errors_in") else ""
    return told
