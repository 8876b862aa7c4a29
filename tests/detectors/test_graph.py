"""Scorers give in a graph of torch what they give of arrays."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline import detectors
from pipeline.columns import BLOCK_NORM, FEATURE, LOGITS
from pipeline.detectors._steps import combined
from pipeline.detectors.ash import Ash
from pipeline.detectors.base import Pooled
from pipeline.detectors.gradnorm import GradNorm
from pipeline.detectors.msp import Msp
from pipeline.detectors.react import React
from pipeline.detectors.selectednorm import SelectedNorm
from pipeline.detectors.vra import Vra
from pipeline.errors import UserError
from pipeline.network import arrays, graph
from pipeline.network.arrays import Array

KINDS = {name: detectors.get(name) for name in detectors.names() if name != "ensemble"}
IN = sorted(name for name, kind in KINDS.items() if graph.why_not(kind()) is None)
OTHERS = {
    "gradnorm_2": GradNorm(order=2, bias=True),
    "ash_b": Ash(variant="b"),
    "vra_given": Vra(a=0.1, c=0.9),
    "selectednorm_msp": SelectedNorm(score="msp"),
    "steps": combined(Msp(temperature=2), [React(p=80)]),
}
DOCUMENTED = Path(__file__).parents[2] / "docs" / "bundles.md"


class Stored:
    """A network whose images are rows that are kept already: the number of a row is all of an image."""

    def __init__(self, rows) -> None:
        self.module = torch.nn.Identity()
        self.compiled, self.taps = None, SimpleNamespace(stages=())
        self.rows = {name: torch.from_numpy(rows[name].copy()) for name in (FEATURE, LOGITS, BLOCK_NORM)}
        self.rows |= {Pooled().column: torch.from_numpy(rows[Pooled().column].copy())}

    def columns(self, images):
        return {name: values[images] for name, values in self.rows.items()}


@pytest.mark.parametrize("name", [*IN, *OTHERS])
def test_a_graph_gives_the_scores_of_the_scorer(real, name) -> None:
    detector = OTHERS.get(name) or KINDS[name]()
    scorer = detector.fit(real.training(detector))
    made = graph.Graph(Stored(real.query), {name: graph.Fitted(scorer)}, [], "float32")
    expected, rows = scorer(real.query), torch.arange(len(real.is_ood))
    prediction, scores, flags = made(rows, torch.tensor([float(np.median(expected))], dtype=torch.float64))
    assert scores.dtype == torch.float64 and scores.shape == (len(rows), 1)
    np.testing.assert_allclose(scores[:, 0].numpy(), expected, rtol=0, atol=1e-9 * np.ptp(expected))
    np.testing.assert_array_equal(prediction.numpy(), real.query["prediction"])
    assert abs(int(flags.sum()) - len(rows) // 2) <= len(rows) // 4


def test_thresholds_may_be_by_predicted_class(real) -> None:
    scorer = Msp().fit(real.training(Msp()))
    made = graph.Graph(Stored(real.query), {"msp": graph.Fitted(scorer)}, [], "float32")
    limits = torch.full((len(real.bias), 1), torch.inf, dtype=torch.float64)
    limits[3] = -torch.inf
    prediction, _, flags = made(torch.arange(len(real.is_ood)), limits)
    assert torch.equal(flags[:, 0], prediction == 3) and flags.any()


def test_the_guide_names_the_detectors_of_graphs() -> None:
    text = DOCUMENTED.read_text().partition("<!-- detectors of graphs -->")[2].partition("\n\n")[0]
    assert sorted(part.strip().strip("`") for part in text.strip().rstrip(".").split(",")) == IN


def test_arrays_that_scorers_have_in_common_are_in_a_graph_once(real) -> None:
    both = [KINDS["mds"](), KINDS["rmds"]()]
    fitted = {each.name: graph.Fitted(each.fit(real.training(*both))) for each in both}
    held = [len(dict(graph.Graph(Stored(real.query), some, [], "float32").named_buffers())) for some in
            ({"mds": fitted["mds"]}, {"rmds": fitted["rmds"]}, fitted)]  # fmt: skip
    assert held == [3, 4, 4]


def test_code_that_torch_does_not_know_is_refused_by_the_label(real, monkeypatch) -> None:
    monkeypatch.delitem(arrays._FUNCTIONS, np.einsum)
    scorer = KINDS["residual"]().fit(real.training(KINDS["residual"]()))
    made = graph.Graph(Stored(real.query), {"mine": graph.Fitted(scorer)}, [], "float32")
    with pytest.raises(
        UserError, match=r"the code of mine is not known to torch \(no implementation .*einsum"
    ):
        made(torch.arange(3), torch.zeros(1))


def test_numbers_give_way_to_arrays_as_in_numpy() -> None:
    given = np.arange(3, dtype=np.float32)
    for other in (2, 0.1, np.float64(0.1), np.float32(0.1), given.astype(np.float64)):
        made, expected = Array(torch.from_numpy(given)) * other, given * other
        assert made.dtype == expected.dtype
        np.testing.assert_array_equal(made.tensor.numpy(), expected)


def test_whole_numbers_become_the_floats_of_numpy() -> None:
    given = np.arange(1, 4)
    whole = Array(torch.from_numpy(given))
    for made, expected in ((whole / 2, given / 2), (np.exp(whole), np.exp(given)), (whole**2, given**2)):
        assert made.dtype == expected.dtype
        np.testing.assert_array_equal(made.tensor.numpy(), expected)


def test_a_norm_of_a_matrix_is_refused() -> None:
    with pytest.raises(TypeError, match="without an axis"):
        np.linalg.norm(Array(torch.ones(3, 3)), 1)


def test_values_cannot_be_taken_out_of_a_graph() -> None:
    with pytest.raises(TypeError, match="the values are not known before the graph runs"):
        np.asarray(Array(torch.zeros(3)))
    with pytest.raises(TypeError, match=r"no implementation found for 'numpy\.sinc'"):
        np.sinc(Array(torch.zeros(3)))
