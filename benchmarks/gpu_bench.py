"""What the benchmarks on a GPU share: sizes, photos, rates that others use, and how busy the GPU was."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from statistics import mean
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

T = TypeVar("T")

WIDTH, HEIGHT = 500, 375
QUALITY, NOISE = 90, 22
"""Of the JPEG files; chosen for about 100 kB each."""


@dataclass
class Bench:
    """Where to work and how much is to be measured."""

    scratch: Path
    quick: bool
    images: int
    """Of the whole evaluation."""
    rates: dict[str, float] = field(default_factory=dict)
    """Images per second of forward passes from memory, by what is measured."""

    def size(self, full: int, quick: int) -> int:
        """One of two sizes."""
        return quick if self.quick else full

    @cached_property
    def device(self) -> str:
        """The GPU; with `--quick` the CPU where there is none."""
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def gpus(self) -> int:
        """What a model actor reserves."""
        return int(self.device == "cuda")

    @property
    def decoders(self) -> int:
        """CPUs that are left for decoding beside a model actor."""
        return max(1, (os.cpu_count() or 2) - 1)

    @cached_property
    def originals(self) -> list[Path]:
        """Distinct JPEG files: smooth colours under noise, as large as ImageNet's photos."""
        folder = self.scratch / "originals"
        folder.mkdir()
        paths = [folder / f"{number:04d}.jpg" for number in range(self.size(500, 20))]
        with ThreadPoolExecutor() as pool:
            list(pool.map(_write_photo, range(len(paths)), paths))
        return paths

    @cached_property
    def photo_bytes(self) -> float:
        """Mean size of one."""
        return mean(path.stat().st_size for path in self.originals)

    def photos(self, count: int, classes: int) -> Path:
        """A folder of class folders with so many images: hard links to the originals, in turns."""
        folder = self.scratch / f"photos-{count}"
        if folder.is_dir():
            return folder
        for label in range(classes):
            (folder / f"{label:04d}").mkdir(parents=True)
        for number in range(count):
            target = folder / f"{number % classes:04d}" / f"{number:06d}.jpg"
            os.link(self.originals[number % len(self.originals)], target)
        return folder


def _write_photo(seed: int, path: Path) -> None:
    rng = np.random.default_rng(seed)
    colours = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
    smooth = np.asarray(colours.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
    noisy = smooth + NOISE * rng.standard_normal((HEIGHT, WIDTH, 1), np.float32)
    content = BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=QUALITY)
    path.write_bytes(content.getvalue())


def tried(what: str, measure: Callable[[], T]) -> T | None:
    """What was measured; None, and a line on the screen, if that failed."""
    started = time.perf_counter()
    try:
        found = measure()
    except (Exception, SystemExit) as error:
        print(f"  {what}: failed: {type(error).__name__}: {str(error)[-1500:]}", flush=True)
        return None
    print(f"  {what}: {found} ({time.perf_counter() - started:.0f} s)", flush=True)
    return found


def number(value: float | None, form: str = "{:,.0f}") -> str:
    """A cell of a table."""
    return "failed" if value is None else form.format(value)


class Busy:
    """Asks the driver during a `with` block for the share of time in which the GPU ran anything."""

    PERIOD = 0.25

    def __init__(self) -> None:
        self.samples: list[tuple[float, float]] = []
        """Time, and percent over the last fraction of a second."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Busy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def share(self, start: float, stop: float) -> float | None:
        """Mean between two times; None where nothing was seen."""
        found = [percent for when, percent in self.samples if start <= when <= stop]
        return mean(found) / 100 if found else None

    def _run(self) -> None:
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0"]
        while not self._stop.wait(self.PERIOD):
            with suppress(OSError, ValueError, subprocess.SubprocessError):
                said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
                self.samples.append((time.time(), float(said)))
