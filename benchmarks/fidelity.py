"""Our scores against those of pytorch-ood, on the same features and images, and writes `fidelity.md`.

    pip install --no-deps pytorch-ood==0.4.0
    python benchmarks/fidelity.py

pytorch-ood is no dependency of this project: install it into an environment of its own that sees the
project's (`python -m venv --system-site-packages`), or remove it afterwards. Nothing but the shipped
classifier and images is read. Takes some minutes on one thread. Methods that one of the two lacks are left
out.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from scipy.spatial.distance import cdist
from scipy.special import expit
from scipy.stats import rankdata
from torch import Tensor, nn

from pipeline import detectors, quickstart
from pipeline.columns import FEATURE, LABEL, LOGITS, PREDICTION, Batch, Float, Pixels
from pipeline.config.schema import Transform
from pipeline.detectors.base import NEIGHBOURS, Detector, Dropped, Extra, Pooled, Training, bank_of
from pipeline.detectors.gram import held_out
from pipeline.learned import statistics
from pipeline.learned.logits import logsumexp, softmax
from pipeline.learned.statistics import Head
from pipeline.network import extras, taps
from pipeline.network.classifier import Classifier
from pipeline.quickstart.resnet import build

PEER = "0.4.0"
RESULTS = Path(__file__).with_name("fidelity.md")
SHIPPED = Path(quickstart.__file__).parent
TOLERANCE = 1e-4
"""Scores that differ by no more of their range are the same: pytorch-ood computes most in float32."""
TRANSFORM = Transform(resize=28, crop=28, mean=(0.2860,), std=(0.3530,), channels=1)
DROPOUT = 0.2
"""Rate of a layer that the network gets before its last one; it is at work in MC dropout alone."""
PART = 256
"""Images that go through the network at a time."""


@dataclass(frozen=True)
class Rows:
    """What both are fitted to (`train`) and score (`query`), and the last layer."""

    train: Batch
    query: Batch
    layer: nn.Linear
    classifier: Classifier | None = None
    """The whole network, for what takes more than features."""
    pixels: Mapping[str, Pixels] = field(default_factory=dict)
    """Images (N, 28, 28, 1) of `train` and `query`."""
    images: Mapping[str, Tensor] = field(default_factory=dict)
    """The same (N, 1, 28, 28), normalised."""

    @property
    def head(self) -> Head:
        """The last layer as arrays."""
        weight, bias = (values.detach().numpy() for values in (self.layer.weight, self.layer.bias))
        return Head(weight, bias, tuple(self.stages.values()))

    @property
    def stages(self) -> Mapping[str, int]:
        """Channels of the blocks that end a stage, by name."""
        return self.classifier.taps.stages if self.classifier else {}

    @property
    def network(self) -> Any:
        """The network as a module."""
        assert self.classifier
        return self.classifier.module

    def parts(self, rows: str) -> Iterator[Tensor]:
        """Normalised images of `train` or `query`, as precise as the last layer."""
        return (part.to(self.layer.weight.dtype) for part in torch.split(self.images[rows], PART))

    def labels(self) -> Sequence[Tensor]:
        """Classes of `train`, in the same parts."""
        return torch.split(self.tensor("train", LABEL), PART)

    def measured(self, rows: str, spec: Extra) -> NDArray[Any]:
        """A column of ours that takes more than features."""
        assert self.classifier
        pixels = self.pixels[rows]
        keys = [str(number) for number in range(len(pixels))]
        parts = [slice(start, start + PART) for start in range(0, len(pixels), PART)]
        return np.concatenate(
            [extras.measure(self.classifier, spec, pixels[part], keys[part]) for part in parts]
        )

    def with_extras(self, detector: Detector) -> Rows:
        """The same with the columns that a detector reads beyond those of features."""
        found = self
        for spec in detector.extras():
            for rows in ("train", "query") if detector.needs_train() else ("query",):
                known = getattr(found, rows)
                if spec.column not in known:
                    more: dict[str, Any] = {rows: {**known, spec.column: self.measured(rows, spec)}}
                    found = replace(found, **more)
        return found

    def to(self, dtype: torch.dtype) -> Rows:
        """The same with a network that computes in float32 or float64."""
        if self.classifier is None:
            return replace(self, layer=deepcopy(self.layer).to(dtype))
        module = deepcopy(self.network).to(dtype)
        return replace(self, layer=module.fc, classifier=replace(self.classifier, module=module))

    def tensor(self, rows: str, column: str) -> Tensor:
        """A column of `train` or `query`; classes as int64, others as precise as the last layer."""
        values = torch.tensor(getattr(self, rows)[column])
        return values.long() if column in (LABEL, PREDICTION) else values.to(self.layer.weight.dtype)


Theirs = Callable[[Any, Rows], Tensor]
"""pytorch-ood's module of detectors, and rows -> scores of the query rows."""
Left = Callable[[Any, Rows, Float, Float], float]
"""The same and both scores -> a difference."""


