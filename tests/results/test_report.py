"""The report is all that most readers see of a run: its numbers are the run's, and nothing is left out."""

import json
import re
import shutil
from base64 import b64decode
from dataclasses import dataclass, field
from html.parser import HTMLParser
from io import BytesIO, StringIO
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageColor
from rich.console import Console
from sklearn.metrics import roc_curve

from pipeline.errors import UserError
from pipeline.results import report
from pipeline.results.report import charts, plots
from pipeline.results.report import page as page_module
from pipeline.results.report.compare import deviations
from pipeline.results.report.review import review
from pipeline.results.report.tables import GROUPS, Results
from pipeline.stages.evaluate import PAIRS
from tests.stored import stored

NEAR = {"cifar-100": "near_ood", "tin": "near_ood"}
FAR = {"mnist": "far_ood", "svhn": "far_ood", "textures": "far_ood"}
DETECTORS = ("grood", "knn", "featurenorm")
SMALL = {"tin": "near_ood", "svhn": "far_ood"}
NOTE = "1 of 2 files not read: .heic 1 (first: b.heic)"
HARMLESS = "1 of 9 files not read: hidden 1 (first: .DS_Store)"
METRICS = ("auroc", "aupr_in", "aupr_out", "fpr95_id", "fpr95_ood", "detection_error", "oscr")


@dataclass
class Setup:
    """What the synthetic run has."""

    ood: dict[str, str] = field(default_factory=lambda: SMALL)
    detectors: tuple[str, ...] = ("grood", "knn")
    shift: dict[str, float] = field(default_factory=dict)
    """Detector -> mean of its OOD scores; 2 unless told. ID scores have mean 0."""
    uses_ood: tuple[str, ...] = ()
    unlabelled: tuple[str, ...] = ("production",)
    passes: bool = True
    index: bool = True
    errors: dict[str, int] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    full_spectrum: bool = False
    rows: int = 120
    published: str | None = None
    not_applicable: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    level: tuple[str, ...] = ()
    """Detectors of which no test tells one from another."""
    notices: dict[str, list[str]] = field(default_factory=dict)
    costs: dict[str, dict[str, float]] = field(default_factory=dict)


def area(inlier, outlier):
    """AUROC by counting pairs in the right order, equal ones half."""
    ordered = np.sort(inlier)
    twice = sum(np.searchsorted(ordered, outlier, side).sum() for side in ("left", "right"))
    return float(twice / (2 * len(inlier) * len(outlier)))


def write_scores(run, setup):
    """Score tables in two parts each; returns dataset -> detector -> scores."""
    rng = np.random.default_rng(0)
    scores = {}
    for i, name in enumerate(["cifar10_test", *setup.ood, *setup.unlabelled]):
        shift = {d: (setup.shift.get(d, 2.0) + 0.2 * i if i else 0) for d in setup.detectors}
        scores[name] = {d: rng.normal(shift[d], 1 + 0.2 * (i > 0), setup.rows) for d in setup.detectors}
        right = (np.arange(setup.rows) % 10 > 0).astype(np.int32)
        table = {
            "key": [f"{n}.png" for n in range(setup.rows)],
            "label": np.ones_like(right),
            "prediction": right,
        }
        table |= scores[name]
        if name in setup.unlabelled:
            table |= {f"is_ood.{d}": column > 1.64 for d, column in scores[name].items()}
        half = setup.rows // 2
        stored(run / "scores" / name, [pa.table(table).slice(0, half), pa.table(table).slice(half)])
    return scores


def metric_rows(setup, scores):
    """True AUROC, made-up values for the other metrics: the report must show them, not compute them."""
    rng = np.random.default_rng(1)
    rows = []
    for detector in setup.detectors:
        for prefix in ("", "fs_") if setup.full_spectrum else ("",):
            values = {}
            for dataset, role in setup.ood.items():
                value = area(scores["cifar10_test"][detector], scores[dataset][detector])
                values[dataset, prefix + role] = {m: float(rng.random()) for m in METRICS} | {"auroc": value}
            for group in dict.fromkeys(group for _, group in values):
                members = [v for (_, g), v in values.items() if g == group]
                values[group, group] = {m: float(np.mean([v[m] for v in members])) for m in METRICS}
            rows += [
                metric_row(detector, dataset, group, metric, value)
                for (dataset, group), cells in values.items()
                for metric, value in cells.items()
            ]
    rows += [
        metric_row(detector, "cifar10_test", "id", metric, float(rng.random() / 2))
        for detector in setup.detectors
        for metric in ("aurc", "augrc")
    ]
    return [*rows, metric_row("classifier", "cifar10_test", "id", "id_accuracy", 0.9137)]


def differences(setup):
    """Every detector differs from every other, by AUROC on near-OOD, but for those that are level."""
    row = {"dataset": "near_ood", "group": "near_ood", "metric": "auroc"}
    return [
        row
        | {"detector": a, "other": b, "p_holm": 0.3 if {a, b} <= set(setup.level) else 0.01}
        | {"difference": 0.01 * (setup.shift.get(a, 2.0) - setup.shift.get(b, 2.0))}
        for a, b in combinations(setup.detectors, 2)
    ]


