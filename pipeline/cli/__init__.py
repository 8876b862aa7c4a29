"""The command `ood-pipeline`: reads arguments, calls the package, turns errors into exit statuses.

0 success, 2 a mistake of the user's (one message, no traceback), 1 anything else; the job's status where a
command waited for one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from pipeline import __version__, imports
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config.schema import Config
    from pipeline.detectors.base import Detector
    from pipeline.stages.prepare import Prepared
    from pipeline.workflows.run import Options, StageName

app = typer.Typer(
    name="ood-pipeline",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Evaluate out-of-distribution detectors: one forward pass, every detector, tracked in MLflow.\n\n"
    "Start with `ood-pipeline run quickstart`.",
)
console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())

ConfigFile = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A config file, or the name of a bundled one.")
]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override one value; may be repeated.")
]
Workspace = Annotated[str, typer.Option(help="Folder for features, fits and runs; overrides the config's.")]


Address = Annotated[
    str,
    typer.Option(metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="Dashboard of the cluster's head."),
]


def _changes(overrides: list[str], workspace: str) -> list[str]:
    return [*overrides, f"workspace={json.dumps(workspace)}"] if workspace else overrides


def _load(source: str, overrides: list[str], workspace: str) -> Config:
    from pipeline.config import loading

    return loading.load(source, _changes(overrides, workspace))


def _execute(settings: Config, options: Options) -> None:
    """Run stages and show what came of them."""
    from pipeline.cli.progress import Display
    from pipeline.results import report
    from pipeline.workflows import run

    outcome = run.execute(settings, options, Display(console))
    if options.last in ("evaluate", "report"):
        console.print(report.console_table(outcome.folder))
    lines: dict[str, object] = {"results": outcome.folder}
    if options.last == "report":
        lines["report"] = outcome.folder / "report" / "index.html"
    lines |= {"mlflow": outcome.link, "warning": outcome.warning}
    for name, text in lines.items():
        if text:
            console.print(f"{name:<8} {text}", markup=False, soft_wrap=True)
    _show_left_out(outcome.not_applicable)


@app.command()
def run(
    source: ConfigFile,
    overrides: Overrides = [],  # noqa: B006 - typer copies defaults
    workspace: Workspace = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Do everything again.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and show the plan; start nothing.")
    ] = False,
) -> None:
    """Run a whole evaluation; a run that was interrupted goes on where it stopped.

    Example: `ood-pipeline run quickstart --set extract.batch_size=64 --workspace /tmp/ood`
    """
    from pipeline.stages.prepare import prepare
    from pipeline.workflows.run import Options

    settings = _load(source, overrides, workspace)
    if dry_run:
        _show_plan(prepare(settings))
    else:
        _execute(settings, Options(fresh=fresh))


def _stage(name: StageName, summary: str) -> None:
    """Add the command of one stage."""

    def command(
        source: ConfigFile,
        overrides: Overrides = [],  # noqa: B006 - typer copies defaults
        workspace: Workspace = "",
    ) -> None:
        from pipeline.workflows.run import Options

        _execute(_load(source, overrides, workspace), Options(name, name))

    command.__doc__ = f"{summary}\n\nExample: `ood-pipeline {name} quickstart`"
    app.command(name)(command)


_stage("extract", "Only the forward pass: features of every image, cached for all later runs.")
_stage("fit", "Fit the detectors on cached features; refused before `extract`.")
_stage("score", "Score cached rows with fitted detectors; refused before `fit`.")
_stage("evaluate", "Metrics from score tables; refused before `score`.")


@app.command()
def report(
    source: ConfigFile,
    overrides: Overrides = [],  # noqa: B006 - typer copies defaults
    workspace: Workspace = "",
    track: Annotated[bool, typer.Option("--track", help="Send the results to MLflow, too.")] = False,
) -> None:
    """Write the report of a finished evaluation again, and send it to MLflow with `--track`.

    Example: `ood-pipeline report quickstart --track`
    """
    from pipeline.workflows.run import Options

    _execute(_load(source, overrides, workspace), Options("report", publish="always" if track else "never"))


@app.command()
def tune(
    source: ConfigFile,
    overrides: Overrides = [],  # noqa: B006 - typer copies defaults
    workspace: Workspace = "",
    metric: Annotated[str, typer.Option(help="Decides instead of the config's `tune.metric`.")] = "",
    output: Annotated[
        str, typer.Option(metavar="FILE", help="The new config; default NAME.tuned.yaml.")
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace the new config if it exists.")] = False,
) -> None:
    """Choose detector parameters from the grids of `tune`, on cached rows of `id_val` and `ood_val` images.

    Example: `ood-pipeline tune quickstart --metric fpr95_id --output tuned.yaml`
    """
    from pipeline.cli.progress import Display
    from pipeline.workflows import tune as search

    chosen = [f"tune.metric={json.dumps(metric)}"] if metric else []
    settings = _load(source, [*overrides, *chosen], workspace)
    outcome = search.execute(settings, search.target(source, output, force), Display(console))
    console.print(search.console_table(outcome))
    for name, text in {"table": outcome.table, "config": outcome.config}.items():
        console.print(f"{name:<8} {text}", markup=False, soft_wrap=True)


@app.command()
def submit(
    source: ConfigFile,
    address: Address,
    overrides: Overrides = [],  # noqa: B006 - typer copies defaults
    workspace: Workspace = "",
    stage: Annotated[str, typer.Option(help="run, extract, fit, score or evaluate.")] = "run",
    env: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="Environment variable to send, or pattern; may be repeated."),
    ] = [],  # noqa: B006
    follow: Annotated[bool, typer.Option("--follow", help="Show the job's log while waiting.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return when the job is submitted.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do everything again.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be sent; send nothing.")
    ] = False,
) -> None:
    """Run an evaluation on a Ray cluster, and wait for its end; submitting again resumes it.

    Example: `ood-pipeline submit quickstart --address http://head:8265 --workspace /shared/ood --env 'AWS_*'`
    """
    from pipeline.cluster.remote import submit as jobs

    order = jobs.Order(source, _changes(overrides, workspace), stage, fresh, tuple(env))
    if dry_run:
        jobs.show(order, console)
    else:
        raise typer.Exit(jobs.submit(order, address, console, follow, wait=not no_wait))


@app.command()
def status(
    address: Address,
    job: Annotated[str, typer.Argument(help="One job in full.")] = "",
    follow: Annotated[
        bool, typer.Option("--follow", help="Show its log until it ends; the exit status is the job's.")
    ] = False,
) -> None:
    """List the jobs of a cluster, or show one.

    Example: `ood-pipeline status quickstart-1a2b3c4d --address http://head:8265 --follow`
    """
    from pipeline.cluster.remote import submit as jobs

    cluster = jobs.Cluster(address)
    if not job:
        jobs.table(cluster, console)
    elif follow:
        raise typer.Exit(jobs.watch(cluster, job, console, follow=True))
    else:
        jobs.describe(cluster, job, console)


@app.command()
def stop(job: Annotated[str, typer.Argument(help="The job.")], address: Address) -> None:
    """Stop a job of a cluster and wait until it gave its workspace back; submitting again resumes it.

    Example: `ood-pipeline stop quickstart-1a2b3c4d --address http://head:8265`
    """
    from pipeline.cluster.remote import submit as jobs

    jobs.stop(jobs.Cluster(address), job, console)


@app.command()
def validate(
    source: ConfigFile,
    overrides: Overrides = [],  # noqa: B006 - typer copies defaults
    workspace: Workspace = "",
    probe: Annotated[
        bool, typer.Option(help="Decode and forward 100 images on Ray to estimate the time.")
    ] = True,
    batch_sizes: Annotated[
        bool, typer.Option("--batch-sizes", help="Try batch sizes in the probe and name the fastest.")
    ] = False,
) -> None:
    """Open data and model, check that everything goes together, and estimate the cost; no long work.

    Example: `ood-pipeline validate quickstart --batch-sizes`
    """
    from pipeline.cluster.session import session
    from pipeline.stages.prepare import prepare

    ready = prepare(_load(source, overrides, workspace))
    _show_plan(ready)
    if probe:
        with session():
            _show_probe(ready, batch_sizes)


def _show_plan(ready: Prepared) -> None:
    """What was found and what a run would do."""
    from rich.table import Table

    from pipeline.stages.estimate import Cost

    settings = ready.config
    weight, _ = ready.classifier.head
    taps = ready.classifier.taps
    shape = f"{weight.shape[0]} classes, feature {weight.shape[1]}"
    console.print(f"model     {settings.model.name}: {shape}", markup=False)
    console.print(f"taps      head {taps.head}; blocks {', '.join(taps.blocks) or 'none'}")
    table = Table("dataset", "role", "images", "labels", "features cached")
    for dataset in settings.datasets:
        job = ready.jobs[dataset.name]
        labels, cached = _histogram(job.manifest.class_count), "yes" if job.complete else "no"
        table.add_row(dataset.name, dataset.role, f"{job.manifest.rows:,}", labels, cached)
    console.print(table)
    cost = Cost.of(ready)
    console.print(f"forward   {cost.images:,} images, and at most {cost.extra:,} in extra passes")
    shards = f"{cost.shards:,} shards of {ready.plan.shard_rows:,}"
    console.print(f"cache     {_size(cost.cache_bytes)} in all; {shards} to do")
    console.print(f"index     {_size(cost.index_bytes)} of memory")
    for label, detector in ready.detectors.items():
        needs = [f"{type(spec).__name__} pass" for spec in detector.passes()] + _per_image(detector)
        extra = ", ".join(needs)
        flag = "  [bold]uses OOD data[/bold]" if ready.uses_ood(label) else ""
        console.print(f"detector  {label:<14} {detector.caption}{'; ' + extra if extra else ''}{flag}")
    _show_left_out(ready.not_applicable)


def _show_left_out(not_applicable: Mapping[str, str]) -> None:
    """Detectors that do not apply, a line for each reason."""
    labels: dict[str, list[str]] = {}
    for label, reason in not_applicable.items():
        labels.setdefault(reason, []).append(label)
    for reason, found in labels.items():
        console.print(f"left out {', '.join(found)}: {reason}", markup=False, soft_wrap=True)


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


def _show_probe(ready: Prepared, batch_sizes: bool) -> None:
    """What some real images tell about the time."""
    from pipeline.stages import estimate

    settings = ready.config.extract
    sizes = sorted({settings.batch_size, *(estimate.BATCH_SIZES if batch_sizes else ())})
    found = estimate.probe(ready, sizes)
    console.print(
        f"probe     {found.images} images: decoding {found.decode:,.0f} images/s per CPU, "
        f"forward pass {found.forward[settings.batch_size]:,.0f} images/s per model actor"
    )
    for key, reason in found.errors[:5]:
        console.print(f"unreadable  {key}: {reason}", markup=False)
    for size, rate in found.forward.items() if batch_sizes else ():
        best = "  <- fastest" if rate == max(found.forward.values()) else ""
        console.print(f"batch     {size:>5}  {rate:,.0f} images/s{best}")
    seconds, actors = estimate.duration(ready, found)
    console.print(f"estimate  about {_duration(seconds)} of forward passes on {actors} model actors")


def _duration(seconds: float) -> str:
    """Seconds for people."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{max(seconds, 1):.0f} s"