@dataclass(frozen=True)
class Comparison:
    """One method on both sides."""

    method: str
    theirs: Theirs
    parameters: Mapping[str, Any] = field(default_factory=dict)
    scale: Callable[[Float, Rows], Float] = lambda ours, rows: ours
    """Ours -> what theirs is expected to be, where the definitions differ by a known increasing function."""
    scaled: str = ""
    """That function, in words."""
    left: Left | None = None
    """The difference that is left without what `EXPLANATIONS` names."""

    @property
    def title(self) -> str:
        """Method and parameters."""
        return " ".join([self.method, *(f"{name}={value}" for name, value in self.parameters.items())])


@dataclass(frozen=True)
class Outcome:
    """What a comparison found."""

    title: str
    scaled: str
    correlation: float
    difference: float
    in_double: float
    """The difference when theirs computes in float64."""
    left: float | None
    """The difference that is left without what is known to differ, theirs in float64."""

    @property
    def verdict(self) -> str:
        """Whether more than rounding differs."""
        if self.difference <= TOLERANCE:
            return "same"
        return "same in float64" if self.in_double <= TOLERANCE else "**differs**"

    @property
    def explanation(self) -> str:
        """Why it differs, as far as that is known."""
        method = self.title.partition(" ")[0]
        if self.in_double <= TOLERANCE:
            return f"{self.title}: theirs loses these digits to float32; nothing else differs."
        if self.left is None or self.left > TOLERANCE:
            return f"{self.title}: not explained."
        return f"{self.title}: {EXPLANATIONS[method]} Difference without that: {self.left:.1e}."


def logits(name: str, **options: Any) -> Theirs:
    """A score of logits that needs no fit."""
    return lambda peer, rows: getattr(peer, name)(None, **options).predict_logits(
        rows.tensor("query", LOGITS)
    )


def fitted_logits(name: str, **options: Any) -> Theirs:
    """A score of logits that is fitted to the logits and classes of the training rows."""

    def score(peer: Any, rows: Rows) -> Tensor:
        detector = getattr(peer, name)(None, **options)
        detector.fit_logits(rows.tensor("train", LOGITS), rows.tensor("train", LABEL))
        found: Tensor = detector.predict_logits(rows.tensor("query", LOGITS))
        return found

    return score


def features(make: Callable[[Any, Rows], Any]) -> Theirs:
    """A score of pooled features, fitted to those of the training rows."""

    def score(peer: Any, rows: Rows) -> Tensor:
        detector = make(peer, rows)
        detector.fit_features(rows.tensor("train", FEATURE), rows.tensor("train", LABEL))
        found: Tensor = detector.predict_features(rows.tensor("query", FEATURE))
        return found

    return score


def maps(name: str, fitted: bool, **options: Any) -> Theirs:
    """A score of feature maps, here of one pixel: pooled features, which is what ours change."""

    def score(peer: Any, rows: Rows) -> Tensor:
        detector = getattr(peer, name)(None, nn.Sequential(nn.Flatten(), rows.layer), **options)
        train, query = (rows.tensor(each, FEATURE)[:, :, None, None] for each in ("train", "query"))
        if fitted:
            detector.fit_feature_maps(train, rows.tensor("train", LABEL))
        found: Tensor = detector.predict_feature_maps(query)
        return found

    return score


