"""The command `validate`, and what it shows of a run that is prepared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.app import (
    ConfigFile,
    EngineName,
    Json,
    Overrides,
    Quietly,
    Workspace,
    apart,
    app,
    console,
    display,
    document,
    load_all,
    warn,
)
from pipeline.cli.detectors import per_image
from pipeline.cli.several import documented, end, several_of

if TYPE_CHECKING:
    from pipeline.cluster.engine import Asked
    from pipeline.detectors.base import Detector
    from pipeline.stages.prepare import Prepared
    from pipeline.stages.shards import Job
    from pipeline.workflows.progress import Display
    from pipeline.workflows.several import Several

Document = dict[str, Any]


@app.command()
def validate(
    source: ConfigFile,
    overrides: Overrides = [],  # noqa: B006 - typer copies defaults
    workspace: Workspace = "",
    probe: Annotated[bool, typer.Option(help="Decode and forward 100 images to estimate the time.")] = True,
    batch_sizes: Annotated[
        bool, typer.Option("--batch-sizes", help="Try batch sizes in the probe and name the fastest.")
    ] = False,
    engine: EngineName = "auto",
    quiet: Quietly = False,
    as_json: Json = False,
) -> None:
    """Open data and model, check that everything goes together, and estimate the cost; no long work.

    Example: `ood-pipeline validate quickstart --batch-sizes`
    """
    apart(as_json)
    several = several_of(load_all(source, overrides, workspace))
    from pipeline.workflows.engines import connected

    ready = several.prepared(display(quiet))
    if probe:
        with connected(engine, ready):
            show_plans(several, ready, as_json, partial(_probed, engine, batch_sizes, display(quiet)))
    else:
        show_plans(several, ready, as_json)
    end(several, 2)


def show_plans(
    several: Several,
    prepared: Sequence[Prepared],
    as_json: bool,
    measured: Callable[[Prepared], Document] | None = None,
) -> None:
    """What was found of each evaluation and what a run would do; as one document, a list of several."""

    def planned(ready: Prepared) -> Document:
        if len(several.configs) > 1:
            warn([ready.config.name], "run")
        show_plan(ready)
        return {**_plan(ready), **(measured(ready) if measured else {})}

    found = several.run(planned, prepared)
    if as_json:
        document(documented(found, several))


def _plan(ready: Prepared) -> Document:
    """What `show_plan` shows."""
    from pipeline.stages.estimate import Cost

    weight, _ = ready.network.head
    datasets = {}
    for dataset in ready.config.datasets:
        job = ready.jobs[dataset.name]
        datasets[dataset.name] = {
            "role": dataset.role,
            "images": job.manifest.rows,
            "images_per_class": {
                label: n for label, n in job.manifest.class_count.items() if label >= 0 and n
            },
            "features_cached": job.complete,
            "notes": list(job.manifest.notes),
        }
    return {
        "name": ready.config.name,
        "model": ready.config.model.name,
        "classes": weight.shape[0],
        "feature": weight.shape[1],
        "head": ready.network.taps.head,
        "blocks": list(ready.network.taps.blocks),
        "datasets": datasets,
        "cost": asdict(Cost.of(ready)),
        "detectors": {
            label: {"method": detector.caption, "needs": _needs(detector), "uses_ood": ready.uses_ood(label)}
            for label, detector in ready.detectors.items()
        },
        "not_applicable": dict(ready.not_applicable),
    }


def _needs(detector: Detector) -> list[str]:
    return [f"{type(spec).__name__} pass" for spec in detector.passes()] + per_image(detector)


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
        extra = ", ".join(_needs(detector))
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


def _probed(engine: Asked, batch_sizes: bool, shown: Display, ready: Prepared) -> Document:
    """Show what some real images tell about the time."""
    from pipeline.cluster.engine import chosen, opened
    from pipeline.stages import estimate

    settings = ready.config.extract
    sizes = sorted({settings.batch_size, *(estimate.BATCH_SIZES if batch_sizes else ())})
    name = chosen(engine, ready.images, ready.plain)
    begins = "starts Ray" if name == "ray" else "loads PyTorch"
    with shown.stage("probe", begins) as stage, opened(name) as working:
        found = estimate.probe(working, ready, sizes, stage)
        about, (_, actors) = estimate.times(working, ready, found), estimate.forwarding(working, ready, found)
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
    parts = {
        "starting": about.start,
        f"forward passes on {actors} model actors": about.forward,
        "fit": about.fit,
        "score": about.score,
        "evaluation and report": about.rest,
    }
    told = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in parts.items())
    console.print(f"estimate  about {_duration(about.total)}: {told}", soft_wrap=True)
    borrowed = estimate.borrowed(ready)
    for text in borrowed:
        console.print(f"borrowed  {text}", soft_wrap=True)
    return {"probe": asdict(found), "seconds": asdict(about), "borrowed": borrowed, "actors": actors}


def _duration(seconds: float) -> str:
    """Seconds for people."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{max(seconds, 1):.0f} s"
