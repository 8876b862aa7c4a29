"""The page on fidelity covers every detector, and the comparison behind it measures what it says."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from pipeline import detectors

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "fidelity.md").read_text("utf-8")
QUOTED = dict(re.findall(r"^### `(\w+)`\n\n```text\n(.*?)\n```$", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture
def fidelity(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("fidelity")


@pytest.mark.parametrize("name", detectors.names())
def test_the_page_has_a_row_and_the_formula_of_every_detector(name: str) -> None:
    rows = re.findall(rf"^\| `{name}` \|(.*)\|$", PAGE, re.MULTILINE)
    assert len(rows) == 1
    assert all(cell.strip() for cell in rows[0].split("|"))
    assert QUOTED.get(name) == detectors.get(name).formula


def test_every_row_of_the_page_has_its_section() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == set(QUOTED)


def test_the_peer_is_needed_only_to_run_the_comparison(fidelity: ModuleType) -> None:
    assert "pytorch_ood" not in sys.modules
    assert set(fidelity.EXPLANATIONS) == {each.method for each in fidelity.COMPARISONS if each.left}


def test_the_comparison_sees_order_and_size(fidelity: ModuleType) -> None:
    ours = np.array([0.0, 1.0, 2.0, 4.0])
    assert fidelity.difference(ours, np.array([0.0, 1.0, 3.0, 4.0])) == 0.25
    assert fidelity.spearman(ours, ours**3) == pytest.approx(1)
    assert fidelity.spearman(ours, -ours) == pytest.approx(-1)


@pytest.mark.slow
def test_neighbours_are_looked_up_in_the_training_rows(fidelity: ModuleType) -> None:
    rows = fidelity.load()
    few = {column: values[:50] for column, values in rows.train.items()}
    found = fidelity.score(detectors.get("knn")(k=1), fidelity.Rows(few, few, rows.layer))
    np.testing.assert_allclose(found, 0, atol=1e-6)


@pytest.mark.slow
def test_columns_beyond_the_features_are_measured_on_the_images_behind_the_rows(fidelity: ModuleType) -> None:
    rows = fidelity.load()
    few = {column: values[:20] for column, values in rows.query.items()}
    pixels = {name: values[:20] for name, values in rows.pixels.items()}
    images = fidelity.Rows(rows.train, few, rows.layer, rows.classifier, pixels)
    unmoved = fidelity.score(detectors.get("odin")(noise=0), images)
    np.testing.assert_allclose(unmoved, fidelity.score(detectors.get("msp")(temperature=1000), images))
    double = images.double()
    assert {each.dtype for each in double.network.parameters()} == {double.layer.weight.dtype}
    assert double.layer is double.network.fc