def whole(make: Callable[[Any, Rows], Any]) -> Theirs:
    """A score of images, through the whole network."""

    def score(peer: Any, rows: Rows) -> Tensor:
        detector = make(peer, rows).to("cpu")
        return torch.cat([detector.predict(part).detach() for part in rows.parts("query")])

    return score


def odin(**options: Any) -> Theirs:
    """A step in pixel values takes the std of the transform."""
    return whole(lambda peer, rows: peer.ODIN(rows.network, norm_std=list(TRANSFORM.std), **options))


def stages(network: Any) -> list[nn.Module]:
    """The parts of the network of which each ends where a stage does, in their order."""
    stem = nn.Sequential(network.conv1, network.bn1, network.relu)
    return [nn.Sequential(stem, network.layer1), network.layer2, network.layer3, network.layer4]


def tail(network: Any) -> nn.Module:
    """What follows the last stage."""
    return nn.Sequential(network.avgpool, nn.Flatten(), network.fc)


def rankfeat(*blocks: int) -> Theirs:
    """One split of the network for each block; theirs knows one, so the mean of logits is taken here."""

    def score(peer: Any, rows: Rows) -> Tensor:
        layers, end = stages(rows.network), tail(rows.network)
        splits = [(nn.Sequential(*layers[:n]), nn.Sequential(*layers[n:], end)) for n in blocks]
        both = [peer.RankFeat(*split, detector=lambda logits: logits) for split in splits]
        with torch.no_grad():
            found = [torch.cat([each.predict(part) for part in rows.parts("query")]) for each in both]
        return peer.EnergyBased.score(sum(found) / len(found))  # type: ignore[no-any-return]

    return score


def layers_gradnorm(*layers: str) -> Theirs:
    """Theirs takes parameters by name; ours the weights of linear and convolutional layers."""

    def make(peer: Any, rows: Rows) -> Any:
        modules = rows.network.named_modules()
        weighted = [name for name, module in modules if isinstance(module, (nn.Conv2d, nn.Linear))]
        chosen = {f"{name}.weight" for name in weighted if name.partition(".")[0] in layers}
        return peer.GradNorm(rows.network, param_filter=lambda name: name in chosen)

    return whole(make)


def ensemble(peer: Any, rows: Rows, weights: list[float]) -> Tensor:
    """Mahalanobis distances of several layers with these weights, from images."""
    detector = peer.MultiMahalanobis(stages(rows.network), alpha=weights).to("cpu")
    parts = list(rows.parts("train"))
    with torch.no_grad():
        detector.fit(list(zip(parts, rows.labels(), strict=True)))
        return torch.cat([detector.predict(part) for part in rows.parts("query")])


def gram(peer: Any, rows: Rows) -> Tensor:
    """Theirs, from the maps of images with all their positions; fitted to the true classes."""
    torch.manual_seed(0)
    detector = peer.Gram(tail(rows.network), stages(rows.network), rows.layer.out_features, ORDERS).to("cpu")
    detector.fit(list(zip(rows.parts("train"), rows.labels(), strict=True)))
    return torch.cat([detector.predict(part) for part in rows.parts("query")])


def mcdropout(peer: Any, rows: Rows) -> Tensor:
    """Theirs switches the network to training mode, but for its batch normalisations."""
    torch.manual_seed(0)
    return whole(lambda peer, rows: peer.MCD(rows.network, samples=SAMPLES, mode="mean"))(peer, rows)


def gradnorm(peer: Any, rows: Rows) -> Tensor:
    """Theirs differentiates a model; here the last layer on features."""
    detector = peer.GradNorm(rows.layer, param_filter=lambda name: name == "weight").to("cpu")
    found: Tensor = detector.predict(rows.tensor("query", FEATURE))
    return found


