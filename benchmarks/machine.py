"""What the numbers were measured on: without it they mean nothing."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from pipeline import __version__

PACKAGES = ("ray", "torch", "faiss-cpu", "numpy", "pyarrow")

VARIABLES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables that change how fast the libraries compute."""


def _versioned(name: str) -> str:
    return f"{name} {version(name)}"


def describe() -> dict[str, str]:
    """Date, hardware, load and versions, in the order they are shown."""
    busy = f"{os.getloadavg()[0]:.1f} running processes in the minute before the start"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{os.cpu_count()} cores, {_processor()}",
        "memory": f"{_memory() / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "packages": ", ".join(
            [f"ood-pipeline {__version__}", *(f"{name} {version(name)}" for name in PACKAGES)]
        ),
        "libraries": ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)
        or "-",
        "other load": busy,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
