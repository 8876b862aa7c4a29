"""Which images calibrate, and that too few of them are refused with numbers and cure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.metrics.conformal import needed
from pipeline.stages.calibration import Split, notices
from pipeline.stages.prepare import prepare
from tests.conftest import _dataset

KEYS = np.array([f"{number}.png" for number in range(2000)])


def with_held_out(raw: dict[str, Any], limit: int | None = None) -> dict[str, Any]:
    """The small evaluation with ID images to calibrate on."""
    path = raw["datasets"][0]["path"]
    held = _dataset(path, "held", "id_val")  # type: ignore[arg-type]
    raw["datasets"].append(held | ({} if limit is None else {"limit": limit}))
    return raw


def test_the_split_is_decided_by_seed_and_key_alone() -> None:
    split, order = Split(0.3, 0), np.random.default_rng(0).permutation(len(KEYS))
    whole = split.calibrates(KEYS)
    assert whole.mean() == pytest.approx(0.3, abs=4 * np.sqrt(0.21 / len(KEYS)))
    assert split.calibrates(KEYS[order]).tolist() == whole[order].tolist()
    assert split.calibrates(KEYS[:7].tolist()).tolist() == whole[:7].tolist()
    assert (Split(0.3, 1).calibrates(KEYS) != whole).any()
    assert (Split(0.6, 0).calibrates(KEYS) >= whole).all()  # a larger share has the images of a smaller one


def test_the_split_does_not_follow_the_samples_of_datasets() -> None:
    """`limit` keeps the keys with the smallest hashes; they must not all be on one side."""
    from pipeline.data.filters import _rank

    sample = KEYS[np.argsort([_rank(key, 0) for key in KEYS])[:400]]
    assert Split(0.5, 0).calibrates(sample).mean() == pytest.approx(0.5, abs=4 * 0.5 / 20)


def test_images_to_calibrate_on_must_be_there(settings, load) -> None:
    settings["thresholds"] = {"false_alarm": [0.05]}
    with pytest.raises(
        UserError, match=r"^thresholds\.calibrate_on: no dataset has role 'id_val'\. Add ID im"
    ):
        prepare(load(settings))


@pytest.mark.parametrize(("wanted", "least"), [({}, 99), ({"false_alarm": [0.2], "fdr": 0.004}, 249)])
def test_too_few_images_for_the_smallest_rate_are_refused_before_any_work(
    settings, load, wanted, least
) -> None:
    settings["thresholds"] = {"false_alarm": [0.1, 0.01], **wanted}
    which = "fdr: 0.004" if "fdr" in wanted else r"false_alarm: 0\.01"
    with pytest.raises(
        UserError,
        match=rf"^thresholds\.{which} takes at least {least} calibration images, got 98 in held; with fewer "
        r"nothing is ever flagged\. Add images of role 'id_val', or raise the rate\.$",
    ):
        prepare(load(with_held_out(settings, limit=98)))
    assert least == needed(min(0.01 if not wanted else 1, wanted.get("fdr", 1)))


def test_as_many_as_it_takes_are_enough(settings, load) -> None:
    settings["thresholds"] = {"false_alarm": [0.01]}
    prepare(load(with_held_out(settings, limit=99)))


def test_a_part_that_is_too_small_is_refused(settings, load) -> None:
    settings["thresholds"] = {"false_alarm": [0.05], "calibrate_on": "id", "share": 0.02}
    with pytest.raises(
        UserError,
        match=r"least 19 calibration images, got \d in test; .* role 'id', raise thresholds\.share, or raise",
    ):
        prepare(load(settings))


def test_a_part_that_leaves_none_to_be_tested_is_refused(settings, load) -> None:
    settings["thresholds"] = {"false_alarm": [0.05], "calibrate_on": "id", "share": 0.999999}
    with pytest.raises(
        UserError, match=r"^thresholds\.share: all 300 images of test would calibrate, and none"
    ):
        prepare(load(settings))


def test_a_class_that_is_seldom_predicted_is_refused_by_name_and_count(settings, load, execute) -> None:
    settings["thresholds"] = {"false_alarm": [0.1], "per_class": True}
    with pytest.raises(
        UserError,
        match=r"takes at least 9 calibration images of every predicted class, but \d+ of 10 classes have "
        r"fewer in held \(\d: \d, .*\); with fewer nothing is ever flagged\. Add images of role 'id_val', or "
        r"raise the rate, or set thresholds\.per_class to false\.$",
    ):
        execute(load(with_held_out(settings, limit=60)), last="extract")


def test_detectors_that_have_seen_the_images_are_told(settings, load) -> None:
    settings["detectors"] = [
        "tempscale",
        {"knn": {"k": 5, "tuned_on_ood": True}},
        "msp",
        "energy",
        {"seen": {"method": "ensemble", "members": ["msp", "tempscale"]}},
        {"unseen": {"method": "ensemble", "members": ["msp", "energy"]}},
    ]
    settings["thresholds"] = {"false_alarm": [0.1]}
    config = load(with_held_out(settings))
    told = notices(config, config.built())
    assert set(told) == {"tempscale", "knn", "seen"}
    assert "its false alarms may exceed the rates. thresholds.calibrate_on: id avoids it." in told["knn"]
    settings["thresholds"]["calibrate_on"] = "id"
    config = load(settings)
    assert notices(config, config.built()) == {}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({}, r"thresholds\.false_alarm: Field required"),
        ({"false_alarm": []}, r"thresholds\.false_alarm: .* at least 1 item"),
        ({"false_alarm": [0]}, r"thresholds\.false_alarm"),
        ({"false_alarm": [1.0]}, r"thresholds\.false_alarm"),
        ({"false_alarm": [0.1, 0.1]}, "a rate is given twice"),
        ({"false_alarm": [0.1], "fdr": 1}, r"thresholds\.fdr"),
        ({"false_alarm": [0.1], "share": 0.5}, "share is of the images of role id; set calibrate_on: id"),
        ({"false_alarm": [0.1], "calibrate_on": "id", "share": 1}, r"thresholds\.share"),
        ({"false_alarm": [0.1], "calibrate_on": "train"}, r"thresholds\.calibrate_on"),
    ],
)
def test_mistakes_in_the_section_are_told(settings, load, wanted, message) -> None:
    settings["thresholds"] = wanted
    with pytest.raises(UserError, match=message):
        load(settings)
