from __future__ import annotations

import re
from contextvars import ContextVar
from pathlib import Path

import numpy as np
import pytest

from pipeline.cluster import attempts
from pipeline.errors import UserError

POISON = """
import os
from pipeline.quickstart import resnet

def build():
    network = resnet.build()
    inner = network.forward

    def forward(images):
        if (images.flatten(1).amin(dim=1) > 2).any():
            os._exit(1)
        return inner(images)

    network.forward = forward
    return network
"""
"""A classifier that ends its process over a white image."""


def test_the_first_start_leaves_no_trace(tmp_path) -> None:
    with attempts.begun(str(tmp_path / "part-00001.parquet"), "extracting") as attempt:
        attempt.at(["a", "b"])
        assert list(tmp_path.iterdir()) == []
    assert not attempt.last


def test_work_that_dies_again_and_again_is_given_up_with_the_images_it_was_at(tmp_path, monkeypatch) -> None:
    part = str(tmp_path / "part-00001.parquet")
    monkeypatch.setattr(attempts, "_replaces", ContextVar("replaces", default=True))
    for number in range(1, attempts.LIMIT + 1):
        with pytest.raises(KeyboardInterrupt), attempts.begun(part, "extracting") as attempt:
            attempt.at(["a", "b", "c", f"d{number}"])
            assert attempt.last == (number == attempts.LIMIT)
            raise KeyboardInterrupt
    with pytest.raises(UserError, match=r"at 4 images: a, b, c, \.\.\."), attempts.begun(part, "extracting"):
        raise AssertionError
    with attempts.begun(part, "decoding"):
        pass
    attempts.forget(tmp_path)
    with attempts.begun(part, "extracting") as attempt:
        assert attempt.number == 1
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_kills_its_process_ends_the_run_and_is_named(
    ray_session, settings, load, execute, tmp_path
) -> None:
    with np.load(settings["datasets"][0]["path"]) as arrays:
        kept = {name: arrays[name].copy() for name in ("test_x", "test_y", "animals_x")}
    kept["animals_x"][77] = 255
    np.savez(tmp_path / "images.npz", **kept)
    (tmp_path / "poison.py").write_text(POISON)
    settings["model"]["name"] = "poison.py:build"
    settings["datasets"] = [
        {**dataset, "path": str(tmp_path / "images.npz")}
        for dataset in settings["datasets"]
        if dataset["name"] in ("test", "animals")
    ]
    settings["detectors"] = ["msp"]
    settings["extract"] |= {"batch_size": 16, "shard_rows": 64}
    with pytest.raises(UserError) as refusal:
        execute(load(settings), engine="ray")
    assert "extracting: the process died again and again" in str(refusal.value)
    assert re.search(r"the last time at 16 images: \S*64, \S*65, \S*66, \.\.\.", str(refusal.value)), (
        refusal.value
    )
    (features,) = Path(tmp_path / "workspace" / "features").glob("animals-*")
    assert not (features / "_manifest.json").exists()
    assert {file.parent for file in tmp_path.rglob(".attempts-*")} == {features}
