"""A function in a process of its own: nothing imported yet, its own environment, nothing left behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar
from unittest.mock import patch

T = TypeVar("T")


def fresh(function: Callable[..., T], *arguments: Any, **environment: str) -> T:
    """Call a function in a new process, with variables that libraries read when they are imported."""
    with (
        patch.dict(os.environ, environment),
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
    ):
        return pool.submit(function, *arguments).result()
