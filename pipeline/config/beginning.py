"""The first config of a user: what was named on the command line, and comments on what else there is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

_TEXT = """\
# Check it:  ood-pipeline validate {file}
# Run it:    ood-pipeline run {file}
# Every key: ood-pipeline schema
name: {name}
seed: 0
workspace: ./workspace   # features, fits and runs; on a cluster a folder that all nodes see, or s3://bucket/prefix

model:
  source: {source}   # torchvision, timm, exported (torch.export) or factory (a function that returns it)
  name: {model}
  weights: {weights}   # a state dict (.safetensors, .pt), published ones (IMAGENET1K_V1), or null
  transform: auto   # {transform} {{resize: 256, crop: 224, mean: [...], std: [...]}}

# Roles: train, id (test images of the model's classes), near_ood, far_ood, shifted_id, id_val (to calibrate
# on), unlabelled (scored and flagged). Of an imagefolder of role train or id, each class is a folder.
datasets:
{datasets}

detectors: all   # that apply; or a list: [msp, knn: {{k: 50}}]; `ood-pipeline detectors` explains each

extract: {{batch_size: 64}}
hardware: cpu   # gpu: a GPU for each model actor and each shard of the index

# p-values and flags at a false-alarm rate, see docs/metrics.md:
{thresholds}thresholds: {{false_alarm: [0.05], calibrate_on: {calibration}}}
"""


def text(file: Path, model: str, weights: str | None, datasets: Sequence[Mapping[str, str]]) -> str:
    """A config with comments, as YAML.

    Args:
        file: that it is for; its name is that of the run.
        model: a torchvision name, `timm:NAME`, a program (.pt2), or `file.py:function` or `module:function`.
        weights: of the model; None = what the source has.
        datasets: role, format and path of each.
    """
    source, name = _source(model)
    held_out = any(entry["role"] == "id_val" for entry in datasets)
    names: dict[str, int] = {}
    lines = []
    for entry in datasets:
        wanted = _plain(Path(entry["path"]).name.partition(".")[0]) or entry["role"]
        names[wanted] = names.get(wanted, 0) + 1
        own = wanted if names[wanted] == 1 else f"{wanted}-{names[wanted]}"
        fields = ", ".join(f"{key}: {json.dumps(entry[key])}" for key in ("role", "format", "path"))
        lines.append(f"  - {{name: {json.dumps(own)}, {fields}}}")
    return _TEXT.format(
        file=file,
        name=json.dumps(_plain(file.stem) or "mine"),
        source=source,
        model=json.dumps(name),
        weights="null" if weights is None else json.dumps(weights),
        transform="write it out:" if source in ("exported", "factory") else "that of published weights; else",
        datasets="\n".join(lines),
        thresholds="" if held_out else "# ",
        calibration="id_val" if held_out else "id",
    )


def _source(model: str) -> tuple[str, str]:
    if model.endswith(".pt2"):
        return "exported", model
    if model.startswith("timm:"):
        return "timm", model.removeprefix("timm:")
    return ("factory" if ":" in model else "torchvision"), model


def _plain(name: str) -> str:
    """A name as configs take it."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-._")[:100]
