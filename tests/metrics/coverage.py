"""How often the 95 % intervals of the metrics hold the truth, for normal scores whose truth is known.

Run: `python -m tests.metrics.coverage [REPEATS]` prints the table of docs/metrics.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from pipeline.metrics.comparisons import compare, failures
from pipeline.metrics.metrics import against_ood

UNLABELLED = tuple(metric.name for metric in against_ood() if not metric.needs_labels)

AUROCS = (0.58, 0.8, 0.95, 0.98, 0.998)
SIZES = ((100, 100), (300, 300), (1000, 1000), (5000, 5000), (2000, 200), (200, 2000))


@dataclass(frozen=True)
class Case:
    """ID scores of the standard normal distribution, OOD scores of another."""

    auroc: float
    n_id: int
    n_ood: int
    spread: float = 1.0
    """Standard deviation of the OOD scores."""

    @property
    def mean(self) -> float:
        """Of the OOD scores."""
        return float(norm.ppf(self.auroc) * np.hypot(1, self.spread))

    def truth(self) -> dict[str, float]:
        """The metrics of infinitely many rows in the ratio of the case."""
        quantiles = (np.arange(200_000) + 0.5) / 200_000
        inside = norm.ppf(quantiles)
        outside = self.mean + self.spread * inside
        below, above = norm.cdf((inside - self.mean) / self.spread), norm.sf(outside)
        errors = (below + 1 - quantiles) / 2, (quantiles + above) / 2
        hits, hits_out = self.n_id * quantiles, self.n_ood * (1 - quantiles)
        return {
            "auroc": self.auroc,
            "aupr_in": float(np.mean(hits / (hits + self.n_ood * below))),
            "aupr_out": float(np.mean(hits_out / (hits_out + self.n_id * above))),
            "fpr95_id": float(norm.cdf((norm.ppf(0.95) - self.mean) / self.spread)),
            "fpr95_ood": float(norm.sf(self.mean + self.spread * norm.ppf(0.05))),
            "detection_error": float(min(found.min() for found in errors)),
        }


def misses(case: Case, repeats: int, seed: int = 0) -> NDArray[np.float64]:
    """(2, 6) shares of the intervals that lie above the truth, and below it, in the order of `UNLABELLED`."""
    rng, truth = np.random.default_rng(seed), case.truth()
    missed = np.zeros((2, len(UNLABELLED)))
    for _ in range(repeats):
        outside = rng.normal(case.mean, case.spread, case.n_ood)
        results = compare(rng.normal(size=case.n_id), {"ood": outside}, {})
        missed += [
            [result.ci_low > truth[result.metric] + 1e-9 for result in results],
            [result.ci_high < truth[result.metric] - 1e-9 for result in results],
        ]
    return missed / repeats


@dataclass(frozen=True)
class Errors:
    """ID rows some of which the classifier has wrong, with normal scores of spread 1, and OOD rows."""

    error: float
    shift: float
    """Mean of the scores of wrong rows; that of right ones is 0."""
    rows: int

    def truth(self) -> tuple[float, float, float]:
        """AURC, AUGRC and OSCR of infinitely many rows, where OOD scores have mean 2."""
        scores = self.shift + norm.ppf((np.arange(400_000) + 0.5) / 400_000)
        coverage = (1 - self.error) * norm.cdf(scores) + self.error * norm.cdf(scores - self.shift)
        oscr = (1 - self.error) * norm.cdf(2 / np.sqrt(2))
        return (*(self.error * float(part.mean()) for part in (-np.log(coverage), 1 - coverage)), float(oscr))

    def held(self, repeats: int, seed: int = 0) -> NDArray[np.float64]:
        """(3,) shares of the intervals of AURC, AUGRC and OSCR that hold the truth."""
        rng, truth, held = np.random.default_rng(seed), self.truth(), np.zeros(3)
        for _ in range(repeats):
            wrong = rng.random(self.rows) < self.error
            scores = rng.normal(size=self.rows) + self.shift * wrong
            oscr = compare(scores, {"ood": rng.normal(2, 1, self.rows)}, {}, ~wrong)[-1]
            found = [*failures("id", scores, ~wrong), oscr]
            held += [f.ci_low <= value <= f.ci_high for f, value in zip(found, truth, strict=True)]
        return held / repeats


FAILURE_CASES = [
    Errors(error, shift, rows)
    for rows in (300, 1000, 5000)
    for error, shift in ((0.25, 1.0), (0.05, 2.0), (0.05, 0.0), (0.6, 1.0))
]


def table(repeats: int) -> Iterator[str]:
    """Lines of Markdown: the share of the intervals that hold the truth, in percent."""
    yield f"| AUROC | spread | ID rows | OOD rows | {' | '.join(UNLABELLED)} |"
    yield "|---" * (4 + len(UNLABELLED)) + "|"
    for spread in (1.0, 0.5, 2.0):
        for n_id, n_ood in SIZES if spread == 1 else SIZES[1:4]:
            for auroc in AUROCS:
                held = 100 * (1 - misses(Case(auroc, n_id, n_ood, spread), repeats).sum(axis=0))
                shown = " | ".join(f"{share:.1f}" for share in held)
                yield f"| {auroc} | {spread:g} | {n_id:,} | {n_ood:,} | {shown} |"


def failure_table(repeats: int) -> Iterator[str]:
    """The same of metrics that need labels."""
    yield "| error | shift | rows | aurc | augrc | oscr |"
    yield "|---|---|---|---|---|---|"
    for case in FAILURE_CASES:
        shown = " | ".join(f"{100 * share:.1f}" for share in case.held(repeats))
        yield f"| {case.error} | {case.shift:g} | {case.rows:,} | {shown} |"


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    for line in (*table(count), "", *failure_table(count)):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