def openmax(tail: int) -> Theirs:
    """Fitted to correct training rows alone, as the paper says; theirs leaves that to the caller."""

    def score(peer: Any, rows: Rows) -> Tensor:
        train, label = rows.tensor("train", LOGITS), rows.tensor("train", LABEL)
        right = label == rows.tensor("train", PREDICTION)
        detector = peer.OpenMax(None, tailsize=tail, alpha=10)
        detector.fit_logits(train[right], label[right])
        found: Tensor = detector.predict_logits(rows.tensor("query", LOGITS))
        return found

    return score


def clamped(peer: Any, rows: Rows, ours: Float, theirs: Float, kept: int = 100) -> float:
    """GEN of clamped probabilities against theirs."""
    probability = np.clip(softmax(rows.query[LOGITS]), 1e-7, 1 - 1e-7)
    largest = np.sort(probability, axis=1)[:, ::-1][:, :kept]
    return difference(((largest * (1 - largest)) ** 0.1).mean(axis=1), theirs)


def probability(ours: Float, rows: Rows) -> Float:
    """-p of log(1 - p)."""
    return np.expm1(ours)


OF_PROBABILITY = "exp(ours) - 1: theirs is -p, ours log(1 - p)"


def same_temperature(peer: Any, rows: Rows, ours: Float, theirs: Float) -> float:
    """Our MSP at their temperature against theirs."""
    detector = peer.TemperatureScaling(None)
    detector.fit_logits(rows.tensor("train", LOGITS), rows.tensor("train", LABEL))
    msp = detectors.get("msp").model_validate({"temperature": detector.t.item()})
    return difference(probability(score(msp, rows), rows), theirs)


def same_signs(peer: Any, rows: Rows, ours: Float, theirs: Float) -> float:
    """Ours against theirs, where every ReLU behind the layers has the same sign in float32 and in float64."""

    def signs(part: Rows) -> Tensor:
        found: list[Tensor] = []
        relu = part.network.layer4[0].relu
        hook = relu.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].flatten(1) > 0))
        for images in part.parts("query"):
            part.network(images)
        hook.remove()
        return torch.cat([torch.cat(both, dim=1) for both in zip(found[::2], found[1::2], strict=True)])

    same = (signs(rows.to(torch.float32)) == signs(rows)).all(dim=1).numpy()
    return float(np.abs(ours - theirs)[same].max() / np.ptp(ours))


def same_shift(peer: Any, rows: Rows, ours: Float, theirs: Float) -> float:
    """Ours against theirs with tails that begin at 1."""
    module = import_module("pytorch_ood.detector.openmax.numpy")

    def shifted(tailsize: int) -> Any:
        fit = libmr(tailsize=tailsize)
        fit.translation = 1
        return fit

    libmr = module.LibNotMR
    with patch.object(module, "LibNotMR", shifted):
        return difference(ours, openmax(tail=8)(peer, rows).numpy())


def same_means(peer: Any, rows: Rows, ours: Float, theirs: Float) -> float:
    """Ours against theirs on means over positions, by predicted class, with the rows we hold out."""
    train, query = rows.train[Pooled().column], rows.query[Pooled().column]
    drawn, widths = held_out(train), list(rows.stages.values())

    def maps(values: NDArray[Any]) -> list[Tensor]:
        parts = torch.split(torch.from_numpy(values).double(), widths, dim=1)
        return [part[:, :, None, None] for part in parts]

    def one_hot(batch: Batch) -> Tensor:
        return torch.eye(rows.layer.out_features)[torch.from_numpy(batch[PREDICTION]).long()]

    detector = peer.Gram(None, [None] * len(widths), rows.layer.out_features, ORDERS).to("cpu")
    kept = maps(train[~drawn])
    detector.validation_fraction = 0.0
    with patch.object(detector, "_create_feature_list", lambda _: (None, kept)):
        detector.fit([(torch.empty(0), torch.from_numpy(rows.train[PREDICTION][~drawn]).long())])
    expected = []
    for stage in range(len(widths)):
        detector.layer_norm = torch.full((len(widths),), torch.inf)
        detector.layer_norm[stage] = 1
        found = detector.predict_structured(one_hot(rows.train)[drawn], maps(train[drawn]))
        expected.append(found.mean())
    detector.layer_norm = torch.stack(expected)
    return difference(ours, detector.predict_structured(one_hot(rows.query), maps(query)).numpy())


