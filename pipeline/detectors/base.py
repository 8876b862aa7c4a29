"""The contract of a detector: what it declares, and the scorer it is fitted to.

Array in, array out: nothing here or in any detector imports Ray, torch, FAISS or MLflow.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat, field_serializer

from pipeline.columns import Batch, Float, Mask
from pipeline.learned.statistics import Statistic, Statistics
from pipeline.parameters import Frozen


class Pass(Frozen):
    """A small extra pass through the network that a detector needs at fit time.

    Equal passes are run once, however many detectors ask for them.
    """

    held_out: ClassVar[bool] = False
    """Whether it takes images of role `id_val` where there are any."""
    version: ClassVar[int] = 1
    """Goes up when the bits of its result change: it is then run again."""

    def forwards(self, classes: int, rows: int) -> int:
        """Most images it forwards, for a head of so many classes and so many training rows."""
        raise NotImplementedError


class Mixup(Pass):
    """Mean feature of training images mixed, at `block`, with their runner-up class.

    Result: `mean` (D,) float64 and `samples` () int, the number of images that went in.
    """

    version: ClassVar[int] = 2

    block: str = "auto"
    weight: float = Field(default=0.8, ge=0, le=1)
    samples: int = Field(default=1000, ge=1)
    class_samples: int | None = Field(default=100, ge=1)

    def forwards(self, classes: int, rows: int) -> int:
        """Once to find the runner-up classes, once mixed, and the images behind their mean maps."""
        behind = rows if self.class_samples is None else min(self.class_samples * classes, rows)
        return 2 * min(self.samples, rows) + behind


class Noise(Pass):
    """Mean feature of the blurred noise images the classifier is least sure about.

    The blur is 5 pixels wide and 7 high, as in the authors' code in OpenOOD.

    Result: `mean` (D,) float64 and `samples` () int, the number of images kept.
    """

    version: ClassVar[int] = 3

    samples: int = Field(default=1000, ge=10)
    keep: float = Field(default=0.1, gt=0, le=1)

    def forwards(self, classes: int, rows: int) -> int:
        """Every noise image."""
        return self.samples


class Jigsaw(Pass):
    """FeatureNorm of training images over FeatureNorm of their jigsaws, for every block.

    Result: `ratio` (B,) float64, `stderr` (B,) float64 and `samples` () int.
    """

    version: ClassVar[int] = 2
    samples: int = Field(default=10_000, ge=2)
    grid: int = Field(default=3, ge=2)

    def forwards(self, classes: int, rows: int) -> int:
        """Every image and its jigsaw."""
        return 2 * min(self.samples, rows)


class Extra(Frozen):
    """A column that takes the network beyond its one forward pass over an image.

    Equal extras are computed once, however many detectors ask for them: for every image that is scored, and
    for the training images if a statistic or a bank reads the column.
    """

    needs: ClassVar[str]
    """What the network must give, in a few words."""
    tapped: ClassVar[bool] = False
    """Whether the forward pass for the features brings it along."""
    version: ClassVar[int] = 1
    """Goes up when the bits of its values change: they are then computed again."""

    @property
    def kind(self) -> str:
        """Name of the class, as in `rank_reduced`."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    @property
    def column(self) -> str:
        """Name of the column, and of the folder it is kept in."""
        text = f"{type(self).__qualname__} {self.version} {self.model_dump_json()}"
        return f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def forwards(self) -> int:
        """How often an image goes through the network; a backward pass counts as one more."""
        return 1

    def width(self, classes: int, features: int, stages: Sequence[int]) -> int:
        """Values per image, for a head of so many classes and features, and stages of so many channels."""
        return features


class Perturbed(Extra):
    """Penultimate feature (D,) of an image moved along the sign of an input gradient.

    x + step * sign(dF / dx), in the network's normalised input or, for `pixels`, in pixel values in [0, 1].
    """

    needs: ClassVar[str] = "input gradient"

    objective: Literal["log_softmax", "logit"]
    """F: log softmax(z / temperature) or z, of the predicted class."""
    step: FiniteFloat = Field(ge=0)
    temperature: FiniteFloat = Field(default=1.0, gt=0)
    pixels: bool = False
    share: float = Field(default=1.0, gt=0, le=1)
    """Share of the values of an image that move, rounded down: those with the smallest |dF / dx|."""

    @property
    def forwards(self) -> int:
        """Forward, backward, and forward again."""
        return 3


