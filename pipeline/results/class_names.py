"""Names of the classes of a run, where class folders or a file of names tell them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pipeline.config import schema
from pipeline.data import formats
from pipeline.errors import UserError


def class_names(settings: schema.Config, count: int) -> list[str] | None:
    """Names of all `count` classes by index, as the ID or training data tell them; None if they do not."""
    for dataset in settings.of_role("id", "train", "id_val"):
        module = formats.get(dataset.format)
        with suppress(UserError, OSError):
            index = module.classes(dataset).index if hasattr(module, "classes") else None
            names = {number: name for name, number in reversed((index or {}).items())}
            if sorted(names) == list(range(count)):
                return [names[number] for number in range(count)]
    return None


def known(record: Mapping[str, Any]) -> dict[int, str]:
    """Names by class index as `manifest.json` has them; none of a run of an earlier version."""
    return dict(enumerate(record.get("class_names") or ()))


def shown(index: int, names: Mapping[int, str]) -> str:
    """A class for a reader: `5 (sandal)`; the index alone where it has no name, or one that is the index."""
    name = names.get(index, "")
    return f"{index} ({name})" if name not in ("", str(index)) else str(index)