def same_masks(peer: Any, rows: Rows, ours: Float, theirs: Float) -> float:
    """Ours against theirs with a dropout layer that plays back the masks of ours."""
    masked: list[Tensor] = []
    hook = rows.layer.register_forward_pre_hook(lambda _, inputs: masked.append(inputs[0]))
    rows.measured("query", Dropped(samples=SAMPLES))
    hook.remove()
    assert rows.classifier
    network = deepcopy(rows.network)
    network.avgpool = Played(masked)
    played = replace(rows, layer=network.fc, classifier=replace(rows.classifier, module=network))
    return difference(ours, mcdropout(peer, played).numpy())


class Played(nn.Module):
    """Gives what was recorded, one after the other."""

    def __init__(self, recorded: list[Tensor]) -> None:
        super().__init__()
        self.recorded = iter(recorded)

    def forward(self, _: Tensor) -> Tensor:
        """The next one."""
        return next(self.recorded)


def clipped(peer: Any, rows: Rows, ours: Float, theirs: Float) -> float:
    """Energy of features between the percentiles of every dimension against theirs."""
    feature = np.clip(rows.query[FEATURE], *np.percentile(rows.train[FEATURE], [10, 90], axis=0))
    return difference(-logsumexp(feature @ rows.head.weight.T + rows.head.bias), theirs)


SAMPLES = 4
"""Passes of MC dropout."""
ORDERS = [1, 2, 3, 4, 5]
"""Orders of Gram matrices."""

