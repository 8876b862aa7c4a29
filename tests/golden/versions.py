"""The versions that golden entries were made with: bits may change only where a version does.

`python -m tests.golden.make` refuses to replace an entry whose versions are those it had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config import schema
from pipeline.detectors.base import Detector
from pipeline.stages import banks, evaluate, score, shards
from tests.golden import entries, tolerances

Versions = dict[str, dict[str, dict[str, Any]]]
"""By kind and group, what stands for the code that its bits come from. Names of statistics hold theirs."""


def current(loaded: schema.Config) -> Versions:
    """Those of the code as it is."""
    found = {label: _of(detector) for label, detector in loaded.built().items()}
    columns = {name: number for each in found.values() for name, number in each["columns"].items()}
    features = {"format": shards.FORMAT, "columns": columns}
    formats = {"formats": [shards.FORMAT, banks.FORMAT, score.FORMAT]}
    scores = {label: {**formats, **versions} for label, versions in found.items()}
    metrics = {label: {**versions, "results": evaluate.FORMAT} for label, versions in scores.items()}
    return {
        "features": {dataset.name: features for dataset in loaded.datasets},
        "scores": scores,
        "metrics": {**metrics, "classifier": {**features, "results": evaluate.FORMAT}},
    }


def _of(detector: Detector) -> dict[str, Any]:
    """A detector, and all that it learns from."""
    wanted = [*detector.statistics(), *detector.calibration(), *detector.ood_statistics()]
    return {
        "detector": [part.version for part in detector.parts()],
        "statistics": sorted({versioned for each in wanted for versioned in _statistics(each.identity)}),
        "passes": {type(each).__name__: each.version for each in detector.passes()},
        "columns": {each.kind: each.version for each in detector.extras()},
    }


def _statistics(identity: Mapping[str, Any]) -> Iterator[str]:
    yield f"{identity['statistic'].rpartition('.')[2]} {identity['version']}"
    for earlier in identity.get("after", ()):
        yield from _statistics(earlier)


def unversioned(
    kind: str, group: str, golden: Mapping[str, Any], found: Mapping[str, Any], before: Any, now: Any
) -> list[str]:
    """What of a group would change though its versions do not; nothing if all may be stored.

    Args:
        kind: of the entries.
        group: its name.
        golden: its entries as they are; arrays that are not there yet may be added.
        found: its arrays, or lists of numbers, as they come out now.
        before: the versions that the entries were made with.
        now: those of the code.
    """
    if before != now:
        return []
    wrong = []
    for name in golden:
        if name not in found:
            wrong.append(f"{name}: gone")
        elif kind == "metrics":
            tolerance = max(tolerances.SCORES.get(group, 0), tolerances.METRICS)
            wrong += [] if entries.equal(golden[name], found[name], tolerance) else [f"{name}: other numbers"]
        else:
            tolerance = tolerances.of(kind, group, name)
            wrong += [f"{name}: {each}" for each in entries.differences(golden[name], found[name], tolerance)]
    return [f"{kind}: {group}: {each}" for each in wrong]
