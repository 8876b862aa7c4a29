"""Where datasets lie."""

from __future__ import annotations

from pipeline.config.loading import resolve
from pipeline.config.schema import Dataset
from pipeline.data import formats
from pipeline.errors import UserError
from pipeline.workspace import storage


def located(path: str) -> str:
    """A configured path as one of `storage`: a URI, or an absolute local path."""
    if "://" in path and not path.startswith("package://"):
        return path
    return str(resolve(path).absolute())


def require_there(dataset: Dataset) -> None:
    """Refuse a path at which there is nothing, if its format says what lies there; a look that costs no time.

    Raises:
        UserError: if there is none.
    """
    known = formats.get(dataset.format) if dataset.format in formats.names() else None
    what = getattr(known, "PLACE", None)
    if what is None or set(dataset.path) & set("*{"):
        return
    if storage.find(located(dataset.path)) is None:
        raise UserError(f"datasets.{dataset.name}.path: no such {what}: {located(dataset.path)}")
