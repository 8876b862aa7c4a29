"""A finished run, counted again from its files: whether every number of it is what the files say.

Needs the run folder and the workspace it lies in; neither the images, nor the model, nor Ray.

A check yields findings and raises `Unreadable` on a file it cannot use. `_features` and `_scores` have a
table of checks that every row passes through: one more is one function there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

from pipeline.config import loading
from pipeline.results.verify import _calibration, _features, _metrics, _scores
from pipeline.results.verify._files import Kept, Record, Run, intact, kept, read, reading
from pipeline.results.verify._findings import Finding, Tally, Unreadable, same
from pipeline.results.verify._listing import Listing
from pipeline.stages.evaluate import FORMAT
from pipeline.workspace import artifacts, files, runs, storage
from pipeline.workspace.files import Place

__all__ = ["Finding", "examine", "rows"]

_AGAIN = "run the evaluation again"


def examine(folder: Place, advance: Callable[[int], None] = lambda _: None) -> Iterator[Finding]:
    """Count and compute everything again.

    Args:
        folder: the run folder, as `runs.located` gives it.
        advance: called with the number of rows of every piece that was read.
    """
    try:
        record = read(folder / "manifest.json", Record)
    except Unreadable as error:
        yield _unreadable(error, "manifest.json", f"{_AGAIN}, which writes {folder / 'manifest.json'} anew")
        return
    run = Run(folder, runs.workspace_of(folder), record)
    status = same("status", "finished", record.status)
    yield from _of("run", f"{_AGAIN}: only what is finished is counted", iter([status]))
    if not status.good:
        return
    yield from _of("run", _AGAIN, _run(run))
    for name in record.datasets:
        yield from _dataset(run, name, advance)
    fix = f"delete what is not of this run in {folder / 'scores'}, and {_AGAIN}"
    yield from _of("scores", fix, _scores.strangers(run))
    for name in run.scored:
        fix = f"delete {run.scores(name)}, and {_AGAIN}"
        yield from _of(f"scores/{name}", fix, _scores.examine(run, name, advance))
    fix = f"delete {folder / artifacts.RECORD}, and {_AGAIN}"
    form = list(_of("metrics", _AGAIN, _form(run)))
    yield from form
    if all(finding.good for finding in form):
        yield from _of("metrics", fix, _metrics.examine(run))
        yield from _of("thresholds", fix, _metrics.thresholds(run))
        yield from _of("decisions", fix, _calibration.examine(run))
    yield from _of("artifacts", f"{_AGAIN}, which makes anew what is damaged and used", _kept(run))


def _dataset(run: Run, name: str, advance: Callable[[int], None]) -> Iterator[Finding]:
    """The list of a dataset's images, and its features."""
    where, path = f"manifests/{name}", run.compiled(name) / "rows.parquet"
    fix = f"{_AGAIN}, which writes {path} anew"
    try:
        listing = Listing(path)
    except Unreadable as error:
        yield _unreadable(error, where, fix)
        return
    yield from _of(where, fix, _features.listed(run, name, listing))
    fix = f"{_AGAIN}, which counts anew; if that does not help, delete {run.features(name)} before"
    yield from _of(f"features/{name}", fix, _features.examine(run, name, listing, advance))


def rows(folder: Place) -> int:
    """How many rows `examine` will read, as far as the record tells."""
    try:
        datasets = read(folder / "manifest.json", Record).datasets.values()
    except Unreadable:
        return 0
    return sum(dataset.rows * (1 if dataset.role == "train" else 2) for dataset in datasets)


def _of(where: str, fix: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """Findings of one place; a file that cannot be used ends them and is one more."""
    try:
        for finding in findings:
            yield replace(finding, where=where, fix="" if finding.good else fix)
    except Unreadable as error:
        yield _unreadable(error, where, fix)


def _unreadable(error: Unreadable, where: str, fix: str) -> Finding:
    return Finding("files", "all there and readable", str(error), False, where, fix)


def _form(run: Run) -> Iterator[Finding]:
    """Whether this version made the results; those of others are no damage, but have other metrics."""
    kind = kept(run.folder, Kept).kind
    if kind != FORMAT:
        yield Finding("format", FORMAT, f"{kind}: results of another version of this package", False)


def _kept(run: Run) -> Iterator[Finding]:
    """Whether what the run learned, and the scores of its detectors, have the bytes that were written."""
    wrong, places = Tally(), [name for name in run.record.artifacts if name.startswith(("fits/", "scores/"))]
    for name in places:
        try:
            found = intact(run.workspace / name, kept(run.workspace / name, Kept))
            wrong.add([] if found.good else [found.found])
        except Unreadable as error:
            wrong.add([error])
    yield wrong.finding("bytes", f"the recorded SHA-256 of every file of {len(places)} folders")
    remade = Tally()
    for name in run.scored:
        with suppress(FileNotFoundError, artifacts.Damaged):  # what is missing is told elsewhere
            table = artifacts.read_record(run.scores(name))
            for label, folder in table.identity["scores"].items():
                content = artifacts.read_record(run.workspace / "scores" / folder).content
                remade.add([f"{label} on {name}"] if content != table.inputs[label] else [])
    yield remade.finding("scores", "those that the run's tables were put together of; none made again since")


def _run(run: Run) -> Iterator[Finding]:
    """The run as a whole."""
    record = run.record
    yield same("name", storage.name_of(storage.parent(str(run.folder))), record.name)
    page = run.folder / "report" / "index.html"
    yield Finding("report", str(page), "there" if page.is_file() else "missing", page.is_file())
    results = kept(run.folder, Kept)
    yield same("fingerprint", record.fingerprint, str(results.identity.get("fingerprint")))
    yield intact(run.folder, results)
    with reading(run.folder / "config.yaml"), files.local(run.folder / "config.yaml") as file:
        settings = loading.load(str(file))
    yield same("seed in config.yaml", settings.seed, record.seed)
    roles = {dataset.name: dataset.role for dataset in settings.datasets}
    wrong = Tally()
    datasets = {name: dataset.role for name, dataset in record.datasets.items()}
    wrong.add(sorted(name for name in roles.keys() | datasets if roles.get(name) != datasets.get(name)))
    labels = {entry.label for entry in settings.detectors}
    wrong.add(sorted(labels ^ (record.detectors.keys() | record.not_applicable.keys())))
    yield wrong.finding("datasets, roles and detectors", "those of config.yaml")
