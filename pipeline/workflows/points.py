"""Scorers that differ in their parameters only, scored together; equal banks are held and searched once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from pipeline.detectors.base import Bank, Detector, Scorer, bank_of
from pipeline.stages.index import Neighbours
from pipeline.stages.score import Scoring


def holders(detectors: Mapping[str, Detector], scorers: Mapping[str, Scorer]) -> dict[str, str]:
    """For each scorer with a bank the one whose bank serves it.

    Points that differ in the number of neighbours alone have the same vectors; the largest serves all.

    Args:
        detectors: by label.
        scorers: what they were fitted to, by label.
    """
    banks = {label: bank for label, scorer in scorers.items() if (bank := bank_of(scorer))}
    widest: dict[str, str] = {}
    served = {}
    for label in sorted(banks, key=lambda label: -banks[label].k):
        detector = detectors[label]
        counts = getattr(detector, "k", None) == banks[label].k
        fields = detector.model_dump_json(exclude={"k"} if counts else set())
        served[label] = widest.setdefault(f"{type(detector)} {fields}", label)
    return {label: served[label] for label in banks}


@dataclass(frozen=True)
class Points(Scoring):
    """Scoring of many points in one pass over the rows."""

    holder: Mapping[str, str]
    """Label -> label of the scorer whose bank is searched, as `holders` finds them."""

    def _ask(self, batch: Mapping[str, NDArray[Any]]) -> dict[str, Callable[[], Neighbours]]:
        """Begin one search of a batch per bank; a scorer reads as many of its neighbours as it needs."""
        if self.index is None:
            return {}
        asked = {}
        for label in dict.fromkeys(self.holder.values()):
            bank = bank_of(self.scorers[label])
            assert isinstance(bank, Bank)
            asked[label] = self.index.ask(label, bank.queries(batch), bank.k)
        return {label: asked[holder] for label, holder in self.holder.items()}
