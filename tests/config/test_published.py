"""Published numbers are facts: every one has its source, and they agree with each other."""

from __future__ import annotations

import csv
from collections import Counter
from statistics import fmean

import pytest

from pipeline import detectors
from pipeline.config import loading, published
from pipeline.errors import UserError
from pipeline.metrics.metrics import against_ood
from pipeline.results.report.tables import GROUPS

TABLES = sorted(path.stem for path in (loading.bundled() / "published").glob("*.csv"))
COLUMNS = ["protocol", "model", "detector", "dataset", "metric", "value", "std", "source"]


@pytest.mark.parametrize("name", TABLES)
def test_every_row_is_complete_and_occurs_once(name) -> None:
    with (loading.bundled() / "published" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        assert next(csv.reader(file)) == COLUMNS
    rows = published.read(name)
    assert len({(row.protocol, row.model) for row in rows}) == 1
    count = Counter((row.detector, row.dataset, row.metric) for row in rows)
    assert [found for found, times in count.items() if times > 1] == []
    for row in rows:
        assert 0 <= row.value <= 1, row
        assert row.std is None or 0 < row.std < 0.1, row
        assert len(row.source) > 20, row
        if row.detector == "classifier":
            assert row.metric == "id_accuracy"
        else:
            assert row.detector in detectors.names()
            assert row.metric in [metric.name for metric in against_ood()]


@pytest.mark.parametrize("name", TABLES)
def test_every_row_has_a_counterpart_in_the_config_of_the_same_name(name) -> None:
    settings = loading.load(name)
    assert settings.published == name
    methods = {entry.method for entry in settings.detectors}
    ids = {dataset.name for dataset in settings.of_role("id")}
    ood = {dataset.name for dataset in settings.of_role("near_ood", "far_ood")}
    for row in published.read(name):
        assert row.protocol == settings.protocol
        if row.detector == "classifier":
            assert row.dataset in ids
        else:
            assert row.dataset in ood | set(GROUPS)
            assert row.detector in methods


@pytest.mark.parametrize("name", TABLES)
def test_a_published_mean_is_the_mean_of_the_published_values(name) -> None:
    """To half a unit of the last digit of each."""
    settings = loading.load(name)
    values = {(row.detector, row.dataset, row.metric): row.value for row in published.read(name)}
    for group in ("near_ood", "far_ood"):
        members = [dataset.name for dataset in settings.of_role(group)]
        for detector, dataset, metric in values:
            cells = [values.get((detector, member, metric)) for member in members]
            if dataset == group and None not in cells:
                assert values[detector, group, metric] == pytest.approx(fmean(cells), abs=1.01e-4)


def test_openood_is_compared_in_its_own_convention_and_the_papers_in_theirs() -> None:
    for name in TABLES:
        metrics = {row.metric for row in published.read(name)}
        assert not metrics & {"fpr95_id" if name != "imagenet1k-mos-resnet50" else "fpr95_ood"}


def test_an_unknown_table_is_refused_with_the_closest() -> None:
    with pytest.raises(UserError, match="Did you mean 'imagenet1k-swin-t'"):
        published.read("imagenet1k-swint")
