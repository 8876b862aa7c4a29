"""Changes to a raw config from the command line: `--set key.path=value`."""

from __future__ import annotations

from copy import copy
from typing import Any

import yaml

from pipeline.config.documents import Items, Section, names, position_of
from pipeline.errors import UserError, unknown


def apply_override(data: dict[str, Any], override: str) -> None:
    """Apply one `key.path=value`; the value is read as YAML, list items go by number or name."""
    target, separator, text = override.partition("=")
    where = f"--set {target}"
    if not separator or not target:
        raise UserError(f"{where}: expected key.path=value, e.g. extract.batch_size=64")
    *parents, last = target.split(".")
    node: Any = data
    for key in parents:
        node = _inside(node, key, where)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: the value is not valid YAML: {error}") from None
    if isinstance(node, list):
        position, labelled = _position(node, last, where)
        node[position] = {last: value} if labelled and isinstance(value, dict | None) else value
    else:
        _put(node, last, value)


def _inside(node: Any, key: str, where: str) -> Any:
    """What lies under a key, apart from whatever an alias repeats it as; an empty section if nothing does."""
    place: Any = key
    if isinstance(node, list):
        place, labelled = _position(node, key, where)
        if labelled:
            node[place] = {key: {}} if isinstance(node[place], str) else _copied(node[place])
            return _inside(node[place], key, where)
    elif node.get(key) is None:
        _put(node, key, Section({}, {}))
    if not isinstance(node[place], dict | list):
        raise UserError(f"{where}: {key!r} is a value, not a section")
    node[place] = _copied(node[place])
    return node[place]


def _copied(node: Any) -> Any:
    if isinstance(node, Section):
        return Section(node, dict(node.places))
    return Items(node, node.places) if isinstance(node, Items) else copy(node)


def _put(node: dict[str, Any], key: str, value: Any) -> None:
    node[key] = value
    if isinstance(node, Section):
        node.places[key] = "--set"


def _position(items: list[Any], key: str, where: str) -> tuple[int, bool]:
    """Position of a list item; and whether the key is its whole text or its key, as for detectors."""
    position = position_of(items, key)
    if position is None:
        raise UserError(f"{where}: {unknown('item', key, [name for item in items for name in names(item)])}")
    item = items[position]
    return position, key == item or (isinstance(item, dict) and key in item)
