"""A network and its fitted detectors as one graph, which is run without this program.

The scorers are traced as they are (see `arrays`), one image at a time; torch makes a batch of that.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from pipeline.columns import FEATURE, LOGITS, PREDICTION, Float, SharedBatch
from pipeline.detectors import plain
from pipeline.detectors._combination import Combination
from pipeline.detectors.base import Detector, Extra, Scorer
from pipeline.errors import UserError
from pipeline.network import extras
from pipeline.network.arrays import Array
from pipeline.network.classifier import Classifier

INPUTS, OUTPUTS = ("images", "thresholds"), ("prediction", "scores", "is_ood")
FORMATS = (".pt2", ".onnx")
"""Endings of the files: `torch.export`, and ONNX."""

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

ABOUT = "detectors.json"
"""What a graph says of itself: an extra file in `.pt2`, a property of the model in `.onnx`."""

TOLERANCE = 1e-5
"""Of the spread of a detector's scores: how far those of the graph may be from its own."""


def why_not(detector: Detector) -> str | None:
    """What keeps a detector out of a graph; None if nothing that it declares does."""
    if isinstance(detector, Combination):
        return "combines the scores of others"
    if detector.neighbours:
        return "looks up neighbours"
    beyond = [extra for extra in detector.extras() if not extra.tapped]
    return f"takes more than a forward pass ({beyond[0].needs})" if beyond else None


def require(detectors: Mapping[str, Detector], paths: Sequence[str]) -> None:
    """Refuse what cannot be written, before work starts.

    Args:
        detectors: by label.
        paths: of the files.

    Raises:
        UserError: names the ending, the packages or the detectors.
    """
    for path in paths:
        if not path.endswith(FORMATS):
            raise UserError(f"--export: {path} is no graph; expected an ending of {', '.join(FORMATS)}.")
        missing = [name for name in _PACKAGES if path.endswith(".onnx") and not find_spec(name)]
        if missing:
            raise UserError(
                f"--export: {path} takes {', '.join(missing)}; install ood-pipeline[export], or export .pt2."
            )
    reasons = {label: why_not(each) for label, each in detectors.items()}
    if any(reasons.values()):
        told = "; ".join(f"{label} {reason}" for label, reason in reasons.items() if reason)
        fit = ",".join(label for label, reason in reasons.items() if not reason)
        cure = f"Name the others: --detectors {fit}." if fit else "No detector of the bundle does."
        raise UserError(f"--export: a graph is a function of one forward pass, but {told}. {cure}")


@dataclass(frozen=True)
class Fitted:
    """A detector that goes into a graph."""

    scorer: Scorer
    modules: Sequence[str] = ()
    """Where its code is, if it is not ours."""
    spread: float = 0.0
    """Largest less smallest of the scores of some images; 0 = as if they were equal."""


