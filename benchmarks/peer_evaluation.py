"""What a user of pytorch-ood writes to compare detectors: one forward pass, features shared by all of them.

A program of its own, started by `side_by_side.py`; of the pipeline it imports the network alone.

    python benchmarks/peer_evaluation.py NPZ OUT.json

NPZ holds `train_x`, `train_y`, `id_x`, and images (N, 28, 28) of the OOD datasets under other names.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_ood import detector as peer
from pytorch_ood.metrics import OODMetrics
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.quickstart import resnet

BATCH = 256
MEAN, STD = 0.2860, 0.3530


def forward(network: nn.Module, pixels: Any) -> tuple[Tensor, Tensor]:
    """Features and logits of images."""
    features: list[Tensor] = []
    hook = network.get_submodule("fc").register_forward_pre_hook(lambda _, given: features.append(given[0]))
    with torch.inference_mode():
        parts = torch.split(torch.from_numpy(pixels[:, None]), BATCH)
        logits = [network((part.float() / 255 - MEAN) / STD) for part in parts]
    hook.remove()
    return torch.cat(features), torch.cat(logits)


def of_logits(made: Any) -> Callable[..., Any]:
    """Scores by a detector of logits, fitted where it can be."""

    def use(train: tuple[Tensor, Tensor], labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        if made.requires_fit:
            made.fit_logits(train[1], labels)
        return lambda features, logits: made.predict_logits(logits)

    return use


def of_features(made: Any) -> Callable[..., Any]:
    """Scores by a detector of features."""

    def use(train: tuple[Tensor, Tensor], labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        made.fit_features(train[0], labels)
        return lambda features, logits: made.predict_features(features)

    return use


def of_maps(made: Any) -> Callable[..., Any]:
    """Scores by a detector that changes pooled features, given as maps of one pixel."""

    def use(train: tuple[Tensor, Tensor], labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        if made.requires_fit:
            made.fit_feature_maps(train[0][:, :, None, None], labels)
        return lambda features, logits: made.predict_feature_maps(features[:, :, None, None])

    return use


def detectors(layer: Any) -> dict[str, Callable[..., Any]]:
    """The methods that both sides have, by our names."""
    weight, bias = layer.weight, layer.bias
    tail = nn.Sequential(nn.Flatten(), layer)
    return {
        "msp": of_logits(peer.MaxSoftmax(None)),
        "maxlogit": of_logits(peer.MaxLogit(None)),
        "energy": of_logits(peer.EnergyBased(None)),
        "entropy": of_logits(peer.Entropy(None)),
        "gen": of_logits(peer.GEN(None)),
        "tempscale": of_logits(peer.TemperatureScaling(None)),
        "klmatching": of_logits(peer.KLMatching(None)),
        "knn": of_features(peer.KNN(None, k=50)),
        "dice": of_features(peer.DICE(None, weight, bias, p=0.7)),
        "she": of_features(peer.SHE(None, layer)),
        "fdbd": of_features(peer.fDBD(None, layer)),
        "mds": of_features(peer.Mahalanobis(None)),
        "rmds": of_features(peer.RMD(None)),
        "vim": of_features(peer.ViM(None, 64, weight, bias)),
        "react": of_maps(peer.ReAct(None, tail, percentile=0.9)),
        "ash": of_maps(peer.ASH(None, tail, variant="ash-s", percentile=0.9)),
        "scale": of_maps(peer.SCALE(None, tail, percentile=0.85)),
    }


def main() -> None:
    """Evaluate and write AUROC by detector and dataset."""
    images, out = np.load(sys.argv[1]), Path(sys.argv[2])
    network = resnet.build()
    network.load_state_dict(load_file(Path(resnet.__file__).with_name("resnet.safetensors")))
    network.eval().requires_grad_(False)
    labels = torch.from_numpy(images["train_y"].astype(np.int64))
    train = forward(network, images["train_x"])
    test = {
        name: forward(network, images[name]) for name in images.files if name not in ("train_x", "train_y")
    }
    known = test.pop("id_x")
    found: dict[str, dict[str, float]] = {}
    for name, use in detectors(network.get_submodule("fc")).items():
        score = use(train, labels)
        of_known = score(*known)
        found[name] = {}
        for dataset, there in test.items():
            of_ood = score(*there)
            metrics = OODMetrics()
            truth = torch.cat([torch.zeros(len(of_known)), -torch.ones(len(of_ood))]).long()
            metrics.update(torch.cat([of_known, of_ood]), truth)
            found[name][dataset] = float(metrics.compute()["AUROC"])
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
