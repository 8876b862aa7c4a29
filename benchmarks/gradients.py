"""(c) GradNorm's and GROOD's gradients: closed form against one backward pass per image, on one thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from processes import fresh
from results import Section, at_least
from session import Session
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from pipeline import quickstart
from pipeline.columns import FEATURE, LOGITS
from pipeline.config import loading
from pipeline.detectors.base import ParameterGradient
from pipeline.detectors.gradnorm import GradNormScorer
from pipeline.detectors.grood import GroodScorer, Prototypes
from pipeline.network import extras
from pipeline.network.classifier import load

WIDTH, CLASSES, BATCH = 2048, 1000, 1024
SHIPPED_BATCH = 128
GRAPH = 8
TARGET = 100
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

Times = dict[str, tuple[float, float]]


def measure(session: Session) -> Section:
    """Microseconds per image of both ways."""
    found = fresh(_times, session.size(3, 1), session.size(200, 20), **ONE_THREAD)
    rows, checks = [], []
    for name, (autograd, closed) in found.items():
        ratio = autograd / closed
        rows.append((name, f"{autograd * 1e6:,.0f}", f"{closed * 1e6:,.1f}", f"{ratio:,.0f}"))
        what = f"gradient of {name} against per-sample autograd"
        checks.append(at_least(what, ratio, TARGET, "{:,.0f} x"))
        print(f"  {name}: {ratio:,.0f} x", flush=True)
    loop, batched = fresh(_layers, session.size(3, 1), session.size(256, 128), **ONE_THREAD)
    rows.append(
        ("GradNorm of layers", f"{loop * 1e6:,.0f}", f"{batched * 1e6:,.1f}", f"{loop / batched:,.1f}")
    )
    return Section(
        title="(c) Gradients in closed form against per-sample autograd",
        text=f"Synthetic features (D = {WIDTH}) and a head of C = {CLASSES} classes, one thread, in turns, "
        f"median. Closed form: our scorers, in float64, on batches of {BATCH}. Autograd, in float32: one "
        "backward pass of the last layer per image, GradNorm in its weight, GROOD in the OOD prototype and "
        "the class prototypes, each image with a graph of its own. GROOD's authors differentiate image by "
        f"image in the graph of a whole batch, which costs more with every image in it: shown for {GRAPH}. "
        "GradNorm of layers has no closed form: `layer4` and `fc` of the shipped network, from pixels to "
        f"norms, one image at a time against batches of {SHIPPED_BATCH}. "
        "Both ways gave the same gradients to within 1e-4.",
        header=("microseconds per image", "autograd", "closed form", "ratio"),
        rows=rows,
        checks=checks,
    )


@dataclass(frozen=True)
class Problem:
    """Synthetic features, a head, and GROOD's prototypes."""

    batch: Mapping[str, NDArray[np.float32]]
    weight: NDArray[np.float32]
    classes: NDArray[np.float32]
    ood: NDArray[np.float32]


def _problem() -> Problem:
    rng = np.random.default_rng(0)
    feature = np.maximum(rng.standard_normal((BATCH, WIDTH), np.float32), 0)
    weight = rng.standard_normal((CLASSES, WIDTH), np.float32) / np.float32(np.sqrt(WIDTH))
    ood = feature.mean(axis=0)
    classes = ood + rng.standard_normal((CLASSES, WIDTH), np.float32) / 10
    return Problem({FEATURE: feature, LOGITS: feature @ weight.T}, weight, classes, ood)