class RankReduced(Extra):
    """Penultimate feature (D,) when the maps of a block lose their largest singular value.

    They are M x positions, or M x all tokens.
    """

    needs: ClassVar[str] = "feature maps"

    block: str
    """Name of a block; `last`, or `early`: the last one before the final reduction."""


class Dropped(Extra):
    """Mean softmax (C,) over forward passes with the network's own dropout layers at work."""

    needs: ClassVar[str] = "dropout layers"

    samples: int = Field(ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)

    @property
    def forwards(self) -> int:
        """Every sample."""
        return self.samples

    def width(self, classes: int, features: int, stages: Sequence[int]) -> int:
        """One for each class."""
        return classes


class Pooled(Extra):
    """Mean over positions of the output of every stage, one after the other; widths in `Training.stages`."""

    needs: ClassVar[str] = "feature maps (pooled)"
    tapped: ClassVar[bool] = True

    def width(self, classes: int, features: int, stages: Sequence[int]) -> int:
        """One for each channel of a stage."""
        return sum(stages)


class ParameterGradient(Extra):
    """Norm (L,) of the gradient of KL(u ‖ softmax(z / T)) by the weights of each of L layers; u uniform."""

    needs: ClassVar[str] = "layer gradients"
    version: ClassVar[int] = 2

    layers: tuple[str, ...] = Field(min_length=1)
    """Names of modules, each with all linear and convolutional layers inside, or of single parameters."""
    order: float = Field(default=1.0, ge=0.5, le=16)
    """Of the norm; far below 1 its values for millions of weights exceed what the column holds."""
    temperature: FiniteFloat = Field(default=1.0, gt=0)
    bias: bool = False
    """Whether the biases of the layers count, too."""

    @property
    def forwards(self) -> int:
        """Forward and backward."""
        return 2

    def width(self, classes: int, features: int, stages: Sequence[int]) -> int:
        """One for each layer."""
        return len(self.layers)


class Samples(Pass):
    """Features of some ID images and an extra of theirs: of role `id_val`, else of role `train`.

    Result: `feature` (n, D), `extra` (n, width) and `samples` () int, all but the last float64.
    """

    held_out: ClassVar[bool] = True

    extra: Extra
    samples: int = Field(default=1000, ge=1)

    @field_serializer("extra")
    def _with_kind(self, extra: Extra) -> dict[str, Any]:
        return {"kind": extra.kind, **extra.model_dump(mode="json")}

    def forwards(self, classes: int, rows: int) -> int:
        """The features, and what the extra takes."""
        return min(self.samples, rows) * (1 + self.extra.forwards)


@dataclass(frozen=True)
class Training:
    """All a detector may learn from; its arrays are shared with other detectors and not to be written to."""

    weight: NDArray[np.float32]
    """(C, D) weight of the classifier's last linear layer."""
    bias: NDArray[np.float32]
    """(C,) its bias; zeros where it has none."""
    blocks: tuple[str, ...] = ()
    """Names of the blocks behind the columns of `block_norm`."""
    stages: Mapping[str, int] = field(default_factory=dict)
    """Channels of the blocks that end a stage, by name: what `Pooled` holds, in its order."""
    train: Statistics = field(default_factory=Statistics)
    """Statistics of the training rows, as far as a detector of the run needs them."""
    ood_val: Statistics = field(default_factory=Statistics)
    """Statistics of the OOD validation rows, as far as a detector of the run needs them."""
    id_val: Statistics = field(default_factory=Statistics)
    """Statistics of the held-out ID rows, of the training rows where there are none; as far as needed."""
    passes: Mapping[Pass, Mapping[str, NDArray[np.float64]]] = field(default_factory=dict)
    """Results of the extra passes, by specification."""


@dataclass(frozen=True)
class Bank:
    """Vectors of training rows in which the nearest neighbours of every row are looked up."""

    embed: Callable[[Batch], NDArray[np.float32]]
    """Batch -> (N, E) float32; used for the training rows and, without a `query`, for the queries."""
    keep: Callable[[Batch], Mask]
    """Batch of training rows -> (N,) bool; which of them enter the bank."""
    k: int
    """How many neighbours are looked up; the vectors do not depend on it."""
    query: Callable[[Batch], NDArray[np.float32]] | None = None
    """Batch -> (N, E) float32; where queries are embedded in another way than training rows."""
    kth: bool = False
    """Whether the scorer reads the distance to the k-th neighbour alone."""

    @property
    def read(self) -> slice:
        """Which of the neighbours, nearest first, the scorer finds in its batch."""
        return slice(self.k - 1 if self.kth else 0, self.k)

    def queries(self, batch: Batch) -> NDArray[np.float32]:
        """(N, E) float32, what is looked up for a batch."""
        return (self.query or self.embed)(batch)


