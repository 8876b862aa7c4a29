"""(c) Exact neighbours in as many vectors as ImageNet has training images: FAISS alone, our index, a CPU."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from gpu_bench import Bench, number, tried
from numpy.typing import NDArray
from processes import fresh
from results import Section

from pipeline.cluster.inline import Object
from pipeline.config import schema
from pipeline.stages import banks, index
from pipeline.stages.banks import BATCH
from pipeline.stages.faiss_shard import IndexShard
from pipeline.stages.index import BankFiles
from pipeline.workspace.artifacts import Artifact, write

NEIGHBOURS = (50, 1000)
PIECE = 65_536


def measure(bench: Bench) -> Section:
    """Queries per second."""
    rows, width = bench.size(1_281_167, 5000), bench.size(2048, 64)
    queries, few = bench.size(10_000, 200), bench.size(128, 50)
    folder = bench.scratch / "bank"
    found = fresh(_search, folder, rows, width, queries, few, bench.device)
    shutil.rmtree(folder)
    return Section(
        title="(c) Exact neighbours",
        text=f"{rows:,} x {width:,} float32, random unit vectors; {queries:,} queries like them. FAISS "
        "alone: one search of all queries in its flat index, and `knn_gpu`, which brings the vectors to the "
        f"GPU first. Ours: `IndexShard` of one shard, {BATCH:,} queries at a time as in scoring, which "
        "computes the k-th distance again in float64 on one thread of the CPU. CPU: FAISS' flat index on all "
        f"cores. The index is built from {len(_pieces(rows))} files of the workspace, whose digests are "
        "compared, and brought to the device.",
        header=("", "device", "k", "queries", "seconds", "queries/s"),
        rows=found,
        checks=[],
    )


def _pieces(rows: int) -> list[int]:
    return [min(PIECE, rows - start) for start in range(0, rows, PIECE)]


def _vectors(rows: int, width: int, device: str, seed: int) -> NDArray[np.float32]:
    generator = torch.Generator(device).manual_seed(seed)
    vectors = torch.randn(rows, width, device=device, generator=generator)
    vectors /= torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    found: NDArray[np.float32] = vectors.cpu().numpy()
    return found


def _search(
    folder: Path, rows: int, width: int, queries: int, few: int, device: str
) -> list[tuple[str, ...]]:
    """Rows of the table; each is printed as soon as it is known."""
    bank = _bank(folder, rows, width, device)
    asked = _vectors(queries, width, device, seed=len(bank.pieces))
    if device == "cuda":
        torch.cuda.empty_cache()
    found = []
    shard = IndexShard(0, 1, schema.Index(device=device), {"bank": bank})
    found += _row("our index: built", device, 0, rows, lambda: shard.load("bank"))
    flat = faiss.IndexFlatL2(width)
    flat.add(bank.read(0, rows))
    for part in _parts(shard, flat, asked, few, device):
        found += _row(*part)
    agreement = tried("neighbours that GPU and CPU agree on", lambda: _agreement(shard, flat, asked[:few]))
    found.append(
        ("neighbours that both agree on", "", f"{NEIGHBOURS[0]}", f"{few:,}", "", _percent(agreement))
    )
    return found


def _bank(folder: Path, rows: int, width: int, device: str) -> BankFiles:
    """Random vectors as a workspace keeps them."""
    made = {}
    for piece, count in enumerate(_pieces(rows)):
        name, vectors = f"bank-{piece:05d}.npy", _vectors(count, width, device, seed=piece)
        made[name] = write(folder / name, partial(_save, vectors), rows=count, width=width)
    artifact = Artifact(folder, banks.FORMAT, {"rows": rows, "width": width})
    return BankFiles.of(artifact, artifact.finish(made))


def _save(vectors: NDArray[np.float32], path: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, vectors)


def _parts(
    shard: IndexShard, flat: Any, asked: NDArray[np.float32], few: int, device: str
) -> Iterator[tuple[str, str, int, int, Callable[[], Any]]]:
    """What is timed: its name, device, k, number of queries, and the call."""
    plain = shard.indexes.get("bank", flat)
    vectors = faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d)
    plain.search(asked[:few], 10)  # warms up
    for k in NEIGHBOURS:
        yield "FAISS alone, flat index", device, k, len(asked), partial(plain.search, asked, k)
    for k in NEIGHBOURS:
        yield f"the same, {BATCH:,} at a time", device, k, len(asked), partial(_in_turns, plain, asked, k)
    for k, count in zip(NEIGHBOURS, (len(asked), min(len(asked), BATCH)), strict=True):
        yield "our index", device, k, count, partial(_ours, shard, asked[:count], k)
    if device == "cuda":
        resources = faiss.StandardGpuResources()
        yield (
            "FAISS alone, knn_gpu",
            device,
            NEIGHBOURS[0],
            len(asked),
            lambda: faiss.knn_gpu(resources, asked, vectors, NEIGHBOURS[0]),
        )
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    for k in NEIGHBOURS:
        yield (
            "FAISS alone, flat index",
            "cpu",
            k,
            few,
            partial(flat.search, asked[:few], k),
        )


def _in_turns(plain: Any, asked: NDArray[np.float32], k: int) -> None:
    for start in range(0, len(asked), BATCH):
        plain.search(asked[start : start + BATCH], k)


def _ours(shard: IndexShard, asked: NDArray[np.float32], k: int) -> None:
    whole = index.Index((Object(shard),), flat=True)
    for start in range(0, len(asked), BATCH):
        whole.search("bank", asked[start : start + BATCH], k).distance(slice(k - 1, k))


def _row(what: str, device: str, k: int, count: int, call: Callable[[], Any]) -> list[tuple[str, ...]]:
    """The row of one call; k is 0 where there is none."""
    seconds = tried(f"{what}, {device}, k = {k}, seconds for {count:,}", lambda: _seconds(call))
    rate = None if seconds is None else count / seconds
    return [(what, device, f"{k:,}" if k else "", f"{count:,}", number(seconds, "{:.2f}"), number(rate))]


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _agreement(shard: IndexShard, flat: Any, asked: NDArray[np.float32]) -> float:
    """Share of equal neighbours at equal places."""
    k = NEIGHBOURS[0]
    _, one = shard.indexes.get("bank", flat).search(asked, k)
    _, other = flat.search(asked, k)
    return float((one == other).mean())


def _percent(value: float | None) -> str:
    return number(None if value is None else 100 * value, "{:.2f} %")
