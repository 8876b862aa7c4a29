"""A config of several models: `models` where `model` would stand, and a run for each. Plain data alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.config.documents import Section
from pipeline.config.schema import NAME
from pipeline.errors import UserError, unknown

MODEL, MODELS = "model", "models"


def spread(data: Section) -> dict[str, Section]:
    """The config of each model, by its label; the config itself, by no label, where `models` are not there.

    Each is named `<name>-<label>`. A label that stands as `model` chooses that model alone.

    Raises:
        UserError: `model` beside `models`, no models, or a label that is no text, no name or not there.
    """
    models, chosen = data.get(MODELS), data.get(MODEL)
    if models is None:
        return {"": Section({key: value for key, value in data.items() if key != MODELS}, data.places)}
    if isinstance(chosen, dict | list):
        raise UserError(
            f"{MODELS}: given beside {MODEL}. Leave one of them out; models.LABEL.KEY changes one of several."
        )
    if not isinstance(models, Section) or not models:
        raise UserError(f"{MODELS}: got {models!r:.100}; expected labels, and below each what a model has.")
    for label in models:
        _require_label(label)
    found = {label: _of_one(data, label, model) for label, model in models.items()}
    if chosen is None:
        return found
    chosen = str(chosen)  # `--set model=18` is a number
    if chosen not in found:
        raise UserError(f"{MODEL}: {unknown('model', chosen, found)}")
    return {chosen: found[chosen]}


def _require_label(label: object) -> None:
    """Refuse what YAML reads as no text, as 18 or yes, and what cannot be part of a folder's name."""
    if not isinstance(label, str):
        raise UserError(
            f"{MODELS}.{label}: YAML reads {label!r} here, but a label is text. Write it in quotes, as '18'."
        )
    if not re.fullmatch(NAME, label):
        raise UserError(
            f"{MODELS}.{label}: is part of the name of a run; expected letters, digits, '_', '.' and '-'."
        )


def _of_one(data: Section, label: str, model: Any) -> Section:
    shared = {key: value for key, value in data.items() if key not in (MODEL, MODELS)}
    own: dict[str, Any] = {MODEL: model}
    if isinstance(data.get("name"), str):  # anything else is refused as it is
        own["name"] = f"{data['name']}-{label}"
    return Section({**shared, **own}, {**data.places, MODEL: data[MODELS].places.get(label, "")})


def gathered(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The inverse of `spread`, of plain data."""
    (first, content), *_ = found.items()
    if not first:
        return dict(content)
    shared = {key: value for key, value in content.items() if key != MODEL}
    models = {label: each[MODEL] for label, each in found.items()}
    return {**shared, "name": whole(first, content["name"]), MODELS: models}


def whole(label: str, name: str) -> str:
    """The name of a sweep, given that of the run of one of its models."""
    return name.removesuffix(f"-{label}") if label else name


def told(label: str, mistake: str) -> str:
    """What is wrong with a model, by the key that it has in the file."""
    return re.sub(rf"^{MODEL}(?=[.:])", f"{MODELS}.{label}", mistake) if label else mistake
