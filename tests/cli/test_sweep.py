"""Sweeps and repeats: one command, a run for each, and a failure that loses no other."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.workspace import files

NET = """
import torch
from torch import nn

def build(width=4, fails=False):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, width, 3, padding=1)
            self.head = nn.Linear(width, 10)

        def forward(self, x):
            return self.head(torch.relu(self.conv(x)).mean((2, 3)))

    if fails:
        raise ArithmeticError("of the user's own code")
    return Net()
"""
Sweep = Callable[..., Result]


@pytest.fixture
def sweep(settings: dict[str, Any], tmp_path: Path, undrawn: None) -> Sweep:
    """Run a command on a small sweep over the models that are given by their keyword arguments."""
    (tmp_path / "net.py").write_text(NET)
    model = settings.pop("model") | {"name": "./net.py:build", "weights": "random"}
    settings["datasets"] = [
        entry | {"limit": 64} for entry in settings["datasets"] if entry["role"] in ("id", "far_ood")
    ]
    settings["detectors"] = ["msp", "energy"]

    def run(command: str, *arguments: str, **models: dict[str, Any]) -> Result:
        given = {name: {**model, "options": options} for name, options in models.items()}
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings | {"models": given}))
        options = () if command == "report" else ("--engine", "inline")
        where = ("--workspace", str(tmp_path / "workspace"), *options)
        words = [command, str(tmp_path / "small.yaml"), *where, *arguments]
        return CliRunner().invoke(main.app, words, env={"COLUMNS": "200"})

    return run


def test_a_sweep_is_a_run_for_each_model_and_one_table(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # another test may have a connection
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = sweep("run", "--engine", "auto", narrow={}, wide={"width": 8})
    assert "forwarded" in found.output
    assert found.output.count("work stays in this process") == 2
    assert found.exit_code == 0, found.output
    assert re.search(r"Detector +small-narrow +small-wide *\n", found.stdout)
    table = found.stdout[found.stdout.index("small-narrow  ") :]
    assert re.search(r"Far-OOD: AUROC ↑ *\n +(msp|energy) .*\(1\)", table)
    runs = tmp_path / "workspace" / "runs"
    assert sorted(path.name for path in runs.iterdir()) == ["small-narrow", "small-wide"]
    again = sweep("run", "--quiet", narrow={}, wide={"width": 8})
    assert again.exit_code == 0
    assert "forwarded" not in again.output
    for record in (files.read_json(path) for path in runs.glob("*/*/manifest.json")):
        assert [each["stages"]["extract"]["forward_images"] for each in record["executions"]] == [128, 0]


@pytest.mark.slow
def test_repeats_of_a_sweep_are_a_column_for_each_model_even_if_models_are_alike(sweep: Sweep) -> None:
    found = sweep("run", "--quiet", "--seeds", "0,1", a={}, b={})
    assert found.exit_code == 0, found.output
    assert re.search(r"Detector +small-a \(2 runs\) +small-b \(2 runs\) *\n", found.stdout)


def test_a_model_that_fails_is_named_and_the_others_run(sweep: Sweep) -> None:
    found = sweep("run", "--json", a={}, wrong={"fails": True}, b={"width": 5})
    assert found.exit_code == 1
    first, second, failed = json.loads(found.stdout)
    assert [Path(each["results"]).parent.name for each in (first, second)] == ["small-a", "small-b"]
    assert (failed["name"], failed["seed"]) == ("small-wrong", 0)
    assert (
        "ArithmeticError: of the user's own code\nerror: small-wrong: of the user's own code\n"
        in found.stderr
    )
    assert found.stderr.endswith("error: 1 of 3 failed: small-wrong\n")
    record = files.read_json(Path(second["results"]) / "manifest.json")
    assert record["status"] == "finished"


def test_a_model_that_fails_under_way_is_named_and_the_others_run(sweep: Sweep) -> None:
    found = sweep("run", "--set", "models.a.transform.mean=[1e38]", a={}, b={})
    assert found.exit_code == 1
    assert re.search(r"error: small-a: .*\n", found.stderr)
    assert found.stderr.endswith("error: 1 of 2 failed: small-a\n")
    assert re.search(r"results .*/runs/small-b/", found.stdout)


@pytest.mark.parametrize("command", [("validate", "--no-probe"), ("run", "--dry-run")])
def test_all_models_are_checked_and_each_mistake_is_told(sweep: Sweep, command: tuple[str, ...]) -> None:
    found = sweep(*command, "--set", "models.b.head=had", "--json", a={}, b={}, c={"width": 5})
    assert found.exit_code == 2
    one, other, failed = json.loads(found.stdout)
    assert [one["name"], other["name"], failed["name"]] == ["small-a", "small-c", "small-b"]
    assert (one["feature"], other["feature"]) == (4, 5)
    assert "error: small-b: model.head: unknown layer 'had'" in found.stderr


def test_a_mistake_in_every_model_is_one_message_and_status_2(sweep: Sweep) -> None:
    found = sweep("run", "-q", "--set", "datasets.test.path=nowhere.npz", a={}, b={})
    assert isinstance(found.exception, UserError)
    assert re.fullmatch(
        r"small-a: datasets\.test\.path: no such file: .*\nsmall-b: datasets\.test\.path: .*",
        str(found.exception),
    )
    assert found.output == ""


def test_the_stages_take_a_sweep_too(sweep: Sweep) -> None:
    found = sweep("extract", "--quiet", a={}, b={"width": 5})
    assert found.exit_code == 0, found.output
    assert len(re.findall(r"^results .*/small-[ab]/", found.stdout, re.MULTILINE)) == 2
