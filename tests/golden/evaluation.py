"""A small evaluation of every detector whose features are exact, run as the command line runs one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from pipeline import detectors
from pipeline.cli.progress import Display
from pipeline.config import loading, schema
from pipeline.workflows import run
from tests.golden import network
from tests.golden.network import CLASSES, Pixels

ROLES = {
    "train": "train",
    "test": "id",
    "shifted": "shifted_id",
    "held": "id_val",
    "near": "near_ood",
    "far": "far_ood",
    "val": "ood_val",
    "production": "unlabelled",
}
"""Role of every dataset by its name."""

_SEED = 34
"""With it, rounding decides neither on the order of two scores nor on the sign of an input gradient."""
_IMAGES = {"train": 320, "test": 60, "shifted": 30, "held": 60, "near": 40, "far": 40, "val": 40}


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    """Images and labels of every dataset: of the classes with more or less noise, and of what is none."""
    rng = np.random.Generator(np.random.PCG64(_SEED))
    found: dict[str, np.ndarray[Any, Any]] = {}
    for name, eighths in {"train": 1, "test": 1, "held": 1, "shifted": 2}.items():
        label = rng.integers(0, CLASSES, _IMAGES[name])
        found[f"{name}_x"] = network.noisy(rng, network.classes()[label], eighths)
        found[f"{name}_y"] = np.where(rng.integers(0, 32, len(label)) == 0, (label + 1) % CLASSES, label)
    found["near_x"] = network.noisy(rng, _halves(rng, _IMAGES["near"]), 1)
    for name in ("far", "val"):
        found[f"{name}_x"] = network.noisy(rng, network.patterns(rng, _IMAGES[name]), 1)
    found["production_x"] = np.concatenate([found["held_x"][:12], found["val_x"][:12]])
    return found


def _halves(rng: np.random.Generator, count: int) -> Pixels:
    """The upper half of a class above the lower half of another."""
    upper = rng.integers(0, CLASSES, count)
    lower = (upper + rng.integers(1, CLASSES, count)) % CLASSES
    half = network.SIDE // 2
    return np.concatenate([network.classes()[upper, :half], network.classes()[lower, half:]], axis=1)


def settings(images: Path) -> dict[str, Any]:
    """The raw config."""
    file = Path(network.__file__).resolve()
    return {
        "name": "golden",
        "model": {
            "source": "factory",
            "name": f"{file}:build",
            "transform": {"crop": network.SIDE, "mean": [0.5], "std": [0.5], "channels": 1},
        },
        "datasets": [_dataset(name, role, images) for name, role in ROLES.items()],
        "detectors": _detectors(),
        "extract": {"batch_size": 32, "shard_rows": 64, "actors": 1},
        "tracking": {"enabled": False},
    }


def _dataset(name: str, role: str, images: Path) -> dict[str, Any]:
    labels = {"labels": f"{name}_y"} if role in ("train", "id", "shifted_id", "id_val") else {}
    entry = {"name": name, "role": role, "format": "npz", "path": str(images), "images": f"{name}_x"}
    return {**entry, **labels}


def _detectors() -> list[dict[str, Any]]:
    """Every detector, and those variants that are computed in another way.

    Images are mixed with a weight of 3/4 and over 8 images of a class, which keeps the mixed features exact.
    The first neighbours are further apart than float32 resolves: FAISS finds the same ones everywhere.
    """
    few = {"samples": 64, "class_samples": 8, "mixup_weight": 0.75}
    changed = {
        "adascale": {"samples": 50},
        "featurenorm": {"samples": 64},
        "gradorth": {"share": 0.993},
        "grood": few,
        "grood_norm": few,
        "knn": {"k": 2},
        "neco": {"dim": 4},
        "selectednorm": {"samples": 64},
        "vra": {"low": 40},
    }
    return [
        *({name: changed.get(name)} for name in detectors.names()),
        {"react_dice": {"method": "msp", "steps": ["react", {"dice": {"p": 10}}]}},
        {"grood_noise": {"method": "grood", "prototype": "noise", "samples": 100}},
        {"grood_val": {"method": "grood", "prototype": "ood_val"}},
        {"gradnorm_fc": {"method": "gradnorm", "layers": ["head"]}},
        {"gradnorm_body": {"method": "gradnorm", "layers": ["block2", "block3.conv.bias"], "order": 2}},
        {"odin_cold": {"method": "odin", "temperature": 1.0, "noise": 1 / 64}},
        {"ash_maxlogit": {"method": "maxlogit", "steps": [{"ash": {"variant": "p"}}]}},
        {"dice_maxlogit": {"method": "maxlogit", "steps": ["dice"]}},
        {"react_maxlogit": {"method": "maxlogit", "steps": ["react"]}},
    ]


def evaluate(folder: Path) -> schema.Config:
    """Run the evaluation with data and workspace in an empty folder; returns its config."""
    images, file = folder / "images.npz", folder / "config.yaml"
    np.savez(images, **arrays())
    file.write_text(yaml.safe_dump(settings(images)))
    loaded = loading.load(str(file), [f"workspace={folder / 'workspace'}"])
    run.execute(
        loaded, run.Options(last="evaluate", engine="inline", threads=1), Display(Console(quiet=True))
    )
    return loaded
