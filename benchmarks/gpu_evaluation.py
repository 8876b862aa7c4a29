"""(d) A whole evaluation at the size of ImageNet's features and classes, stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import commands
import fashion
import numpy as np
import torch
from gpu_bench import Bench, Busy, number
from numpy.typing import NDArray
from processes import fresh
from results import Section
from safetensors.torch import save_file
from torchvision import models

from pipeline.network.classifier import make_reproducible

SIDE, NOISE = 64, 40
STAGES = ("extract", "fit", "score", "evaluate", "report")


def measure(bench: Bench) -> Section:
    """Seconds of each stage as the run's record has them, and how busy the GPU was."""
    classes = bench.size(1000, 10)
    each = max(3, 2 * bench.images // 3 // classes) if not bench.quick else 6
    folder = bench.scratch / "evaluation"
    folder.mkdir()
    counts = _write_images(folder, classes, each)
    fresh(_write_weights, folder, bench.device)
    settings = _settings(bench, folder, classes)
    with Busy() as busy:
        done, device = _run(settings, folder)
    usage = busy.share(0.0, float("inf"))
    stages = done.stages
    rest = done.seconds - done.prepare - sum(stages[name]["seconds"] for name in STAGES)
    rows: list[tuple[str, ...]] = [("prepare", number(done.prepare, "{:.1f}"), "", "")]
    for name in STAGES:
        costs = (number(stages[name][key], "{:.1f}") for key in ("seconds", "cpu_seconds", "gpu_seconds"))
        rows.append((name, *costs))
    rows += [
        (
            "of extract, from the first shard to the last",
            f"{stages['extract']['steady_seconds']:.1f}",
            "",
            "",
        ),
        ("start-up and end: program, Ray", f"{rest:.1f}", "", ""),
        ("whole command", f"{done.seconds:.1f}", "", ""),
    ]
    return Section(
        title="(d) A whole evaluation",
        text=_text(counts, classes, device, usage),
        header=("seconds", "wall", "CPU", "GPU reserved"),
        rows=rows,
        checks=[],
    )


def _run(settings: dict[str, Any], folder: Path) -> tuple[commands.Done, str]:
    """The run, and the device of its index: the CPU, on the same features, if FAISS cannot use the GPU."""
    device = settings["index"]["device"]
    try:
        return commands.run("run", settings, folder), device
    except SystemExit as error:
        if device == "cpu":
            raise
        print(f"  with the index on {device} it failed: {str(error)[-1500:]}", flush=True)
        return commands.run("run", {**settings, "index": {}}, folder), "cpu"


def _settings(bench: Bench, folder: Path, classes: int) -> dict[str, Any]:
    """The quickstart's detectors on a ResNet-50."""
    names = {"train": ("train", True), "id": ("test", True), "near_ood": ("near", False)}
    names["far_ood"] = ("far", False)
    datasets = [
        {
            "name": name,
            "role": role,
            "format": "npz",
            "path": str(folder / "images.npz"),
            "images": f"{name}_x",
            **({"labels": f"{name}_y"} if labelled else {}),
        }
        for role, (name, labelled) in names.items()
    ]
    detectors = fashion.quickstart()["detectors"]
    small = {"batch_size": 8, "shard_rows": 16} if bench.quick else {"batch_size": 256}
    return {
        "name": "evaluation",
        "model": {
            "source": "torchvision",
            "name": "resnet50",
            "weights": str(folder / "resnet50.safetensors"),
            "options": {"num_classes": classes},
            "transform": {"crop": SIDE, "mean": [0.5] * 3, "std": [0.25] * 3},
        },
        "datasets": datasets,
        "detectors": [_fewer(entry) for entry in detectors] if bench.quick else detectors,
        "extract": {**small, "device": bench.device, "gpus_per_actor": bench.gpus},
        "index": {"device": bench.device, "gpus_per_shard": bench.gpus},
        "tracking": {"enabled": False},
    }


def _fewer(entry: Any) -> Any:
    """A detector that makes do with few training images."""
    small = {"featurenorm": {"samples": 8}, "knn": {"k": 5}}
    small |= {name: {"samples": 10, "class_samples": 3} for name in ("grood", "grood_norm")}
    name = entry if isinstance(entry, str) else next(iter(entry))
    return {name: small[name]} if name in small else entry


def _write_images(folder: Path, classes: int, each: int) -> dict[str, int]:
    """Smooth colours for each class under noise; OOD: means of two classes, and colours of no class."""
    rng = np.random.default_rng(0)
    known, strange = (_colours(rng, classes) for _ in range(2))
    train, test = np.repeat(np.arange(classes), each), np.repeat(np.arange(classes), max(1, each // 4))
    some = np.arange(max(1, len(test) // 2)) % classes
    mixed = known // 2 + np.roll(known, 1, axis=0) // 2
    patterns = {"train": known[train], "test": known[test], "near": mixed[some], "far": strange[some]}
    arrays: dict[str, Any] = {f"{name}_x": _noisy(rng, found) for name, found in patterns.items()}
    np.savez(folder / "images.npz", train_y=train, test_y=test, **arrays)
    np.save(folder / "patterns.npy", _noisy(rng, known))
    return {name: len(found) for name, found in patterns.items()}


def _colours(rng: np.random.Generator, count: int) -> NDArray[np.uint8]:
    """(count, SIDE, SIDE, 3) of squares of one colour."""
    return (
        rng.integers(NOISE, 256 - NOISE, (count, 8, 8, 3), np.uint8).repeat(SIDE // 8, 1).repeat(SIDE // 8, 2)
    )


def _noisy(rng: np.random.Generator, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Plus noise that stays within the range of values."""
    return images + rng.integers(-NOISE, NOISE, images.shape, np.int8).view(np.uint8)


def _write_weights(folder: Path, device: str) -> None:
    """A random ResNet-50 whose last layer tells the classes apart: by the feature of an image of each."""
    make_reproducible(torch.get_num_threads())
    torch.manual_seed(0)
    patterns = np.load(folder / "patterns.npy")
    network = models.resnet50(num_classes=len(patterns)).eval().to(device)
    features: list[torch.Tensor] = []
    network.fc.register_forward_pre_hook(lambda _, given: features.append(given[0]))
    with torch.no_grad():
        for start in range(0, len(patterns), 64):
            some = torch.from_numpy(patterns[start : start + 64]).to(device).permute(0, 3, 1, 2)
            network((some.float() / 255 - 0.5) / 0.25)
        means = torch.cat(features)
        offset = means - means.mean(dim=0)
        scale = 10 / offset.square().sum(dim=1).median()
        network.fc.weight.copy_(scale * offset)
        network.fc.bias.copy_(scale * (means.mean(dim=0).square().sum() - means.square().sum(dim=1)) / 2)
    save_file(
        {name: each.cpu() for name, each in network.state_dict().items()}, folder / "resnet50.safetensors"
    )


def _text(counts: dict[str, int], classes: int, device: str, busy: float | None) -> str:
    sizes = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    seen = "" if busy is None else f" The GPU ran a kernel in {busy:.0%} of the command's time."
    return (
        f"`ood-pipeline run` in an empty workspace: synthetic images of {SIDE} x {SIDE} pixels ({sizes}), a "
        "ResNet-50 with random weights and a last layer that knows the classes (D = 2,048, "
        f"C = {classes:,}), the quickstart's detectors, the neighbour index on {device}. Seconds as the "
        f"run's record has them; those of CPU and GPU are summed over all processes.{seen}"
    )
