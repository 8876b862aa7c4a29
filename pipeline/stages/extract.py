"""The single forward pass: every image once through the classifier, one feature row or one error each.

The actor that takes a shard writes its part under a temporary name and renames it, so a retry overwrites and
a resumed run does only the shards whose part is missing. While it writes one, it forwards the next. Extra
columns are computed in the same visit, or in one of their own if the features are there already; they have
parts of their own with the rows of the features, in a folder inside that of the features.
"""

from __future__ import annotations

import ctypes
import json
import logging
import platform
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, fields, replace
from functools import cached_property, partial
from importlib.metadata import version
from threading import Lock
from typing import Any
from weakref import WeakSet

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.cluster import attempts
from pipeline.cluster.attempts import FIRST, Attempt
from pipeline.cluster.engine import Engine
from pipeline.columns import BLOCK_NORM, DIGEST, FEATURE, KEY, LABEL, LOGITS, PREDICTION, Mask
from pipeline.config import schema
from pipeline.data.fetch import fetch
from pipeline.detectors.base import Extra
from pipeline.errors import UserError
from pipeline.network import extras
from pipeline.network.classifier import Classifier, fetching, fitting, load, make_reproducible
from pipeline.network.description import same_network
from pipeline.stages import decoding, shards
from pipeline.stages.decoding import ACCEPTED, OTHERS, Decoded, decode_rows, decode_shard
from pipeline.stages.identity import device
from pipeline.stages.progress import LOADS, LOOKS, SILENT, Stage
from pipeline.stages.shards import Job, Plan, Shard
from pipeline.workspace import files, tables
from pipeline.workspace.artifacts import Damaged, write_part

Forwarded = tuple[Decoded, dict[str, NDArray[np.float32]], dict[Extra, NDArray[np.float32]]]
"""A batch, and what its forward pass gives: columns of the features by name, and extras that come along."""

_log = logging.getLogger(__name__)
_loading = Lock()
_loaded: WeakSet[nn.Module] = WeakSet()
"""Networks of the workers of this process."""


def machine(settings: schema.Extract) -> str:
    """The kind of machine this process computes features on: they have the same bits on all of a kind."""
    if device(settings.device, settings.gpus_per_actor) == "cuda":
        computes = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        computes = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    decoders = dict.fromkeys(("pillow", settings.decoder))
    packages = [f"{name} {version(name)}" for name in ("torch", *decoders)]
    return ", ".join([computes, *packages])


