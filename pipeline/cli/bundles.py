"""Commands about fitted detectors that leave their evaluation: make a bundle, apply it to images."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.app import (
    EngineName,
    Json,
    Overrides,
    Quietly,
    Threads,
    Verbose,
    apart,
    app,
    console,
    display,
    document,
    level,
)

ALARM = 3
"""Exit status where an alarm that was asked for is raised."""

Detectors = Annotated[
    str, typer.Option(metavar="NAME,NAME,...", help="Labels of the detectors; default: all.")
]


@app.command()
def bundle(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Run folder, path or URI: `<workspace>/runs/<name>[/<id>]`.")
    ],
    out: Annotated[str, typer.Option(metavar="FOLDER", help="The bundle, path or URI; must not exist.")],
    detectors: Detectors = "",
    weights: Annotated[
        bool, typer.Option("--weights", help="Put the weights of the network into it, as safetensors.")
    ] = False,
    false_alarm: Annotated[
        list[float],
        typer.Option(metavar="RATE", help="May be repeated; default: those of the run, or 0.05."),
    ] = [],  # noqa: B006 - typer copies defaults
    code: Annotated[
        bool, typer.Option("--code", help="Put the code of detectors that are files of your own into it.")
    ] = False,
    export: Annotated[
        list[str],
        typer.Option(
            metavar="FILE",
            help="Write network and detectors as one graph, too: .pt2 or .onnx; may be repeated.",
        ),
    ] = [],  # noqa: B006
    log_model: Annotated[
        bool, typer.Option("--log-model", help="Log it as a model of the run in MLflow, too.")
    ] = False,
    register: Annotated[
        str, typer.Option(metavar="NAME", help="Log it and make it a version of this registered model.")
    ] = "",
    quiet: Quietly = False,
) -> None:
    """Keep the fitted detectors of a finished run as one folder that needs neither workspace nor data.

    Example: `ood-pipeline bundle workspace/runs/quickstart --detectors grood,knn --out detector.ood`
    """
    from pipeline.workflows import bundle as work

    shown = display(quiet)
    with shown.stage("write", "opens the run") as stage:
        asked = _labels(detectors)
        options = work.Options(asked, weights, false_alarm, code, export)
        made = work.make(run, out, options, stage)
        stage.note = f"{len(made.labels)} detectors"
    console.print(f"bundle   {made.name}", markup=False, soft_wrap=True)
    for path in export:
        console.print(f"graph    {path}", markup=False, soft_wrap=True)
    if members := [label for label in made.labels if asked and label not in asked]:
        console.print(
            f"notice   also in it, as members of those asked for: {', '.join(members)}",
            markup=False,
            soft_wrap=True,
        )
    if not made.false_alarm:
        console.print(
            "notice   the run has no held-out ID images (role id_val): the bundle gives scores, but no "
            "p-values and no flags",
            soft_wrap=True,
        )
    if not made.document["holds_weights"]:
        model = made.document["model"]
        console.print(
            f"notice   the weights are not in it; it needs {model['weights'] or model['name']} (--weights)",
            markup=False,
            soft_wrap=True,
        )
    if log_model or register:
        with shown.stage("track", "logs the model to MLflow"):
            uri = work.log_model(made, run, register or None)
        console.print(f"model    {uri}", markup=False, soft_wrap=True)


@app.command()
def apply(
    bundle: Annotated[
        str, typer.Argument(metavar="BUNDLE", help="A folder that `bundle` made, path or URI.")
    ],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Images: a folder, tar, Parquet, .npz, IDX, or one image.")
    ],
    out: Annotated[str, typer.Option(metavar="TABLE", help="A folder of parts, or a .parquet or .csv file.")],
    format: Annotated[str, typer.Option(help="Of DATA; default: told from its name.")] = "",
    images: Annotated[
        str, typer.Option(help="npz: array; parquet: column; webdataset: ending of the images.")
    ] = "",
    time: Annotated[
        str, typer.Option(metavar="COLUMN", help="Parquet: when images were taken; default: folders' dates.")
    ] = "",
    detectors: Detectors = "",
    false_alarm: Annotated[
        float | None, typer.Option(metavar="RATE", help="Flag images at it; default: the first of BUNDLE.")
    ] = None,
    fdr: Annotated[
        float | None,
        typer.Option(metavar="RATE", help="Flag the images together instead, at a false-discovery rate."),
    ] = None,
    alarm_above: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Exit status 3 if a detector flags a larger share of the images."),
    ] = None,
    alarm_drift: Annotated[
        bool, typer.Option("--alarm-drift", help="Exit status 3 if a date is out of control.")
    ] = False,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run the code of detectors that BUNDLE holds.")
    ] = False,
    workspace: Annotated[
        str, typer.Option(help="Folder for what is done so far; a killed command goes on there.")
    ] = "./workspace",
    overrides: Overrides = [],  # noqa: B006
    engine: EngineName = "auto",
    threads: Threads = 0,
    quiet: Quietly = False,
    as_json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Score and flag images with the detectors of a bundle; if interrupted, it goes on where it stopped.

    Example: `ood-pipeline apply detector.ood /data/last-night --out scores.parquet --alarm-above 0.1`
    """
    apart(as_json)
    from pipeline.results import applied
    from pipeline.workflows import apply as work

    options = work.Options(
        format=format or None,
        images=images or None,
        time=time or None,
        detectors=_labels(detectors),
        false_alarm=false_alarm,
        fdr=fdr,
        alarm_above=alarm_above,
        alarm_drift=alarm_drift,
        trust_code=trust_code,
        workspace=workspace,
        overrides=overrides,
        engine=engine,
        threads=threads or None,
        level=level(verbose),
    )
    outcome = work.execute(bundle, data, out, options, display(quiet))
    lines = [("", line) for line in applied.sentences(outcome.summary)]
    lines += [("table", str(outcome.output.place)), ("summary", str(outcome.output.summary))]
    if outcome.summary["images"]["errors"]:
        lines.append(("errors", str(outcome.output.errors)))
    lines += [("alarm", text) for text in outcome.alarms]
    for word, text in lines:
        console.print(f"{word:<8} {text}" if word else text, markup=False, soft_wrap=True)
    if as_json:
        document({"table": str(outcome.output.place), **outcome.summary})
    if outcome.alarms:
        raise typer.Exit(ALARM)


def _labels(text: str) -> list[str]:
    return [label.strip() for label in text.split(",") if label.strip()]
