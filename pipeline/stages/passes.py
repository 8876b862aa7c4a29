"""Extra passes through the network at fit time, each over a few seeded training images or noise.

What cannot be had from stored features: GROOD's mixed-up images and noise, NormRatio's jigsaws. Pieces of
a pass run on a pool of model actors and are merged in order, so the result does not depend on the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipeline import columns
from pipeline.cluster.engine import Engine, Pool
from pipeline.columns import BLOCK_NORM, FEATURE, KEY, LOGITS, Float, Mask, padded
from pipeline.data import decode
from pipeline.data.manifest import Manifest
from pipeline.detectors.base import Extra, Jigsaw, Mixup, Noise, Pass, Samples
from pipeline.errors import UserError
from pipeline.learned.logits import logsumexp
from pipeline.network import extras, taps
from pipeline.network.classifier import Classifier, fitting
from pipeline.stages import decoding, extract
from pipeline.stages.shards import Plan

Result = dict[str, NDArray[Any]]
Index = NDArray[np.int64]


BATCHES = 16
"""Most batches in one call; while the network works on one of them, the next is decoded."""
MAPS = 32
"""Most mean maps that a worker holds; one takes up to 3 MiB in float32 and twice that as a sum."""


DECODERS = 16
"""Most threads that decode for a worker."""


@dataclass(frozen=True)
class Group:
    """Images that are mixed with the same map: the prototype p^early of a class (ElAraby et al., eq. 7)."""

    mixed: Index
    """Rows of these images."""
    behind: Index
    """Rows of the class whose mean map it is, ascending."""


class Worker:
    """Model worker of the pool."""

    def __init__(self, plan: Plan, threads: int, decoders: int = 1) -> None:
        """Args: the model, threads that the network computes with, and threads that decode."""
        self.plan, self.threads = plan, threads
        self.size = plan.settings.batch_size
        self.seed = plan.seed
        self.decoders = ThreadPoolExecutor(decoders, "decoder")
        self.slices = decoders

    @cached_property
    def classifier(self) -> Classifier:
        """Loaded by the first call: an error raised there keeps its type, one of `__init__` does not."""
        return extract.load_in_worker(self.plan, self.threads)

    def _batches(self, train: Manifest, rows: Index) -> Iterator[tuple[columns.Pixels, Index]]:
        """Decodable images of some rows (ascending), at most `size` at once, and their rows.

        While the network works on a batch, the next one is decoded.
        """
        pieces = [rows[start : start + self.size] for start in range(0, len(rows), self.size)]
        following = self._decode(train, pieces[0]) if pieces else []
        for number, piece in enumerate(pieces):
            found = [future.result() for future in following]
            following = self._decode(train, pieces[number + 1]) if number + 1 < len(pieces) else []
            readable = np.concatenate([kept for _, kept in found])
            if readable.any():
                yield np.concatenate([pixels for pixels, _ in found]), piece[readable]

    def _decode(self, train: Manifest, rows: Index) -> list[Future[tuple[columns.Pixels, Mask]]]:
        """The readable images of some rows, and which they are, in slices that are decoded side by side."""
        return [
            self.decoders.submit(self._decoded, train.take(some))
            for some in np.array_split(rows, min(self.slices, len(rows)))
        ]

    def _decoded(self, table: pa.Table) -> tuple[columns.Pixels, Mask]:
        decoded = decoding.decode_rows(table, self.plan)
        return decoded.pixels, np.isin(table[KEY].to_pylist(), [row[KEY] for row in decoded.rows])

    def _forward(self, pixels: columns.Pixels, blocks: bool) -> dict[str, NDArray[np.float32]]:
        output = self.classifier.forward(padded(pixels, self.size), blocks)
        return {name: values[: len(pixels)] for name, values in output.items()}

    def norm_ratios(self, train: Manifest, rows: Index, grid: int) -> Float:
        """(n, B) FeatureNorm of images over that of their jigsaws; NaN where the jigsaw's is zero."""
        ratios = [np.empty((0, len(self.classifier.taps.blocks)))]
        for pixels, kept in self._batches(train, rows):
            pairs = [
                decode.jigsaw(image, grid, np.random.default_rng([self.seed, row]))
                for image, row in zip(pixels, kept.tolist(), strict=True)
            ]
            whole, puzzle = (np.stack(side) for side in zip(*pairs, strict=True))
            norms = self._forward(whole, blocks=True)[BLOCK_NORM].astype(np.float64)
            shuffled = self._forward(puzzle, blocks=True)[BLOCK_NORM].astype(np.float64)
            ratios.append(np.divide(norms, shuffled, out=np.full_like(norms, np.nan), where=shuffled > 0))
        return np.concatenate(ratios)

    def runners_up(self, train: Manifest, rows: Index, classes: Index) -> tuple[Index, Index]:
        """The decodable ones of some rows, and of some classes that with the largest logit of each row.

        Its own predicted class does not count.
        """
        found = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        for pixels, kept in self._batches(train, rows):
            logits = self._forward(pixels, blocks=False)[LOGITS]
            logits[np.arange(len(logits)), logits.argmax(axis=1)] = -np.inf
            found.append((kept, classes[logits[:, classes].argmax(axis=1)]))
        kept, chosen = (np.concatenate(side) for side in zip(*found, strict=True))
        return kept, chosen

    def mixed_sum(self, train: Manifest, groups: Sequence[Group], spec: Mixup) -> tuple[Float, int]:
        """Sum of the penultimate features of images mixed with their group's mean map, and their number."""
        maps = self.mean_maps(train, [group.behind for group in groups], spec.block)
        of_row = {row: number for number, group in enumerate(groups) for row in group.mixed.tolist()}
        total, count = np.zeros(self.classifier.head[0].shape[1]), 0
        for pixels, kept in self._batches(train, np.sort(np.array(list(of_row)))):
            own_maps = padded(np.stack([maps[of_row[row]] for row in kept.tolist()]), self.size)
            with fitting(self.size):
                other = torch.tensor(own_maps, device=self.classifier.device)

            def mix(_: Any, __: Any, own: torch.Tensor, other: torch.Tensor = other) -> torch.Tensor:
                return spec.weight * own + (1 - spec.weight) * other

            with taps.hooked(self.classifier.module, {spec.block: mix}):
                total += self._forward(pixels, blocks=False)[FEATURE].astype(np.float64).sum(axis=0)
            count += len(kept)
        return total, count

    def mean_maps(self, train: Manifest, groups: Sequence[Index], block: str) -> list[NDArray[np.float32]]:
        """Mean output of a block over the rows of each group, all groups in the same batches."""
        of_row = {row: number for number, rows in enumerate(groups) for row in rows.tolist()}
        totals: list[Any] = [0.0] * len(groups)
        counts = np.zeros(len(groups), np.int64)
        for pixels, kept in self._batches(train, np.sort(np.concatenate(groups))):
            seen: list[torch.Tensor] = []

            def see(_: Any, __: Any, output: torch.Tensor, seen: list[torch.Tensor] = seen) -> None:
                seen.append(output.clone())  # a later layer may work in place

            with taps.hooked(self.classifier.module, {block: see}):
                self._forward(pixels, blocks=False)
            members = np.array([of_row[row] for row in kept.tolist()])
            for number in np.unique(members).tolist():
                with fitting(self.size):
                    mine = torch.from_numpy(np.flatnonzero(members == number)).to(seen[0].device)
                    totals[number] = totals[number] + seen[0][mine].double().sum(dim=0).cpu().numpy()
                counts[number] += len(mine)
        if len(missing := np.flatnonzero(counts == 0)):
            rows = groups[missing[0]]
            raise UserError(f"datasets: none of the training images {rows[0]} ... {rows[-1]} can be read.")
        return [(total / count).astype(np.float32) for total, count in zip(totals, counts, strict=True)]

    def features_and(self, source: Manifest, rows: Index, extra: Extra) -> list[tuple[Float, Float]]:
        """Penultimate features of some rows, as precise as stored ones, and an extra of theirs, by batch.

        Rows that are not finite are left out.
        """
        found = []
        for pixels, kept in self._batches(source, rows):
            keys = source.take(kept)[KEY].to_pylist()
            values = extras.column(self.classifier, extra, pixels, keys, self.plan.settings)
            feature = self._forward(pixels, blocks=False)[FEATURE]
            stored = feature.astype(self.plan.settings.feature_dtype).astype(np.float64)
            finite = np.isfinite(stored).all(axis=1) & np.isfinite(values).all(axis=1)
            found.append((stored[finite], values[finite].astype(np.float64)))
        return found

    def noise(self, piece: int, count: int) -> tuple[NDArray[np.float32], Float]:
        """Penultimate features and logsumexp of the logits of blurred uniform noise, normalised."""
        from scipy.ndimage import gaussian_filter

        transform, rng = self.classifier.transform, np.random.default_rng([self.seed, piece])
        images = rng.random((self.size, transform.channels, transform.crop, transform.crop), dtype=np.float32)
        for image, sigma in zip(images, rng.uniform(0.2, 5, self.size), strict=True):
            gaussian_filter(image, sigma, axes=(1, 2), radius=(3, 2), mode="mirror", output=image)
        with fitting(self.size):
            pixels = torch.from_numpy(images).to(self.classifier.device)
            output = self.classifier.forward_images(self.classifier.normalise(pixels), blocks=False)
        return output[FEATURE][:count], logsumexp(output[LOGITS][:count])


