"""Commands that run an evaluation, a stage of it, or a search for parameters.

They read the config before they import what takes seconds, so that a mistake in it is told at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.app import (
    ConfigFile,
    EngineName,
    Json,
    Overrides,
    Quietly,
    Threads,
    Verbose,
    Workspace,
    apart,
    app,
    aside,
    console,
    display,
    document,
    level,
    load,
    load_all,
    warn,
)
from pipeline.cli.several import documented, end, several_of
from pipeline.cli.validate import show_left_out, show_plans
from pipeline.cli.workspace import show_comparison

if TYPE_CHECKING:
    from pipeline.config.schema import Config
    from pipeline.results.mlflow.apart import Apart
    from pipeline.stages.prepare import Prepared
    from pipeline.workflows.run import Options, Outcome, StageName
    from pipeline.workflows.several import Several


def _execute(
    settings: Config,
    options: Options,
    quiet: bool = False,
    prepared: Prepared | None = None,
    background: Apart | None = None,
) -> Outcome:
    """Run stages and show what came of them."""
    from pipeline.results import report
    from pipeline.workflows import run

    outcome = run.execute(settings, options, display(quiet), prepared, background)
    if options.last in ("evaluate", "report"):
        warn(outcome.cautions)
        console.print(report.console_table(outcome.folder))
        for sentence in report.verdict(outcome.folder):
            console.print(f"verdict  {sentence}", markup=False, soft_wrap=True)
        if (decided := report.decisions_table(outcome.folder)) is not None:
            console.print(decided)
    lines: dict[str, object] = {"results": outcome.folder}
    if options.last == "report":
        lines["report"] = outcome.folder / "report" / "index.html"
    lines |= {"mlflow": outcome.link, "warning": outcome.warning}
    for name, text in lines.items():
        if text:
            console.print(f"{name:<8} {text}", markup=False, soft_wrap=True)
    warn(outcome.unreadable)
    warn(outcome.unscored)
    warn((f"{label}: {text}" for label, texts in outcome.notices.items() for text in texts), "notice")
    show_left_out(outcome.not_applicable)
    return outcome


def _described(outcome: Outcome) -> dict[str, object]:
    """An outcome as a document."""
    from pipeline.results import report
    from pipeline.workspace import files

    texts = (*outcome.cautions, *outcome.unreadable, *outcome.unscored, outcome.warning)
    return {
        "results": str(outcome.folder),
        "verdict": report.verdict(outcome.folder),
        "report": str(outcome.folder / "report" / "index.html"),
        "mlflow": outcome.link,
        "warnings": list(filter(None, texts)),
        "notices": dict(outcome.notices),
        "not_applicable": dict(outcome.not_applicable),
        "metrics": files.read_json(outcome.folder / "metrics.json"),
    }


@app.command()
def run(
    source: ConfigFile,
    overrides: Overrides = [],  # noqa: B006 - typer copies defaults
    workspace: Workspace = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Do everything again.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="If the same evaluation is under way, wait for its end.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and show the plan; start nothing.")
    ] = False,
    seeds: Annotated[
        str, typer.Option(metavar="N,N,...", help="A run for each of these seeds, and their mean ± std.")
    ] = "",
    weights: Annotated[
        list[str],
        typer.Option(metavar="WEIGHTS", help="A run for each of several weights of the model; repeat it."),
    ] = [],  # noqa: B006
    engine: EngineName = "auto",
    threads: Threads = 0,
    verbose: Verbose = 0,
    quiet: Quietly = False,
    as_json: Json = False,
) -> None:
    """Run a whole evaluation, or one for each of its `models`; what was interrupted goes on where it stopped.

    Example: `ood-pipeline run quickstart --set extract.batch_size=64 --workspace /tmp/ood`
    """
    apart(as_json)
    repeats = _repeats(seeds, weights)
    configs = [config for each in repeats for config in load_all(source, [*overrides, *each], workspace)]
    from pipeline.workflows.run import Options

    options = Options(fresh=fresh, wait=wait, engine=engine, threads=threads or None, level=level(verbose))
    several = several_of(configs)
    if dry_run:
        show_plans(several, several.prepared(display(quiet)), as_json)
        end(several, 2)
    else:
        done = _run(several, options, quiet)
        if as_json:
            document(documented([*map(_described, done)], several))
        elif len(done) > 1:
            _show_together(done, configs[0], quiet)
        end(several)


def _run(several: Several, options: Options, quiet: bool) -> list[Outcome]:
    """Run all on one engine. One that is alone is made ready by its run, which shows that it is."""
    from pipeline.results.mlflow.apart import Apart
    from pipeline.workflows.engines import connected

    if len(several.configs) == 1:
        return [_execute(several.configs[0], options, quiet)]

    def execute(ready: Prepared) -> Outcome:
        warn([ready.config.name], "run")
        return _execute(ready.config, options, quiet, ready, background)

    ready = several.prepared(display(quiet))
    with connected(options.engine, ready), Apart() as background:
        return several.run(execute, ready)


def _show_together(done: Sequence[Outcome], settings: Config, quiet: bool) -> None:
    from pipeline.results.comparing import compared
    from pipeline.results.evaluation import opened

    metric = "auroc" if settings.of_role("near_ood", "far_ood") else "aurc"
    with aside("compare", "compares the runs", quiet):
        found = compared([opened(outcome.folder) for outcome in done], [metric])
    show_comparison(found)


def _repeats(seeds: str, weights: list[str]) -> list[list[str]]:
    """The overrides of each run: every seed with every weights.

    Raises:
        UserError: seeds that are no numbers, or something given twice.
    """
    from pipeline.errors import UserError

    texts = [text.strip() for text in seeds.split(",")] if seeds else []
    if not all(text.isdecimal() for text in texts):
        raise UserError(f"--seeds: got {seeds!r}; expected numbers with commas between them, as 0,1,2.")
    numbers = [str(int(text)) for text in texts]
    for option, given in (("--seeds", numbers), ("--weights", weights)):
        if len(set(given)) < len(given):
            raise UserError(f"{option}: {', '.join(given)}: one is given twice. Give each its own.")
    by_seed = [[f"seed={number}"] for number in numbers] or [[]]
    by_weights = [[f"model.weights={json.dumps(each)}"] for each in weights] or [[]]
    return [[*seed, *each] for seed in by_seed for each in by_weights]


def _stage(name: StageName, summary: str) -> None:
    """Add the command of one stage."""

    def command(
        source: ConfigFile,
        overrides: Overrides = [],  # noqa: B006 - typer copies defaults
        workspace: Workspace = "",
        engine: EngineName = "auto",
        threads: Threads = 0,
        verbose: Verbose = 0,
        quiet: Quietly = False,
    ) -> None:
        several = several_of(load_all(source, overrides, workspace))
        from pipeline.workflows.run import Options

        options = Options(name, name, engine=engine, threads=threads or None, level=level(verbose))
        _run(several, options, quiet)
        end(several)

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
    quiet: Quietly = False,
    as_json: Json = False,
) -> None:
    """Write the report of a finished evaluation again, and send it to MLflow with `--track`.

    Example: `ood-pipeline report quickstart --track`
    """
    apart(as_json)
    several = several_of(load_all(source, overrides, workspace))
    from pipeline.workflows.run import Options

    options = Options("report", publish="always" if track else "never", engine="inline")
    done = _run(several, options, quiet)
    if as_json:
        document(documented([*map(_described, done)], several))
    end(several)


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
    engine: EngineName = "auto",
    threads: Threads = 0,
    verbose: Verbose = 0,
    quiet: Quietly = False,
    as_json: Json = False,
) -> None:
    """Choose detector parameters from the grids of `tune`, on cached rows of `id_val` and `ood_val` images.

    Example: `ood-pipeline tune quickstart --metric fpr95_id --output tuned.yaml`
    """
    apart(as_json)
    chosen = [f"tune.metric={json.dumps(metric)}"] if metric else []
    settings = load(source, [*overrides, *chosen], workspace)
    from pipeline.workflows import tune as search

    options = replace(search.FROM_FIT, engine=engine, threads=threads or None, level=level(verbose))
    outcome = search.execute(settings, search.target(source, output, force), display(quiet), options)
    console.print(search.console_table(outcome))
    for name, text in {"table": outcome.table, "config": outcome.config}.items():
        console.print(f"{name:<8} {text}", markup=False, soft_wrap=True)
    warn(outcome.unscored)
    if as_json:
        document({**asdict(outcome), "table": str(outcome.table), "config": str(outcome.config)})