COMPARISONS = (
    Comparison("msp", logits("MaxSoftmax"), scale=probability, scaled=OF_PROBABILITY),
    Comparison(
        "msp",
        logits("MaxSoftmax", t=1000.0),
        {"temperature": 1000},
        scale=probability,
        scaled=OF_PROBABILITY,
    ),
    Comparison("maxlogit", logits("MaxLogit")),
    Comparison("energy", logits("EnergyBased")),
    Comparison("energy", logits("EnergyBased", t=10.0), {"temperature": 10}),
    Comparison(
        "entropy",
        logits("Entropy"),
        scale=lambda ours, rows: np.exp(ours),
        scaled="exp(ours): ours is the logarithm",
    ),
    Comparison(
        "gen",
        logits("GEN", gamma=0.1, M=100),
        {"gamma": 0.1, "m": 100},
        scale=lambda ours, rows: np.exp(ours) / rows.layer.out_features,
        scaled="exp(ours) / min(M, C): theirs is the mean, ours the logarithm of the sum",
        left=clamped,
    ),
    Comparison(
        "gen",
        logits("GEN", gamma=0.1, M=3),
        {"gamma": 0.1, "m": 3},
        scale=lambda ours, rows: np.exp(ours) / 3,
        scaled="exp(ours) / min(M, C): theirs is the mean, ours the logarithm of the sum",
        left=partial(clamped, kept=3),
    ),
    Comparison(
        "tempscale",
        fitted_logits("TemperatureScaling"),
        scale=probability,
        scaled=OF_PROBABILITY,
        left=same_temperature,
    ),
    Comparison("klmatching", fitted_logits("KLMatching")),
    Comparison(
        "openmax",
        openmax(tail=8),
        {"tail": 8, "alpha": 10},
        scale=lambda ours, rows: expit(ours),
        scaled="1 / (1 + exp(-ours)): theirs is the probability",
        left=same_shift,
    ),
    Comparison("gradnorm", gradnorm),
    Comparison("knn", features(lambda peer, rows: peer.KNN(None, k=50)), {"k": 50}),
    Comparison("knn", features(lambda peer, rows: peer.KNN(None, k=1)), {"k": 1}),
    Comparison(
        "dice",
        features(lambda peer, rows: peer.DICE(None, rows.layer.weight, rows.layer.bias, p=0.7)),
        {"p": 70},
    ),
    Comparison(
        "dice",
        features(lambda peer, rows: peer.DICE(None, rows.layer.weight, rows.layer.bias, p=0.9)),
        {"p": 90},
    ),
    Comparison("she", features(lambda peer, rows: peer.SHE(None, rows.layer))),
    Comparison("fdbd", features(lambda peer, rows: peer.fDBD(None, rows.layer))),
    Comparison("nci", features(lambda peer, rows: peer.NCI(None, rows.layer, alpha=0.001)), {"alpha": 0.001}),
    Comparison("nci", features(lambda peer, rows: peer.NCI(None, rows.layer, alpha=0.1)), {"alpha": 0.1}),
    Comparison(
        "mds",
        features(lambda peer, rows: peer.Mahalanobis(None)),
        scale=lambda ours, rows: ours / (2 * len(rows.train[FEATURE])),
        scaled="ours / 2N: theirs is half the distance under the scatter, not divided by N",
    ),
    Comparison(
        "rmds",
        features(lambda peer, rows: peer.RMD(None)),
        scale=lambda ours, rows: ours / len(rows.train[FEATURE]),
        scaled="ours / N: theirs uses the scatter, not divided by N",
    ),
    Comparison(
        "vim",
        features(lambda peer, rows: peer.ViM(None, 64, rows.layer.weight, rows.layer.bias)),
        {"dim": 64},
    ),
    Comparison(
        "nnguide", features(lambda peer, rows: peer.NNGuide(None, rows.layer, k=10)), {"k": 10, "share": 1.0}
    ),
    Comparison("react", maps("ReAct", fitted=True, percentile=0.9), {"p": 90}),
    Comparison(
        "vra",
        maps("VRA", fitted=True, lower_percentile=0.1, upper_percentile=0.9),
        {"low": 10, "high": 90},
        left=clipped,
    ),
    Comparison("ash", maps("ASH", fitted=False, variant="ash-s", percentile=0.9), {"variant": "s", "p": 90}),
    Comparison("ash", maps("ASH", fitted=False, variant="ash-b", percentile=0.65), {"variant": "b", "p": 65}),
    Comparison("ash", maps("ASH", fitted=False, variant="ash-p", percentile=0.6), {"variant": "p", "p": 60}),
    Comparison("scale", maps("SCALE", fitted=False, percentile=0.85), {"p": 85}),
    Comparison("odin", odin(), scale=probability, scaled=OF_PROBABILITY),
    Comparison(
        "odin",
        odin(eps=0.02, temperature=1.0),
        {"temperature": 1.0, "noise": 0.02},
        scale=probability,
        scaled=OF_PROBABILITY,
    ),
    Comparison("rankfeat", rankfeat(3, 4)),
    Comparison("rankfeat", rankfeat(4), {"blocks": ["last"]}),
    Comparison("gradnorm", layers_gradnorm("layer4", "fc"), {"layers": ["layer4", "fc"]}, left=same_signs),
    Comparison(
        "mcdropout",
        mcdropout,
        {"samples": SAMPLES},
        scale=lambda ours, rows: ours - 1,
        scaled="ours - 1: theirs is -p, ours 1 - p",
        left=same_masks,
    ),
    Comparison(
        "mahalanobis_ensemble",
        partial(ensemble, weights=[1, 1, 1, 1]),
        {"weights": [1, 1, 1, 1]},
        scale=lambda ours, rows: ours / (2 * len(rows.train[FEATURE])),
        scaled="ours / 2N: theirs is half the distance under the scatter, not divided by N",
    ),
    Comparison(
        "mahalanobis_ensemble",
        partial(ensemble, weights=[1 / 16, 1 / 32, 1 / 64, 1 / 128]),
        scale=lambda ours, rows: ours / (2 * len(rows.train[FEATURE])),
        scaled="ours / 2N: theirs is half the distance under the scatter, not divided by N; its weights are "
        "set to 1 / channels",
    ),
    Comparison("gram", gram, {"orders": ORDERS}, left=same_means),
)

