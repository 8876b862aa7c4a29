"""(a), (e) Extraction of JPEG files on a GPU, against a plain PyTorch loop and the network alone."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import commands
import gpu_plain
import numpy as np
import pyarrow.parquet as pq
import torch
from gpu_bench import Bench, Busy, number, tried
from processes import fresh
from results import Section

from pipeline.columns import KEY, LABEL
from pipeline.config import schema
from pipeline.network.classifier import load
from pipeline.stages import decoding, extract, shards
from pipeline.workspace import tables

TITLES = {"resnet50": "ResNet-50", "vit_b_16": "ViT-B/16"}
WAVES = {"resnet50": 4, "vit_b_16": 2}
"""Shards for each CPU that decodes; the first of them is not part of a rate."""

TRANSFORM = {
    "resize": 256,
    "crop": 224,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}


def measure(bench: Bench, name: str, precision: str = "fp32") -> Section:
    """Images per second: parts of a model actor, the plain loop, the pipeline."""
    settings = _settings(bench, name, precision)
    letter = "(a)" if precision == "fp32" else "(e)"
    profile = tried("one process", lambda: fresh(_profile, settings, bench.scratch, bench.size(15, 2) / 10))
    if profile:
        bench.rates[f"{TITLES[name]}, {precision}"] = profile[FROM_MEMORY]
    waves = WAVES[name] if precision == "fp32" else 2
    count = waves * bench.decoders * _plan(settings).shard_rows
    folder = bench.photos(count, settings["model"]["options"]["num_classes"])
    work = gpu_plain.Work(name, folder, settings, bench.device, bench.decoders)
    loop = tried("plain loop", lambda: fresh(gpu_plain.rate, work))
    ours = tried("pipeline", lambda: _extracted(bench, settings, folder))
    rows = [(f"one process: {part}", number(rate)) for part, rate in (profile or {}).items()]
    rows.append((f"plain loop, DataLoader of {bench.decoders} workers", number(loop)))
    rows += _shown(ours)
    if ours and loop:
        rows.append(("pipeline / plain loop", f"{ours.steady / loop:.2f}"))
    return Section(
        title=f"{letter} Extraction, {TITLES[name]}, {precision}",
        text=_text(bench, count, settings),
        header=("", "images/s"),
        rows=rows,
        checks=[],
    )


def _settings(bench: Bench, name: str, precision: str) -> dict[str, Any]:
    classes, side = bench.size(1000, 10), bench.size(224, 32)
    sized = {"image_size": side} if name == "vit_b_16" else {}
    numerics = {} if precision == "fp32" else {"precision": precision, "channels_last": True}
    small = {"batch_size": 4, "shard_rows": 8} if bench.quick else {"batch_size": 256}
    return {
        "name": "extraction",
        "model": {
            "source": "torchvision",
            "name": name,
            "weights": "random",
            "options": {"num_classes": classes, **sized},
            "transform": {**TRANSFORM, "crop": side},
        },
        "datasets": [],
        "detectors": ["msp"],
        "extract": {
            **small,
            **numerics,
            "decode": "separate",
            "device": bench.device,
            "gpus_per_actor": bench.gpus,
        },
        "tracking": {"enabled": False},
    }


def _plan(settings: dict[str, Any]) -> shards.Plan:
    """Of a network that is not loaded yet."""
    model = schema.Model.model_validate(settings["model"])
    assert isinstance(model.transform, schema.Transform)
    chosen = schema.Extract.model_validate(settings["extract"])
    return shards.Plan(model, chosen, 0, "", model.transform, np.empty((0, 0), np.float32))


FROM_MEMORY = "the pipeline's forward pass, from pixels in memory to arrays"


def _profile(settings: dict[str, Any], scratch: Path, seconds: float) -> dict[str, float]:
    """Images per second of one process for more and more of what a model actor does."""
    plan = _plan(settings)
    known = load(plan.model, plan.seed)
    plan = replace(plan, digest=known.digest, probe=known.probe)
    classifier, size = extract.load_in_worker(plan, 1), plan.settings.batch_size
    side = plan.transform.crop
    pixels = np.random.default_rng(0).integers(0, 256, (size, side, side, 3), np.uint8)
    images = classifier.images(pixels)
    plain = images.contiguous()
    rows = [{KEY: f"{row}", LABEL: 0, decoding.ACCEPTED: None} for row in range(size)]
    decoded = decoding.Decoded(pixels, rows, [])

    def alone(given: torch.Tensor) -> None:
        with torch.inference_mode():
            classifier.answer(given)

    def written() -> None:
        features, _, _ = extract.extract_rows(classifier, [decoded], plan.settings)
        tables.write_table(scratch / "profile.parquet", features)

    parts: dict[str, Callable[[], Any]] = {
        "the network alone, images on the device": lambda: alone(plain),
        "the same, images laid out as the pipeline does": lambda: alone(images),
        FROM_MEMORY: lambda: classifier.forward(pixels, blocks=False),
        "and FeatureNorm of all blocks": lambda: classifier.forward(pixels),
        "and checks and tables": lambda: extract.extract_rows(classifier, [decoded], plan.settings),
        "and writing Parquet": written,
    }
    return {part: size / _mean_seconds(call, seconds) for part, call in parts.items()}


def _mean_seconds(call: Callable[[], Any], seconds: float) -> float:
    """Of a call, over at least three and so many seconds, after two to warm up."""
    finish = torch.cuda.synchronize if torch.cuda.is_available() else nullcontext
    for _ in range(2):
        call()
    finish()
    count, started = 0, time.perf_counter()
    while count < 3 or time.perf_counter() - started < seconds:
        call()
        count += 1
        finish()
    return (time.perf_counter() - started) / count


@dataclass(frozen=True)
class Extracted:
    """A run of `ood-pipeline extract`."""

    steady: float
    """Images per second after the first shards of all decoders, by the time stamps of the parts."""
    recorded: float
    """Images per second as the run's record has them: from the begin of the first shard on."""
    seconds: float
    """Of the command."""
    busy: float | None
    """Share of the steady time in which the GPU ran something."""