class Extractor:
    """Model worker: takes shards, writes parts, gives receipts."""

    def __init__(self, plan: Plan, threads: int, tell: Callable[[int], None] = lambda count: None) -> None:
        """With what all shards share; `tell` hears how many images of a batch are done, or unreadable."""
        self.plan, self.threads, self.tell = plan, threads, tell

    @cached_property
    def classifier(self) -> Classifier:
        """Loaded by the first shard: an error raised there keeps its type, one of `__init__` does not."""
        return load_in_worker(self.plan, self.threads, compiled=self.plan.settings.compile)

    @cached_property
    def machine(self) -> str:
        """What it computes on; versions of packages are read from their files, which takes a while."""
        return machine(self.plan.settings)

    def __call__(self, row: dict[str, Any]) -> Callable[[], dict[str, Any]]:
        """Forward one shard, given as a row of `Shard` fields, or what `decode_shard` made of it.

        What is returned writes its parts and gives its receipt; the next shard may be forwarded meanwhile.
        """
        shard = Shard(**{field.name: row[field.name] for field in fields(Shard)})
        decoded = Decoded(row["pixels"], *json.loads(row[OTHERS])) if OTHERS in row else None
        with attempts.begun(shard.part, "extracting") as attempt:
            write = self._extract(shard, decoded, attempt)
            if attempt.number == 0:
                return write
            receipt = write()  # if that ends the process again, it is this shard and no other
        return lambda: receipt

    def _extract(
        self, shard: Shard, decoded: Decoded | None, attempt: Attempt
    ) -> Callable[[], dict[str, Any]]:
        classifier, settings = self.classifier, self.plan.settings  # loaded before the clock starts
        torch.set_num_threads(self.threads)  # counted by thread, and each call may come in another
        started = time.time()
        batches = decoded.batches(settings.batch_size) if decoded else self._decode(shard, attempt)
        batches = self._told(batches)
        specs = [self.plan.extras[name] for name in shard.extras.split() if name != shards.DIGESTS]
        others = Others(classifier, specs)
        part, errors, forwarded = None, 0, 0
        if shard.featured:
            keys = _keys_of(shard)
            others.follow(batches, keys, settings, attempt)
        else:
            features, found, forwarded = extract_rows(classifier, batches, settings, attempt, others)
            keys, errors = features[KEY].to_pylist(), len(found)
            part = features.replace_schema_metadata({shards.ERRORS: json.dumps(found)})
        rows, seconds = shard.stop - shard.start, time.time() - started
        _log.info("%s: %d images, %d errors, %.2f s", shard.part, rows, errors, seconds)
        receipt = {
            "dataset": shard.dataset,
            "rows": rows,
            "errors": errors,
            "forwarded": forwarded,
            "extra_forwarded": json.dumps(others.forwarded),
            "started": started,
        }
        return partial(self._write, shard, part, others, keys, receipt)

    def _write(
        self, shard: Shard, part: pa.Table | None, others: Others, keys: list[str], receipt: dict[str, Any]
    ) -> dict[str, Any]:
        """Write what was computed of a shard; its receipt, now that it is complete."""
        rows, digest = len(keys), shards.digest(keys)
        if part is not None or shards.DIGESTS in shard.extras.split():
            path = shards.beside(files.at(shard.part), shards.DIGESTS)  # first: where features are, these are
            write_part(path, tables.written(others.table_of_digests(keys)), rows=rows, keys=digest)
        if part is not None:
            write_part(
                files.at(shard.part),
                tables.written(part),
                start=shard.start,
                stop=shard.stop,
                rows=rows,
                errors=receipt["errors"],
                keys=digest,
                machine=self.machine,
            )
        for column, values in others.columns(keys):
            path = shards.beside(files.at(shard.part), column)
            write_part(path, tables.written(values), rows=rows, keys=digest)
        return receipt | {"seconds": time.time() - receipt["started"]}

    def _told(self, batches: Iterator[Decoded]) -> Iterator[Decoded]:
        """The batches; each is told of when the next is asked for."""
        for batch in batches:
            yield batch
            self.tell(len(batch.rows) + len(batch.errors))

    def _decode(self, shard: Shard, attempt: Attempt = FIRST) -> Iterator[Decoded]:
        table, size = shard.images(), self.plan.settings.batch_size
        contents = fetch(table, self.plan.settings.max_image_bytes)
        for start in range(0, len(table), size):
            yield decode_rows(table.slice(start, size), self.plan, attempt, contents)


def _keys_of(shard: Shard) -> list[str]:
    """Keys of the features of a shard that are there.

    Raises:
        Damaged: they are others than were written.
    """
    try:
        with tables.parquet(shard.part) as file:
            keys: list[str] = file.read(columns=[KEY])[KEY].to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise Damaged(shard.part, str(error).splitlines()[0]) from None
    if shards.digest(keys) != shard.featured:
        raise Damaged(shard.part, "other keys than were written")
    return keys


