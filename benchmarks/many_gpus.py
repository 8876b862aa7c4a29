"""Extraction on many GPUs that are not there: who waits for whom, in the real engine and on paper.

    python benchmarks/many_gpus.py

Starts Ray with logical CPUs and GPUs and streams shards through the pipeline's own engine. A decoding task
sleeps as long as one CPU takes to decode a shard, a model actor as long as a GPU takes to forward it; both
rates are those of `gpu.md`. Real is the scheduling: Ray Data, its back-pressure, the driver. Not simulated:
pixels (they do not travel), the network, the store. A discrete simulation counts the same, also for 64 GPUs.
"""

from __future__ import annotations

import argparse
import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import machine
import ray

from pipeline.cluster.engine import opened

SHARD = 2048
"""Images, as with `shard_rows: auto`."""


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
    def starves(self) -> str:
        """Which side waits for the other."""
        return "GPUs" if self.gpus * self.forward > self.cpus * self.decode else "CPUs"


class Gpu:
    """A model actor that takes as long as a GPU."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """A receipt of a shard."""
        started = time.time()
        time.sleep(row["rows"] / self.rate)
        return {"started": started, "ended": time.time()}


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
    """Seconds of the driver's CPU per shard."""


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
            cpu = time.process_time()
            receipts = list(
                engine.stream(
                    rows,
                    decode=(decode, (site.decode,), 0),
                    worker=(Gpu, (site.forward,)),
                    needs={"CPU": 1, "GPU": 1},
                    count=site.gpus,
                )
            )
            driver = (time.process_time() - cpu) / count
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


def on_paper(site: Site, shards: int, driver: float) -> Measured:
    """The same by events: CPUs decode, GPUs take what is decoded, the driver hands out shards one by one.

    Args:
        site: the cluster.
        shards: how many.
        driver: seconds of the driver per shard.
    """
    cpus, gpus = [0.0] * site.cpus, [0.0] * site.gpus
    told, spans = 0.0, []
    for _ in range(shards):
        told = max(told + driver, 0.0)
        begun = max(heapq.heappop(cpus), told)
        decoded = begun + SHARD / site.decode
        heapq.heappush(cpus, decoded)
        start = max(heapq.heappop(gpus), decoded)
        end = start + SHARD / site.forward
        heapq.heappush(gpus, end)
        spans.append((start, end))
    return Measured(*_steady(spans, site.gpus), driver)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--forward", type=float, default=1900, help="images/s of a GPU (ResNet-50, fp32)")
    parser.add_argument(
        "--decode", type=float, default=257, help="images/s of a CPU (500 x 375 JPEG, Pillow)"
    )
    parser.add_argument("--seconds", type=float, default=60, help="that each cluster works")
    options = parser.parse_args()
    rates = options.forward, options.decode
    print("\n".join(f"* {name}: {value}" for name, value in machine.describe().items()))
    print(
        f"\n{options.forward:,.0f} images/s of a GPU, {options.decode:,.0f} of a CPU; shards of {SHARD:,}.\n"
    )
    print("| GPUs | CPUs | who waits | GPUs busy | images/s | of the bound | driver, ms/shard | on paper |")
    print("| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    driver = 0.0
    for gpus, cpus in ((1, 8), (8, 64), (8, 32)):
        site = Site(gpus, cpus, *rates)
        found = run(site, options.seconds)
        driver = max(driver, found.driver)
        paper = on_paper(site, int(site.bound * options.seconds / SHARD), found.driver)
        print(_line(site, found, f"{paper.busy:.1%}"), flush=True)
    for gpus, cpus in ((64, 512), (64, 256), (256, 2048)):
        site = Site(gpus, cpus, *rates)
        print(_line(site, on_paper(site, int(site.bound * 60 / SHARD), driver), "only"))


def _line(site: Site, found: Measured, paper: str) -> str:
    cells = (site.gpus, site.cpus, site.starves, f"{found.busy:.1%}", f"{found.rate:,.0f}")
    more = (f"{found.rate / site.bound:.1%}", f"{1000 * found.driver:.1f}", paper)
    return f"| {' | '.join(map(str, (*cells, *more)))} |"


if __name__ == "__main__":
    main()
