"""A finished run that is counted again: whole, and damaged in one way at a time."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli import main
from pipeline.detectors.base import Pooled
from pipeline.errors import UserError
from pipeline.workspace import artifacts, files, tables
from pipeline.workspace.runs import located
from tests.stored import newest

Damage = Callable[[Path], None]

POOLED = Pooled().column


def pictures(folder: Path, images: Path) -> list[dict[str, Any]]:
    """Two datasets of files: one has a file that is no image, one has images with two right labels."""
    with np.load(images) as arrays:
        pixels, labels = arrays["test_x"][:6], arrays["test_y"][:6].tolist()
    for name in ("strange", "several"):
        (folder / name).mkdir()
        for number, image in enumerate(pixels):
            Image.fromarray(image).save(folder / name / f"{number}.png")
    (folder / "strange" / "broken.png").write_text("this is no image")
    lines = [f"several/{number}.png {label};{(label + 1) % 10}\n" for number, label in enumerate(labels)]
    (folder / "several.txt").write_text("".join(lines))
    return [
        {"name": "strange", "role": "far_ood", "format": "imagefolder", "path": str(folder / "strange")},
        {"name": "several", "role": "id", "format": "imagelist", "path": str(folder / "several.txt")},
    ]


@pytest.fixture(scope="module")
def kept() -> dict[str, Path]:
    """The workspace of the one evaluation of this module, once it was made."""
    return {}


@pytest.fixture
def finished(kept, settings, images, load, execute, tmp_path, tmp_path_factory) -> Path:
    """Workspace of a finished evaluation; not to be changed."""
    if not kept:
        more = {"shifted": "shifted_id", "production": "unlabelled"}
        entries = [
            {"name": name, "role": role, "format": "npz", "path": str(images), "images": f"{name}_x"}
            for name, role in more.items()
        ]
        entries[0]["labels"] = "shifted_y"
        settings["datasets"] += entries + pictures(tmp_path, images)
        settings["detectors"] = ["msp", "mahalanobis_ensemble"]
        settings["extract"]["max_bad_fraction"] = 0.5
        made = execute(load(settings)).folder.parent.parent.parent
        kept["workspace"] = made.rename(tmp_path_factory.mktemp("finished") / "workspace")
    return kept["workspace"]


@pytest.fixture
def workspace(finished: Path, tmp_path: Path) -> Path:
    """A copy of the evaluation that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def verify(workspace: Path, *options: str) -> Result:
    return CliRunner().invoke(main.app, ["verify", str(workspace / "runs" / "small"), *options])


def test_checks_that_are_fine_are_counted_and_named_on_request(finished: Path) -> None:
    short = verify(finished).output
    assert re.fullmatch(
        r"verify    reads the record\n(?:verify .*\n)*verify +[\d.]+ s  (\d+) checks, 0 bad\n", short
    )
    count = int(short.split("s  ")[1].split()[0])
    assert len(re.findall("^ok ", verify(finished, "-v").output, re.MULTILINE)) == count
    found = json.loads(verify(finished, "--json").stdout)
    assert len(found) == count
    assert all(finding["good"] for finding in found)


def bad(result: Result) -> list[str]:
    return [line for line in result.output.splitlines() if line.startswith("bad")]


def features(dataset: str, part: int | str = 0) -> Callable[[Path], Path]:
    name = tables.part_name(part) if isinstance(part, int) else part
    return lambda workspace: next(workspace.glob(f"features/{dataset}-*")) / name


def compiled(dataset: str) -> Callable[[Path], Path]:
    return lambda workspace: next(workspace.glob(f"manifests/{dataset}-*")) / "rows.parquet"


def of_run(name: str) -> Callable[[Path], Path]:
    return lambda workspace: newest(workspace) / name


def scores(dataset: str) -> Callable[[Path], Path]:
    return of_run(f"scores/{dataset}/part-00000.parquet")


def table(where: Callable[[Path], Path], change: Callable[[pa.Table], pa.Table]) -> Damage:
    """Damage of a Parquet file."""

    def damage(workspace: Path) -> None:
        with pq.ParquetFile(where(workspace)) as file:
            content = file.read()
        tables.write_table(where(workspace), change(content))

    return damage


def cell(where: Callable[[Path], Path], column: str, row: int, value: Any) -> Damage:
    """Another value in one cell of a Parquet file; given a function, of the column's values."""

    def change(content: pa.Table) -> pa.Table:
        values = content[column].to_pylist()
        values[row] = value(values) if callable(value) else value
        field = content.schema.field(column)
        return content.set_column(content.schema.get_field_index(column), field, pa.array(values, field.type))

    return table(where, change)