EXPLANATIONS = {
    "gen": "theirs clamps probabilities to [1e-7, 1 - 1e-7]. The formula has no such bounds, and p^γ is far "
    "from 0 there: with γ = 0.1 every class of a smaller probability counts as 0.2. Ours computes 1 - p of "
    "the predicted class as the sum of the others.",
    "tempscale": "theirs stops before the minimum of the NLL: 50 iterations of L-BFGS with a step of 0.01. "
    "Ours finds the zero of its slope. At the same temperature both are the same (msp).",
    "gradnorm": "in two images (2e-8 and -2e-7 in float64) an input of the last stage's last ReLU has "
    "another sign in float32, in which our network computes. The gradient jumps there, so such an image has "
    "one of two scores, and rounding decides which; theirs in float32 is not theirs in float64, either.",
    "openmax": "theirs shifts each tail so that its smallest distance is 10,000 before it fits the Weibull "
    "distribution, ours to 1, the default of libMR's Python interface; the fit depends on the shift. Theirs "
    "also gives a row another score in another batch: distances from a class that is predicted for no row "
    "of the batch are left at 0.",
    "gram": "theirs takes the matrices of all positions, ours those of the means over positions; theirs "
    "has ranges by true class, ours by predicted class, by which a new image is compared; each holds out "
    "another tenth of the rows.",
    "mcdropout": "the masks are other draws. With ours played back to theirs nothing differs.",
    "vra": "theirs raises low entries to the lower percentile of their dimension; ours sets them to 0, as "
    "the authors' code does.",
}
"""Why a method differs; read only where a difference is measured."""


def load() -> Rows:
    """The shipped images through the shipped classifier."""
    network = build()
    network.load_state_dict(load_file(SHIPPED / "resnet.safetensors"))
    network.add_module("avgpool", nn.Sequential(network.avgpool, nn.Dropout(DROPOUT)))
    network.eval().requires_grad_(False)
    images = np.load(SHIPPED / "images.npz")
    seen = [images[name] for name in ("id_test_x", "ood_animals_x", "ood_textures_x")]
    train = {**forward(network, images["id_train_x"]), LABEL: images["id_train_y"].astype(np.int32)}
    pixels = {"train": images["id_train_x"][..., None], "query": np.concatenate(seen)[..., None]}
    found = taps.find(network, torch.rand(2, 1, 28, 28))
    head = network.fc.weight.numpy(), network.fc.bias.numpy()
    classifier = Classifier(TRANSFORM, found, "", "", np.empty((0, len(head[1])), np.float32), head, network)
    normalised = {rows: classifier.images(values) for rows, values in pixels.items()}
    query = forward(network, np.concatenate(seen))
    return Rows(train, query, network.fc, classifier, pixels, normalised)


