"""What a workspace keeps under a digest of everything it depends on, and how one sees that it is complete.

A folder of parts is complete when its `_manifest.json` exists; that file is always written last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from pipeline import __version__
from pipeline.errors import UserError
from pipeline.workspace import files, storage
from pipeline.workspace.files import Place


def digest(value: Any) -> str:
    """SHA-256 of a JSON-serialisable value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


RECORD = "_manifest.json"


def remove_folder(folder: Place) -> None:
    """Delete a folder, all completion markers first: what a kill leaves then never looks complete."""
    if folder.is_dir():
        _unmark(folder)
        files.remove_folder(folder)


def _unmark(folder: Place) -> None:
    """Delete the completion markers of a folder and of those in it."""
    inside = [entry.uri for entry in storage.entries(str(folder)) if entry.folder]
    (folder / RECORD).unlink(missing_ok=True)
    for each in inside:
        _unmark(files.at(each))


def remove_drafts(folder: Place) -> None:
    """Delete what writers that were killed left behind."""
    for draft in folder.glob(".part-*"):
        draft.unlink(missing_ok=True)


_ARRAYS = "arrays.safetensors"


@dataclass(frozen=True)
class Cache:
    """The artefacts of a workspace."""

    folder: Place
    mode: Literal["reuse", "frozen", "fresh"] = "reuse"
    """Compute what is not there; or refuse to; or compute everything again."""

    def get(
        self, kind: str, identity: Mapping[str, Any], compute: Callable[[], Mapping[str, NDArray[Any]]]
    ) -> dict[str, NDArray[Any]]:
        """Arrays of an artefact: read back, or computed and stored.

        Raises:
            UserError: if it is not there and the cache is frozen.
        """
        return self.get_all(kind, [identity], lambda _: [compute()])[0]

    def get_all(
        self,
        kind: str,
        identities: Sequence[Mapping[str, Any]],
        compute: Callable[[list[int]], Iterable[Mapping[str, NDArray[Any]]]],
    ) -> list[dict[str, NDArray[Any]]]:
        """Arrays of several artefacts; those that are missing are computed together.

        Args:
            kind: what they are.
            identities: what each depends on.
            compute: gives the arrays of those at some positions.

        Raises:
            UserError: if one is not there and the cache is frozen.
        """
        folders = [self.place(kind, identity) for identity in identities]
        missing = [number for number, folder in enumerate(folders) if not self.has(folder, kind)]
        for number, found in zip(missing, compute(missing) if missing else (), strict=True):
            data = save({name: np.asarray(value, order="C") for name, value in found.items()})
            with files.atomic(folders[number] / _ARRAYS) as draft:
                draft.write_bytes(data)
            files.write_json(folders[number] / RECORD, {"kind": kind, "identity": identities[number]})
        return [self._read(folder) for folder in folders]

    @staticmethod
    def _read(folder: Place) -> dict[str, NDArray[Any]]:
        with files.local(folder / _ARRAYS) as file:
            return load_file(file)

    def place(self, kind: str, identity: Mapping[str, Any]) -> Place:
        """Folder of an artefact."""
        return self.folder / digest({"kind": kind, "version": __version__, **identity})[:16]

    def has(self, folder: Place, kind: str) -> bool:
        """Whether an artefact is there to be used."""
        if self.mode == "fresh":
            remove_folder(folder)
        found = (folder / RECORD).is_file()
        if self.mode == "frozen" and not found:
            raise UserError(f"fit: no {kind} in the workspace. Run `ood-pipeline fit` first.")
        return found
