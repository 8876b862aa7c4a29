"""The command `validate`, and what it shows of a run that is prepared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.app import ConfigFile, EngineName, Overrides, Workspace, app, console, load
from pipeline.cli.detectors import per_image

if TYPE_CHECKING:
    from pipeline.cluster.engine import Engine
    from pipeline.stages.prepare import Prepared
    from pipeline.stages.shards import Job


@app.command()
def validate(
    source: ConfigFile,
    overrides: Overrides = [],  # noqa: B006 - typer copies defaults
    workspace: Workspace = "",
    probe: Annotated[bool, typer.Option(help="Decode and forward 100 images to estimate the time.")] = True,
    batch_sizes: Annotated[
        bool, typer.Option("--batch-sizes", help="Try batch sizes in the probe and name the fastest.")
    ] = False,
    engine: EngineName = "ray",
) -> None:
    """Open data and model, check that everything goes together, and estimate the cost; no long work.

    Example: `ood-pipeline validate quickstart --batch-sizes`
    """
    settings = load(source, overrides, workspace)
    from pipeline.cluster.engine import opened
    from pipeline.stages.prepare import prepare

    ready = prepare(settings)
    show_plan(ready)
    if probe:
        with opened(engine) as working:
            _show_probe(working, ready, batch_sizes)


def show_plan(ready: Prepared) -> None:
    """What was found and what a run would do."""
    from rich.table import Table

    from pipeline.stages.estimate import Cost

    settings = ready.config
    weight, _ = ready.network.head
    taps = ready.network.taps
    shape = f"{weight.shape[0]} classes, feature {weight.shape[1]}"
    console.print(f"model     {settings.model.name}: {shape}", markup=False)
    console.print(f"taps      head {taps.head}; blocks {', '.join(taps.blocks) or 'none'}")
    table = Table("dataset", "role", "images", "labels", "features cached")
    for dataset in settings.datasets:
        job = ready.jobs[dataset.name]
        labels = _histogram(job.manifest.class_count)
        table.add_row(dataset.name, dataset.role, f"{job.manifest.rows:,}", labels, _cached(job))
    console.print(table)
    for dataset in settings.datasets:
        for note in ready.jobs[dataset.name].manifest.notes:
            console.print(f"note      {dataset.name}: {note}", markup=False, soft_wrap=True)
    cost = Cost.of(ready)
    console.print(f"forward   {cost.images:,} images, and at most {cost.extra:,} in extra passes")
    shards = f"{cost.shards:,} shards of {ready.plan.shard_rows:,}"
    console.print(f"cache     {_size(cost.cache_bytes)} in all; {shards} to do")
    console.print(f"index     {_size(cost.index_bytes)} of memory")
    for label, detector in ready.detectors.items():
        needs = [f"{type(spec).__name__} pass" for spec in detector.passes()] + per_image(detector)
        extra = ", ".join(needs)
        flag = "  [bold]uses OOD data[/bold]" if ready.uses_ood(label) else ""
        console.print(f"detector  {label:<14} {detector.caption}{'; ' + extra if extra else ''}{flag}")
    show_left_out(ready.not_applicable)


def show_left_out(not_applicable: Mapping[str, str]) -> None:
    """Detectors that do not apply, a line for each reason."""
    labels: dict[str, list[str]] = {}
    for label, reason in not_applicable.items():
        labels.setdefault(reason, []).append(label)
    for reason, found in labels.items():
        console.print(f"left out {', '.join(found)}: {reason}", markup=False, soft_wrap=True)


def _cached(job: Job) -> str:
    """Whether the features of a dataset are there, and which columns beside them are not."""
    if not job.featured:
        return "no"
    return ", ".join(["yes", *(f"no {extra.kind}" for extra in job.lacking())])


def _histogram(class_count: Mapping[int, int]) -> str:
    """Number of classes, images per class, and their distribution over the class indices."""
    counts = [class_count[label] for label in sorted(class_count) if label >= 0 and class_count[label]]
    if not counts:
        return "-"
    width = -(-len(counts) // 16)
    bars = [sum(counts[start : start + width]) for start in range(0, len(counts), width)]
    drawn = "".join("▁▂▃▄▅▆▇█"[min(8 * bar // max(bars), 7)] for bar in bars)
    return f"{len(counts)} classes of {min(counts):,} to {max(counts):,} {drawn}"


def _size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def _show_probe(working: Engine, ready: Prepared, batch_sizes: bool) -> None:
    """What some real images tell about the time."""
    from pipeline.stages import estimate

    settings = ready.config.extract
    sizes = sorted({settings.batch_size, *(estimate.BATCH_SIZES if batch_sizes else ())})
    found = estimate.probe(working, ready, sizes)
    console.print(
        f"probe     {found.images} images: decoding {found.decode:,.0f} images/s per CPU, "
        f"forward pass {found.forward[settings.batch_size]:,.0f} images/s per model actor"
    )
    for key, reason in found.errors[:5]:
        console.print(f"unreadable  {key}: {reason}", markup=False)
    if found.numbering is not None:
        console.print(f"[bold]warning[/]   {found.numbering}: see `labels` of your datasets.")
    for size, rate in found.forward.items() if batch_sizes else ():
        best = "  <- fastest" if rate == max(found.forward.values()) else ""
        console.print(f"batch     {size:>5}  {rate:,.0f} images/s{best}")
    about, (_, actors) = estimate.times(working, ready, found), estimate.forwarding(working, ready, found)
    parts = {
        "starting": about.start,
        f"forward passes on {actors} model actors": about.forward,
        "fit": about.fit,
        "score": about.score,
        "evaluation and report": about.rest,
    }
    told = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in parts.items())
    console.print(f"estimate  about {_duration(about.total)}: {told}", soft_wrap=True)


def _duration(seconds: float) -> str:
    """Seconds for people."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{max(seconds, 1):.0f} s"
