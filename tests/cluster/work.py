"""What the engines are given to do; their workers import this module, and so it imports little."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cluster import attempts, ray_worker
from pipeline.cluster.engine import Actor, Shared
from pipeline.errors import UserError


def scaled(number: int, factor: Shared[int]) -> int:
    return number * factor.get()


def taken(seconds: float) -> tuple[float, float]:
    """When it began and ended."""
    begun = time.time()
    time.sleep(seconds)
    return begun, time.time()


def refused(number: int) -> int:
    if number == 3:
        raise UserError("three: not a number that is liked, got 3; expected another.")
    return number


def broken(number: int) -> float:
    return 1 / number


class Counter:
    """An object with a state."""

    def __init__(self, start: int) -> None:
        self.count, self.process = start, os.getpid()

    def add(self, number: int) -> int:
        self.count += number
        return self.count

    def square(self, number: int) -> int:
        return number**2 + self.count

    def made_in(self) -> int:
        return self.process


def asked_here(number: int, counters: Shared[list[Actor]]) -> tuple[list[int], bool]:
    """What each of some counters says of a number, and whether all lie in the process of the task."""
    found = [(each.ask("square", number)(), each.ask("made_in")()) for each in counters.get()]
    return [square for square, _ in found], {process for _, process in found} == {os.getpid()}


def copies_after(counters: Shared[list[Actor]]) -> tuple[int, int]:
    """The process, and how many copies lie in it, once it has asked some counters."""
    for each in counters.get():
        each.ask("made_in")()
    return os.getpid(), len(ray_worker.copied)


def asked_for(number: int, *counters: Actor) -> tuple[int, ...]:
    """What each of some counters says of a number, and whoever asks waits for it."""
    return tuple(each.ask("square", number)() for each in counters)


def asked_by_the_second(number: int, counters: Shared[list[Actor]], died: str) -> tuple[list[int], bool]:
    """The same of a task whose first process died over one number after it had asked."""
    found = asked_here(number, counters)
    if number == 2 and not (mark := Path(died)).exists():
        mark.touch()
        os._exit(1)
    return found


class Halver:
    """A model worker: a callable that works on a row and returns what gives its receipt."""

    def __init__(self, divisor: float) -> None:
        self.divisor = divisor

    def __call__(self, row: dict[str, Any]) -> Callable[[], dict[str, Any]]:
        if row["number"] == 99:
            raise UserError("number: 99 is too large; expected less.")
        total = row["values"].sum() if "values" in row else row["number"]

        def finish() -> dict[str, Any]:
            if row["number"] == 98:
                raise UserError("number: 98 cannot be written; expected less.")
            return {"number": row["number"], "half": float(total / self.divisor)}

        return finish


class Relay:
    """A model worker whose first rows are finished only when the next one is worked on."""

    def __init__(self) -> None:
        self.seen, self.inside = list[int](), 0

    def __call__(self, row: dict[str, Any]) -> Callable[[], dict[str, Any]]:
        self.inside += 1
        self.seen.append(row["number"])
        time.sleep(0.01)
        alone, place = self.inside == 1, len(self.seen)
        self.inside -= 1

        def finish() -> dict[str, Any]:
            until = time.monotonic() + 20
            while place < row["rows"] and len(self.seen) == place and time.monotonic() < until:
                time.sleep(0.01)
            return {"alone": alone, "overtaken": len(self.seen) > place}

        return finish


def decoded(row: dict[str, Any], length: int) -> dict[str, Any]:
    return {"values": np.full(length, row["number"], np.int64)}


def deadly(number: int, folder: str) -> int:
    """A task that ends its process over one number."""
    with attempts.begun(f"{folder}/part-{number}", "counting") as attempt:
        attempt.at([f"image {number}", f"image {number + 1}"])
        if number == 2:
            os._exit(1)
    return number


class Deadly:
    """A model worker that does."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, row: dict[str, Any]) -> Callable[[], dict[str, Any]]:
        number = deadly(row["number"], self.folder)
        return lambda: {"number": number}


class Chatty:
    """A model worker that prints, logs, and has no room for one number."""

    def __call__(self, row: dict[str, Any]) -> Callable[[], dict[str, Any]]:
        sys.stdout.write("counted with love\n")
        logging.getLogger("mine").info("quiet word")
        if row["number"] == 2:
            raise MemoryError("no room for this batch")
        return lambda: row
