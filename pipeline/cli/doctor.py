"""What is installed and what the machine offers: everything a run trips over, in one list."""

from __future__ import annotations

import os
import platform
import shutil
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.error import URLError

from pipeline import __version__
from pipeline.errors import UserError
from pipeline.stages.progress import SILENT, Stage


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    what: str
    text: str
    good: bool = True


def examine(mlflow_uri: str = "", stage: Stage = SILENT) -> Iterator[Finding]:
    """All findings; the stage is told who is asked."""
    yield Finding("python", platform.python_version())
    yield Finding("ood-pipeline", __version__)
    for name in ("ray", "torch", "torchvision", "pyarrow", "mlflow"):
        yield _version(name)
    stage.doing("loads PyTorch")
    yield _torch()
    stage.doing("loads FAISS")
    yield _faiss()
    yield Finding("cpus", str(os.cpu_count()))
    stage.doing("asks the Ray cluster")
    yield _ray()
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    yield Finding("disk", f"{free:,.1f} GiB free here", free > 1)
    if mlflow_uri:
        stage.doing(f"asks {mlflow_uri}")
        yield _mlflow(mlflow_uri)


def _version(name: str) -> Finding:
    try:
        return Finding(name, version(name))
    except PackageNotFoundError:
        return Finding(name, "not installed. Install ood-pipeline with its dependencies.", good=False)


def _ray() -> Finding:
    """The nodes of the cluster that runs would use, and what each offers."""
    if "RAY_ADDRESS" not in os.environ:
        return Finding("ray cluster", "none; a local one is started for each run")
    from pipeline.cluster import on_ray

    try:
        with on_ray.session(None, None):
            on_ray.connect()
            nodes = on_ray.nodes().values()
    except UserError as error:
        return Finding("ray cluster", str(error), good=False)
    offers = [
        f"{node['host']} ({node['address']}) {node['resources'].get('CPU', 0):g} CPU, "
        f"{node['resources'].get('GPU', 0):g} GPU"
        for node in nodes
    ]
    return Finding("ray cluster", f"{len(offers)} nodes: {'; '.join(offers)}")


def _torch() -> Finding:
    import torch

    count = torch.cuda.device_count()
    names = ", ".join(torch.cuda.get_device_name(number) for number in range(count))
    return Finding("torch sees", names or f"no GPU (built for {torch.version.cuda or 'CPU'})")


def _faiss() -> Finding:
    """FAISS must be there exactly once: its builds overwrite each other's files."""
    builds = []
    for name in ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs", "faiss-gpu-cu12", "faiss-cuda"):
        try:
            builds.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    if len(builds) != 1:
        found = ", ".join(builds) or "none"
        advice = "Install exactly one: pip install 'ood-pipeline[cpu]' or 'ood-pipeline[gpu]'."
        return Finding("faiss", f"{found}. {advice}", good=False)
    import faiss

    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    return Finding("faiss", f"{builds[0]}, {gpus} GPU")


def _mlflow(uri: str) -> Finding:
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10) as answer:
            return Finding("mlflow", f"{uri} answers {answer.status}")
    except (URLError, HTTPException, ValueError, OSError) as error:
        return Finding("mlflow", f"{uri} does not answer: {error}. Start it, or check the URL.", good=False)
