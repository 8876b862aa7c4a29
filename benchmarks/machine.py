"""What the numbers were measured on: without it they mean nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline import __version__

PACKAGES = ("ray", "torch", "faiss-cpu", "faiss-gpu", "numpy", "pyarrow", "pillow")

VARIABLES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables that change how fast the libraries compute."""


def describe() -> dict[str, str]:
    """Date, hardware, load and versions, in the order they are shown."""
    busy = f"{os.getloadavg()[0]:.1f} running processes in the minute before the start"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{os.cpu_count()} cores, {_processor()}",
        "memory": f"{_memory() / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "packages": ", ".join(
            [f"ood-pipeline {__version__}", *(f"{name} {found}" for name, found in _versions())]
        ),
        "libraries": ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)
        or "-",
        "other load": busy,
    }


def _versions() -> Iterator[tuple[str, str]]:
    """Of the packages that are installed: there is one FAISS or the other."""
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            yield name, version(name)


def gpu() -> dict[str, str]:
    """The GPU, its driver, and the libraries that torch brings for it; nothing where there is none."""
    import torch

    if not torch.cuda.is_available():
        return {}
    asked = "--query-gpu=name,memory.total,driver_version"
    command = ["nvidia-smi", asked, "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        found = f"{torch.cuda.device_count()} of unknown name"
    cudnn: Any = torch.backends.cudnn
    libraries = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {cudnn.version()}"
    return {"GPU": "; ".join(found.strip().splitlines()) + " (name, memory, driver)", "for it": libraries}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
