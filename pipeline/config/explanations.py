"""What pydantic found wrong with a config, in words that help: the key, the value, the closest valid name."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.errors import unknown


def explain(error: ValidationError, prefix: str, root: type[BaseModel]) -> str:
    """One line per key: where, what, and the closest valid key."""
    found: dict[str, tuple[list[str], str]] = {}
    for problem in error.errors():
        location, kind, value = problem["loc"], problem["type"], problem["input"]
        keys, section = _followed(root, location)
        if kind == "extra_forbidden":
            keys.append(str(location[-1]))
            message = unknown("key", keys[-1], section.model_fields).removesuffix(".")
        else:
            message = problem["msg"].removeprefix("Value error, ")
        if kind in ("string_type", "literal_error") and len(keys) < len(location) and _is_container(value):
            continue  # the branch of a union that was not meant
        # a value with an @ may be a URL with a password
        silent = kind in ("missing", "extra_forbidden") or _is_container(value) or "@" in str(value)
        place = (prefix + ".".join(keys)).rstrip(":. ")
        found.setdefault(place, ([], "" if silent else f", got {value!r:.200}"))[0].append(message)
    return "\n".join(f"{place}: {', or '.join(messages)}{got}." for place, (messages, got) in found.items())


def _is_container(value: Any) -> bool:
    return isinstance(value, dict | list)


def _followed(section: type[BaseModel], location: tuple[int | str, ...]) -> tuple[list[str], type[BaseModel]]:
    """The config keys among the parts of a pydantic location, and the section they lead to."""
    keys = []
    for part in location:
        if isinstance(part, int):
            keys.append(str(part))
        elif part in section.model_fields:
            keys.append(part)
            annotation = section.model_fields[part].annotation
            kinds = (annotation, *getattr(annotation, "__args__", ()))
            inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
            section = inner[0] if inner else section
    return keys, section
