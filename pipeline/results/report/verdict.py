"""Which detector to take, in words: the best, what is level with it, what it misses, what it needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pipeline.metrics.pairs import LEVEL_OF_TESTS
from pipeline.results.report.tables import GROUPS, OOD, Cell, Results, leaderboard

POOR = 0.75
"""AUROC below which nobody should rely on a detector alone."""


def verdict(results: Results) -> list[str]:
    """Sentences for whoever has to choose; none where no OOD dataset was compared with the ID data.

    Every number is one of `metrics.parquet`. Detectors that have seen OOD images are proposed only where
    there are no others.
    """
    board = leaderboard(results.metrics, results.differences)
    if not board.rows:
        return []
    entries = results.manifest["detectors"]
    unaided = [row for row in board.rows if not entries[row.detector]["uses_ood"]]
    chosen, *others = unaided or board.rows
    groups = [
        (number, column.group) for number, column in enumerate(board.columns) if column.metric == "auroc"
    ]
    values = " and ".join(f"{_interval(chosen.cells[number])} on {GROUPS[group]}" for number, group in groups)
    found = [f"{chosen.detector}, {entries[chosen.detector]['title']}, ranks best: AUROC {values}."]
    if seen := [row.detector for row in board.rows if row not in (chosen, *others)]:
        found.append(f"Not ranked with it, as they have seen OOD images: {_listed(seen)}.")
    found += _beside(_compared(results, chosen.detector, [other.detector for other in others]))
    found += _missed(results, chosen.detector)
    found += _needs(results, chosen.detector)
    if all(chosen.cells[number].value < POOR for number, _ in groups):
        found.append(f"An AUROC below {POOR:g} separates little: none of these should decide alone.")
    return found


def _interval(cell: Cell) -> str:
    return f"{cell.value:.3f} ({cell.low:.3f}–{cell.high:.3f})"


def _compared(results: Results, chosen: str, others: Sequence[str]) -> dict[str, dict[str, int]]:
    """Whether the chosen detector is ahead of others (1), behind (-1) or level (0), by each group's AUROC."""
    found: dict[str, dict[str, int]] = {}
    for row in results.differences.to_pylist():
        pair = {row["detector"], row["other"]}
        of_group = row["dataset"] == row["group"] and row["group"] in OOD and row["metric"] == "auroc"
        if of_group and chosen in pair and pair <= {chosen, *others}:
            (other,) = pair - {chosen}
            ahead = (row["difference"] > 0) == (row["detector"] == chosen)
            told = row["p_holm"] < LEVEL_OF_TESTS
            found.setdefault(row["group"], {})[other] = (1 if ahead else -1) if told else 0
    return found


def _beside(groups: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """Whom the chosen detector cannot be told from, and who is better; or that its lead is no chance."""
    others = list(dict.fromkeys(other for found in groups.values() for other in found))
    level = [other for other in others if not any(found.get(other) for found in groups.values())]
    if level:
        yield f"On the same images its lead over {_listed(level)} may be chance; take what costs least."
    for group, found in groups.items():
        better, alike = ([other for other in found if found[other] == told] for told in (-1, 0))
        if better:
            are = "is" if len(better) == 1 else "are"
            yield f"On {GROUPS[group]} {_listed(better)} {are} better, by more than chance."
        if alike := [other for other in alike if other not in level]:
            yield f"On {GROUPS[group]} its difference from {_listed(alike)} may be chance."
    if others and all(told > 0 for found in groups.values() for told in found.values()):
        yield "On the same images its lead over every other is more than chance."


def _missed(results: Results, detector: str) -> Iterator[str]:
    """What passes as ID at the threshold that keeps 95 % of the ID images, on the mean and at worst."""
    rows = [
        row
        for row in results.metrics.to_pylist()
        if row["detector"] == detector and row["metric"] == "fpr95_id" and row["group"] in OOD
    ]
    means = [row for row in rows if row["dataset"] == row["group"]]
    sets = [row for row in rows if row["dataset"] != row["group"]]
    if not means:
        return
    shares = " and ".join(f"{row['value']:.0%} of {GROUPS[row['group']]}" for row in means)
    worst = max(sets, key=lambda row: float(row["value"]))
    text = f"At the threshold that keeps 95% of the ID images it takes {shares} images for ID"
    yield f"{text}, at worst {worst['value']:.0%} of {worst['dataset']}." if len(sets) > 1 else f"{text}."


def _needs(results: Results, detector: str) -> Iterator[str]:
    """What it asks for beyond features and logits."""
    bank = results.manifest["index"].get(detector)
    if bank:
        yield f"For every image it searches {bank['rows']:,} vectors of training images."


def _listed(names: Sequence[str]) -> str:
    shown = list(names[:4])
    if len(names) > len(shown):
        shown.append(f"{len(names) - len(shown)} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
