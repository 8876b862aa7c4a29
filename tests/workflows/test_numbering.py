"""Labels that are numbered otherwise than the network's classes are told before anything is believed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cluster.engine import Engine
from pipeline.config.schema import Config
from pipeline.stages import estimate, prepare
from pipeline.workspace import files


def test_labels_in_another_order_are_told_by_the_probe_and_by_the_run(
    settings: dict[str, Any],
    images: Path,
    load: Callable[..., Config],
    execute: Callable[..., Any],
    engine: Engine,
    tmp_path: Path,
) -> None:
    with np.load(images) as arrays:
        moved = {name: (values + 1) % 10 for name, values in arrays.items() if name.endswith("_y")}
        np.savez(tmp_path / "moved.npz", **{**arrays, **moved})
    settings["detectors"] = ["msp"]
    sound = prepare.prepare(load(settings, "sound"))
    assert estimate.probe(engine, sound, [64]).numbering is None
    for entry in settings["datasets"]:
        entry["path"] = str(tmp_path / "moved.npz")
    loaded = load(settings)
    found = estimate.probe(engine, prepare.prepare(loaded), [64]).numbering
    assert found is not None
    assert found.better is not None
    assert dict(found.moved)[3] == 2
    outcome = execute(loaded, last="evaluate")
    told = [
        text for text in files.read_json(outcome.folder / "manifest.json")["warnings"] if "numbered" in text
    ]
    assert [text.partition(":")[0] for text in told] == ["train", "test"]
    assert "it knows label 0 as 9, 1 as 0, 2 as 1 and 7 more" in told[0]
    assert set(told) <= set(outcome.cautions)