class Others:
    """Extra columns of a shard in the making."""

    def __init__(self, classifier: Classifier, specs: Sequence[Extra]) -> None:
        self.classifier, self.specs = classifier, specs
        self.parts: dict[Extra, list[NDArray[np.float32]]] = {spec: [] for spec in specs}
        self.forwarded = Counter[str]()
        """Images that went through the network for each kind of extra, as often as they did."""
        self.digests: list[bytes] = []
        """Of the bytes of the images."""

    def add(
        self, batch: Decoded, kept: Mask, settings: schema.Extract, found: Mapping[Extra, NDArray[np.float32]]
    ) -> None:
        """Compute what a batch was not `found` to have by its forward pass, and keep some rows of all."""
        if not kept.any():
            return
        count = len(batch.rows)
        self.digests += [
            bytes.fromhex(row[DIGEST]) for row, keep in zip(batch.rows, kept, strict=True) if keep
        ]
        keys = [row[KEY] for row in batch.rows]
        for spec in self.specs:
            if spec in found:
                values = found[spec][:count]
            else:
                values = extras.column(self.classifier, spec, batch.pixels, keys, settings)
                self.forwarded[spec.kind] += spec.forwards * count
            wrong = ~np.isfinite(values).all(axis=1) & kept
            if wrong.any():
                raise UserError(
                    f"{keys[int(wrong.argmax())]}: {spec.kind} is not finite. Remove the image, or drop the "
                    f"detector that needs it ({spec.needs})."
                )
            self.parts[spec].append(values[kept])

    def follow(
        self, batches: Iterable[Decoded], keys: list[str], settings: schema.Extract, attempt: Attempt
    ) -> None:
        """Compute them for the rows that have features.

        Raises:
            UserError: if an image that has features cannot be read any more.
        """
        known, seen = set(keys), list[str]()
        for batch in batches:
            own = [row[KEY] for row in batch.rows]
            attempt.at(own)
            kept = np.array([key in known for key in own], dtype=bool)
            self.add(batch, kept, settings, {})
            seen += [key for key in own if key in known]
        if seen != keys:
            read = set(seen)
            lost = next(key for key in keys if key not in read)
            raise UserError(
                f"{lost}: it was read when its features were extracted and cannot be read now. Bring the "
                "image back, or run with --fresh."
            )

    def table_of_digests(self, keys: list[str]) -> pa.Table:
        """The digests of the images."""
        return pa.table({KEY: pa.array(keys, pa.string()), DIGEST: pa.array(self.digests, pa.binary(16))})

    def columns(self, keys: list[str]) -> Iterator[tuple[str, pa.Table]]:
        """Name and table of each."""
        for spec, parts in self.parts.items():
            empty = np.zeros((0, self.classifier.width(spec)), np.float32)
            values = np.concatenate([empty, *parts])
            table = tables.arrow_columns({KEY: np.array(keys, dtype=object), spec.column: values})
            schema = pa.schema([(KEY, pa.string()), table.schema.field(spec.column)])
            yield spec.column, table.cast(schema)


def load_in_worker(plan: Plan, threads: int, compiled: bool = False) -> Classifier:
    """Load the classifier on the worker's device and make sure that it is the one the driver saw."""
    settings = plan.settings
    _keep_freed_memory()
    make_reproducible(threads)
    where = device(settings.device, settings.gpus_per_actor)
    if where == "cuda" and not torch.cuda.is_available():
        raise UserError("extract.device: cuda is not available on a worker. Set extract.device to cpu.")
    with _loading:  # building draws from torch's generator, which all threads of a process share
        classifier = load(plan.model, plan.seed, where)
        if classifier.module in _loaded:  # a factory that gives one network to all: each worker taps its own
            with fitting():
                classifier = replace(classifier, module=deepcopy(classifier.module))
        _loaded.add(classifier.module)
    if classifier.digest != plan.digest:
        raise UserError(f"model.weights: {plan.model.weights} is not what the driver loaded; it was changed.")
    if not same_network(plan.probe, classifier.probe):
        raise UserError(
            "model: the network answers otherwise on a worker than in the driver, though its weights are the "
            "same. Have the same code and the same packages on all nodes."
        )
    return classifier.tuned(settings, compiled)


