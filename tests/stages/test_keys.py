"""Features keep their name on machines that round otherwise: other threads, another instruction set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.network.description import same_network

ASK = """
import json, sys
import torch
from pipeline.config.schema import Extract, Model
from pipeline.data.manifest import Manifest
from pipeline.network.classifier import load
from pipeline.stages import identity
torch.set_num_threads(int(sys.argv[1]))
classifier = load(Model.model_validate(json.loads(sys.argv[2])), 0)
found = identity.identity(classifier, Manifest("", 0, "images", {}), Extract())
print(json.dumps([found, classifier.probe.tolist()]))
"""

SHIPPED = {
    "source": "factory",
    "name": "pipeline.quickstart.resnet:build",
    "weights": "package://pipeline.quickstart/resnet.safetensors",
    "transform": {"crop": 28, "mean": [0.286], "std": [0.353], "channels": 1},
}
CONFIG = Path(__file__).parents[2] / "configs" / "photos.yaml"
PHOTOS = yaml.safe_load(CONFIG.read_text("utf-8"))["model"]
PLAIN = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}


def asked(model: Mapping[str, Any], threads: int, **environment: str) -> tuple[Any, np.ndarray[Any, Any]]:
    """Identity of features, and what the network answers to the probe, in a process of its own."""
    found = subprocess.run(
        [sys.executable, "-c", ASK, str(threads), json.dumps(model)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    identity, probe = json.loads(found.stdout)
    return identity, np.array(probe, np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("model", [SHIPPED, PHOTOS], ids=["shipped", "photos"])
def test_a_network_keeps_its_name_on_another_instruction_set(model: dict[str, Any]) -> None:
    own, plain = asked(model, 2), asked(model, 1, **PLAIN)
    assert own[0] == plain[0]
    assert not np.array_equal(own[1], plain[1])  # they do round otherwise
    assert same_network(own[1], plain[1])
