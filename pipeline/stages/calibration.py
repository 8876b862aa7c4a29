"""Held-out ID images that p-values and thresholds come from: which they are, whether they are enough.

They are those of role `id_val`, or a part of those of role `id`, which then is in no metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.columns import KEY, PREDICTION, Float, Mask
from pipeline.config.schema import Config, Thresholds
from pipeline.detectors._combination import Combination
from pipeline.detectors.base import Detector
from pipeline.errors import UserError
from pipeline.metrics.conformal import Calibration, needed
from pipeline.stages.score import SCORE, ScoreJob
from pipeline.workspace import artifacts, tables

SHARE = 0.5
"""Default of `thresholds.share`."""
_NAMED = 5


@dataclass(frozen=True)
class Split:
    """Which ID images calibrate; the others are tested."""

    share: float
    """About how many of them calibrate."""
    seed: int

    @classmethod
    def of(cls, settings: Config) -> Split | None:
        """The one of a config, if it has one."""
        wanted = settings.thresholds
        if wanted is None or wanted.calibrate_on != "id":
            return None
        return cls(SHARE if wanted.share is None else wanted.share, settings.seed)

    def calibrates(self, keys: Sequence[str] | NDArray[Any]) -> Mask:
        """(N,) bool; an image's key and the seed decide, whatever other images there are.

        The hash is another one than that of the samples (`limit`), which keep the smallest of theirs.
        """
        limit, seed = int(self.share * 2**64), str(self.seed).encode()

        def drawn(key: str) -> int:
            return int.from_bytes(
                blake2b(key.encode(), digest_size=8, key=seed, person=b"calibration").digest()
            )

        return np.fromiter((drawn(key) < limit for key in keys), np.bool_, len(keys))


def identity(settings: Config, names: Sequence[str]) -> list[Any]:
    """What decides which images calibrate.

    Args:
        settings: the config.
        names: of the features of the datasets of which some do.
    """
    split = Split.of(settings)
    return [list(names), split and asdict(split)]


def role_of(settings: Config) -> Literal["id_val", "id"]:
    """The role of the datasets of which images calibrate."""
    return "id_val" if settings.thresholds is None else settings.thresholds.calibrate_on


def check_roles(settings: Config) -> None:
    """Whether the config has images that thresholds are calibrated on, if it wants thresholds.

    Raises:
        UserError: no dataset has the role.
    """
    if settings.thresholds is not None and not settings.of_role(role_of(settings)):
        raise UserError(
            "thresholds.calibrate_on: no dataset has role 'id_val'. Add ID images that are neither trained "
            "nor tested on, or set it to id, which splits the ID test images."
        )


def check(settings: Config, counts: Mapping[str, tuple[int, int]]) -> None:
    """Whether there are as many images to calibrate on as the rates take, if all of them can be read.

    Args:
        settings: with `thresholds`, or without.
        counts: images that calibrate, and all, by dataset.

    Raises:
        UserError: too few, or none is left to be tested.
    """
    if settings.thresholds is None:
        return
    _require(settings.thresholds, {-1: sum(count for count, _ in counts.values())}, ", ".join(counts))
    for name, (count, rows) in counts.items() if Split.of(settings) else ():
        if count == rows:
            raise UserError(
                f"thresholds.share: all {rows:,} images of {name} would calibrate, and none is left to be "
                "tested. Lower it, or add images."
            )


def notices(settings: Config, chosen: Mapping[str, Detector]) -> dict[str, str]:
    """What is to be known of detectors that have seen the images that calibrate, by label.

    Their scores of these images are not exchangeable with those of new ones.
    """
    wanted = settings.thresholds
    if wanted is None or wanted.calibrate_on != "id_val":
        return {}
    tuned = {entry.label for entry in settings.detectors if entry.tuned_on_ood}
    seen = {label for label, detector in chosen.items() if label in tuned or detector.calibrates()}
    seen |= {label for label, each in combinations(chosen).items() if seen & {*each.members}}
    cure = "its false alarms may exceed the rates. thresholds.calibrate_on: id avoids it."
    return {
        label: "It was fitted to the images of role id_val that its thresholds come from, or tuned on them: "
        f"{cure}"
        for label in chosen
        if label in seen
    }


def combinations(chosen: Mapping[str, Detector]) -> dict[str, Combination]:
    """Those of some detectors that combine others, by label."""
    return {label: each for label, each in chosen.items() if isinstance(each, Combination)}


def calibrating(settings: Config, features: Mapping[str, tables.Table]) -> dict[str, Mask]:
    """Which rows calibrate, of the datasets of which some do, by name.

    Args:
        settings: the config.
        features: what was extracted, by dataset.
    """
    split = Split.of(settings)
    found = {}
    for dataset in settings.of_role(role_of(settings)):
        table = features[dataset.name]
        keys = [split.calibrates(part[KEY].to_pylist()) for part in table.columns([KEY])] if split else []
        found[dataset.name] = np.concatenate(keys) if keys else np.ones(table.rows, np.bool_)
    return found


def require_predictions(
    settings: Config, features: Mapping[str, tables.Table], rows: Mapping[str, Mask], classes: int
) -> None:
    """Refuse a set of images that can be too few by now, as of a class that is seldom predicted.

    Args:
        settings: with `thresholds`.
        features: what was extracted, by dataset.
        rows: those that calibrate.
        classes: of the head.

    Raises:
        UserError: names classes and counts.
    """
    assert settings.thresholds is not None
    found = np.concatenate([column(features[name], PREDICTION)[mask] for name, mask in rows.items()])
    _require(settings.thresholds, _counted(settings.thresholds, found, classes), ", ".join(rows))


def _counted(wanted: Thresholds, predictions: NDArray[Any], classes: int) -> dict[int, int]:
    """Images of every set that is calibrated on its own."""
    if not wanted.per_class:
        return {-1: len(predictions)}
    return dict(enumerate(np.bincount(predictions, minlength=classes).tolist()))


def _require(wanted: Thresholds, counts: Mapping[int, int], where: str) -> None:
    """Refuse too few images of a set, by predicted class; all under -1 where classes do not count."""
    least = needed(wanted.smallest)
    few = {each: count for each, count in counts.items() if count < least}
    if not few:
        return
    which = "fdr" if wanted.smallest == wanted.fdr else "false_alarm"
    takes = f"thresholds.{which}: {wanted.smallest:g} takes at least {least:,} calibration images"
    never = f"with fewer nothing is ever flagged. Add images of role {wanted.calibrate_on!r}"
    never += ", raise thresholds.share" * (wanted.calibrate_on == "id")
    more = f"{never}, or raise the rate"
    if -1 in few:
        raise UserError(f"{takes}, got {few[-1]:,} in {where}; {more}.")
    named = ", ".join(f"{each}: {count:,}" for each, count in list(few.items())[:_NAMED])
    named += ", ..." * (len(few) > _NAMED)
    raise UserError(
        f"{takes} of every predicted class, but {len(few)} of {len(counts)} classes have fewer in {where} "
        f"({named}); {more}, or set thresholds.per_class to false."
    )


@dataclass(frozen=True)
class Calibrated:
    """What decides on an image: the scores of all detectors on the images that calibrate."""

    settings: Thresholds
    scores: Mapping[str, Float]
    """(n,) by label, NaN where there is none."""
    predictions: NDArray[np.int32]
    """(n,) of the classifier."""
    split: Split | None
    made_of: str
    """Digest of all that it depends on."""

    @cached_property
    def of(self) -> dict[str, Calibration]:
        """That of each detector, by label."""
        classes = self.predictions if self.settings.per_class else None
        return {label: Calibration(scores, classes) for label, scores in self.scores.items()}


def gathered(
    settings: Config, jobs: Sequence[ScoreJob], rows: Mapping[str, Mask], classes: int
) -> Calibrated:
    """Read the scores of the images that calibrate.

    Args:
        settings: with `thresholds`.
        jobs: all datasets, scored.
        rows: those that calibrate, by dataset.
        classes: of the head.

    Raises:
        UserError: a detector has scores of too few.
    """
    assert settings.thresholds is not None
    held = [(job, job.tables(), rows[job.dataset]) for job in jobs if job.dataset in rows]
    predictions = np.concatenate([column(job.features, PREDICTION)[mask] for job, _, mask in held])
    scores = held_scores(jobs, rows, list(held[0][0].scores))
    for label, found in scores.items():
        counts = _counted(settings.thresholds, predictions[np.isfinite(found)], classes)
        _require(settings.thresholds, counts, f"{', '.join(rows)} that {label} has scores of")
    split = Split.of(settings)
    contents = [
        [job.dataset, job.features.content, {label: table.content for label, table in found.items()}]
        for job, found, _ in held
    ]
    made_of = artifacts.digest(
        [settings.thresholds.model_dump(mode="json"), split and asdict(split), contents]
    )
    return Calibrated(settings.thresholds, scores, predictions, split, made_of)


def held_scores(
    jobs: Sequence[ScoreJob], rows: Mapping[str, Mask], labels: Sequence[str]
) -> dict[str, Float]:
    """(n,) scores of the images that calibrate, by detector; NaN where there is none."""
    held = [(job.tables(), rows[job.dataset]) for job in jobs if job.dataset in rows]
    return {
        label: np.concatenate([column(found[label], SCORE)[mask] for found, mask in held]) for label in labels
    }


def column(table: tables.Table, name: str) -> NDArray[Any]:
    """A column as an array; NaN where it has none."""
    parts = [part[name].to_numpy() for part in table.columns([name])]
    found: NDArray[Any] = np.concatenate([np.empty(0, np.int32), *parts])  # keeps the type of either column
    return found
