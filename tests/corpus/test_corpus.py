"""Every image file that Pillow tests itself with, PngSuite, and damaged copies: features or an error."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import warnings
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from pipeline.cli.progress import Display
from pipeline.config import loading
from pipeline.config.schema import Transform
from pipeline.data.decode import FORMATS, MAX_PIXELS, decode
from pipeline.workflows import run
from tests.corpus import files
from tests.detectors.conftest import network

pytestmark = [pytest.mark.corpus, pytest.mark.timeout(1800)]

SIDE = 28
SECONDS, MIB = 5, 512
"""Most that one file may take to decode."""
TRANSFORM = Transform(resize=SIDE, crop=SIDE, mean=(0.286,), std=(0.353,), channels=1)
REFUSED = re.compile(rf"which have no agreed range|more than {MAX_PIXELS:,}|smaller than the|scans over")
"""Reasons for which an image that Pillow reads is refused (docs/datasets.md)."""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Contents by name."""
    found = files.fetched(tmp_path_factory.mktemp("packages"))
    return found | files.mutated(found)


@pytest.fixture(scope="session")
def folder(corpus, tmp_path_factory):
    """The same as files."""
    root = tmp_path_factory.mktemp("corpus")
    for name, content in corpus.items():
        (root / name).write_bytes(content)
    return root


@pytest.fixture(scope="session")
def outcomes(corpus):
    """Pixels, or the reason why there are none, by name."""
    found = {}
    for name, content in corpus.items():
        try:
            found[name] = decode(content, None, TRANSFORM)
        except ValueError as error:
            found[name] = str(error)
    return found


def expected(content):
    """Pixels by Pillow and torchvision alone."""
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    image.load()
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    image = CenterCrop(SIDE)(Resize(SIDE, InterpolationMode.BILINEAR)(image.convert("L")))
    return np.asarray(image)[..., None]


def test_pixels_are_those_of_pillow_and_torchvision(corpus, outcomes):
    wrong = {}
    for name, content in corpus.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                reference = expected(content)
            except Exception as error:
                reference = error
        found = outcomes[name]
        if isinstance(found, str):
            if not isinstance(reference, Exception) and not REFUSED.search(found):
                wrong[name] = f"refused: {found}"
        elif isinstance(reference, Exception):
            wrong[name] = f"read, where Pillow says {reference!r}"
        elif not np.array_equal(found, reference):
            wrong[name] = "other pixels"
    kinds = Counter(isinstance(found, str) for found in outcomes.values())
    sys.stdout.write(f"{len(corpus)} files: {kinds[False]} read, {kinds[True]} refused\n")
    assert wrong == {}
    assert kinds[False] > 800


def test_no_file_takes_long_or_much_memory_or_ends_its_process(folder):
    command = [sys.executable, "-m", "tests.corpus.bounded", str(folder), str(SIDE)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = {name: took for name, *took in map(json.loads, done.stdout.splitlines())}
    names = sorted(each.name for each in folder.iterdir())
    assert done.returncode == 0, f"after {list(found)[-1:]}: {done.stderr[-2000:]}"
    assert list(found) == names
    for part in (0, 1):
        most = sorted(names, key=lambda name: -found[name][part])[:3]
        sys.stdout.write(f"{ {name: found[name] for name in most} }\n")
    assert {name: took for name, took in found.items() if took[0] > SECONDS or took[1] > MIB} == {}


def test_each_file_ends_in_features_or_errors_as_plain_torch_gives_them(corpus, folder, outcomes, tmp_path):
    listed = tmp_path / "list.csv"
    quoted = ['"' + name.replace('"', '""') + '",0\n' for name in corpus]
    listed.write_text("path,label\n" + "".join(quoted))
    raw = {
        "name": "corpus",
        "model": {
            "source": "factory",
            "name": "pipeline.quickstart.resnet:build",
            "weights": "package://pipeline.quickstart/resnet.safetensors",
            "transform": TRANSFORM.model_dump(mode="json"),
        },
        "datasets": [
            {"name": "files", "role": "id", "format": "imagelist", "path": str(listed), "root": str(folder)}
        ],
        "detectors": ["msp"],
        "extract": {"batch_size": 64, "max_bad_fraction": 1.0},
        "tracking": {"enabled": False},
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(raw))
    loaded = loading.load(str(config), [f"workspace={tmp_path / 'workspace'}"])
    options = run.Options(last="extract", engine="inline", threads=1)
    run.execute(loaded, options, Display(Console(quiet=True)))
    (features,) = (tmp_path / "workspace").glob("features/files-*")
    table = pq.read_table(sorted(features.glob("part-*.parquet")))
    errors = pq.read_table(features / "errors.parquet").to_pylist()
    readable = {name: pixels for name, pixels in outcomes.items() if not isinstance(pixels, str)}
    assert sorted(table["key"].to_pylist()) == sorted(readable)
    assert {row["key"]: row["reason"] for row in errors} == {
        name: reason for name, reason in outcomes.items() if isinstance(reason, str)
    }
    images = np.stack([readable[name] for name in table["key"].to_pylist()]).transpose(0, 3, 1, 2)
    with torch.inference_mode():
        logits = network()((torch.tensor(images).float() / 255 - 0.286) / 0.353).numpy()
    np.testing.assert_allclose(np.stack(table["logits"].to_numpy()), logits, rtol=1e-4, atol=1e-4)