def metric_row(detector, dataset, group, metric, value):
    low, high = max(value - 0.0123, 0.0), min(value + 0.0117, 1.0)
    names = ("detector", "dataset", "group", "metric", "value", "ci_low", "ci_high", "n_id", "n_ood")
    return dict(zip(names, (detector, dataset, group, metric, value, low, high, 120, 120), strict=True))


def manifest_of(setup):
    roles = {"cifar10_train": "train", "cifar10_test": "id", **setup.ood}
    roles |= dict.fromkeys(setup.unlabelled, "unlabelled")
    blocks = [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]
    ratio = [1.02, 1.05, 1.11, 1.13, 1.22, 1.31, 1.46, 1.17]
    jigsaw = {
        "kind": "jigsaw",
        "spec": {"samples": 2000, "grid": 3},
        "samples": 1987,
        "blocks": blocks,
        "ratio": ratio,
        "stderr": [0.01 + 0.004 * i for i in range(8)],
    }
    mixup = {"kind": "mixup", "spec": {"samples": 1000}, "samples": 1000}
    index = {"knn": {"rows": 1950, "dim": 128, "kind": "flat", "shards": 1, "recall_at_1": 0.99951}}
    return {
        "name": "quickstart",
        "fingerprint": "5e3f" * 16,
        "status": "finished",
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T01:30:00+01:00",
        "seed": 0,
        "protocol": "OpenOOD v1.5 CIFAR-10",
        "published": setup.published,
        "versions": {"ood-pipeline": "0.1.0", "python": "3.11.7", "ray": "2.63.0", "torch": "2.14.0"},
        "git_commit": "abcdef0123456789",
        "model": {
            "source": "factory",
            "name": "pipeline.quickstart.resnet:build",
            "weights": "resnet.safetensors",
            "weights_digest": "77aa" * 16,
            "classes": 10,
            "feature_dim": 128,
            "head": "fc",
            "blocks": blocks,
        },
        "datasets": {
            name: {
                "role": role,
                "format": "npz",
                "path": f"data/{name}.npz",
                "rows": setup.rows + setup.errors.get(name, 0),
                "expected": setup.rows,
                "notes": setup.notes.get(name, []),
                "features": setup.rows,
                "errors": setup.errors.get(name, 0),
                "hash": f"{i:02x}" * 32,
                "digest": f"{i + setup.rows:02x}" * 32,
                "accuracy": 0.9137 if role == "id" else None,
                "machines": {"x86_64 AVX2": 3, **({"x86_64 AVX512": 1} if name == "svhn" else {})},
            }
            for i, (name, role) in enumerate(roles.items())
        },
        "detectors": {
            label: {
                "method": label,
                "title": f"{label.upper()} (2025)",
                "reading": f"At least 0: high {label} = OOD.",
                "formulas": [[f"{label.upper()} (2025)", f"score = <{label}>(x)", "Nobody: A paper. 2025"]],
                "parameters": {"k": 1, "prototype": {"kind": "mixup", "weight": 0.8}},
                "uses_ood": label in setup.uses_ood,
                "columns": ["feature"],
            }
            for label in setup.detectors
        },
        "not_applicable": setup.not_applicable,
        "warnings": list(setup.warnings),
        "notices": setup.notices,
        "costs": setup.costs,
        "passes": [jigsaw, mixup] if setup.passes else [],
        "index": index if setup.index else {},
        "stages": {
            "extract": {
                "seconds": 12.34,
                "images": 5800,
                "images_per_second": 2100.4,
                "forward_images": 5800,
            },
            "fit": {"seconds": 3.0},
            "score": {"seconds": 1.25, "images": 5800, "images_per_second": 4640.0, "retries": 3},
        },
        "nodes": {"ab12": {"host": "worker-7", "address": "10.0.0.7", "resources": {"CPU": 4.0, "GPU": 1.0}}},
    }


def make_run(folder: Path, setup: Setup) -> Path:
    run = folder / "quickstart"
    run.mkdir(parents=True)
    scores = write_scores(run, setup)
    pq.write_table(pa.Table.from_pylist(metric_rows(setup, scores)), run / "metrics.parquet")
    pq.write_table(pa.Table.from_pylist(differences(setup), PAIRS), run / "comparisons.parquet")
    (run / "manifest.json").write_text(json.dumps(manifest_of(setup)))
    (run / "thresholds.json").write_text(json.dumps(dict.fromkeys(setup.detectors, 1.64)))
    return run


class Page(HTMLParser):
    """Text of the page, text of each cell by section, and all attributes."""

    def __init__(self, source):
        super().__init__()
        self.attributes, self.images, self.cells = [], [], {}
        self.text, self.section, self.inside = "", "", False
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "section":
            self.section = dict(attrs)["id"]
        if tag == "img":
            self.images.append(dict(attrs))
        if tag in ("td", "th"):
            self.cells.setdefault(self.section, []).append("")
            self.inside = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cells[self.section][-1] = " ".join(self.cells[self.section][-1].split())
            self.inside = False

    def handle_data(self, data):
        self.text += data
        if self.inside:
            self.cells[self.section][-1] += data