def _times(turns: int, samples: int) -> Times:
    """Seconds per image by autograd and in closed form."""
    torch.set_num_threads(1)
    problem = _problem()
    few = max(samples // 5, GRAPH) // GRAPH * GRAPH
    return {
        "GradNorm": _gradnorm(problem, turns, samples),
        "GROOD": _grood(problem, turns, samples, graph=1),
        f"GROOD with {GRAPH} images in a graph": _grood(problem, turns, few, graph=GRAPH),
    }


def _gradnorm(problem: Problem, turns: int, samples: int) -> tuple[float, float]:
    head = nn.Linear(WIDTH, CLASSES, bias=False)
    head.weight.data = torch.tensor(problem.weight)
    features = torch.tensor(problem.batch[FEATURE][:samples])

    def norm(feature: Tensor) -> float:
        head.zero_grad()
        torch.autograd.backward(-log_softmax(head(feature[None]), dim=1).mean())
        assert head.weight.grad is not None
        return float(head.weight.grad.abs().sum())

    scorer = GradNormScorer(temperature=1.0, order=1.0, bias=False)
    slow = [-norm(one) for one in features]
    np.testing.assert_allclose(slow, scorer(problem.batch)[:samples], rtol=1e-4)
    return _turns(lambda: [norm(one) for one in features], samples, lambda: scorer(problem.batch), turns)


def _layers(turns: int, samples: int) -> tuple[float, float]:
    classifier = load(loading.load("quickstart").model, 0)
    pixels = np.load(Path(quickstart.__file__).parent / "images.npz")["id_test_x"][:samples, ..., None]
    keys = [str(row) for row in range(samples)]
    spec = ParameterGradient(layers=("layer4", "fc"))
    network = deepcopy(classifier.module)
    chosen = (each for name, each in network.named_parameters() if name.startswith(spec.layers))
    weights = [each.requires_grad_() for each in chosen if each.dim() > 1]
    torch.set_num_threads(1)

    def norms(image: Tensor) -> float:
        network.zero_grad()
        torch.autograd.backward(-log_softmax(network(image[None]), dim=1).mean())
        return float(sum(each.grad.abs().sum() for each in weights if each.grad is not None))

    def batched() -> NDArray[np.float32]:
        starts = range(0, samples, SHIPPED_BATCH)
        parts = (slice(start, start + SHIPPED_BATCH) for start in starts)
        found = [extras.measure(classifier, spec, pixels[part], keys[part]) for part in parts]
        total: NDArray[np.float32] = np.concatenate(found).sum(axis=1)
        return total

    images = classifier.images(pixels)
    np.testing.assert_allclose([norms(image) for image in images], batched(), rtol=1e-4)
    loop, whole = _turns(lambda: [norms(image) for image in images], samples, batched, turns)
    return loop, whole * BATCH / samples


def _grood(problem: Problem, turns: int, samples: int, graph: int) -> tuple[float, float]:
    points = torch.tensor(problem.classes, requires_grad=True)
    outside = torch.tensor(problem.ood, requires_grad=True)
    label = torch.zeros(graph, dtype=torch.long)
    groups = torch.split(torch.tensor(problem.batch[FEATURE][:samples]), graph)

    def gradients(features: Tensor) -> list[Tensor]:
        offsets = features[:, None] - torch.cat([points, outside[None]])
        logits = -torch.linalg.vector_norm(offsets, dim=2)
        losses = cross_entropy(logits, label, reduction="none")
        return [torch.autograd.grad(loss, [outside, points], retain_graph=True)[0] for loss in losses]

    ood, classes = (values.astype(np.float64) for values in (problem.ood, problem.classes))
    scorer = GroodScorer(Prototypes(ood, classes - ood), 1)
    slow = np.stack([found.numpy() for group in groups for found in gradients(group)])
    fast = scorer.gradient(problem.batch)[:samples]
    np.testing.assert_allclose(slow, fast, atol=1e-4 * np.abs(fast).max())
    every = partial(scorer.gradient, problem.batch)
    return _turns(lambda: [gradients(group) for group in groups], samples, every, turns)


def _turns(
    slow: Callable[[], object], samples: int, fast: Callable[[], object], turns: int
) -> tuple[float, float]:
    """Medians of seconds per image of both ways, taken in turns."""
    found = [(_seconds(slow) / samples, _seconds(fast) / BATCH) for _ in range(turns)]
    return median(pair[0] for pair in found), median(pair[1] for pair in found)


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