def _extracted(bench: Bench, settings: dict[str, Any], photos: Path) -> Extracted:
    folder = bench.scratch / "extraction"
    dataset = {"name": "photos", "role": "id", "format": "imagefolder", "path": str(photos)}
    with Busy() as busy:
        done = commands.run("extract", {**settings, "datasets": [dataset]}, folder)
    parts = sorted(
        (folder / "workspace" / "features").glob("*/part-*"), key=lambda part: part.stat().st_mtime
    )
    times = [part.stat().st_mtime for part in parts]
    rows = [pq.read_metadata(part).num_rows for part in parts]
    skipped = min(bench.decoders, len(parts) - 1)
    steady = sum(rows[skipped:]) / (times[-1] - times[skipped - 1])
    shutil.rmtree(folder)
    return Extracted(
        steady,
        done.stages["extract"]["images_per_second"],
        done.seconds,
        busy.share(times[skipped - 1], times[-1]),
    )


def _shown(ours: Extracted | None) -> list[tuple[str, str]]:
    if ours is None:
        return [("pipeline", "failed")]
    return [
        ("pipeline, steady", number(ours.steady)),
        ("pipeline, from the first shard to the last (its record)", number(ours.recorded)),
        ("pipeline, the whole command in seconds", number(ours.seconds, "{:.1f} s")),
        ("pipeline, share of the steady time in which the GPU ran a kernel", _share(ours.busy)),
    ]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _text(bench: Bench, count: int, settings: dict[str, Any]) -> str:
    batch = settings["extract"]["batch_size"]
    layout = " and channels last" if "channels_last" in settings["extract"] else ""
    return (
        f"{count:,} JPEG files of 500 x 375 pixels, {bench.photo_bytes / 1000:.0f} kB on average "
        f"({len(bench.originals)} different ones, linked), random weights, {batch} images a batch, on "
        f"{bench.device}, TF32 off{layout}. One process: the work of a model actor on one batch again and "
        "again, added up part by part. Plain loop: DataLoader whose workers decode, resize and crop with "
        "torchvision, pinned memory, normalisation on the device, feature and logits kept in memory; timed "
        "after the first batch of every worker. Pipeline: `ood-pipeline extract` on Ray in an empty "
        f"workspace with one model actor and decoding tasks on the other {bench.decoders} CPUs; steady: "
        "after the first shard of every CPU."
    )