class Scorer(Protocol):
    """A fitted detector: pure, picklable, float64 (N,) out, higher = more OOD."""

    def __call__(self, batch: Batch) -> Float:
        """Score one batch."""
        ...


class Detector(Frozen):
    """A method with its hyper-parameters, before it has seen data.

    A subclass is one file in this package; the file name is its name in the config. A scorer that
    has an attribute `bank` (a `Bank`) finds the Euclidean distances to its `k` nearest neighbours,
    nearest first, in the column `NEIGHBOURS`; or, with `kth`, the one to the k-th.
    """

    title: ClassVar[str]
    """Name of the method and its year, as the literature writes them."""
    paper: ClassVar[str]
    """Authors, title, venue and year, arXiv id."""
    formula: ClassVar[str]
    """The score in the paper's symbols, with the sign we use."""
    reading: ClassVar[str] = ""
    """How to read a score, in one sentence: its range, what it is relative to and what high means."""
    columns: ClassVar[tuple[str, ...]]
    """Columns of the feature table that the scorer reads, besides those of `extras`."""
    neighbours: ClassVar[bool] = False
    """Whether the scorer has a bank of training rows."""
    version: ClassVar[int] = 1
    """Goes up when the bits of its scores change: they are then computed again."""

    @property
    def name(self) -> str:
        """Name of the method in the config."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def caption(self) -> str:
        """What tables call the method."""
        return self.title

    def parts(self) -> tuple[Detector, ...]:
        """What it is made of: itself, unless it combines others."""
        return (self,)

    def passes(self) -> tuple[Pass, ...]:
        """Extra passes through the network that `fit` reads."""
        return ()

    def extras(self) -> tuple[Extra, ...]:
        """Columns beyond those of the feature table that the scorer or a statistic reads."""
        return ()

    def statistics(self) -> tuple[Statistic[Any], ...]:
        """What `fit` reads of `Training.train`."""
        return ()

    def ood_statistics(self) -> tuple[Statistic[Any], ...]:
        """What `fit` reads of `Training.ood_val`."""
        return ()

    def calibration(self) -> tuple[Statistic[Any], ...]:
        """What `fit` reads of `Training.id_val`.

        On training rows a classifier is surer than on any new ones; what depends on that belongs here.
        """
        return ()

    def uses_ood(self) -> bool:
        """Whether `fit` reads OOD data; marked wherever a result is shown."""
        return bool(self.ood_statistics())

    def needs_train(self) -> bool:
        """Whether the run must have training data."""
        return bool(self.statistics() or self.neighbours or any(not spec.held_out for spec in self.passes()))

    def calibrates(self) -> bool:
        """Whether the run must have held-out ID data, or training data in their place."""
        return bool(self.calibration() or any(spec.held_out for spec in self.passes()))

    def table(self, classes: int, width: int, stages: Mapping[str, int]) -> int:
        """Numbers in the largest array that it holds by pairs of classes, or by class and more than features.

        Args:
            classes: of the head.
            width: dimensions of the feature.
            stages: as `Training.stages`.
        """
        return 0

    def check(self, width: int, stages: Mapping[str, int]) -> None:
        """Whether the parameters suit the network.

        Args:
            width: dimensions of the feature.
            stages: as `Training.stages`.

        Raises:
            UserError: naming the parameter that does not.
        """

    def check_rows(self, width: int, stages: Mapping[str, int], rows: int, count: Mapping[int, int]) -> None:
        """Whether so many training images can be enough, if all of them can be read.

        Args:
            width: dimensions of the feature.
            stages: as `Training.stages`.
            rows: training images.
            count: how many of them accept each label; -1 is unlabelled.

        Raises:
            UserError: if `fit` would refuse them.
        """

    def fit(self, train: Training) -> Scorer:
        """Fit to the training data."""
        raise NotImplementedError

    def notices(self, train: Training) -> tuple[str, ...]:
        """What whoever reads the numbers should know of these parameters on these data; a sentence each."""
        return ()


NEIGHBOURS = "neighbours"
"""(N, k) float64; distances a scorer with a bank finds in its batch, nearest first; with `kth` (N, 1)."""


def bank_of(scorer: Scorer) -> Bank | None:
    """The bank a scorer needs, if it needs one."""
    return getattr(scorer, "bank", None)
