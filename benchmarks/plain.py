"""What a person would write without the pipeline: a PyTorch loop over an array, at its best setting."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

from pipeline.config.loading import resolve
from pipeline.quickstart import resnet

MEAN, STD = 0.2860, 0.3530
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1


@dataclass(frozen=True)
class Setting:
    """What can be chosen about the loop."""

    processes: int
    threads: int
    batch: int
    channels_last: bool = False
    keep_memory: bool = False
    """Tell the allocator (glibc) to keep freed memory instead of returning it to the system."""

    def __str__(self) -> str:
        extras = ", channels last" * self.channels_last + ", allocator keeps freed memory" * self.keep_memory
        return f"{self.processes} process x {self.threads} threads, batch {self.batch}{extras}"


def best(images: NDArray[np.uint8], batches: tuple[int, ...]) -> tuple[Setting, list[tuple[Setting, float]]]:
    """The fastest setting, and the rates of all that were tried.

    Every batch size with one process of two threads and with two processes of one, each with both ways of
    the allocator, which change what batch is best; then the three fastest, with both memory layouts, twice
    more each: the best of its runs counts, as the machine is not always equally fast.
    """
    tried: dict[Setting, float] = {}
    for mode, batch, keeps in product(((1, 2), (2, 1)), batches, (False, True)):
        setting = Setting(*mode, batch, keep_memory=keeps)
        tried[setting] = rate(images, setting)
    fastest = sorted(tried, key=tried.__getitem__, reverse=True)[:3]
    for setting in 2 * [replace(each, channels_last=last) for each in fastest for last in (False, True)]:
        tried[setting] = max(tried.get(setting, 0), rate(images, setting))
    return max(tried, key=tried.__getitem__), list(tried.items())


def rate(images: NDArray[np.uint8], setting: Setting) -> float:
    """Images per second, from the first batch of the first process to the last of the last, warmed up."""
    context = get_context("spawn")
    barrier = context.Barrier(setting.processes)
    ends, workers = [], []
    for share in np.array_split(images, setting.processes):
        ours, theirs = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(share, setting, barrier, theirs))
        worker.start()
        theirs.close()  # so that a worker that dies is an end of file, not a wait for ever
        ends.append(ours)
        workers.append(worker)
    spans = [end.recv() for end in ends]
    for worker in workers:
        worker.join()
    seconds: float = max(stop for _, stop in spans) - min(start for start, _ in spans)
    return len(images) / seconds


def _work(images: NDArray[np.uint8], setting: Setting, barrier: Any, end: Connection) -> None:
    torch.set_num_threads(setting.threads)
    if setting.keep_memory:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**29)
    model = resnet.build().eval()
    model.load_state_dict(load_file(resolve("package://pipeline.quickstart/resnet.safetensors")))
    if setting.channels_last:
        model = model.to(memory_format=torch.channels_last)
    for _ in forward(model, images[: 4 * setting.batch], setting):
        pass
    barrier.wait(timeout=120)
    started = time.perf_counter()
    kept = list(forward(model, images, setting))
    end.send((started, time.perf_counter()))
    assert sum(len(feature) for feature, _ in kept) == len(images)


def forward(
    model: nn.Module, images: NDArray[np.uint8], setting: Setting
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Penultimate feature (N, 128) and logits (N, 10) of one batch after the other."""
    features: list[torch.Tensor] = []
    hook = model.get_submodule("fc").register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    with torch.inference_mode():
        for start in range(0, len(images), setting.batch):
            pixels = torch.tensor(images[start : start + setting.batch])
            shaped = pixels[..., None].permute(0, 3, 1, 2) if setting.channels_last else pixels[:, None]
            logits = model(shaped.float().div_(255).sub_(MEAN).div_(STD))
            yield features.pop().numpy(), logits.numpy()
    hook.remove()
