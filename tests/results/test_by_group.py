"""Errors by predicted class and by metadata: counted from the score files, and of the right detector."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from pipeline.data.metadata import Metadata
from pipeline.data.metadata import read as read_metadata
from pipeline.results import report
from pipeline.results.report.by_group import by_group
from pipeline.results.report.tables import Results
from tests.results.test_report import SMALL, Setup, area, make_run, page_of
from tests.stored import stored

THRESHOLD = 1.64


def read(run: Path, dataset: str) -> pa.Table:
    return pq.read_table(run / "scores" / dataset)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path, Setup(shift={"knn": 1.0}, uses_ood=("grood",), passes=False))


def test_errors_are_those_of_the_scores_of_the_best_detector_that_saw_no_ood_image(run: Path) -> None:
    (found,) = by_group(Results.read(run))
    assert (found.by, found.detector) == ("predicted class", "knn")
    ood = pa.concat_tables([read(run, name) for name in SMALL])
    tested = read(run, "cifar10_test")
    assert {each.value for each in found.groups} == {"0", "1"}
    for each in found.groups:
        inside, outside = (
            table["knn"].to_numpy()[table["prediction"].to_numpy() == int(each.value)]
            for table in (tested, ood)
        )
        assert (each.n_id, each.n_ood) == (len(inside), len(outside))
        assert (each.false_alarms, each.missed) == ((inside > THRESHOLD).sum(), (outside <= THRESHOLD).sum())
        assert each.auroc == pytest.approx(area(inside, outside))
    assert found.groups[0].wrong > found.groups[1].wrong


def test_rows_without_a_score_and_classes_of_one_kind_are_told_apart(run: Path) -> None:
    predictions, scores = [5, 5, 7], [2.0, None, 0.5]
    table = {"key": list("abc"), "label": [1, 1, 1], "prediction": pa.array(predictions, pa.int32())}
    for path in (run / "scores" / "svhn").iterdir():
        path.unlink()
    stored(run / "scores" / "svhn", [pa.table({**table, "knn": scores, "grood": scores})])
    (found,) = by_group(Results.read(run))
    alone = {each.value: each for each in found.groups if int(each.value) > 1}
    assert (alone["5"].n_id, alone["5"].n_ood, alone["5"].missed) == (0, 1, 0)
    assert (alone["7"].n_ood, alone["7"].missed) == (1, 1)
    assert all(np.isnan(each.auroc) for each in alone.values())


@pytest.mark.usefixtures("undrawn")
def test_the_page_shows_the_classes_with_the_most_errors_and_a_file_has_all(run: Path) -> None:
    for name in ("cifar10_test", *SMALL):
        table = read(run, name)
        own = pa.array(np.arange(len(table)) % 13, pa.int32())
        for path in (run / "scores" / name).iterdir():
            path.unlink()
        stored(
            run / "scores" / name,
            [table.set_column(table.schema.get_field_index("prediction"), "prediction", own)],
        )
    page = page_of(run)
    listed = pyarrow.csv.read_csv(run / "report" / "classes.csv").to_pylist()
    errors = [row["false_alarms"] + row["missed"] for row in listed]
    assert errors == sorted(errors, reverse=True)
    assert len(listed) == 13
    shown = page.cells["classes"][6::6]
    assert shown == [str(row["value"]) for row in listed[:10]]
    assert "all 13 are in classes.csv" in " ".join(page.text.split())


@pytest.mark.usefixtures("undrawn")
def test_without_ood_data_there_are_no_classes(tmp_path: Path) -> None:
    run = make_run(tmp_path, Setup(ood={}))
    assert by_group(Results.read(run)) == []
    assert "classes" not in page_of(run).cells
    assert not (report.write(run).parent / "classes.csv").exists()


def test_errors_by_metadata_are_those_of_the_images_it_names(run: Path) -> None:
    tested, other = read(run, "cifar10_test"), read(run, "svhn")
    rows = [("cifar10_test", key, "day" if number % 3 else "night", None) for number, key in enumerate(
        tested["key"].to_pylist()
    )]  # fmt: skip
    rows += [("svhn", key, "day", "x") for key in other["key"].to_pylist()]
    names = ("dataset", "key", "light", "lens")
    table = pa.table({name: [row[at] for row in rows[::-1]] for at, name in enumerate(names)})
    _, light, lens = by_group(Results.read(run), Metadata(table))
    assert (light.by, light.name, lens.name) == ("light", "by-light", "by-lens")
    found = {each.value: each for each in light.groups}
    assert found.keys() == {"day", "night", "(none)"}, "images of other datasets are in no row"
    scores = tested["knn"].to_numpy()
    night = np.arange(len(scores)) % 3 == 0
    assert (found["night"].n_id, found["night"].n_ood) == (night.sum(), 0)
    assert found["night"].false_alarms == (scores[night] > THRESHOLD).sum()
    assert found["day"].auroc == pytest.approx(area(scores[~night], other["knn"].to_numpy()))
    assert {each.value: each.n_ood for each in lens.groups}["x"] == len(other)


@pytest.mark.usefixtures("undrawn")
def test_the_page_has_a_section_for_each_column_of_metadata(run: Path, tmp_path: Path) -> None:
    keys = read(run, "cifar10_test")["key"].to_pylist()
    lines = [f'{key},"<b>bay, {number % 2}</b>"' for number, key in enumerate(keys)]
    (tmp_path / "meta.csv").write_text("key,loading bay\n" + "\n".join(lines))
    page = report.write(run, metadata=read_metadata(str(tmp_path / "meta.csv")))
    text = page.read_text()
    assert '<section id="by-loading-bay">' in text
    assert "<b>bay, 0</b>" not in text and "&lt;b&gt;bay, 0&lt;/b&gt;" in text
    listed = pyarrow.csv.read_csv(page.parent / "by-loading-bay.csv").to_pylist()
    assert {row["value"] for row in listed} == {"<b>bay, 0</b>", "<b>bay, 1</b>"}
    assert sum(row["n_id"] for row in listed) == len(keys)
