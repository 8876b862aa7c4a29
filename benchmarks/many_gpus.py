"""Extraction on many GPUs that are not there: who waits for whom, in the real engine and on paper.

    python benchmarks/many_gpus.py

Starts Ray with logical CPUs and GPUs and streams shards through the pipeline's own engine. A decoding task
sleeps as long as one CPU takes to decode a shard, a model actor as long as a GPU takes to compute it; both
rates are those of `gpu.md`. Real is the scheduling: Ray Data, its back-pressure, the driver. Busy is what
these leave a GPU, not what an actor makes of it. Not simulated: pixels (they do not travel), the network, the
store. A discrete simulation counts the same, also for 64 GPUs.
"""

from __future__ import annotations

import argparse
import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import numpy as np
import ray

from pipeline.cluster.engine import opened

SHARD = 2048
"""Images, as with `shard_rows: auto`."""

_PAGE = """\
# Extraction on many GPUs, simulated

Written by `python benchmarks/many_gpus.py --output benchmarks/many_gpus.md`; no GPU was there.

{facts}

A GPU takes {forward:,.0f} images/s ({gpu}), a CPU decodes
{decode:,.0f}: sleeping stands for both. *engine*: shards went through the pipeline's own engine on Ray, on
logical CPUs and GPUs; pixels did not travel, nothing was written. *paper*: the same simulated by events,
with what a shard cost the driver: {each:.0f} ms of its CPU, and {always:.0%} of a CPU always.
Busy and images/s: between the first and the last quarter of the shards. Bound: the slower side never waiting.

|  | GPUs | CPUs | images of a shard | who waits | GPUs busy | images/s | of the bound | CPUs of the driver |
| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |
{lines}
"""


@dataclass(frozen=True)
class Site:
    """A cluster, and how fast its parts are."""

    gpus: int
    cpus: int
    """That decode."""
    forward: float
    """Images per second of a GPU."""
    decode: float
    """Images per second of a CPU."""

    @property
    def bound(self) -> float:
        """Images per second if nobody ever waited."""
        return min(self.gpus * self.forward, self.cpus * self.decode)

    @property
    def waits(self) -> str:
        """Which side waits for the other."""
        return "GPUs" if self.gpus * self.forward > self.cpus * self.decode else "CPUs"


class Gpu:
    """A model actor that takes as long as a GPU."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, row: dict[str, Any]) -> Callable[[], dict[str, Any]]:
        """What gives the receipt of a shard."""
        started = time.time()
        time.sleep(row["rows"] / self.rate)
        receipt = {"started": started, "ended": time.time()}
        return lambda: receipt


def decode(row: dict[str, Any], rate: float) -> dict[str, Any]:
    """What a decoding task does."""
    time.sleep(row["rows"] / rate)
    return {"decoded": True}


@dataclass(frozen=True)
class Measured:
    """What came of a run."""

    busy: float
    """Share of the steady time in which GPUs forwarded."""
    rate: float
    """Images per second in it."""
    driver: float
    """Share of a CPU that the driver took."""


def run(site: Site, seconds: float) -> Measured:
    """Stream shards for some time through the engine on logical CPUs and GPUs."""
    count = int(site.bound * seconds / SHARD)
    ray.init(
        address="local",
        num_cpus=site.cpus + site.gpus,
        num_gpus=site.gpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        with opened("ray") as engine:
            rows = [{"number": number, "rows": SHARD} for number in range(count)]
            cpu, clock = time.process_time(), time.perf_counter()
            receipts = list(
                engine.stream(
                    rows,
                    decode=(decode, (site.decode,), 0),
                    worker=(Gpu, (site.forward,)),
                    needs={"CPU": 1, "GPU": 1},
                    count=site.gpus,
                )
            )
            driver = (time.process_time() - cpu) / (time.perf_counter() - clock)
    finally:
        ray.shutdown()
    spans = [(receipt["started"], receipt["ended"]) for receipt in receipts]
    return Measured(*_steady(spans, site.gpus), driver)


def _steady(spans: Sequence[tuple[float, float]], gpus: int) -> tuple[float, float]:
    """Share of busy GPUs and images per second, between the first and the last quarter of the shards."""
    ends = sorted(end for _, end in spans)
    first, last = ends[len(ends) // 4], ends[3 * len(ends) // 4]
    busy = sum(max(0.0, min(end, last) - max(start, first)) for start, end in spans)
    done = sum(first < end <= last for end in ends)
    return busy / (gpus * (last - first)), done * SHARD / (last - first)


def on_paper(site: Site, shards: int, rows: int, driver: float) -> Measured:
    """The same by events: CPUs decode, GPUs take what is decoded, the driver hands out shards one by one.

    Args:
        site: the cluster.
        shards: how many.
        rows: images of a shard.
        driver: seconds of the driver per shard.
    """
    cpus, gpus = [0.0] * site.cpus, [0.0] * site.gpus
    told, spans = 0.0, []
    for _ in range(shards):
        told += driver
        decoded = max(heapq.heappop(cpus), told) + rows / site.decode
        heapq.heappush(cpus, decoded)
        start = max(heapq.heappop(gpus), decoded)
        heapq.heappush(gpus, start + rows / site.forward)
        spans.append((start, start + rows / site.forward))
    busy, rate = _steady(spans, site.gpus)
    return Measured(busy, rate * rows / SHARD, driver * rate / SHARD)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--forward", type=float, default=2414, help="images/s of a GPU (default: %(default)s)"
    )
    parser.add_argument(
        "--gpu",
        default="an H100, ResNet-50 in fp32, from pixels in memory to arrays",
        help="whose rate that is",
    )
    parser.add_argument(
        "--decode", type=float, default=257, help="images/s of a CPU (500 x 375 JPEG, Pillow)"
    )
    parser.add_argument("--seconds", type=float, default=120, help="that each cluster works")
    parser.add_argument("--output", type=Path, help="also write the page there")
    options = parser.parse_args()
    rates = options.forward, options.decode
    about, lines, found = machine.describe(), [], []
    for gpus, cpus in ((1, 10), (8, 80), (8, 40)):
        site = Site(gpus, cpus, *rates)
        found.append(run(site, options.seconds))
        lines.append(_line(site, SHARD, found[-1], "engine"))
    shards = np.array([each.rate / SHARD for each in found])
    each, always = np.polyfit(shards, [one.driver for one in found], 1).tolist()
    papers = (8, 80, SHARD), (64, 640, SHARD), (64, 640, 4 * SHARD), (64, 320, 4 * SHARD)
    for gpus, cpus, rows in papers:
        site = Site(gpus, cpus, *rates)
        count = int(site.bound * options.seconds / rows)
        lines.append(_line(site, rows, on_paper(site, count, rows, each), "paper"))
    facts = "\n".join(f"* {name}: {value}" for name, value in about.items())
    page = _PAGE.format(
        facts=facts,
        forward=rates[0],
        gpu=options.gpu,
        decode=rates[1],
        lines="\n".join(lines),
        each=1000 * each,
        always=always,
    )
    print(page)
    if options.output:
        options.output.write_text(page)


def _line(site: Site, rows: int, found: Measured, how: str) -> str:
    cells = (how, site.gpus, site.cpus, f"{rows:,}", site.waits, f"{found.busy:.1%}", f"{found.rate:,.0f}")
    return f"| {' | '.join(map(str, cells))} | {found.rate / site.bound:.1%} | {found.driver:.2f} |"


if __name__ == "__main__":
    main()
