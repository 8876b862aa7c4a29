"""YAML files as plain data that remembers where every key stands: a mistake is told with its line."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError

LARGEST = 2**20
"""Bytes that a config file may have: the largest of ours has some thousand."""


class Section(dict[str, Any]):
    """A mapping, and where each of its keys stands."""

    def __init__(self, content: dict[str, Any], places: dict[str, str]) -> None:
        super().__init__(content)
        self.places = places


class Items(list[Any]):
    """A list, and where each of its items stands."""

    def __init__(self, content: list[Any], places: list[str]) -> None:
        super().__init__(content)
        self.places = places


def read(path: Path, name: str = "") -> Section:
    """The mapping in a YAML file.

    Args:
        path: of the file.
        name: what the file is called beside line numbers; nothing for the one that everybody knows.

    Raises:
        UserError: no YAML, no mapping, a key that stands there twice, a value that cannot be read; names
            the line.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path}: larger than {LARGEST:,} bytes, and so no config file.")
        loader = _Loader(path.read_text(encoding="utf-8"))
        loader.place = f"{name}, line" if name else "line"
        data = loader.get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: nested too deeply.") from None
    if not isinstance(data, Section):
        raise UserError(f"{path}: expected a mapping with the keys name, model, datasets, detectors")
    return data


def place_of(data: Any, keys: Sequence[str | int]) -> str:
    """Where the value behind some keys stands, or what is nearest to it; nothing if nobody knows.

    Args:
        data: of a config file.
        keys: of sections; items of lists go by position, name or label.
    """
    found = ""
    for key in keys:
        if isinstance(data, Section) and key in data:
            found, data = data.places.get(str(key), found), data[str(key)]
        elif isinstance(data, Items) and (position := position_of(data, key)) is not None:
            found, data = data.places[position], data[position]
            if isinstance(data, Section) and key in data:  # a detector under its label
                found, data = data.places.get(str(key), found), data[str(key)]
        else:
            break
    return found


def position_of(items: Sequence[Any], key: str | int) -> int | None:
    """Position of a list item that goes by its position, or by a name."""
    if isinstance(key, int) or (key.isdecimal() and len(key) < 10 and int(key) < len(items)):
        return int(key) if int(key) < len(items) else None
    return next((position for position, item in enumerate(items) if key in names(item)), None)


def names(item: Any) -> list[str]:
    """What a list item is called: its `name` or `label`, else its keys or its text."""
    if isinstance(item, dict):
        own = item.get("name", item.get("label"))
        return [str(key) for key in item] if own is None else [str(own)]
    return [item] if isinstance(item, str) else []


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader; mappings and lists remember lines."""

    place = "line"

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # of int() and datetime
            raise _wrong(node, str(error)) from None

    def told(self, node: yaml.Node) -> str:
        return f"{self.place} {node.start_mark.line + 1}"

    def section(self, node: yaml.MappingNode) -> Section:
        first: dict[Hashable, int] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key, deep=True)
            if isinstance(name, Hashable) and name in first:
                raise _wrong(key, f"the key {name!r} stands here twice, first in line {first[name]}")
            if isinstance(name, Hashable):
                first[name] = key.start_mark.line + 1
        content: dict[Any, Any] = self.construct_mapping(node, deep=True)
        places = {str(self.construct_object(key, deep=True)): self.told(key) for key, _ in node.value}
        return Section(content, places)

    def items(self, node: yaml.SequenceNode) -> Items:
        return Items(self.construct_sequence(node, deep=True), [self.told(item) for item in node.value])


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.section)
_Loader.add_constructor("tag:yaml.org,2002:seq", _Loader.items)


def _wrong(node: yaml.Node, reason: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, reason, node.start_mark)
