"""The JSON Schema of a config file takes what the loader takes, and names what it refuses."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
import yaml

from pipeline import detectors
from pipeline.config import loading
from pipeline.config.json_schema import json_schema
from pipeline.data import formats
from pipeline.network import sources


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json_schema(formats.names(), sources.names())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("name", sorted(path.stem for path in loading.bundled().glob("*.yaml")))
def test_bundled_configs_are_accepted(validator: jsonschema.Draft202012Validator, name: str) -> None:
    validator.validate(yaml.safe_load(loading.locate(name).read_text()))


@pytest.mark.parametrize("name", detectors.names())
def test_every_detector_is_accepted_with_all_of_its_parameters(
    validator: jsonschema.Draft202012Validator, name: str
) -> None:
    fields = detectors.get(name).model_fields
    given = {
        key: field.get_default(call_default_factory=True)
        for key, field in fields.items()
        if not field.is_required()
    }
    parameters = yaml.safe_load(yaml.safe_dump({key: _plain(value) for key, value in given.items()}))
    validator.validate({"detectors": [name, {name: None}, {name: parameters}]})
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({"detectors": [{name: {"no such parameter": 1}}]})


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    "config",
    [
        {"detectors": "all", "extends": "quickstart"},
        {"models": {"a": {"source": "timm", "name": "x"}}, "model": "a"},
        {"models": None, "model": {"source": "timm", "name": "x"}, "extends": "photos-sweep"},
        {"detectors": [{"mine": {"method": "grood", "prototype": "noise"}}, "./mine.py:Mine"]},
        {"detectors": [{"react_dice": {"method": "energy", "steps": ["react", {"dice": {"p": 10}}]}}]},
    ],
)
def test_what_the_loader_takes_is_accepted(
    validator: jsonschema.Draft202012Validator, config: dict[str, Any]
) -> None:
    validator.validate(config)


@pytest.mark.parametrize(
    "config",
    [
        {"detectors": "every"},
        {"detectors": []},
        {"detectors": ["grodo"]},
        {"extract": {"batch": 1}},
        {"seed": -1},
        {"datasets": [{"name": "x", "role": "ood", "format": "npz", "path": "x"}]},
        {"datasets": [{"name": "x", "role": "id", "format": "npy", "path": "x"}]},
        {"model": {"source": "torchvison"}},
        {"models": {}},
        {"models": {"a/b": {"source": "timm"}}},
        {"models": {"a": {"source": "torchvison"}}},
    ],
)
def test_what_the_loader_refuses_is_refused(
    validator: jsonschema.Draft202012Validator, config: dict[str, Any]
) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(config)
