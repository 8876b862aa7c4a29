"""Makes the golden files: `python -m tests.golden.make`. A change of theirs is a change of results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from tests.golden import entries, evaluation, outputs, tolerances, versions
from tests.golden.outputs import Arrays, Outputs
from tests.golden.tolerances import EXACT, SCORES
from tests.golden.versions import Versions

RANKED = ("test", "shifted", "near", "far")
"""Datasets whose rows are ranked against each other."""


def main() -> None:
    """Run the evaluation and write what it gives."""
    with TemporaryDirectory() as folder:
        loaded = evaluation.evaluate(Path(folder))
        found, now = outputs.read(loaded), versions.current(loaded)
    if refused := list(unversioned(found, now)):
        cure = (
            "Bits changed that no version stands for. Raise the `version` of the detector, statistic, pass "
        )
        raise SystemExit("\n".join([f"{cure}or column, or the FORMAT of the file.", *refused]))
    if doubtful := list(doubts(found)):
        raise SystemExit("\n".join(["Other rounding would change ranks; change the images.", *doubtful]))
    for kind, groups in found.arrays.items():
        described = {
            group: {
                name: entries.describe(values, tolerances.of(kind, group, name))
                for name, values in arrays.items()
            }
            for group, arrays in groups.items()
        }
        entries.store(kind, described)
    entries.store("metrics", found.metrics)
    for kind, groups in now.items():
        entries.store(f"versions of {kind}", groups)


def unversioned(found: Outputs, now: Versions) -> Iterator[str]:
    """Entries that would change under the versions they have."""
    for kind, groups in {**found.arrays, "metrics": found.metrics}.items():
        golden = entries.load(kind)
        before = entries.load(f"versions of {kind}") if kind in now else {}
        for group, values in groups.items():
            if group in golden:
                known = before.get(group), now.get(kind, {}).get(group)
                yield from versions.unversioned(kind, group, golden[group], values, *known)


def doubts(found: Outputs) -> Iterator[str]:
    """Detectors of which two scores are so close that rounding decides on ranks, ties or flags."""
    for label, scores in found.arrays["scores"].items():
        if SCORES[label] != EXACT:
            smallest = min(_gaps(scores, found.metrics[label]["threshold"][0]))
            if smallest <= SCORES[label]:
                yield f"{label}: gap {smallest:.1e}, tolerance {SCORES[label]:.1e}"


def _gaps(scores: Arrays, threshold: float) -> tuple[float, float]:
    """Smallest relative distances of ranked scores, but for 0, and of unlabelled ones from the threshold."""
    ranked = np.concatenate([scores[name] for name in RANKED])
    scale = np.abs(ranked) + np.median(np.abs(ranked))
    order = np.argsort(ranked)
    between: NDArray[np.float64] = np.diff(ranked[order]) / scale[order][1:]
    zeros = (ranked[order][1:] == 0) & (ranked[order][:-1] == 0)
    beside = np.abs(scores["production"] - threshold) / (np.abs(threshold) + np.median(np.abs(ranked)))
    return float(between[~zeros].min()), float(beside.min())


if __name__ == "__main__":
    main()
