"""JSON Schema of a config file as it is written, for editors that complete and check it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline import detectors
from pipeline.config import inherit, sweep
from pipeline.config.schema import NAME, Config
from pipeline.detectors.base import Detector

Schema = dict[str, Any]


def json_schema(formats: Sequence[str], sources: Sequence[str]) -> Schema:
    """Draft 2020-12: what `loading.load_all` accepts, but for what depends on several keys or on files.

    No key is required, because a file may extend another that has it.

    Args:
        formats: names of the formats of datasets.
        sources: names of the sources of models.
    """
    found = Config.model_json_schema()
    defined, properties = found["$defs"], found["properties"]
    del defined["DetectorEntry"]
    defined["Dataset"]["properties"]["format"]["enum"] = list(formats)
    defined["Model"]["properties"]["source"]["enum"] = list(sources)
    for part in (found, defined["Model"], defined["Transform"]):
        part.pop("required", None)
    methods = {name: detectors.get(name) for name in [*detectors.names(), *detectors.installed()]}
    described = {name: _described(method.title) for name, method in methods.items()}
    defined["Detectors"] = {
        "type": "array",
        "minItems": 1,
        "items": {
            "anyOf": [
                {"oneOf": [{"const": name, **text} for name, text in described.items()]},
                {"type": "string", "pattern": ":", "description": "package.module:Class or ./file.py:Class"},
                {
                    "type": "object",
                    "minProperties": 1,
                    "properties": {
                        name: {"anyOf": [{"type": "null"}, _parameters(method)], **described[name]}
                        for name, method in methods.items()
                    },
                    "additionalProperties": {
                        "type": "object",
                        "required": ["method"],
                        "properties": {"method": {"type": "string"}},
                        "description": "a label of your own, with `method` and its parameters",
                    },
                },
            ]
        },
    }
    properties["detectors"] = {
        "anyOf": [{"const": "all", **_described("Every detector that applies")}, _pointer("Detectors")]
    }
    properties[sweep.MODEL] = {
        "anyOf": [_pointer("Model"), {"type": "string", **_described("The label of one of `models`")}]
    }
    properties[sweep.MODELS] = {
        "type": ["object", "null"],
        "minProperties": 1,
        "propertyNames": {"pattern": NAME},
        "additionalProperties": _pointer("Model"),
        **_described("Several models by labels, in place of `model`: a run for each, and a table of all"),
    }
    properties[inherit.KEY] = {"type": "string", **_described("Another config that this one changes")}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def _parameters(method: type[Detector]) -> Schema:
    """What may stand below a detector's name."""
    found = method.model_json_schema()
    found.pop("description", None)
    own: Schema = {
        "method": {"type": "string", **_described("The detector, where the name is a label of your own")},
        "steps": {**_pointer("Detectors"), **_described("ReAct, DICE, ASH, ... before the score")},
        "tuned_on_ood": {"type": "boolean"},
    }
    return {**found, "properties": {**found.get("properties", {}), **own}}


def _pointer(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _described(text: str) -> Schema:
    return {"description": text}