@app.command()
def detectors(
    name: Annotated[
        str, typer.Argument(help="One detector in full: its name, or ./file.py:Class of your own.")
    ] = "",
    applying: Annotated[
        str,
        typer.Option("--config", metavar="CONFIG", help="Also tell which ones apply to this model and data."),
    ] = "",
) -> None:
    """List the detectors, or explain one: formula, needs, parameters with defaults, paper.

    Example: `ood-pipeline detectors grood`
    """
    from pipeline import detectors as known

    if name:
        _explain(name)
        return
    found = {method: known.get(method)() for method in [*known.names(), *known.installed()]}
    _list_detectors(found, _obstacles(applying, found) if applying else None)


def _obstacles(source: str, found: dict[str, Detector]) -> dict[str, str]:
    """Why detectors do not apply to a config; adds those that the config names.

    Args:
        source: the config.
        found: detectors by name; replaced by that of the config where it has one of that label.
    """
    from pipeline.config import loading
    from pipeline.stages import prepare

    settings = loading.load(source)
    found |= settings.built()
    return prepare.obstacles(found, settings)


def _list_detectors(found: Mapping[str, Detector], obstacles: Mapping[str, str] | None) -> None:
    """One line each; cost: cheap, or what is built before scoring."""
    from rich.measure import Measurement
    from rich.table import Table

    table = Table()
    table.add_column("name", no_wrap=True)
    for column in (
        "method",
        "year",
        "paper",
        "needs",
        "cost",
        *(["applies"] if obstacles is not None else ()),
    ):
        table.add_column(column, overflow="fold")
    for label, detector in found.items():
        methods, years, papers = zip(*map(_described, detector.parts()), strict=True)
        cost = ["index"] * detector.neighbours + ["pass"] * bool(detector.passes())
        cost += _per_image(detector)
        joined = [" + ".join(dict.fromkeys(words)) for words in (methods, years, papers, cost)]
        row = [label, *joined[:3], _needs(detector), joined[3] or "cheap"]
        if obstacles is not None:
            row.append(f"no: {obstacles[label]}" if label in obstacles else "yes")
        table.add_row(*map(escape, row))
    if console.is_terminal:
        console.print(table)
    else:  # one line each, for other programs
        whole = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
        Console(highlight=False, width=whole).print(table)


