"""What pydantic found wrong with a config, in words that help: the key, the value, the closest valid name."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.config.documents import place_of
from pipeline.errors import unknown


def explain(error: ValidationError, prefix: str, root: type[BaseModel], data: Any = None) -> list[str]:
    """One line per key: where, what, and the closest valid key.

    Args:
        error: what pydantic found.
        prefix: of every line.
        root: the section that was validated.
        data: what was validated, if it remembers lines.
    """
    found: dict[str, tuple[list[str], str]] = {}
    problems = error.errors()
    for problem in problems:
        location, kind, value = problem["loc"], problem["type"], problem["input"]
        if kind == "too_short" and any(_is_below(location, other["loc"]) for other in problems):
            continue  # items that are wrong are not counted
        keys, section = _followed(root, location, data)
        if kind == "extra_forbidden":
            keys.append(str(location[-1]))
            message = unknown("key", keys[-1], section.model_fields).removesuffix(".")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            message = message.replace("a valid tuple", "a list, as [...]").replace("Tuple", "List")
        if kind in ("string_type", "literal_error") and len(keys) < len(location) and _is_container(value):
            continue  # the branch of a union that was not meant
        # a value with an @ may be a URL with a password
        silent = kind in ("missing", "extra_forbidden") or _is_container(value) or "@" in str(value)
        place = (prefix + ".".join(keys)).rstrip(":. ")
        line = place_of(data, keys)
        ending = ("" if silent else f", got {value!r:.200}") + (f" ({line})" if line else "")
        found.setdefault(place, ([], ending))[0].append(message)
    told = [(place, ", or ".join(messages) + ending) for place, (messages, ending) in found.items()]
    return [f"{place}: {text}." if place else f"{text}." for place, text in told]


def place_told(message: str, data: Any) -> str:
    """A message that begins with the keys of what it is about, with the line at its end."""
    line = place_of(data, message.partition(":")[0].split("."))
    return f"{message.removesuffix('.')} ({line})." if line else message


def _is_below(location: tuple[int | str, ...], other: tuple[int | str, ...]) -> bool:
    return len(other) > len(location) and other[: len(location)] == location


def _is_container(value: Any) -> bool:
    return isinstance(value, dict | list)


def _followed(
    section: type[BaseModel], location: tuple[int | str, ...], data: Any
) -> tuple[list[str], type[BaseModel]]:
    """The config keys among the parts of a pydantic location, and the section they lead to.

    Datasets go by their names, other items of lists by their positions.
    """
    keys: list[str] = []
    for part in location:
        if isinstance(part, int):
            items = data["datasets"] if keys == ["datasets"] and isinstance(data, dict) else []
            item = items[part] if isinstance(items, list) and part < len(items) else None
            keys.append(str(item["name"]) if isinstance(item, dict) and "name" in item else str(part))
        elif part in section.model_fields:
            keys.append(part)
            annotation = section.model_fields[part].annotation
            kinds = (annotation, *getattr(annotation, "__args__", ()))
            inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
            section = inner[0] if inner else section
    return keys, section