class Runner:
    """Runs passes on a pool of model actors, started for the first pass and ended with the `with` block."""

    def __init__(
        self, engine: Engine, train: Manifest, plan: Plan, early: str | None, held_out: Sequence[Manifest]
    ) -> None:
        """Args: engine, training images, the model, what `auto` means for mixing, and other ID images."""
        self.engine, self.train, self.plan, self.early, self.held_out = engine, train, plan, early, held_out
        self.workers: Pool | None = None

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        if self.workers is not None:
            self.workers.stop()

    @cached_property
    def _needs(self) -> dict[str, float]:
        return extract.decoder_needs(self.engine, self.plan)

    @cached_property
    def _count(self) -> int:
        """How many workers there are."""
        room = self.engine.capacity(self._needs, "extract")
        return min(extract.actor_count(self.engine, self.plan), room)

    def _pool(self) -> Pool:
        if self.workers is None:
            # Nothing else of the run works meanwhile, so that the CPUs of its decoding tasks are free.
            decoders = int(self.engine.cpus() // self._count) if self.plan.separate else 1
            given = self.plan, self.engine.threads(self._needs), max(1, min(decoders, DECODERS))
            self.workers = self.engine.pool(Worker, self._needs, self._count, *given)
        return self.workers

    def each(self, call: str, arguments: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Results of a method of `Worker` on the pool, in the order of the arguments."""
        return self._pool().each(call, arguments)

    def pieces(self, rows: Index) -> list[Index]:
        """Rows in pieces of whole batches: one for each worker, or more if they would be large."""
        size = self.plan.settings.batch_size
        batches = -(-len(rows) // size)
        size *= max(1, min(-(-batches // self._count), BATCHES))
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def sample(self, spec: Pass, samples: int, source: Manifest | None = None) -> Index:
        """Seeded rows of the training images, or of others, equally many of each class; ascending."""
        rng = np.random.default_rng([self.plan.seed, *type(spec).__name__.encode()])
        return stratified((source or self.train).labels(), samples, rng)

    def run(self, spec: Pass) -> Result:
        """Run one pass."""
        return _PASSES[type(spec)](self, spec)

    def jigsaw(self, spec: Jigsaw) -> Result:
        """NormRatio (Yu et al., CVPR 2023, eq. 4): mean over images of the ratio, and its standard error."""
        pieces = self.pieces(self.sample(spec, spec.samples))
        found = self.each("norm_ratios", [(self.train, rows, spec.grid) for rows in pieces])
        ratios = np.concatenate(list(found))
        usable = np.isfinite(ratios).sum(axis=0)
        mean = np.divide(
            np.nansum(ratios, axis=0), usable, out=np.full(len(usable), np.nan), where=usable > 0
        )
        squares = np.nansum((ratios - mean) ** 2, axis=0)
        stderr = np.sqrt(squares / np.maximum(usable - 1, 1) / np.maximum(usable, 1))
        return {"ratio": mean, "stderr": stderr, "samples": np.array(len(ratios))}

    def mixup(self, spec: Mixup) -> Result:
        """Mean feature of training images mixed with the mean map of their runner-up class."""
        spec = spec.model_copy(update={"block": self.early if spec.block == "auto" else spec.block})
        if spec.block is None:
            raise UserError("the model has no block to mix images at; name a layer with mixup_layer.")
        labels = self.train.labels()
        classes = np.unique(labels[labels >= 0]).astype(np.int64)
        if len(classes) < 2:
            raise UserError("datasets: training images of one class alone; mixing needs two.")
        sample = self.pieces(self.sample(spec, spec.samples))
        found = self.each("runners_up", [(self.train, rows, classes) for rows in sample])
        rows, chosen = (np.concatenate(side) for side in zip(*found, strict=True))
        rng = np.random.default_rng([self.plan.seed, *b"class maps"])
        order = rng.permutation(len(labels))
        groups = [
            Group(rows[chosen == label], np.sort(order[labels[order] == label][: spec.class_samples]))
            for label in np.unique(chosen)
        ]
        together = self._together(groups)
        sums = self.each("mixed_sum", [(self.train, some, spec) for some in together])
        totals, counts = zip(*sums, strict=True)
        return {"mean": np.sum(totals, axis=0) / sum(counts), "samples": np.array(sum(counts))}

    def _together(self, groups: Sequence[Group]) -> list[list[Group]]:
        """Groups in pieces of so many images that few batches are not full, and of not too many maps."""
        pieces: list[list[Group]] = []
        images = 0
        for group in groups:
            if not pieces or images >= BATCHES * self.plan.settings.batch_size or len(pieces[-1]) == MAPS:
                pieces.append([])
                images = 0
            pieces[-1].append(group)
            images += len(group.behind)
        return pieces

    def noise(self, spec: Noise) -> Result:
        """Mean feature of the share of noise images with the lowest logsumexp."""
        size = self.plan.settings.batch_size
        counts = [
            (piece, min(size, spec.samples - start))
            for piece, start in enumerate(range(0, spec.samples, size))
        ]
        found = self.each("noise", counts)
        feature, energy = (np.concatenate(side) for side in zip(*found, strict=True))
        kept = np.argsort(energy, kind="stable")[: max(1, round(spec.keep * spec.samples))]
        return {"mean": feature[kept].astype(np.float64).mean(axis=0), "samples": np.array(len(kept))}

    def samples(self, spec: Samples) -> Result:
        """Features and an extra of ID images, equally many of each dataset."""
        share = -(-spec.samples // len(self.held_out))
        pieces = [
            (source, piece, spec.extra)
            for source in self.held_out
            for piece in self.pieces(self.sample(spec, share, source))
        ]
        found = [batch for batches in self.each("features_and", pieces) for batch in batches]
        if not any(len(feature) for feature, _ in found):
            raise UserError("datasets: none of the sampled ID images can be read and has finite features.")
        feature, extra = (np.concatenate(side) for side in zip(*found, strict=True))
        return {"feature": feature, "extra": extra, "samples": np.array(len(feature))}


_PASSES: dict[type[Pass], Callable[[Runner, Any], Result]] = {
    Jigsaw: Runner.jigsaw,
    Mixup: Runner.mixup,
    Noise: Runner.noise,
    Samples: Runner.samples,
}


def stratified(labels: NDArray[np.int32], samples: int, rng: np.random.Generator) -> Index:
    """Rows drawn without replacement, class by class in turns, ascending.

    Args:
        labels: (N,) int.
        samples: how many; all rows if there are fewer.
        rng: source of the draw.
    """
    order = rng.permutation(len(labels))
    shuffled = labels[order]
    by_class = np.argsort(shuffled, kind="stable")
    _, starts, counts = np.unique(shuffled[by_class], return_index=True, return_counts=True)
    turn = np.empty(len(labels), dtype=np.int64)
    turn[by_class] = np.arange(len(labels)) - np.repeat(starts, counts)
    return np.sort(order[np.argsort(turn, kind="stable")[:samples]])
