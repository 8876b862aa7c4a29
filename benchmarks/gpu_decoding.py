"""(b) How many images a CPU decodes, and so how many CPUs a GPU needs at its side."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

from gpu_bench import Bench, number, tried
from gpu_extraction import TRANSFORM
from results import Section

from pipeline.config.schema import Transform
from pipeline.data import decode

DECODERS = ("pillow", "simplejpeg")
WAIT = 120
"""Seconds that a process waits for the others to begin."""


def measure(bench: Bench) -> Section:
    """Images per second and CPU, one alone and all together, with each decoder that is installed."""
    some, rows = bench.originals[: bench.size(200, 20)], []
    for decoder in DECODERS:
        if find_spec({"pillow": "PIL"}.get(decoder, decoder)) is None:
            rows.append((decoder, *["not installed"] * (3 + len(bench.rates))))
            continue
        alone, together = (_tried(bench, some, decoder, count) for count in (1, bench.decoders))
        each = together / bench.decoders if together else None
        wanted = [number(forward / each if each else None, "{:.1f}") for forward in bench.rates.values()]
        rows.append((decoder, number(alone), number(each), number(together), *wanted))
    return Section(
        title="(b) Decoding",
        text=f"The same JPEG files, {bench.photo_bytes / 1000:.0f} kB on average, from bytes in memory to "
        "224 x 224 pixels by the pipeline's own code, resize and crop included. One process, and "
        f"{bench.decoders} at once. The last columns: CPUs, all at work, that decode as fast as the forward "
        "pass from memory of (a) and (e) takes images.",
        header=(
            "",
            "images/s of one CPU alone",
            f"of each of {bench.decoders}",
            "together",
            *(f"CPUs for {what}" for what in bench.rates),
        ),
        rows=rows,
        checks=[],
    )


def _tried(bench: Bench, paths: list[Path], decoder: str, count: int) -> float | None:
    return tried(f"{decoder}, {count} at work", lambda: _rate(bench, paths, decoder, count))


def _rate(bench: Bench, paths: list[Path], decoder: str, count: int) -> float:
    """Images per second of so many processes over the same seconds."""
    context = get_context("spawn")
    begun = context.Barrier(count)  # none works before all are there
    with ProcessPoolExecutor(count, context, begun.wait, (WAIT,)) as pool:
        calls = [pool.submit(_decoded, paths, decoder, bench.size(5, 1)) for _ in range(count)]
        return sum(call.result() for call in calls)


def _decoded(paths: list[Path], decoder: str, seconds: float) -> float:
    """Images per second of this process."""
    transform = Transform.model_validate(TRANSFORM)
    contents = [path.read_bytes() for path in paths]
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        decode.decode(contents[count % len(contents)], None, transform, decoder)
        count += 1
    return count / (time.perf_counter() - started)
