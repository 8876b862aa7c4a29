"""The page on fidelity covers every detector, and the comparison behind it measures what it says."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline import detectors

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "fidelity.md").read_text("utf-8")
QUOTED = dict(re.findall(r"^### `(\w+)`\n\n```text\n(.*?)\n```$", PAGE, re.MULTILINE | re.DOTALL))


def _rows(section: str) -> dict[str, str]:
    table = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    found = re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE)
    assert len(found) == len(dict(found))
    return dict(found)


PARAMETERS, READ = _rows("Parameters"), _rows("Where it was read")


@pytest.fixture
def fidelity(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("fidelity")


@pytest.mark.parametrize("name", detectors.names())
def test_the_page_has_a_row_and_the_formula_of_every_detector(name: str) -> None:
    assert all(cell.strip() for cell in PARAMETERS[name].split("|"))
    assert QUOTED.get(name) == detectors.get(name).formula


def test_every_row_of_the_page_has_its_section() -> None:
    assert set(PARAMETERS) == set(READ) == set(QUOTED)


@pytest.mark.parametrize("name", detectors.names())
def test_what_is_said_of_another_implementation_names_the_file_it_was_read_in(name: str) -> None:
    text = " ".join(PAGE.partition(f"### `{name}`")[2].partition("\n### ")[0].split())
    text = re.sub(r"Neither OpenOOD[^.]* nor pytorch-ood|(OpenOOD and )?pytorch-ood do(es)? not", "", text)
    text = re.sub(r"pytorch-ood has no|Not in pytorch-ood|OpenOOD does not have it", "", text)
    authors, openood, pytorch_ood = READ[name].split(" | ")
    of = {r"authors'[^.|]*(code|repository|poster)": authors, "OpenOOD": openood, "pytorch-ood": pytorch_ood}
    for who, files in of.items():
        named = re.search(r"`[\w/*.-]+\.(py|ya?ml|md|ipynb|png)`", files)
        assert bool(re.search(who, text)) == bool(named), who


def test_every_difference_that_was_measured_is_explained() -> None:
    measured = (ROOT / "benchmarks" / "fidelity.md").read_text("utf-8")
    assert "| **differs** |" in measured
    assert "not explained" not in measured


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
    double = images.to(torch.float64)
    assert {each.dtype for each in double.network.parameters()} == {torch.float64}
    assert double.layer is double.network.fc


class AboveZero(nn.Module):
    """Two ReLUs; float64 tells the input of the second from 0, float32 does not."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.bias = nn.Parameter(torch.tensor(1 + 2.0**-40, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.relu(x) + self.bias - 1)


@pytest.mark.slow
def test_images_with_a_rounded_sign_are_left_out_also_where_the_peer_computes_in_double(
    fidelity: ModuleType,
) -> None:
    rows = fidelity.load()
    for name in ("conv1", "bn1", "layer1", "layer2", "layer3"):
        setattr(rows.network, name, nn.Identity())
    rows.network.layer4, rows.network.fc = nn.Sequential(AboveZero()), nn.Linear(1, 10)
    two = replace(rows, images={"query": torch.stack([torch.zeros(1, 28, 28), torch.ones(1, 28, 28)])})
    with fidelity.in_double():
        left = fidelity.same_signs(None, two.to(torch.float64), np.array([0.0, 4.0]), np.array([1.0, 6.0]))
    assert left == 0.5  # of the second image alone