def _per_image(detector: Detector) -> list[str]:
    """What the extra columns of a detector cost beyond the one forward pass; empty if nothing."""
    passes = sum(extra.forwards for extra in detector.extras() if not extra.tapped)
    return [f"{passes} passes per image"] if passes else []


def _described(detector: Detector) -> tuple[str, str, str]:
    """Method and year; first author, venue and where to find the paper."""
    method, _, year = detector.title.removesuffix(")").rpartition(" (")
    authors, _, rest = detector.paper.partition(": ")
    first, others, _ = authors.partition(", ")
    return method, year, f"{first}{' et al.' if others else ''}, {rest.rpartition('. ')[2]}"


def _needs(detector: Detector) -> str:
    """What a detector reads and learns from."""
    from pipeline import columns

    words = {columns.FEATURE: "features", columns.BLOCK_NORM: "feature maps (block norms)"}
    needs = [words.get(column, column) for column in detector.columns]
    needs += dict.fromkeys(extra.needs for extra in detector.extras())
    needs += ["training statistics"] * bool(detector.statistics()) + ["index"] * detector.neighbours
    needs += ["held-out or training statistics"] * bool(detector.calibration())
    needs += [f"extra pass ({type(spec).__name__.lower()})" for spec in detector.passes()]
    return ", ".join(needs + ["OOD data"] * detector.uses_ood())


