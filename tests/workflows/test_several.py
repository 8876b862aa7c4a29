"""What remains of the runs of a sweep that fail: which they were and why, and nothing that they held."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.network import classifier
from pipeline.stages import extract
from pipeline.workflows.several import Failure, Several


class Network:
    """Large."""


def ready(*runs: tuple[str, int]) -> list[Any]:
    return [SimpleNamespace(config=SimpleNamespace(name=name, seed=seed)) for name, seed in runs]


def several(given: list[Any]) -> tuple[Several, list[Failure]]:
    told: list[Failure] = []
    return Several([each.config for each in given], told.append), told


def test_nothing_of_a_run_that_failed_is_held_while_others_run() -> None:
    given = ready(("a", 0), ("b", 0))
    held: list[weakref.ref[Network]] = []

    def execute(each: Any) -> object:
        if each.config.name == "b":
            return held[0]()
        network = Network()
        held.append(weakref.ref(network))
        raise ArithmeticError("of the network")

    work, told = several(given)
    assert work.run(execute, given) == [None]
    assert [(failure.run, failure.error) for failure in told] == [("a", "of the network")]
    assert told[0].traceback.endswith("ArithmeticError: of the network\n")


def test_no_network_is_held_beyond_its_turn(
    settings: dict[str, Any],
    load: Callable[..., Config],
    execute: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held: list[weakref.ref[Any]] = []
    original = classifier.load

    def loaded(*given: Any) -> classifier.Classifier:
        found = original(*given)
        held.append(weakref.ref(found.module))
        return found

    def begin(ready: Any) -> int:
        gc.collect()
        there, before = [each() for each in held], len(held)
        assert there == [None] * before
        execute(ready.config, last="extract")
        return len(held) - before

    for module in (classifier, extract):
        monkeypatch.setattr(module, "load", loaded)
    for entry in settings["datasets"]:
        entry["limit"] = 64
    settings["detectors"] = ["msp"]
    settings["model"]["weights"] = "random"
    work = Several([load(settings | {"seed": seed}) for seed in (0, 1)], lambda _: None)
    ready = work.prepared()
    assert len(held) == 2
    assert min(work.run(begin, ready)) > 0


def test_each_failure_of_a_repeated_model_counts_and_names_its_seed() -> None:
    given = ready(("a", 0), ("b", 0), ("a", 1), ("b", 1))

    def execute(each: Any) -> str:
        if each.config.name == "a":
            raise UserError(f"mistake {each.config.seed}")
        return "done"

    work, told = several(given)
    assert work.run(execute, given) == ["done", "done"]
    assert told == work.failed
    assert work.failed == [
        Failure("a", seed, f"a (seed {seed})", f"mistake {seed}", traceback="") for seed in (0, 1)
    ]


def test_what_is_wrong_with_one_of_several_repeats_ends_all() -> None:
    given = ready(("a", 0), ("a", 1))

    def execute(_: Any) -> None:
        raise ArithmeticError

    work, told = several(given)
    with pytest.raises(ArithmeticError):
        work.run(execute, given)
    assert told == work.failed == []