def forward(network: nn.Module, pixels: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """Feature, logits and prediction of (N, 28, 28) images."""
    caught: list[Tensor] = []
    hook = network.get_submodule("fc").register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    scaled = torch.from_numpy((pixels[:, None] / 255 - 0.2860) / 0.3530).float()
    with torch.inference_mode():
        found = torch.cat([network(part) for part in torch.split(scaled, 256)]).numpy()
    hook.remove()
    prediction = found.argmax(axis=1).astype(np.int32)
    return {FEATURE: torch.cat(caught).numpy(), LOGITS: found, PREDICTION: prediction}


def score(detector: Detector, rows: Rows) -> Float:
    """Our scores of the query rows, through the contract of every detector."""
    rows = rows.with_extras(detector)
    known = statistics.of(rows.train, [*detector.statistics(), *detector.calibration()], rows.head)
    head, stages = rows.head, rows.stages
    scorer = detector.fit(Training(head.weight, head.bias, stages=stages, train=known, id_val=known))
    bank = bank_of(scorer)
    if bank is None:
        return scorer(rows.query)
    vectors = bank.embed(rows.train)[bank.keep(rows.train)].astype(np.float64)
    distance = cdist(bank.queries(rows.query).astype(np.float64), vectors)
    return scorer({**rows.query, NEIGHBOURS: np.sort(distance, axis=1)[:, bank.read]})


def spearman(ours: Float, theirs: Float) -> float:
    """Rank correlation; ties share their mean rank."""
    return float(np.corrcoef(rankdata(ours), rankdata(theirs))[0, 1])


def difference(ours: Float, theirs: Float) -> float:
    """Largest difference of two scores of a row, as a share of the range of ours."""
    return float(np.abs(ours - theirs).max() / np.ptp(ours))


def compare(comparison: Comparison, peer: Any, rows: Rows) -> Outcome:
    """Fit and score on both sides."""
    detector = detectors.get(comparison.method).model_validate(comparison.parameters)
    rows = rows.with_extras(detector)
    found = score(detector, rows)
    ours = comparison.scale(found, rows)
    theirs = comparison.theirs(peer, rows).detach().numpy().astype(np.float64)
    with in_double():
        exact = rows.to(torch.float64)
        precise = comparison.theirs(peer, exact).detach().numpy()
        left = comparison.left(peer, exact, ours, precise) if comparison.left else None
    return Outcome(
        title=comparison.title,
        scaled=comparison.scaled,
        correlation=spearman(ours, theirs),
        difference=difference(ours, theirs),
        in_double=difference(ours, precise),
        left=left,
    )


@contextmanager
def in_double() -> Iterator[None]:
    """Tensors are float64, those that are converted to float included."""
    single, default = torch.Tensor.float, torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.float = single  # type: ignore[method-assign]
        torch.set_default_dtype(default)


def page(outcomes: Iterable[Outcome], rows: Rows, missing: Iterable[str]) -> str:
    """The results as Markdown."""
    outcomes = list(outcomes)
    lines = [
        "# Our scores against pytorch-ood's",
        "",
        "Written by `python benchmarks/fidelity.py`; not edited by hand. Both are fitted to the same "
        f"{len(rows.train[FEATURE]):,} cached training features of the shipped classifier and score the same "
        f"{len(rows.query[FEATURE]):,} test, animal and texture features, with the same parameters. Methods "
        "that take more than features get the same normalised images; for MC dropout the network has a "
        f"dropout layer of rate {DROPOUT:g} before its last layer. "
        "Difference: the largest of a row, as a share of the range of our scores, after the scale named "
        "below; in float64: the same with pytorch-ood made to compute in float64, as ours do. "
        f"Same: at most {TOLERANCE:g}.",
        "",
        f"pytorch-ood {version('pytorch-ood')}, torch {torch.__version__.partition('+')[0]}, "
        f"NumPy {np.__version__}, Python {platform.python_version()}.",
        "",
        "| method | rank correlation | difference | in float64 | verdict |",
        "| --- | --- | --- | --- | --- |",
    ]
    for each in outcomes:
        numbers = f"{each.correlation:.6f} | {each.difference:.1e} | {each.in_double:.1e}"
        lines.append(f"| {each.title} | {numbers} | {each.verdict} |")
    lines += ["", "## Scales", ""]
    lines += [f"* {each.title}: {each.scaled}" for each in outcomes if each.scaled]
    lines += ["", "## Differences", ""]
    lines += [f"* {each.explanation}" for each in outcomes if each.verdict != "same"] or ["None."]
    lines += ["", f"Not in pytorch-ood, or only under other definitions: {', '.join(missing)}.", ""]
    return "\n".join(lines)


def main() -> None:
    """Compare what both have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write (default: %(default)s)")
    options = parser.parse_args()
    try:
        peer = import_module("pytorch_ood.detector")
    except ImportError as error:
        parser.error(f"pytorch-ood cannot be imported ({error}): pip install --no-deps pytorch-ood=={PEER}")
    torch.set_num_threads(1)
    rows, names = load(), detectors.names()
    outcomes = [compare(each, peer, rows) for each in COMPARISONS if each.method in names]
    compared = {each.method for each in COMPARISONS}
    found = page(outcomes, rows, [name for name in names if name not in compared])
    options.output.write_text(found, "utf-8")
    print(found)


if __name__ == "__main__":
    main()