def page_of(run: Path) -> Page:
    return Page(report.write(run).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(
        tmp_path_factory.mktemp("runs"),
        Setup(
            NEAR | FAR, DETECTORS, uses_ood=("knn",), errors={"svhn": 3}, notes={"mnist": [NOTE, HARMLESS]}
        ),
    )


@pytest.fixture(scope="module")
def page(finished):
    return page_of(finished)


def means(run):
    rows = pq.read_table(run / "metrics.parquet").to_pylist()
    return {(r["detector"], r["group"], r["metric"]): r for r in rows if r["dataset"] == r["group"]}


def test_every_number_of_the_leaderboard_is_the_one_in_the_metrics(finished):
    board = report.leaderboard(pq.read_table(finished / "metrics.parquet"))
    expected = means(finished)
    assert [(c.group, c.metric) for c in board.columns] == [
        (group, metric) for group in ("near_ood", "far_ood") for metric in ("auroc", "fpr95_id", "fpr95_ood")
    ]
    for row in board.rows:
        for column, cell in zip(board.columns, row.cells, strict=True):
            source = expected[row.detector, column.group, column.metric]
            assert (cell.value, cell.low, cell.high) == (source["value"], source["ci_low"], source["ci_high"])


def test_the_leaderboard_is_sorted_by_mean_auroc_and_marks_the_best_of_each_column(tmp_path):
    run = make_run(tmp_path, Setup(SMALL, DETECTORS, {"grood": 0.5, "knn": 3.0, "featurenorm": 1.0}))
    board = report.leaderboard(pq.read_table(run / "metrics.parquet"))
    assert [row.detector for row in board.rows] == ["knn", "featurenorm", "grood"]
    for i, column in enumerate(board.columns):
        values = [row.cells[i].value for row in board.rows]
        wanted = max(values) if column.metric == "auroc" else min(values)
        assert [row.cells[i].best for row in board.rows] == [value == wanted for value in values]


def test_detectors_that_the_same_images_cannot_tell_from_the_best_are_marked_where_they_are(tmp_path):
    shift = {"grood": 3.0, "knn": 2.9, "featurenorm": 1.0}
    run = make_run(tmp_path, Setup(SMALL, DETECTORS, shift, level=("grood", "knn"), passes=False))
    tables = (pq.read_table(run / f"{name}.parquet") for name in ("metrics", "comparisons"))
    board = report.leaderboard(*tables)
    level = {
        (column.group, column.metric): [row.detector for row in board.rows if row.cells[i].level]
        for i, column in enumerate(board.columns)
    }
    best, second = (row.detector for row in board.rows[:2])
    assert {best, second} == {"grood", "knn"}
    assert level.pop(("near_ood", "auroc")) == [second]
    assert not any(level.values())
    console = Console(width=80, record=True, file=StringIO())
    console.print(report.console_table(run))
    value = means(run)[second, "near_ood", "auroc"]["value"]
    assert f"={value:.4f}" in console.export_text()
    assert "level with the best" in report.write(run).read_text()


def test_rows_of_the_terminal_are_a_line_of_80_columns_each(tmp_path):
    names = ("temperature_knn_1", "grood", "knn")
    run = make_run(tmp_path, Setup(SMALL, names, level=names, passes=False))
    places = product(("near_ood", "far_ood"), ("auroc", "fpr95_id", "fpr95_ood"))
    rows = pq.read_table(run / "comparisons.parquet").to_pylist()
    level = [
        {**row, "dataset": group, "group": group, "metric": metric, "p_holm": 0.3}
        for group, metric in places
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(level, PAIRS), run / "comparisons.parquet")
    console = Console(width=80, record=True, file=StringIO())
    console.print(report.console_table(run))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert sorted(line[0] for line in lines if len(line) == 7) == sorted(2 * names)
    assert sum("=" in "".join(line[1:]) for line in lines if len(line) == 7) == 6


def test_what_must_be_known_first_stands_above_every_number(tmp_path):
    said = "knn is worse than guessing on <svhn>."
    source = report.write(make_run(tmp_path, Setup(warnings=(said,), passes=False))).read_text()
    assert source.count("knn is worse than guessing on &lt;svhn&gt;.") == 1
    assert source.index("knn is worse") < source.index("ID accuracy")
    assert "Before you believe" not in report.write(make_run(tmp_path / "sound", Setup())).read_text()


def test_the_summary_on_the_page_and_in_the_terminal_show_the_numbers_of_the_metrics(finished, page):
    console = Console(width=80, record=True, file=StringIO())
    console.print(report.console_table(finished))
    printed = console.export_text()
    for row in means(finished).values():
        if row["metric"] in ("auroc", "fpr95_id", "fpr95_ood"):
            value, interval = f"{row['value']:.4f}", f"{row['ci_low']:.3f}–{row['ci_high']:.3f}"
            assert value + interval in page.cells["summary"]
            assert value in printed
            assert interval in printed


def test_every_dataset_has_every_metric_on_the_page(finished, page):
    for row in pq.read_table(finished / "metrics.parquet").to_pylist():
        if row["detector"] != "classifier":
            value, interval = f"{row['value']:.4f}", f"{row['ci_low']:.3f}–{row['ci_high']:.3f}"
            section = "failures" if row["group"] == "id" else "datasets"
            assert value + interval in page.cells[section]


def test_what_was_left_out_of_a_dataset_stands_at_the_top_in_red_unless_nobody_misses_it(finished, page):
    assert f"mnist: {NOTE}." in page.text
    source = (finished / "report" / "index.html").read_text()
    assert f'<p class="alert"><strong>mnist:</strong> {NOTE}.' in source
    assert f'<p class="note"><strong>mnist:</strong> {HARMLESS}.' in source


def test_the_page_asks_for_nothing_from_outside(finished, page):
    links = [v for _, name, v in page.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    source = (finished / "report" / "index.html").read_text(encoding="utf-8")
    drawing = page_module._vendored("uPlot.iife.min.js")
    assert drawing.count("https://") == 1, "its own address, in a comment"
    assert not re.search(r"@import|url\(|https?://", source.replace(drawing, ""))


def test_names_with_markup_are_shown_and_not_interpreted(tmp_path):
    odd = "<&>x$_y"
    setup = Setup(ood={f"set{odd}": "far_ood"}, detectors=(f"det{odd}", "knn"), unlabelled=(f"new{odd}",))
    run = make_run(tmp_path, setup)
    page = page_of(run)
    for name in (f"set{odd}", f"det{odd}", f"new{odd}"):
        assert name in page.text
    assert odd not in (run / "report" / "index.html").read_text(encoding="utf-8")
    assert f"det{odd}" in page.cells["summary"]


def test_every_name_and_every_fact_of_the_manifest_is_on_the_page(finished, page):
    manifest = json.loads((finished / "manifest.json").read_text())
    shown = [
        *manifest["datasets"],
        *manifest["detectors"],
        *manifest["versions"].values(),
        *manifest["stages"],
        "worker-7",
        "10.0.0.7",
        "CPU = 4.0, GPU = 1.0",
    ]
    shown += [entry["hash"][:12] for entry in manifest["datasets"].values()]
    shown += [
        *manifest["versions"].values(),
        manifest["git_commit"],
        manifest["model"]["name"],
        manifest["fingerprint"],
    ]
    shown += ["2,100", "0.9995", "01 January 2026, 00:30 UTC", "0.9137", '"weight": 0.8', "1,987 images"]
    assert [fact for fact in shown if fact not in page.text] == []


def test_the_page_tells_how_to_read_every_score(finished, page):
    for entry in json.loads((finished / "manifest.json").read_text())["detectors"].values():
        ((title, formula, paper),) = entry["formulas"]
        assert entry["reading"] in page.text
        assert f"{title}: {formula} {paper}" in re.sub(r"\s+", " ", page.text)


def test_a_run_from_before_scores_were_explained_has_its_report(tmp_path, undrawn):
    run = make_run(tmp_path, Setup())
    manifest = json.loads((run / "manifest.json").read_text())
    for entry in manifest["detectors"].values():
        del entry["reading"], entry["formulas"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert "How to read the scores" not in page_of(run).text


def test_figures_are_files_and_the_page_embeds_the_same_bytes(finished, page):
    files = {path.name: path.read_bytes() for path in (finished / "report").glob("*.png")}
    assert set(files) == {
        *(f"roc-{name}.png" for name in NEAR | FAR),
        *(f"scores-{name}.png" for name in DETECTORS),
        "norm-ratio-1.png",
    }
    assert all(content.startswith(b"\x89PNG") for content in files.values())
    with Image.open(BytesIO(files["roc-svhn.png"])) as figure:
        dots = set(map(tuple, np.asarray(figure.convert("RGB")).reshape(-1, 3).tolist()))
    assert {ImageColor.getrgb(colour) for colour in plots.COLOURS[: len(DETECTORS)]} <= dots
    embedded = [b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in page.images]
    assert sorted(embedded) == sorted(files.values())
    assert all(image["alt"] for image in page.images)


@pytest.mark.parametrize(
    ("setup", "absent"),
    [
        (Setup(passes=False), "norm-ratio"),
        (Setup(unlabelled=()), "unlabelled"),
        (Setup(ood={}), "roc"),
    ],
)
def test_a_run_without_a_part_has_a_report_without_that_section(tmp_path, setup, absent):
    page = page_of(make_run(tmp_path, setup))
    sections = {value for tag, name, value in page.attributes if (tag, name) == ("section", "id")}
    assert absent not in sections
    assert {"summary", "scores", "provenance"} <= sections


@pytest.mark.usefixtures("undrawn")
def test_a_run_without_an_index_says_nothing_of_one(tmp_path, page):
    assert "Nearest-neighbour index" in page.text
    assert "Nearest-neighbour index" not in page_of(make_run(tmp_path, Setup(index=False))).text


@pytest.mark.parametrize(
    ("ood", "shown", "hidden"), [(NEAR, "Near-OOD", "Far-OOD"), (FAR, "Far-OOD", "Near-OOD")]
)
@pytest.mark.usefixtures("undrawn")
def test_only_the_group_that_exists_is_in_the_summary(tmp_path, ood, shown, hidden):
    cells = page_of(make_run(tmp_path, Setup(ood=ood))).cells["summary"]
    assert shown in cells
    assert hidden not in cells


@pytest.mark.usefixtures("undrawn")
def test_full_spectrum_values_have_columns_of_their_own(tmp_path):
    page = page_of(make_run(tmp_path, Setup(full_spectrum=True)))
    assert page.cells["datasets"].count("Near-OOD, full spectrum") == len(METRICS)
    assert page.cells["summary"].count("Near-OOD, full spectrum") == 1


def test_full_spectrum_values_do_not_decide_on_the_order(tmp_path):
    run = make_run(tmp_path, Setup(full_spectrum=True))
    metrics = pq.read_table(run / "metrics.parquet")
    wanted = [row.detector for row in report.leaderboard(metrics).rows]
    rows = [
        row | ({"value": 0.0} if row["group"].startswith("fs_") and row["detector"] == wanted[0] else {})
        for row in metrics.to_pylist()
    ]
    found = report.leaderboard(pa.Table.from_pylist(rows), groups=GROUPS)
    assert [row.detector for row in found.rows] == wanted
    assert {column.group for column in found.columns} == set(GROUPS)


@pytest.mark.usefixtures("undrawn")
def test_a_detector_below_chance_is_shown_and_explained(tmp_path):
    run = make_run(tmp_path, Setup(shift={"knn": -3.0}))
    page = page_of(run)
    wrong = [r for r in means(run).values() if r["metric"] == "auroc" and r["value"] < 0.5]
    assert {row["detector"] for row in wrong} == {"knn"}
    for row in wrong:
        assert any(f"{row['value']:.4f}" in cell and "▾" in cell for cell in page.cells["summary"])
    assert "OOD images score lower than ID images" in page.text


def test_no_note_on_chance_where_no_detector_is_below_it(page):
    assert "OOD images score lower than ID images" not in page.text


def test_images_that_could_not_be_used_are_announced(page):
    assert re.search(r"svhn:\s*3 of 123 images could not be used", page.text)
    assert "tin: " not in page.text


def test_features_of_several_kinds_of_machine_are_announced(page):
    kinds = r"3 parts on x86_64 AVX2; 1 parts on x86_64 AVX512"
    assert re.search(rf"svhn:\s*its features were made on 2 kinds of machine.*: {kinds}", page.text)
    assert page.text.count("kinds of machine") == 1


def test_a_detector_that_saw_ood_data_is_marked_wherever_it_has_a_result(finished, page):
    for section in ("summary", "datasets", "unlabelled", "provenance"):
        names = [cell.split() for cell in page.cells[section] if cell.split()[:1] in (["knn"], ["grood"])]
        assert ["knn", "uses", "OOD", "data"] in names
        assert ["grood", "uses", "OOD", "data"] not in names
    marked = {text.plain for text in report.console_table(finished).columns[0].cells if "*" in text.plain}
    assert marked == {"knn *"}


def test_the_share_of_flagged_images_is_that_of_the_score_files(finished, page):
    table = pq.read_table(finished / "scores" / "production")
    for detector in DETECTORS:
        share = sum(table[f"is_ood.{detector}"].to_pylist()) / table.num_rows
        assert f"{100 * share:.1f}%" in page.cells["unlabelled"]


def no_image_of(run, dataset):
    """Leave no row in the table of scores of a dataset."""
    shutil.rmtree(run / "scores" / dataset)
    stored(run / "scores" / dataset, [])


@pytest.mark.usefixtures("undrawn")
def test_nothing_is_said_to_be_flagged_of_a_dataset_without_a_readable_image(tmp_path):
    run = make_run(tmp_path, Setup(unlabelled=("production", "camera"), errors={"camera": 120}))
    no_image_of(run, "camera")
    page = Page(report.write(run, 6).read_text(encoding="utf-8"))
    cells = page.cells["unlabelled"]
    assert cells[:3] == ["Detector", "production", "camera"]
    assert all(share.endswith("%") for share in cells[4::3])
    assert cells[5::3] == ["–", "–"]
    assert not re.search(r"\bnan\b", page.text)
    assert not any(image.dataset == "camera" for image in review(Results.read(run), 6).images)


def test_several_id_datasets_are_drawn_as_one(tmp_path):
    run = make_run(tmp_path, Setup(unlabelled=("more",)))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["datasets"]["more"]["role"] = "id"
    (run / "manifest.json").write_text(json.dumps(manifest))
    ids = ["cifar10_test", "more"]
    expected = np.concatenate([pq.read_table(run / "scores" / name)["knn"].to_numpy() for name in ids])
    np.testing.assert_array_equal(Results.read(run).scores(ids, "knn"), expected)
    alts = [image["alt"] for image in page_of(run).images]
    assert "Densities of the knn scores of cifar10_test + more, tin, svhn" in alts


def test_a_block_without_a_finite_ratio_is_never_the_largest():
    assert plots.largest(np.array([1.2, np.nan, np.inf, 1.3, -np.inf])) == 3


def test_a_crash_leaves_the_old_report_and_no_scraps(tmp_path, monkeypatch):
    run = make_run(tmp_path, Setup())
    report.write(run)
    before = {path.name: path.read_bytes() for path in (run / "report").iterdir()}
    (run / "report" / "mark").write_text("old")

    def fail(*_):
        raise RuntimeError("no room left")

    monkeypatch.setattr(plots, "norm_ratio", fail)
    with pytest.raises(RuntimeError, match="no room left"):
        report.write(run)
    after = {path.name: path.read_bytes() for path in (run / "report").iterdir()}
    assert after == before | {"mark": b"old"}
    assert not list(run.glob(".report*"))


def test_a_new_report_replaces_the_old_one_whole(tmp_path):
    run = make_run(tmp_path, Setup())
    page = report.write(run)
    (run / "report" / "roc-gone.png").write_bytes(b"of a dataset that has left the config")
    assert report.write(run) == page == run / "report" / "index.html"
    assert not (run / "report" / "roc-gone.png").exists()
    assert not list(run.glob(".report*"))


@pytest.mark.parametrize(
    "name", ["manifest.json", "metrics.parquet", "comparisons.parquet", "thresholds.json"]
)
def test_an_unfinished_run_is_refused(tmp_path, name):
    run = make_run(tmp_path, Setup())
    (run / name).unlink()
    with pytest.raises(UserError, match=f"not a finished run, got no {name}"):
        report.write(run)


def test_missing_scores_are_named(tmp_path):
    run = make_run(tmp_path, Setup())
    for part in (run / "scores" / "svhn").iterdir():
        part.unlink()
    with pytest.raises(UserError, match="svhn: no scores"):
        report.write(run)


def test_roc_points_are_those_of_scikit_learn_with_ties():
    rng = np.random.default_rng(3)
    inlier, outlier = rng.integers(0, 30, 200).astype(float), rng.integers(10, 40, 90).astype(float)
    fpr, tpr = plots.roc_points(inlier, outlier)
    truth = np.repeat([0, 1], [200, 90])
    expected = roc_curve(truth, np.concatenate([inlier, outlier]), drop_intermediate=False)
    np.testing.assert_allclose(fpr, expected[0], atol=1e-15)
    np.testing.assert_allclose(tpr, expected[1], atol=1e-15)
    assert np.trapezoid(tpr, fpr) == pytest.approx(area(inlier, outlier))


def test_thinned_roc_points_stay_on_the_curve_and_near_what_is_left_out():
    rng = np.random.default_rng(4)
    inlier, outlier = rng.normal(0, 1, 5000), np.round(rng.normal(2, 1, 60), 1)
    points = plots.roc_points(inlier, outlier)
    all_points, kept = np.stack(points, axis=1), np.stack(plots.thinned(*points, limit=101), axis=1)
    assert len(kept) <= 101 < len(all_points)
    assert {tuple(point) for point in kept} <= {tuple(point) for point in all_points}
    assert kept[0].tolist() == [0, 0]
    assert kept[-1].tolist() == [1, 1]
    distance = np.abs(all_points[:, None] - kept).sum(axis=2).min(axis=1)
    assert distance.max() <= 2 / 100 + 1e-12


def test_charts_have_the_rates_of_the_curve_through_all_points():
    rng = np.random.default_rng(6)
    inlier, outlier = rng.integers(0, 30, 300).astype(float), rng.integers(10, 40, 90).astype(float)
    fpr, tpr = plots.roc_points(inlier, outlier)
    found = np.array(charts.tpr_at_rates(fpr, tpr)) / charts.UNIT
    upper = [
        max(tpr[fpr == rate]) if (fpr == rate).any() else np.interp(rate, fpr, tpr) for rate in charts.RATES
    ]
    np.testing.assert_allclose(found, upper, atol=0.5 / charts.UNIT)
    assert found[0] == (outlier > inlier.max()).mean() > 0
    assert charts.tpr_at_rates(*plots.roc_points(np.zeros(3), np.zeros(4))) == [
        round(charts.UNIT * rate) for rate in charts.RATES
    ], "scores that are all equal tell nothing"


def data_of(run):
    source = (run / "report" / "index.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'<script id="charts" type="application/json">(.*?)</script>', source)[1])


def test_the_charts_have_every_detector_and_the_aurocs_of_the_metrics(finished, page):
    data, rows = data_of(finished), pq.read_table(finished / "metrics.parquet").to_pylist()
    aurocs = {(r["detector"], r["dataset"]): r["value"] for r in rows if r["metric"] == "auroc"}
    assert data["detectors"] == Results.read(finished).detectors
    assert [panel["dataset"] for panel in data["roc"]] == [*NEAR, *FAR]
    for panel in data["roc"]:
        assert panel["auroc"] == [aurocs[name, panel["dataset"]] for name in data["detectors"]]
        assert [len(tpr) for tpr in panel["tpr"]] == [len(data["rates"])] * len(DETECTORS)
    assert data["samples"] == ["cifar10_test", *NEAR, *FAR]
    for chart in data["scores"]:
        assert all(0.95 * charts.UNIT < sum(shares) <= 1.002 * charts.UNIT for shares in chart["shares"])
    assert len({json.dumps(line) for line in charts.lines(42)}) == 42


@pytest.mark.usefixtures("undrawn")
def test_more_detectors_than_have_figures_are_in_the_charts_alone(tmp_path):
    many = tuple(f"d{i:02}" for i in range(page_module.STATIC + 2))
    run = make_run(tmp_path, Setup({"tin": "near_ood"}, many, {"d03": 0.1, "d05": 0.2}, passes=False))
    text, data = page_of(run).text, data_of(run)
    assert data["detectors"][-2:] == ["d05", "d03"]
    figures = {path.stem for path in (run / "report").glob("scores-*.png")}
    assert figures == {f"scores-{name}" for name in data["detectors"][: page_module.STATIC]}
    assert f"the first {page_module.STATIC} of {len(many)} detectors" in text
    assert "detectors by mean AUROC" not in page_of(make_run(tmp_path / "few", Setup(passes=False))).text


def test_densities_count_rows_per_unit_of_score_and_ignore_a_far_tail():
    rng = np.random.default_rng(5)
    samples = {"id": np.append(rng.normal(0, 1, 999), 1e9), "ood": rng.normal(4, 1, 500)}
    edges, heights = plots.densities(samples, bins=20)
    assert edges[-1] < 10
    for name, sample in samples.items():
        for i in range(19):
            inside = ((sample >= edges[i]) & (sample < edges[i + 1])).sum()
            assert heights[name][i] == pytest.approx(inside / len(sample) / (edges[1] - edges[0]))


@pytest.mark.parametrize("scores", [[0.0, 0.0], [1e17, 1e17], [-1.0, np.nextafter(-1, 0)]])
def test_scores_that_hardly_differ_have_a_density(scores):
    edges, heights = plots.densities({"id": np.array(scores)})
    assert (np.diff(edges) > 0).all()
    assert (heights["id"] * np.diff(edges)).sum() == pytest.approx(1)


CIFAR10 = dict.fromkeys(("cifar100", "tin"), "near_ood") | dict.fromkeys(
    ("mnist", "svhn", "texture", "places365"), "far_ood"
)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    setup = Setup(CIFAR10, ("knn", "msp", "grood"), published="cifar10-resnet18", full_spectrum=True)
    return make_run(tmp_path_factory.mktemp("runs"), setup)


@pytest.mark.usefixtures("undrawn")
def test_every_published_number_that_the_run_has_a_counterpart_of_stands_beside_it(compared):
    rows = pq.read_table(compared / "metrics.parquet").to_pylist()
    ours = {(r["detector"], r["group"], r["dataset"], r["metric"]): r["value"] for r in rows}
    cells = page_of(compared).cells["published"][7:]
    shown = {tuple(cells[i : i + 3]): cells[i + 3 : i + 7] for i in range(0, len(cells), 7)}
    auroc, fpr = "AUROC ↑", "FPR95, OOD caught ↓"
    for detector, group, dataset, metric, published in (
        ("knn", "near_ood", "near_ood", "auroc", "0.9064 ± 0.0020"),
        ("grood", "near_ood", "near_ood", "auroc", "0.9116"),
        ("msp", "far_ood", "mnist", "auroc", "0.9263"),
        ("msp", "far_ood", "mnist", "fpr95_ood", "0.2364"),
    ):
        name = "Near-OOD, mean" if dataset == group else dataset
        mine, theirs, difference, source = shown[detector, name, auroc if metric == "auroc" else fpr]
        value = ours[detector, group, dataset, metric]
        assert mine.startswith(f"{value:.4f} ")
        assert theirs == published
        assert float(difference) == pytest.approx(value - float(published.split()[0]), abs=6e-5)
        assert "github.com" in source
    datasets = {name for _, name, _ in shown}
    assert datasets >= {"Near-OOD, mean", "Far-OOD, mean", "mnist", "svhn"}
    assert {detector for detector, _, _ in shown} == {"classifier", "knn", "msp", "grood"}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("ood", [CIFAR10, {}], ids=["FPR90", "no OOD data"])
def test_published_numbers_need_no_fpr95_of_the_run(tmp_path, ood):
    run = make_run(tmp_path, Setup(ood, ("knn",), published="cifar10-resnet18", passes=False))
    rows = pq.read_table(run / "metrics.parquet").to_pylist()
    rows = [row | {"metric": row["metric"].replace("fpr95", "fpr90")} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), run / "metrics.parquet")
    page = page_of(run)
    assert not [cell for cell in page.cells["published"] if "FPR" in cell]
    assert "0.9137" in " ".join(page.cells["published"])
    assert "FPR95" not in " ".join(page.cells["datasets"] if ood else [])


@pytest.mark.usefixtures("undrawn")
def test_a_method_under_two_labels_is_compared_under_each(tmp_path):
    run = make_run(tmp_path, Setup(CIFAR10, ("knn", "near"), published="cifar10-resnet18"))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["detectors"]["near"]["method"] = "knn"
    (run / "manifest.json").write_text(json.dumps(manifest))
    cells = page_of(run).cells["published"]
    assert cells.count("knn") == cells.count("near") > 0


@pytest.mark.usefixtures("undrawn")
def test_what_keeps_a_run_from_being_the_protocol_is_said_beside_the_published_numbers(compared):
    text = page_of(compared).text
    assert "Not the protocol as published" not in text
    manifest = json.loads((compared / "manifest.json").read_text())
    protocol = manifest["protocol"]
    assert deviations(manifest["datasets"], protocol) == []
    manifest["datasets"]["tin"]["expected"] = 7793
    manifest["datasets"]["svhn"]["expected"] = None
    manifest["datasets"]["production"]["expected"] = None
    assert deviations(manifest["datasets"], protocol) == [
        "tin has 120 of 7,793 images.",
        "Number of images not checked: svhn.",
    ]


@pytest.mark.usefixtures("undrawn")
def test_a_mean_over_other_datasets_is_not_set_beside_the_published_one(tmp_path):
    fewer = {name: role for name, role in CIFAR10.items() if name != "texture"}
    page = page_of(make_run(tmp_path, Setup(fewer, ("knn", "msp"), published="cifar10-resnet18")))
    cells = page.cells["published"]
    assert "Near-OOD, mean" in cells
    assert "mnist" in cells
    assert "Far-OOD, mean" not in cells
    assert "far_ood is no mean over the protocol's datasets (far_ood: mnist, places365, svhn)." in page.text


@pytest.mark.usefixtures("undrawn")
def test_where_no_published_number_has_a_counterpart_no_empty_table_is_shown(tmp_path):
    run = make_run(tmp_path, Setup(SMALL, ("own",), published="cifar10-resnet18"))
    table = pq.read_table(run / "metrics.parquet")
    pq.write_table(
        table.filter(pa.compute.not_equal(table["detector"], "classifier")), run / "metrics.parquet"
    )
    page = page_of(run)
    assert "published" not in page.cells
    assert "near_ood is no mean over the protocol's datasets (near_ood: tin)." in page.text
    assert "no published value has a counterpart in this run" in page.text


@pytest.mark.usefixtures("undrawn")
def test_what_scores_cost_stands_beside_the_metrics_of_those_that_were_computed(tmp_path, page):
    costs = {"knn": {"scores": 4000, "seconds": 0.5}}
    found = page_of(make_run(tmp_path, Setup(costs=costs)))
    cells = found.cells["summary"]
    assert "Scoring ↓" in cells
    assert cells[cells.index("knn") + 7] == "125 s"
    assert cells[cells.index("grood") + 7] == "–"
    assert "Scoring ↓" not in page.cells["summary"], "a run from before costs were recorded"


@pytest.mark.usefixtures("undrawn")
def test_notices_of_detectors_stand_with_the_summary(tmp_path, page):
    notices = {"knn": ["k = 1 is <small>."], "grood": ["One.", "Two."]}
    found = page_of(make_run(tmp_path, Setup(notices=notices)))
    assert "knn: k = 1 is <small>." in found.text
    assert "grood: One." in found.text and "grood: Two." in found.text
    assert "is <small>." not in page.text


@pytest.mark.usefixtures("undrawn")
def test_detectors_that_do_not_apply_are_listed_with_the_reason_and_are_nowhere_else(tmp_path, page):
    reasons = {"featurenorm": "the model has no <block>.", "vim": "no dataset has role 'train'."}
    found = page_of(make_run(tmp_path, Setup(not_applicable=reasons)))
    assert "2 of them do not apply" in found.text
    at = found.cells["provenance"].index("Reason")
    assert found.cells["provenance"][at + 1 : at + 5] == [cell for item in reasons.items() for cell in item]
    assert [cells.count("featurenorm") for cells in found.cells.values()] == [
        int(section == "provenance") for section in found.cells
    ]
    assert "not-applicable" not in {value for _, name, value in page.attributes if name == "id"}
    assert "of them do not apply" not in page.text


def test_a_run_without_published_numbers_has_no_such_section(finished, page):
    assert "published" not in page.cells
    assert "Published numbers" not in page.text
