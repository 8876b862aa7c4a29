"""A config of several models is one config for each, and goes to a cluster and back as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import loading
from pipeline.errors import UserError

MODEL = {"source": "factory", "name": "./net.py:build", "weights": "random"}
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a config with the given keys over those of a small sweep; None leaves a key out."""

    def written(**changes: Any) -> str:
        raw = {
            "name": "small",
            "models": {"one": MODEL, "two": {**MODEL, "weights": "w.pt"}},
            "datasets": [{"name": "test", "role": "id", "format": "npz", "path": "data.npz", "images": "x"}],
            "detectors": ["msp"],
        } | changes
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in raw.items() if value is not None}))
        return str(path)

    return written


def test_each_model_gets_a_config_that_is_named_after_it(write: Write, tmp_path: Path) -> None:
    one, two = loading.load_all(write())
    assert (one.name, two.name) == ("small-one", "small-two")
    assert (one.model.weights, two.model.weights) == ("random", str(tmp_path / "w.pt"))
    alike = {"name": "", "model": one.model}
    assert one.model_copy(update=alike) == two.model_copy(update=alike)


def test_one_model_is_one_config_under_its_own_name(write: Write) -> None:
    source = write(models=None, model=MODEL)
    assert [config.name for config in loading.load_all(source)] == ["small"]
    assert loading.load_all(source) == [loading.load(source)]


def test_a_model_is_chosen_and_changed_from_the_command_line(write: Write) -> None:
    chosen = loading.load(write(), ["model=two", "models.two.head=fc"])
    assert (chosen.name, chosen.model.head) == ("small-two", "fc")


def test_a_config_that_extends_a_sweep_may_choose_one_of_its_models(write: Write, tmp_path: Path) -> None:
    write()
    (tmp_path / "mine.yaml").write_text("extends: small.yaml\nmodel: one\nname: mine\n")
    assert loading.load(str(tmp_path / "mine.yaml")).name == "mine-one"


def test_a_config_that_extends_a_sweep_may_have_a_model_of_its_own(write: Write, tmp_path: Path) -> None:
    write()
    own = {"extends": "small.yaml", "models": None, "model": MODEL}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(own))
    assert [config.name for config in loading.load_all(str(tmp_path / "mine.yaml"))] == ["small"]


def test_a_label_in_quotes_may_look_like_a_number(write: Write) -> None:
    source = write(models={"18": MODEL, "50": MODEL})
    assert [config.name for config in loading.load_all(source)] == ["small-18", "small-50"]
    assert loading.load(source, ["model=18", "models.18.head=fc"]).model.head == "fc"


@pytest.mark.parametrize("overrides", [[], ["model=two"]])
def test_what_is_read_is_written_and_read_again(write: Write, tmp_path: Path, overrides: list[str]) -> None:
    found, _ = loading.read(write(), overrides)
    again = tmp_path / "again.yaml"
    again.write_text(loading.dump_all(found))
    assert loading.read(str(again))[0] == found


@pytest.mark.parametrize(
    ("changes", "overrides", "expected"),
    [
        ({"model": MODEL}, [], r"models: given beside model\. Leave one of them out; .* \(line \d+\)\."),
        ({}, ["model.weights=w.pt"], r"models: given beside model"),
        ({"models": {}}, [], r"models: got \{\}; expected labels, and below each what a model has \(line"),
        ({"models": ["one"]}, [], r"models: got \['one'\]"),
        ({"models": {"a/b": MODEL}}, [], r"models\.a/b: is part of the name of a run; expected let"),
        ({"models": {"a" * 100: MODEL}}, [], r"name: String should have at most 100 characters"),
        (
            {"models": {1: MODEL, "1": MODEL}},
            [],
            r"models\.1: YAML reads 1 here, .* in quotes, as '18' \(line",
        ),
        ({"models": {True: MODEL}}, [], r"models\.True: YAML reads True here"),
        ({}, ["model=3"], r"model: unknown model '3'"),
        ({}, ["model=three"], r"model: unknown model 'three'\. .*Known: one, two"),
        ({}, ["models.two.nam=x"], r"models\.two\.nam: unknown key 'nam'\. Did you mean 'name'\?"),
        (
            {"models": {"one": 5}},
            [],
            r"models\.one: Input should be a valid dictionary or .*, got 5 \(line 10\)",
        ),
    ],
)
def test_a_mistake_is_one_message_with_the_key_of_the_file(
    write: Write, changes: dict[str, Any], overrides: list[str], expected: str
) -> None:
    source = write(**changes)
    with pytest.raises(UserError, match=rf"^{source}: {expected}") as found:
        loading.load_all(source, overrides)
    assert len(str(found.value).splitlines()) == 1


def test_a_mistake_that_all_models_share_is_told_once(write: Write) -> None:
    with pytest.raises(UserError, match="detectors: ") as found:
        loading.load_all(write(detectors=[]))
    assert len(str(found.value).splitlines()) == 1


def test_what_is_about_one_model_refuses_several_and_says_how_to_choose(write: Write) -> None:
    with pytest.raises(UserError, match=r"models: small-one, small-two are a run each; .*--set model=LABEL"):
        loading.load(write())


def test_the_bundled_sweep_has_a_network_of_each_size() -> None:
    found = loading.load_all("photos-sweep")
    assert [config.name for config in found] == [f"photos-sweep-lite{size}" for size in (0, 1, 2)]
    assert found[0].model == loading.load("photos").model
    assert len({config.model.weights for config in found}) == 3
    crops = [config.model.transform.crop for config in found if not isinstance(config.model.transform, str)]
    assert crops == [224, 240, 260]


def test_a_change_of_one_model_leaves_another_that_repeats_it_by_an_alias(
    write: Write, tmp_path: Path
) -> None:
    transform = {"crop": 8, "mean": [0.5], "std": [0.25], "channels": 1}
    shared = {**MODEL, "transform": transform}
    source = write(models={"one": shared, "two": {**MODEL, "transform": transform}, "three": shared})
    assert "transform: *" in Path(source).read_text()
    found = loading.load_all(source, ["models.one.transform.crop=4", "models.two.transform.mean.0=0.1"])
    transforms = {config.name: config.model.model_dump()["transform"] for config in found}
    assert {name: (each["crop"], each["mean"]) for name, each in transforms.items()} == {
        "small-one": (4, (0.5,)),
        "small-two": (8, (0.1,)),
        "small-three": (8, (0.5,)),
    }