def _explain(name: str) -> None:
    from pipeline import detectors as found

    detector = found.get(name)
    console.print(f"[bold]{escape(detector.title)}[/bold]  {escape(detector.paper)}\n")
    console.print(escape(detector.formula) + "\n")
    extras = [f"{extra.kind} ({extra.needs})" for extra in detector().extras()]
    console.print(f"reads: {', '.join([*detector.columns, *extras])}; higher = more OOD")
    passes = ", ".join(type(spec).__name__ for spec in detector().passes())
    console.print(
        f"extra passes: {passes or 'none'}; nearest neighbours: {'yes' if detector.neighbours else 'no'}\n"
    )
    for key, field in detector.model_fields.items():
        console.print(f"  [bold]{key}[/bold] = {field.default!r}  {escape(field.description or '')}")


@app.command()
def doctor(
    uri: Annotated[
        str, typer.Option("--mlflow", help="Also ask this MLflow server whether it is there.")
    ] = "",
) -> None:
    """Versions, what torch and FAISS see of the machine, and free disk; exit status 1 if something is wrong.

    Example: `ood-pipeline doctor --mlflow http://127.0.0.1:5000`
    """
    from pipeline.cli.doctor import examine

    problems = 0
    for finding in examine(uri):
        mark = "[green]ok[/green]  " if finding.good else "[red]bad[/red] "
        console.print(f"{mark} {finding.what:<12} {escape(finding.text)}")
        problems += not finding.good
    if problems:
        raise typer.Exit(1)


@app.command()
def verify(
    folder: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder, path or URI: <workspace>/runs/<name>.")
    ],
) -> None:
    """Count a finished run again from its files; exit status 1 if anything does not add up.

    Example: `ood-pipeline verify ./workspace/runs/quickstart`
    """
    from pipeline.cli.progress import Display
    from pipeline.results import verify as recount

    place = recount.located(folder)
    checks, fixes = 0, list[str]()
    with Display(console).stage("verify", recount.rows(place)) as stage:
        for finding in recount.examine(place, stage.advance):
            mark = "[green]ok[/green]  " if finding.good else "[red]bad[/red] "
            text = f"{finding.what}: expected {finding.expected}; found {finding.found}"
            console.print(f"{mark} {finding.where:<20} {escape(text)}")
            checks += 1
            fixes += [] if finding.good else [finding.fix]
        stage.note = f"{stage.done:,} rows, {checks} checks, {len(fixes)} bad"
    for fix in dict.fromkeys(fixes):
        console.print(f"fix  {fix}", markup=False)
    if fixes:
        raise typer.Exit(1)


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Options of the command itself."""
    if version:
        console.print(__version__)
        raise typer.Exit


def _end(number: int, _: object) -> None:
    """Leave by an exception, so that whatever is held is given back."""
    raise SystemExit(128 + number)


def main() -> None:
    """Entry point of the console command."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    signal.signal(signal.SIGTERM, _end)  # Ray, once started, has a handler that does the same
    os.environ[imports.FOLDER] = str(Path.cwd())  # inherited by Ray's workers
    try:
        app()
    except UserError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {error}", markup=False)
        raise SystemExit(2) from None
