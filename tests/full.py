"""A GPU without room: torch's calls fail at one line of the package after the other."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import pipeline
from pipeline.errors import UserError

ROOT = Path(pipeline.__file__).parent
_LOOKS = ("__get__", "__len__", "dim", "numpy")
"""Functions that make nothing on a device."""


@cache
def _asks(name: str) -> bool:
    """Whether a file is of the package; the network has lines of its own."""
    file = Path(name)
    return file.is_relative_to(ROOT) and not file.is_relative_to(ROOT / "quickstart")


class Full(TorchFunctionMode):
    """In the block, nothing that one line asks torch for finds room; without a line, all are noted."""

    def __init__(self, line: tuple[str, int] | None = None) -> None:
        super().__init__()
        self.line = line
        self.seen = dict[tuple[str, int], None]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ not in _LOOKS:
            frame = sys._getframe(1)
            while not _asks(frame.f_code.co_filename):
                assert frame.f_back is not None
                frame = frame.f_back
            line = frame.f_code.co_filename, frame.f_lineno
            self.seen[line] = None
            if line == self.line:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
        return func(*args, **(kwargs or {}))


def each_line(work: Callable[[], object], message: str) -> list[tuple[str, int]]:
    """Do work once for each line that asks torch for something; it must say that there is no room.

    Returns:
        File and number of the lines.
    """
    with Full() as found:
        work()
    for line in found.seen:
        with pytest.raises(UserError, match=message), Full(line):
            work()
    return list(found.seen)
