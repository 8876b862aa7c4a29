"""What a person would write for a GPU without the pipeline: a DataLoader and a loop."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import models, transforms

from pipeline.network.classifier import make_reproducible

HEADS = {"resnet50": "fc", "vit_b_16": "heads.head"}


@dataclass(frozen=True)
class Work:
    """What is to be extracted."""

    name: str
    photos: Path
    settings: dict[str, Any]
    """The config of the pipeline's extraction of the same files."""
    device: str
    workers: int


class Files(Dataset[Tensor]):
    """Pixels of image files, (3, side, side) uint8."""

    def __init__(self, paths: list[Path], resize: int, side: int) -> None:
        self.paths = paths
        self.transform = transforms.Compose(
            [transforms.Resize(resize), transforms.CenterCrop(side), transforms.PILToTensor()]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as image:
            pixels: Tensor = self.transform(image.convert("RGB"))
        return pixels


def rate(work: Work) -> float:
    """Images per second, after the first batch of every worker."""
    make_reproducible(1)
    wanted = work.settings["extract"]
    paths, on_gpu = sorted(work.photos.glob("*/*.jpg")), work.device == "cuda"
    transform = work.settings["model"]["transform"]
    files = Files(paths, transform["resize"], transform["crop"])
    loader = DataLoader(files, batch_size=wanted["batch_size"], num_workers=work.workers, pin_memory=on_gpu)
    batches = iter(loader)  # begins its workers before this process has used the GPU
    torch.manual_seed(0)
    module = models.get_model(work.name, weights=None, **work.settings["model"]["options"])
    module = module.eval().to(work.device)
    layout = torch.channels_last if wanted.get("channels_last") else torch.contiguous_format
    module = module.to(memory_format=layout)
    half = torch.autocast(work.device, torch.bfloat16) if "precision" in wanted else nullcontext()
    seen: list[Tensor] = []
    module.get_submodule(HEADS[work.name]).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    mean, std = (
        torch.tensor(transform[name], device=work.device).view(1, 3, 1, 1) for name in ("mean", "std")
    )
    kept, counted, started = [], 0, time.perf_counter()
    for turn, pixels in enumerate(batches):
        images = pixels.to(work.device, non_blocking=True).float().div_(255).sub_(mean).div_(std)
        with torch.inference_mode(), half:
            logits = module(images.contiguous(memory_format=layout))
        kept.append((seen.pop().float().cpu().numpy(), logits.float().cpu().numpy()))
        if turn < min(work.workers, len(loader) - 1):
            started = time.perf_counter()
        else:
            counted += len(pixels)
    return counted / (time.perf_counter() - started)
