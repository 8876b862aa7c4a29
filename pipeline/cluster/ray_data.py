"""Rows through decoding tasks and model actors in one execution of Ray Data, with back-pressure."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import Lock
from typing import Any

import ray
from ray.util.annotations import RayDeprecationWarning

from pipeline.cluster import usage
from pipeline.cluster.engine import Decode, Needs, Row, Work
from pipeline.cluster.logs import Logs
from pipeline.cluster.ray_worker import metered
from pipeline.errors import UserError

COSTS, FAILURE = "costs", "failure"
"""Columns of a receipt beside those of the work: what it cost, and the text of a `UserError`."""


def quiet() -> None:
    """Keep Ray Data's own bars and log lines away from ours."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)


def stream(
    rows: Sequence[Row],
    decode: Decode | None,
    worker: Work,
    needs: Needs,
    count: int,
    logs: Logs | None,
) -> Iterator[Row]:
    """Receipts of rows, as they come; see `engine.Engine.stream`."""
    data = ray.data.from_items(list(rows), override_num_blocks=len(rows))
    if decode is not None:
        given = {"decode": decode, "logs": logs}
        data = data.map(_decoded, fn_kwargs=given, num_cpus=1, memory=decode[2] or None)
    kind, arguments = worker
    own = {name: amount for name, amount in needs.items() if name not in ("CPU", "GPU", "memory")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # the oldest Ray knows no newer name
        receipts = data.map(
            type(kind.__name__, (Worker,), {}),  # the name that Ray shows
            fn_constructor_kwargs={"kind": kind, "given": arguments, "logs": logs},
            compute=ray.data.ActorPoolStrategy(
                size=count, max_tasks_in_flight_per_actor=2, enable_true_multi_threading=True
            ),
            max_concurrency=2,  # a row is worked on while the one before it is finished
            num_cpus=needs["CPU"],
            num_gpus=needs["GPU"] or None,
            memory=needs.get("memory"),
            resources=own or None,
        )
    for row in receipts.iter_rows():
        if row[FAILURE]:
            raise UserError(row[FAILURE])
        for costs in row.pop(COSTS):
            usage.report(costs)
        yield row


class Worker:
    """Model actor around an object that works on rows: on one, while the one before it is finished."""

    def __init__(self, kind: Callable[..., Any], given: Any, logs: Logs | None) -> None:
        self.work, self.logs, self.alone = kind(*given), logs, Lock()

    def __call__(self, row: Row) -> Row:
        """Receipt of a row, or of what went wrong before."""
        before = row.get(COSTS, [])
        if row.get(FAILURE):
            return {COSTS: before, FAILURE: row[FAILURE]}
        with self.alone:
            begun = _receipt(lambda: {"finish": self.work(row)}, self.logs, before)
        finish = begun.pop("finish", dict)
        try:
            return {**finish(), **begun}
        except UserError as error:
            return {**begun, FAILURE: str(error)}


def _decoded(row: Row, decode: Decode, logs: Logs | None) -> Row:
    """Ray Data function: a row with more columns."""
    function, given, _ = decode
    return {**row, **_receipt(lambda: function(row, *given), logs)}


def _receipt(work: Callable[[], Row], logs: Logs | None, before: Iterable[Any] = ()) -> Row:
    """What a Ray Data function returns: its result with its costs and those of functions `before` it.

    A `UserError` is returned as text, because Ray Data would bury it.
    """
    found: Row = {}
    failure = ""
    with metered(logs) as costs:
        try:
            found = work()
        except UserError as error:
            failure = str(error)
    return {**found, COSTS: [*before, costs], FAILURE: failure}
