"""Class names and class indices: folder names, WordNet ids, mapping files, labels written as text."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import loading
from pipeline.config.schema import CLASS_FILES, ID_ROLES, LABELLED_ROLES, Dataset
from pipeline.data.formats import _files
from pipeline.data.places import located
from pipeline.errors import UserError, unknown
from pipeline.workspace import storage

INDEX = "index"
_NUMBER = re.compile(r"-?[0-9]{1,9}")


@dataclass(frozen=True)
class Classes:
    """What class names mean."""

    source: str
    """Where the names are from, for messages."""
    index: dict[str, int] | None
    """Class index by name; None: the name is the index."""

    def of(self, name: str, where: str) -> int:
        """Index of a class.

        Raises:
            UserError: a name that is not known, with the closest ones, or that is no number.
        """
        if self.index is None:
            if not is_number(name):
                raise UserError(f"{where}: {name!r} is no class index; expected a whole number.")
            return int(name)
        if name not in self.index:
            close = ", ".join(map(repr, get_close_matches(name, self.index, n=3))) or "none"
            raise UserError(
                f"{where}: the class {name!r} is not among the {len(self.index)} of {self.source}. "
                f"Closest: {close}. Mend the name, or leave its images out."
            )
        return self.index[name]

    def several(self, text: str, where: str) -> dict[str, Any]:
        """The columns `label` and `accepted` of a label in text: `281`, or `281;282` where both are right."""
        return of([self.of(name.strip(), where) for name in text.split(";")], where)


def of(value: Any, where: str) -> dict[str, Any]:
    """The columns `label` and `accepted` of a label as data formats hold it.

    Args:
        value: None, a class index, several that are right, or text such as `281;282`.
        where: place of the value, for messages.

    Raises:
        UserError: anything else.
    """
    if value is None:
        return {"label": -1, "accepted": None}
    if isinstance(value, str):
        return Classes(INDEX, None).several(value, where)
    labels = list(dict.fromkeys(value if isinstance(value, list) else [value]))
    if not labels or any(type(label) is not int or abs(label) >= 2**31 for label in labels):
        raise UserError(f"{where}: the label is {value!r}; expected a class index, or several in a list.")
    return {"label": labels[0], "accepted": labels if len(labels) > 1 else None}


def read(dataset: Dataset) -> bool:
    """Whether labels are read where there are any: those of training images may be needed by a detector."""
    return needed(dataset) or dataset.role == "train"


def needed(dataset: Dataset) -> bool:
    """Whether there must be labels, whatever the detectors are."""
    filtered = dataset.include_labels is not None or dataset.limit_per_class is not None
    named = dataset.role in ID_ROLES and dataset.labels is not None
    return dataset.role in LABELLED_ROLES or filtered or named


def is_number(name: str) -> bool:
    """Whether a name is a whole number."""
    return _NUMBER.fullmatch(name) is not None


def numbered(names: Iterable[str]) -> dict[str, int]:
    """Index of each name in the order of their characters, as torchvision's `ImageFolder` has it."""
    return {name: index for index, name in enumerate(sorted(names))}


def order_note(index: Mapping[str, int]) -> str:
    """What to know of `numbered` classes whose names are numbers in another order; empty for others."""
    names = list(index)
    if not all(map(is_number, names)) or names == sorted(names, key=int):
        return ""
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return (
        "class folders are numbered as torchvision's ImageFolder does it, in the order of their names as "
        f"text ({shown}). If the model was trained with the number in a name as the class, set labels: index"
    )


def named(dataset: Dataset) -> Classes:
    """The classes that `labels` names: `index`, a list that comes with the package, or a file.

    Raises:
        UserError: an unknown list, or a file that is missing or no mapping.
    """
    labels, where = dataset.labels or INDEX, f"datasets.{dataset.name}.labels"
    if labels == INDEX:
        return Classes(INDEX, None)
    if labels.endswith(CLASS_FILES):
        return Classes(labels, _mapping(labels, where))
    folder = loading.bundled() / "labels"
    known = [path.stem for path in folder.glob("*.txt")]
    if labels not in known:
        endings = ", ".join(CLASS_FILES)
        raise UserError(f"{where}: {unknown('list', labels, [INDEX, *known])} A file ends in {endings}.")
    return Classes(labels, _mapping(str(folder / f"{labels}.txt"), where))


def _mapping(path: str, where: str) -> dict[str, int]:
    """Class index by name, as a file says."""
    with _files.open_file(path, where) as stream:
        content = stream.read()
    try:
        found = _parsed(content.decode("utf-8-sig"), Path(storage.name_of(located(path))).suffix)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{where}: {path} cannot be read: {error}") from None
    mapping = dict(found)
    wrong = [name for name, index in found if type(index) is not int or index < 0]
    if wrong or not mapping or len(mapping) < len(found):
        reason = (
            f"{wrong[0]!r} has no index" if wrong else "a name occurs twice" if mapping else "it is empty"
        )
        raise UserError(
            f"{where}: {path} is no mapping: {reason}. Expected names with their class indices, "
            "or one name per class in the order of the classes."
        )
    return mapping


def _parsed(text: str, ending: str) -> list[tuple[str, Any]]:
    """Names and what should be their indices."""
    if ending == ".csv":
        rows = [row for row in csv.reader(text.splitlines()) if row]
        if rows and not is_number(rows[0][-1]):
            del rows[0]  # the header
        return [(row[0], int(row[-1]) if is_number(row[-1]) else None) for row in rows]
    if ending == ".txt":
        value: Any = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        value = json.loads(text) if ending == ".json" else yaml.safe_load(text)
    if isinstance(value, dict):
        return [(str(name), index) for name, index in value.items()]
    if isinstance(value, list):
        return [(str(name), index) for index, name in enumerate(value)]
    raise ValueError("expected a mapping or a list")