def document(where: Callable[[Path], Path], *keys: Any, value: Any) -> Damage:
    """Another value in a JSON document."""

    def damage(workspace: Path) -> None:
        content = inner = json.loads(where(workspace).read_text())
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        where(workspace).write_text(json.dumps(content))

    return damage


def record(where: Callable[[Path], Path], *keys: Any, value: Any) -> Damage:
    """Another value in the record of an artifact, which is sealed again."""

    def damage(workspace: Path) -> None:
        document(where, *keys, value=value)(workspace)
        content = json.loads(where(workspace).read_text())
        content.pop("sha256 of the rest")
        artifacts._seal(where(workspace), content)

    return damage


def gone(where: Callable[[Path], Path]) -> Damage:
    def damage(workspace: Path) -> None:
        path = where(workspace)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def cut(where: Callable[[Path], Path]) -> Damage:
    """Half of the file is missing."""

    def damage(workspace: Path) -> None:
        content = where(workspace).read_bytes()
        where(workspace).write_bytes(content[: len(content) // 2])

    return damage


def copied(where: Callable[[Path], Path], to: Callable[[Path], Path]) -> Damage:
    def damage(workspace: Path) -> None:
        to(workspace).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(where(workspace), to(workspace))

    return damage


def reordered(content: pa.Table) -> pa.Table:
    return content.take([1, 0, *range(2, len(content))])


def narrower(content: pa.Table) -> pa.Table:
    values = tables.numpy_columns(content, [POOLED])[POOLED][:, 1:]
    return content.set_column(1, POOLED, tables.arrow_columns({POOLED: values})[POOLED])


def text(where: Callable[[Path], Path], old: str, new: str) -> Damage:
    def damage(workspace: Path) -> None:
        content = where(workspace).read_text()
        assert old in content
        where(workspace).write_text(content.replace(old, new, 1))

    return damage


def of_earlier_version(workspace: Path) -> None:
    """Results of a version that knew no OSCR."""
    record(of_run(artifacts.RECORD), "kind", value="results 2")(workspace)
    for name in ("metrics.parquet", "comparisons.parquet"):
        table(of_run(name), lambda content: content.filter(pc.not_equal(content["metric"], "oscr")))(
            workspace
        )


def other_network(workspace: Path) -> None:
    """Features of the same images as another network would see them, consistent in themselves."""

    def change(content: pa.Table) -> pa.Table:
        order = np.roll(np.arange(len(content)), 1)
        for name in ("prediction", "feature", "logits", "block_norm"):
            column = content[name].take(pa.array(order))
            content = content.set_column(content.schema.get_field_index(name), name, column)
        return content

    table(features("animals"), change)(workspace)


CASES: dict[str, tuple[Damage, str]] = {
    "feature row lost": (
        table(features("test", 1), lambda content: content.slice(1)),
        r"features/test +keys: .* found missing: 1 \(test_x/0*128\)$",
    ),
    "feature row counted wrong": (
        table(features("test", 1), lambda content: content.slice(1)),
        r"features/test +parts: .*part-00001\.parquet has 127 rows, not 128",
    ),
    "key twice": (
        cell(features("test"), "key", 1, lambda keys: keys[0]),
        r"features/test +keys: .* found missing: 1 \(.*\); found more than once: 1 \(test_x/0*0\)",
    ),
    "key renamed": (
        cell(features("test"), "key", 1, "renamed"),
        r"features/test +keys: .* found missing: 1 \(.*\); not in the list: 1 \(renamed\)",
    ),
    "error row lost": (
        table(features("strange", "errors.parquet"), lambda content: content.slice(1)),
        r"features/strange +keys: .* missing: 1 \(broken\.png\)",
    ),
    "errors lost": (
        gone(features("strange", "errors.parquet")),
        r"features/strange +columns: .*errors\.parquet is missing",
    ),
    "feature NaN": (
        cell(features("test"), "logits", 2, [float("nan")] * 10),
        r"features/test +finite: .* exceptions: 1 \(test_x/0*2\)",
    ),
    "prediction changed": (
        cell(features("test"), "prediction", 2, -1),
        r"features/test +predictions: .* exceptions: 1 \(test_x/0*2\)",
    ),
    "label changed": (
        cell(features("test"), "label", 2, lambda labels: (labels[2] + 1) % 10),
        r"features/test +labels: .* exceptions: 1 \(test_x/0*2\)",
    ),
    "label that is none of several": (
        cell(features("several"), "label", 2, lambda labels: (labels[2] + 2) % 10),
        r"features/several +labels: .* exceptions: 1 \(",
    ),
    "label outside the head": (
        cell(features("test"), "label", 2, 10),
        r"features/test +label range: .* exceptions: 1 \(test_x/0*2\)",
    ),
    "feature narrower": (
        table(features("test"), lambda content: content.drop_columns("block_norm")),
        r"features/test +columns: .*part-00000\.parquet has other columns: block_norm is missing",
    ),
    "null label": (
        cell(features("test"), "label", 2, None),
        r"features/test +columns: .*part-00000\.parquet has nulls in column label",
    ),
    "truncated features": (
        cut(features("test", 2)),
        r"features/test +columns: .*part-00002\.parquet cannot be read: ",
    ),
    "feature part lost": (
        gone(features("test", 2)),
        r"features/test +parts: .*part-00002\.parquet is missing",
    ),
    "features lost": (
        gone(features("test", "")),
        r"features/test +files: .*/_manifest\.json is missing",
    ),
    "feature part too many": (
        copied(features("test"), features("test", 7)),
        r"features/test +parts: .*part-00007\.parquet is not of it",
    ),
    "feature part of another dataset": (
        copied(features("animals"), features("textures")),
        r"features/textures +keys: .* missing: 128 \(.*not in the list: 128 \(animals_x/0*0, .*, \.\.\.\)",
    ),
    "feature part of another network": (other_network, r"scores/animals +score predictions: "),
    "identity edited": (
        record(features("test", "_manifest.json"), "identity", "weights", value="0"),
        r"features/test +hash of the identity: ",
    ),
    "record of features damaged": (
        document(features("animals", "_manifest.json"), "identity", "weights", value="0"),
        r"features/animals +files: .*_manifest\.json: other bytes than were written",
    ),
    "image list edited": (
        cell(compiled("test"), "label", 2, lambda labels: (labels[2] + 1) % 10),
        r"manifests/test +digest: ",
    ),
    "key twice in the image list": (
        cell(compiled("test"), "key", 2, lambda keys: keys[1]),
        r"manifests/test +repeated keys: expected none among 300; found exceptions: 2 \(test_x/0*1, ",
    ),
    "image list lost": (
        gone(compiled("test")),
        r"manifests/test +files: .*rows\.parquet is missing",
    ),
    "count edited": (
        document(of_run("manifest.json"), "datasets", "test", "features", value=299),
        r"features/test +rows: expected 300 rows = 299 features \+ 0 errors; found 300 rows = 300 features",
    ),
    "score NaN": (
        cell(scores("test"), "msp", 2, float("nan")),
        r"scores/test +finite scores: .* exceptions: 1 \(test_x/0*2\)",
    ),
    "score null": (
        cell(scores("test"), "msp", 2, None),
        r"scores/test +rows without a score: expected none; found msp: 1 \(test_x/0*2\)",
    ),
    "flag null": (
        cell(scores("production"), "is_ood.msp", 2, None),
        r"scores/production +flags: .* exceptions: 1 \(",
    ),
    "loss of scores made up": (
        document(
            of_run("manifest.json"), "unscored", "animals", value={"msp": {"rows": 1, "first": {"a": "nan"}}}
        ),
        r"scores/animals +rows without a score: expected msp: 1 \(a\); found none",
    ),
    "scores in another order": (
        table(scores("test"), reordered),
        r"scores/test +score keys: .* exceptions: 2 \(",
    ),
    "score label changed": (
        cell(scores("test"), "label", 2, lambda labels: (labels[2] + 1) % 10),
        r"scores/test +score labels: .* exceptions: 1 \(test_x/0*2\)",
    ),
    "score row lost": (
        table(scores("test"), lambda content: content.slice(0, 299)),
        r"scores/test +parts: .*part-00000\.parquet has 299 rows, not 300",
    ),
    "score column too many": (
        table(scores("test"), lambda content: content.append_column("old", content["msp"])),
        r"scores/test +files: .*part-00000\.parquet has other columns: old is double, not expected",
    ),
    "truncated scores": (cut(scores("test")), r"scores/test +files: .*part-00000\.parquet cannot be read"),
    "scores lost": (gone(of_run("scores/test")), r"scores +folders: .*test is missing"),
    "scores of another run": (
        copied(scores("test"), scores("old")),
        r"scores +folders: .*old is not of this run",
    ),
    "scores made again of other data": (
        record(of_run("scores/test/_manifest.json"), "inputs", "msp", value="0" * 64),
        r"artifacts +scores: expected those that the run's tables .* exceptions: 1 \(msp on test\)",
    ),
    "flag changed": (
        cell(scores("production"), "is_ood.msp", 2, lambda flags: not flags[2]),
        r"scores/production +flags: .* exceptions: 1 \(production_x/0*2\)",
    ),
    "metric edited": (
        cell(of_run("metrics.parquet"), "value", 3, 0.5),
        r"metrics +values of msp: .* exceptions: 1 \(.* of msp on .* is 0\.5 .*, computed 0\.",
    ),
    "metric counts edited": (
        cell(of_run("metrics.parquet"), "n_id", 3, 305),
        r"metrics +values of msp: .* exceptions: 1 \(.*\(305 ID, 150 OOD\), computed .*\(306 ID, 150 OOD\)",
    ),
    "metric lost": (
        table(of_run("metrics.parquet"), lambda content: content.slice(0, len(content) - 1)),
        r"metrics +metrics: .* exceptions: 1 \(no augrc of mahalanobis_ensemble on shifted in shifted_id",
    ),
    "interval beside the value": (
        cell(of_run("metrics.parquet"), "ci_low", 3, 1.0),
        r"metrics +range: .* exceptions: 1 \(",
    ),
    "comparison lost": (
        table(of_run("comparisons.parquet"), lambda content: content.slice(1)),
        r"metrics +comparisons\.parquet: .* exceptions: 1 \(no .* / .* / auroc",
    ),
    "p-value edited": (
        cell(of_run("comparisons.parquet"), "p_holm", 2, -0.5),
        r"metrics +comparisons\.parquet: .* exceptions: 1 \(p-values of row 2\)",
    ),
    "metrics.json edited": (
        document(of_run("metrics.json"), 3, "value", value=0.5),
        r"metrics +metrics\.json: .* exceptions: 1 \(row 4\)",
    ),
    "metrics.csv edited": (
        text(of_run("metrics.csv"), '"auroc",0', '"auroc",1'),
        r"metrics +metrics\.csv: .* exceptions: 1 \(row 4\)",
    ),
    "truncated metrics": (
        cut(of_run("metrics.parquet")),
        r"metrics +files: .*metrics\.parquet cannot be read",
    ),
    "accuracy edited": (
        document(of_run("manifest.json"), "datasets", "test", "accuracy", value=0.5),
        r"metrics +accuracy of test in manifest\.json: expected 0\.5; found 0\.",
    ),
    "threshold edited": (
        document(of_run("thresholds.json"), "msp", value=-2.0),
        r"thresholds +threshold of msp: expected -.*; found -2\.0",
    ),
    "threshold lost": (
        text(of_run("thresholds.json"), "msp", "mps"),
        r"thresholds +detectors: ",
    ),
    "results of an earlier version": (
        of_earlier_version,
        r"metrics +format: expected results 5; found results 2: results of another version",
    ),
    "killed while it extracted": (
        document(of_run("manifest.json"), "datasets", "test", "features", value=None),
        r"features/test +rows: expected 300 rows = None features \+ 0 errors; found 300 rows = 300 features",
    ),
    "another evaluation": (
        document(of_run("manifest.json"), "fingerprint", value="0"),
        r"run +fingerprint: ",
    ),
    "report lost": (gone(of_run("report")), r"run +report: .*found missing"),
    "config broken": (
        text(of_run("config.yaml"), "name: small", "name: ["),
        r"run +files: .*config\.yaml cannot",
    ),
    "role edited": (
        document(of_run("manifest.json"), "datasets", "animals", "role", value="far_ood"),
        r"run +datasets, roles and detectors: .* exceptions: 1 \(animals\)",
    ),
    "record broken": (
        cut(of_run("manifest.json")),
        r"manifest\.json +files: .*manifest\.json cannot be read",
    ),
    "extra column of other rows": (
        table(features("test", f"{POOLED}/{tables.part_name(1)}"), reordered),
        rf"features/test +{POOLED}: .* exceptions: 2 \(test_x/0*129, test_x/0*128\)$",
    ),
    "extra column not finite": (
        cell(features("train", f"{POOLED}/{tables.part_name(0)}"), POOLED, 3, lambda values: [np.nan] * 240),
        rf"features/train +{POOLED}: .* exceptions: 1 \(train_x/0*3\)$",
    ),
    "extra column narrower": (
        table(features("test", f"{POOLED}/{tables.part_name(0)}"), narrower),
        rf"features/test +{POOLED}: .* {POOLED} is fixed_size_list.*\[239\], not .*\[240\]",
    ),
    "extra column lost": (
        gone(features("animals", f"{POOLED}/{tables.part_name(0)}")),
        rf"features/animals +parts: .*{POOLED}/part-00000\.parquet is missing",
    ),
    "record incomplete": (
        document(of_run("manifest.json"), "datasets", "test", "rows", value=None),
        r"manifest\.json +files: .*datasets\.test\.rows: Input should be a valid integer",
    ),
}


TOGETHER = (
    ("feature row lost", "error row lost", "feature NaN", "prediction changed"),
    ("feature row counted wrong", "errors lost", "label changed", "label that is none of several"),
    ("key twice", "label outside the head", "feature part too many", "feature part of another dataset"),
    ("key renamed", "feature part of another network", "identity edited", "image list edited"),
    ("feature narrower", "truncated features", "key twice in the image list", "score row lost"),
    ("null label", "feature part lost", "score column too many", "scores of another run"),
    ("scores made again of other data",),
    ("features lost", "scores lost", "flag changed", "metric lost", "comparison lost"),
    ("image list lost", "score NaN", "scores in another order", "interval beside the value"),
    ("count edited", "metric edited", "metric counts edited"),
    ("score null", "flag null", "loss of scores made up", "p-value edited"),
    ("truncated scores", "truncated metrics", "threshold lost"),
    ("metrics.json edited", "metrics.csv edited", "accuracy edited", "threshold edited"),
    ("killed while it extracted", "another evaluation", "report lost", "config broken"),
    ("role edited", "extra column of other rows", "extra column not finite", "extra column lost"),
    ("record broken",),
    ("extra column narrower", "record of features damaged", "score label changed"),
    ("record incomplete",),
    ("results of an earlier version",),
)
"""Damages that do not hide each other are done to one copy, because a recount takes most of a second."""


@pytest.mark.parametrize("names", TOGETHER, ids=", ".join)
def test_a_damaged_run_has_status_1_and_a_line_that_names_the_damage(
    names: tuple[str, ...], workspace: Path
) -> None:
    for name in names:
        CASES[name][0](workspace)
    result = verify(workspace)
    assert result.exit_code == 1, result.output
    lines = bad(result)
    for name in names:
        expected = CASES[name][1]
        assert any(re.match(f"bad +{expected}", line) for line in lines), (name, "\n".join(lines))
    if names == ("results of an earlier version",):
        assert not [line for line in lines if "oscr" in line]
    assert "\nfix  " in result.output


def test_every_damage_is_tried_once() -> None:
    assert sorted(name for names in TOGETHER for name in names) == sorted(CASES)


def test_a_whole_run_has_status_0_and_every_check_is_told(finished: Path) -> None:
    result = verify(finished, "-v")
    assert result.exit_code == 0, result.output
    assert not bad(result)
    assert "fix" not in result.output
    for line in (
        r"ok +run +status: expected finished; found finished",
        r"ok +features/strange +rows: expected 7 rows = 6 features \+ 1 errors; found 7 rows = 6 features",
        r"ok +features/train +keys: expected each of 500 once",
        rf"ok +features/strange +{POOLED}: expected keys of the features, finite values; found no exception",
        r"ok +scores/production +flags: ",
        r"ok +metrics +values of msp: expected 76 as computed from the scores; found no exception",
        r"ok +thresholds +threshold of msp: ",
    ):
        assert re.search(line, result.output), line


def test_of_a_run_that_is_not_finished_nothing_else_is_said(workspace: Path) -> None:
    document(of_run("manifest.json"), "status", value="partial")(workspace)
    (newest(workspace) / "metrics.parquet").unlink()
    result = verify(workspace)
    assert result.exit_code == 1
    assert re.search(r"bad +run +status: expected finished; found partial", result.output)
    assert len(re.findall(r"^bad ", result.output, re.MULTILINE)) == 1
    assert "fix  run the evaluation again: only what is finished is counted" in result.output


def test_a_draft_that_a_killed_writer_left_behind_is_no_result(workspace: Path) -> None:
    copied(scores("test"), of_run("scores/test/.part-00000.parquet.0123"))(workspace)
    copied(features("test"), features("test", ".part-00000.parquet.0123"))(workspace)
    assert verify(workspace).exit_code == 0


def test_a_bucket_that_is_not_there_is_refused(bucket: str) -> None:
    missing = files.at(bucket.replace("bucket-", "no-bucket-", 1)) / "runs" / "small"
    with pytest.raises(UserError, match=r"no run folder|cannot be read"):
        located(str(missing))


def test_a_run_is_counted_without_the_libraries_that_made_it() -> None:
    script = (
        "import pipeline.results.verify, sys; print({'torch', 'ray', 'mlflow', 'faiss'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"