def _keep_freed_memory() -> None:
    """Have glibc keep freed activations for the next batch instead of giving them back to the system.

    Otherwise a third of a small network's time goes into page faults: about 50 per image, measured on the
    quickstart's. Does nothing where the C library has no `mallopt`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        map_threshold, trim_threshold = -3, -1
        mallopt(map_threshold, 2**25)
        mallopt(trim_threshold, 2**29)


def extract_rows(
    classifier: Classifier,
    batches: Iterable[Decoded],
    settings: schema.Extract,
    attempt: Attempt = FIRST,
    others: Others | None = None,
) -> tuple[pa.Table, list[list[str]], int]:
    """Feature rows and errors of decoded images, and how many images were forwarded.

    The extra columns of the feature rows are added to `others`.

    Every forward pass has `batch_size` rows, the last image standing in for missing ones: the bits of a
    feature then do not depend on which rows share its batch.
    """
    columns: dict[str, list[NDArray[Any]]] = {}
    errors: list[list[str]] = []
    forwarded = 0
    specs = others.specs if others else ()
    for batch, forward, found in _forwarded(classifier, batches, settings.batch_size, attempt, specs):
        errors += batch.errors
        if not batch.rows:
            continue
        output = {name: values[: len(batch.rows)] for name, values in forward.items()}
        forwarded += len(batch.rows)
        finite = np.all([np.isfinite(values).all(axis=1) for values in output.values()], axis=0)
        keys = np.array([row[KEY] for row in batch.rows], dtype=object)
        errors += [[key, "the network's output is not finite"] for key in keys[~finite]]
        with np.errstate(over="ignore"):
            output[FEATURE] = output[FEATURE].astype(settings.feature_dtype)
        large = finite & ~np.isfinite(output[FEATURE]).all(axis=1)
        why = f"a feature is too large for extract.feature_dtype {settings.feature_dtype}: say float32"
        errors += [[key, why] for key in keys[large]]
        finite &= ~large
        prediction = output[LOGITS].argmax(axis=1).astype(np.int32)
        labels = np.array(list(map(label_of, batch.rows, prediction.tolist())), dtype=np.int32)
        for name, values in {KEY: keys, LABEL: labels, PREDICTION: prediction, **output}.items():
            columns.setdefault(name, []).append(values[finite])
        if others:
            others.add(batch, finite, settings, found)
    return _feature_table(classifier, columns, settings), errors, forwarded


def _forwarded(
    classifier: Classifier, batches: Iterable[Decoded], size: int, attempt: Attempt, specs: Sequence[Extra]
) -> Iterator[Forwarded]:
    """Batches in their order with what one forward pass gives for each.

    A GPU has the next batch before the results of one are looked at, so that it does not wait for that.
    """
    ahead = 1 if classifier.device == "cuda" else 0
    begun: deque[tuple[Decoded, Callable[[], Forwarded]]] = deque()
    for batch in batches:
        if batch.rows:
            under_way = *(earlier for earlier, _ in begun), batch
            attempt.at([row[KEY] for each in under_way for row in each.rows])
        begun.append((batch, _begin(classifier, batch, size, specs)))
        if len(begun) > ahead:
            yield begun.popleft()[1]()
    for _, finish in begun:
        yield finish()


def _begin(
    classifier: Classifier, batch: Decoded, size: int, specs: Sequence[Extra]
) -> Callable[[], Forwarded]:
    """Begin the forward pass of a batch; what is returned waits for it."""
    if not batch.rows:
        return lambda: (batch, {}, {})
    with fitting(size), extras.beside(classifier, specs) as found:
        forward = classifier.begin(batch.pixels, size)
    brought = fetching(found)
    return lambda: (batch, forward(), brought())


def label_of(row: dict[str, Any], prediction: int) -> int:
    """Label of an image; where several are accepted, the prediction if it is among them, else the first."""
    label: int = prediction if prediction in (row[ACCEPTED] or ()) else row[LABEL]
    return label


def _feature_table(
    classifier: Classifier, columns: dict[str, list[NDArray[Any]]], settings: schema.Extract
) -> pa.Table:
    """The rows in the order and with the types of the contract, also when there are none."""
    weight, _ = classifier.head
    widths = {FEATURE: weight.shape[1], LOGITS: weight.shape[0], BLOCK_NORM: len(classifier.taps.blocks)}
    kept = pa.float16() if settings.feature_dtype == "float16" else pa.float32()
    schema = pa.schema(
        [
            (KEY, pa.string()),
            (LABEL, pa.int32()),
            (PREDICTION, pa.int32()),
            *(
                (name, pa.list_(kept if name == FEATURE else pa.float32(), width))
                for name, width in widths.items()
                if width
            ),
        ]
    )
    if not columns:
        return schema.empty_table()
    arrays = {name: np.concatenate(columns[name]) for name in schema.names}
    return tables.arrow_columns(arrays).cast(schema)


def run(
    engine: Engine, jobs: Sequence[Job], plan: Plan, stage: Stage = SILENT, there: int = 0
) -> dict[str, float]:
    """Extract what is not in the cache, all datasets through one pool of model workers.

    Args:
        engine: does the work.
        jobs: what is extracted; those that are not complete must be claimed.
        plan: the model and the settings.
        stage: is told how many images are to be done, and of every batch that is; where workers are other
            processes, of every shard.
        there: images of other datasets of the run, whose features are there.

    Returns:
        Numbers for the record: images forwarded, passes of images for extras by kind, seconds of model work,
        images per second.

    Raises:
        UserError: too many unreadable images.
    """
    stage.doing(LOOKS)
    unfinished = [job for job in jobs if not job.complete]
    todo = [shard for job in unfinished for shard in shards.missing(job, plan)]
    images = sum(job.manifest.rows for job in jobs)
    lacking = sum(shard.stop - shard.start for shard in todo)
    stage.count("images", lacking, images + there - lacking)
    receipts = list(_execute(engine, todo, plan, stage)) if todo else []
    for job in unfinished:
        if not job.featured:
            shards.finish(job, plan)
        elif not job.complete:
            shards.finish_digests(job)
        for extra in job.lacking():
            shards.finish_extra(job, extra)
    forwarded = sum(receipt["forwarded"] for receipt in receipts)
    passes = sum((Counter(json.loads(receipt["extra_forwarded"])) for receipt in receipts), Counter[str]())
    began = min((receipt["started"] for receipt in receipts), default=0.0)
    ended = max((receipt["started"] + receipt["seconds"] for receipt in receipts), default=0.0)
    return {
        "images": images,
        "forward_images": forwarded,
        **{f"{kind}_passes": count for kind, count in passes.items()},
        "steady_seconds": ended - began,
        "images_per_second": forwarded / (ended - began) if receipts else 0.0,
    }


def actor_needs(engine: Engine, plan: Plan) -> dict[str, float]:
    """What a model actor asks for: where it decodes, also memory for that."""
    return plan.settings.needs if plan.separate else decoder_needs(engine, plan)


def decoder_needs(engine: Engine, plan: Plan) -> dict[str, float]:
    """What a model actor asks for that decodes: also memory for the most that takes, if there is that.

    A machine that has not, for the configured number of actors or for one, is asked for none.
    """
    settings = plan.settings
    whole = settings.needs | {"memory": decoding.memory(plan, settings.batch_size)}
    count = 1 if settings.actors == "auto" else settings.actors
    return whole if engine.holds(whole, count) else settings.needs


def actor_count(engine: Engine, plan: Plan) -> int:
    """How many model actors there will be; where they do not decode, a CPU is left for the tasks that do.

    Raises:
        UserError: if the cluster has no room for as many as configured, or for one.
    """
    settings, spare = plan.settings, 1 if plan.separate else 0
    fits = engine.capacity(actor_needs(engine, plan), "extract", spare)
    if settings.actors == "auto":
        return fits
    if not engine.holds(settings.needs, settings.actors, spare):
        raise UserError(
            f"extract.actors: {settings.actors} asked for, the cluster has room for {fits}"
            f"{' beside a CPU that decodes' if spare else ''}. Lower it."
        )
    return settings.actors


def _execute(engine: Engine, todo: list[Shard], plan: Plan, stage: Stage) -> Iterator[dict[str, Any]]:
    """Stream receipts out of the model workers."""
    stage.doing(LOADS)
    settings, telling = plan.settings, Lock()

    def tell(count: int) -> None:
        with telling:
            stage.advance(count)

    shared = (plan, engine.threads(settings.needs))
    receipts = engine.stream(
        [asdict(shard) for shard in todo],
        decode=(decode_shard, (plan,), decoding.memory(plan, plan.shard_rows)) if plan.separate else None,
        worker=(Extractor, (*shared, tell) if engine.here else shared),
        needs=actor_needs(engine, plan),
        count=min(actor_count(engine, plan), len(todo)),
    )
    for receipt in receipts:
        if not engine.here:
            stage.advance(receipt["rows"])
        yield receipt
