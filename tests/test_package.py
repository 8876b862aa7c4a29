"""The package as a user gets it: a wheel with everything in it, and documents that tell the truth."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from pipeline import detectors
from pipeline.config import loading, schema
from pipeline.data import formats
from pipeline.network import sources

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    unpacked = folder / "unpacked"
    zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(unpacked)
    return unpacked


def test_the_wheel_holds_configs_data_weights_and_notices(wheel: Path) -> None:
    for name in (
        "pipeline/configs/quickstart.yaml",
        "pipeline/configs/labels/imagenet1k.txt",
        "pipeline/quickstart/images.npz",
        "pipeline/quickstart/resnet.safetensors",
        "pipeline/results/report/template.html",
        "pipeline/results/report/report.js",
        "pipeline/results/report/uplot/uPlot.iife.min.js",
        "pipeline/results/report/uplot/LICENSE",
        "pipeline/configs/imagenet1k-resnet50.yaml",
        "pipeline/configs/protocols/openood-imagenet1k.yaml",
        "pipeline/configs/published/imagenet1k-resnet50.csv",
        "pipeline/py.typed",
    ):
        assert (wheel / name).is_file(), name
    licences = {path.name for path in wheel.glob("*.dist-info/licenses/*")}
    assert licences == {"LICENSE", "NOTICE"}
    assert not (wheel / "tests").exists()


def test_the_quickstart_is_found_from_the_wheel_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    script = f"import pipeline.cli.main as c; assert c.__file__.startswith({str(wheel)!r}); c.main()"
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    found = subprocess.run(
        [sys.executable, "-c", script, "validate", "quickstart", "--no-probe"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert "fashion-test" in found.stdout


def test_the_config_in_the_readme_is_valid(tmp_path: Path) -> None:
    block = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert block is not None
    path = tmp_path / "mine.yaml"
    path.write_text(block[1])
    assert set(loading.load(str(path)).built()) == set(detectors.names())


BLOCKS = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "datasets.md").read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_datasets_in_the_documents_are_valid(block: str) -> None:
    found = yaml.safe_load(block)["datasets"]
    assert {schema.Dataset(**dataset).format for dataset in found} <= set(formats.names())


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_bundled_config_is_valid(path: Path) -> None:
    raw = yaml.safe_load(path.read_text())
    names = [f"{raw['name']}-{label}" for label in raw.get("models", ())] or [raw["name"]]
    assert [config.name for config in loading.load_all(str(path))] == names


def test_jobs_are_thin() -> None:
    jobs = list((ROOT / "jobs").glob("*.py"))
    assert {job.stem for job in jobs} == {"evaluate", "extract", "fit", "score"}
    for job in jobs:
        found = subprocess.run(
            [sys.executable, str(job), "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert "Usage" in found.stdout
        assert len(job.read_text().splitlines()) <= 40


def test_the_models_in_the_documents_are_valid() -> None:
    blocks = re.findall(
        r"```yaml\nmodel:\n(.*?)```", (ROOT / "docs" / "models.md").read_text("utf-8"), re.DOTALL
    )
    models = [schema.Model.model_validate(yaml.safe_load(block)) for block in blocks]
    assert {model.source for model in models} == set(sources.names())