class Graph(nn.Module):
    """Images and thresholds in; predicted classes, scores and flags out."""

    def __init__(
        self,
        classifier: Classifier,
        fitted: Mapping[str, Fitted],
        specs: Sequence[Extra],
        feature_dtype: str,
    ) -> None:
        super().__init__()
        self.network, self.classifier = classifier.module, classifier
        self.fitted, self.specs, self.feature_dtype = fitted, specs, getattr(torch, feature_dtype)
        self.documents, known = list[tuple[Any, dict[str, str], Sequence[str]]](), dict[Any, str]()
        for each in fitted.values():
            document, arrays = plain.encode(each.scorer)
            names = {}
            for place, array in arrays.items():
                same = array.dtype.str, array.shape, array.tobytes()
                names[place] = known.setdefault(same, f"array_{len(known)}")
                self.register_buffer(names[place], torch.from_numpy(array.copy()))
            self.documents.append((document, names, [*plain.OURS, *each.modules]))

    def forward(self, images: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Judge images.

        Args:
            images: (N, channels, H, W) float32, normalised.
            thresholds: (K,) float64, the largest score of each detector that is not flagged; or (C, K), by
                predicted class.

        Returns:
            (N,) int64 predicted class, (N, K) float64 scores, and (N, K) bool, whether a score is above its
            threshold.
        """
        with extras.beside(self.classifier, self.specs) as found:
            columns = self.classifier.columns(images)
        columns |= {spec.column: values for spec, values in found.items()}
        prediction = columns[LOGITS].argmax(1)
        columns |= {FEATURE: columns[FEATURE].to(self.feature_dtype), PREDICTION: prediction.int()}
        scorers = self._scorers()

        def one(row: dict[str, Tensor]) -> tuple[Tensor, ...]:
            columns: Any = {name: Array(value[None]) for name, value in row.items()}
            batch = SharedBatch(columns)
            return tuple(_score(label, scorer, batch) for label, scorer in scorers.items())

        scores = torch.stack(torch.vmap(one)(columns), 1)
        return prediction, scores, scores > (thresholds if thresholds.dim() == 1 else thresholds[prediction])

    def _scorers(self) -> dict[str, Scorer]:
        """The scorers of the buffers; equal arrays are the same object, so that `once` knows them."""
        arrays: Any = {name: Array(buffer) for name, buffer in self.named_buffers(recurse=False)}
        return {
            label: plain.decode(document, {place: arrays[name] for place, name in names.items()}, allowed)
            for label, (document, names, allowed) in zip(self.fitted, self.documents, strict=True)
        }

    def expected(self, images: Tensor) -> dict[str, Float]:
        """(N,) scores of normalised images by label, as the scorers themselves compute them."""
        with extras.beside(self.classifier, self.specs) as found:
            columns: dict[str, Any] = dict(self.classifier.forward_images(images))
        columns |= {spec.column: values.cpu().numpy() for spec, values in found.items()}
        stored = np.dtype(str(self.feature_dtype).removeprefix("torch."))
        columns |= {
            FEATURE: columns[FEATURE].astype(stored),
            PREDICTION: columns[LOGITS].argmax(axis=1).astype(np.int32),
        }
        batch = SharedBatch(columns)
        return {label: each.scorer(batch) for label, each in self.fitted.items()}

    def noise(self, count: int) -> Tensor:
        """(count, channels, H, W) float32 images to try the graph on, from faint to loud."""
        transform = self.classifier.transform
        shape = (count, transform.channels, transform.crop, transform.crop)
        loud = torch.linspace(0.1, 2, count)[:, None, None, None]
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * loud


def _score(label: str, scorer: Scorer, batch: SharedBatch) -> Tensor:
    """() float64 score of the one image of a batch."""
    try:
        found: Any = scorer(batch)
        score: Tensor = found.tensor[0].double()
        return score
    except (TypeError, AttributeError, NotImplementedError) as error:  # of `Array`
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"--export: the code of {label} is not known to torch ({reason}). Leave it out (--detectors)."
        ) from error


def export(graph: Graph, limits: Float, path: Path, about: str) -> None:
    """Write a graph to a file that ends in one of `FORMATS`, after it has been tried.

    Args:
        graph: the network and its detectors.
        limits: thresholds of the shape that the graph is to take.
        path: of the file.
        about: what the graph says of itself.

    Raises:
        UserError: a network or detector that cannot be traced, or a graph that gives other scores.
    """
    thresholds = torch.from_numpy(limits)
    program = _traced(graph, thresholds)
    if path.suffix == ".pt2":
        torch.export.save(program, path, extra_files={ABOUT: about})
        run = torch.export.load(path).module()
    else:
        run = _onnx(program, graph, thresholds, path, about)
    images = graph.noise(7)  # another number than it was traced with
    expected, found = graph.expected(images), run(images, thresholds)[1].numpy()
    for column, (label, scores) in enumerate(expected.items()):
        spread = graph.fitted[label].spread or float(np.ptp(scores))
        apart = float(np.abs(found[:, column] - scores).max())
        if not apart <= TOLERANCE * spread:
            raise UserError(
                f"--export: {label} differs by {apart:.2g} in {path.name}, more than {TOLERANCE:g} of the "
                f"spread of its scores, {spread:.2g}. Leave it out (--detectors)."
            )


def _traced(graph: Graph, thresholds: Tensor) -> ExportedProgram:
    shapes = ({0: torch.export.Dim("images", min=1)}, None)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(
                graph, (graph.noise(3), thresholds), dynamic_shapes=shapes, strict=False
            )
    except UserError:
        raise
    except Exception as error:  # whatever a network of somebody else's does
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"--export: torch.export cannot trace it: {reason}") from error


def _onnx(program: ExportedProgram, graph: Graph, thresholds: Tensor, path: Path, about: str) -> Any:
    """Write ONNX; returns what runs the file."""
    import onnxruntime

    given = graph.noise(3), thresholds
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns of every empty list of axes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = torch.onnx.export(
                program, given, dynamo=True, verbose=False, input_names=INPUTS, output_names=OUTPUTS
            )
    except Exception as error:  # as above
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"--export: {path.name}: torch.onnx cannot write it: {reason}. Export .pt2."
        ) from error
    assert made is not None
    made.model.metadata_props[ABOUT] = about
    made.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*given: Tensor) -> list[Tensor]:
        arrays = {name: each.numpy() for name, each in zip(INPUTS, given, strict=True)}
        return [torch.from_numpy(each) for each in session.run(None, arrays)]

    return run
