"""Scores of detectors that combine those of others, from their cached scores: no features, no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.columns import CALIBRATION, KEY, Mask
from pipeline.detectors._combination import Combination
from pipeline.errors import UserError
from pipeline.stages.calibration import held_scores
from pipeline.stages.score import SCORE, ScoreJob, Scoring
from pipeline.workspace import tables
from pipeline.workspace.artifacts import Artifact

ROWS = "rows for ensembles"
"""What is counted while they are scored."""

Place = Callable[[str, str, Mapping[str, str]], Artifact]
"""Where scores are kept, by label of the detector, dataset, and content digests of what they are made of."""


@dataclass(frozen=True)
class MemberScores(tables.Table):
    """The rows of a dataset with the scores of detectors as columns of their labels, and which calibrate."""

    scores: tuple[tuple[str, tables.Table], ...] = ()
    calibrating: Mask | None = None
    """(rows,); None = no row calibrates."""

    def read(self, start: int, stop: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Columns of rows [start, stop), at least one."""
        scores = dict(self.scores)
        own = [name for name in names if name not in (*scores, CALIBRATION)]
        found = super().read(start, stop, own)
        found |= {name: scores[name].read(start, stop, [SCORE])[SCORE] for name in names if name in scores}
        rows = np.zeros(stop - start, np.bool_) if self.calibrating is None else self.calibrating[start:stop]
        return found | {CALIBRATION: rows}


def jobs(
    scored: Sequence[ScoreJob], chosen: Mapping[str, Combination], rows: Mapping[str, Mask], place: Place
) -> list[ScoreJob]:
    """What to score: a job for each dataset, whose rows are scores of the members.

    Args:
        scored: all datasets, scored by all members.
        chosen: detectors that combine others.
        rows: those that calibrate, by dataset.
        place: where the scores are kept.
    """
    held = [job for job in scored if job.dataset in rows]
    found = []
    for job in scored:
        made = {
            label: place(label, job.dataset, _contents([job, *held], detector.members))
            for label, detector in chosen.items()
        }
        own, features = job.tables(), job.features
        members = dict.fromkeys(member for detector in chosen.values() for member in detector.members)
        columns = tuple((member, own[member]) for member in members)
        marks = rows.get(job.dataset)
        table = MemberScores(
            features.folder, features.content, features.part_rows, features.beside, columns, marks
        )
        found.append(ScoreJob(job.dataset, table, made))
    return found


def _contents(made_of: Sequence[ScoreJob], members: Sequence[str]) -> dict[str, str]:
    """Content digests of the scores of some members on some datasets, by name."""
    return {job.scores[member].name: job.records[member].content for job in made_of for member in members}


def scoring(
    scored: Sequence[ScoreJob], chosen: Mapping[str, Combination], rows: Mapping[str, Mask]
) -> Scoring:
    """How they score.

    Args:
        scored: all datasets, scored by all members.
        chosen: detectors that combine others.
        rows: those that calibrate, by dataset.

    Raises:
        UserError: no image that calibrates has a score of all members.
    """
    scorers = {}
    members = list(dict.fromkeys(member for detector in chosen.values() for member in detector.members))
    scores = held_scores(scored, rows, members)
    for label, detector in chosen.items():
        own = {member: scores[member] for member in detector.members}
        there = np.all([np.isfinite(values) for values in own.values()], axis=0)
        if not there.any():
            raise UserError(
                f"detectors.{label}: none of the {len(there):,} images of {', '.join(rows)} has a score of "
                "all members. Leave out the member that has none."
            )
        scorers[label] = detector.calibrated({member: values[there] for member, values in own.items()})
    return Scoring(scorers, (KEY, CALIBRATION, *members))


def merged(jobs: Sequence[ScoreJob], others: Sequence[ScoreJob], order: Sequence[str]) -> list[ScoreJob]:
    """The same datasets with the scores of both.

    Args:
        jobs: with the features.
        others: the same datasets with more scores.
        order: of the labels.
    """
    found = []
    for job, other in zip(jobs, others, strict=True):
        scores = {**job.scores, **other.scores}
        found.append(ScoreJob(job.dataset, job.features, {label: scores[label] for label in order}))
    return found
