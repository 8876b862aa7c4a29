"""Both engines do the same: order, errors, shared values, actors, and a pipeline into workers."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import LocalRayletDiedError, RayTaskError, RpcError
from threadpoolctl import threadpool_info

from pipeline.cluster import logs, on_ray, usage
from pipeline.cluster.engine import SMALL, Engine, chosen, opened, shared
from pipeline.cluster.on_ray import LAG, OnRay
from pipeline.config.schema import Extract, Index
from pipeline.errors import UserError
from tests.cluster.work import (
    Chatty,
    Counter,
    Deadly,
    Halver,
    Relay,
    asked_by_the_second,
    asked_for,
    asked_here,
    broken,
    copies_after,
    deadly,
    decoded,
    refused,
    scaled,
    taken,
)

NEEDS = {"CPU": 0.5, "GPU": 0.0}
WHOLE = {"CPU": 1.0, "GPU": 0.0}


@pytest.fixture(params=["inline-1", "inline-3", "ray"])
def each(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Every engine in turn."""
    if request.param == "ray":
        yield request.getfixturevalue("on_ray")
    else:
        with opened("inline", threads=int(request.param[-1])) as engine:
            yield engine


def test_a_connection_that_is_lost_ends_with_the_session_so_that_the_next_opens_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened, alive, answers = False, True, True

    def shut() -> None:
        nonlocal opened
        opened = False

    def nodes() -> dict[str, Any]:
        if not answers:
            raise RpcError("no answer")
        return {"own": {}} if alive else {}

    context = SimpleNamespace(get_node_id=lambda: "own")
    monkeypatch.setattr(on_ray.ray, "is_initialized", lambda: opened)
    monkeypatch.setattr(on_ray.ray, "shutdown", shut)
    monkeypatch.setattr(on_ray.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(on_ray, "nodes", nodes)

    def stays_open(error: Exception) -> bool:
        nonlocal opened
        with pytest.raises(type(error)), on_ray.session(None, None):
            opened = True
            raise error
        return opened

    with on_ray.kept():
        assert stays_open(UserError("of a config"))
        assert not stays_open(LocalRayletDiedError())
        alive = False
        assert not stays_open(UserError("Ray: an actor died"))
        answers = False
        assert not stays_open(UserError("Ray: an actor died"))
        alive = answers = opened = True
    assert not opened
    opened = True
    assert stays_open(LocalRayletDiedError())  # it is not ours


def test_results_come_in_the_order_of_the_arguments_and_are_counted(each: Engine) -> None:
    factor = each.share(7)
    with usage.collect() as used:
        found = list(each.in_order(scaled, ((number, factor) for number in range(40))))
    assert found == [7 * number for number in range(40)]
    assert used.tasks == 40
    assert used.retries == 0


def test_gpus_are_counted_whether_anything_asks_for_them_or_not(
    each: Engine, request: pytest.FixtureRequest
) -> None:
    on_ray = request.node.callspec.params["each"] == "ray"
    assert each.gpus() == (2 if on_ray else torch.cuda.device_count())


def test_a_node_runs_no_more_tasks_at_once_than_it_has_memory_for(
    on_ray: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    on_ray.cpus()  # connects
    (node,) = on_ray.nodes().values()
    has = int(node["resources"]["memory"])

    def most_at_once(need: int, *beside: int) -> int:
        spans = list(on_ray.in_order(taken, [(0.3,)] * 6, lambda _: need, beside))
        return max(sum(begun <= start < ended for begun, ended in spans) for start, _ in spans)

    assert most_at_once(has // 4) > 1
    assert most_at_once(has // 2 + 2**20) == 1
    assert most_at_once(has // 4, has // 4, has // 4 + 2**20) == 1  # actors leave room for one
    assert not caplog.messages
    assert most_at_once(2 * has) == 1
    (line,) = caplog.messages
    assert line.startswith("taken: a task may hold")
    assert line.endswith("GiB: it runs alone")


def test_a_mistake_of_the_user_comes_out_as_it_is(each: Engine) -> None:
    with pytest.raises(UserError, match=r"^three: not a number that is liked"):
        list(each.in_order(refused, [(number,) for number in range(9)]))


def test_another_error_keeps_its_type_and_message(each: Engine) -> None:
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        list(each.in_order(broken, [(1,), (0,)]))


def test_an_actor_keeps_its_state_and_answers_one_call_after_the_other(each: Engine) -> None:
    (actor,) = each.gang(Counter, NEEDS, [(10,)])
    try:
        assert [pending() for pending in [actor.ask("add", number) for number in (1, 2, 3)]] == [11, 13, 16]
    finally:
        with usage.collect() as used:
            actor.stop()
    assert used.tasks in (0, 3)  # of an object in this process they were counted when they were asked for


def test_an_object_that_is_copied_is_asked_in_the_process_of_the_task(each: Engine) -> None:
    counters = [each.copied(Counter, 0), each.copied(Counter, 5)]
    shared = each.share(counters)
    found = list(each.in_order(asked_here, ((number, shared) for number in range(20))))
    assert [numbers for numbers, _ in found] == [[n**2, n**2 + 5] for n in range(20)]
    assert all(own for _, own in found)


def test_an_object_that_is_copied_is_kept_on_ray_until_it_is_stopped(on_ray: Engine) -> None:
    first, second = on_ray.copied(Counter, 0), on_ray.copied(Counter, 5)
    assert [first.ask("add", 1)(), second.ask("add", 1)(), first.ask("add", 1)()] == [1, 6, 2]
    first.stop()
    assert [first.ask("add", 1)(), second.ask("add", 1)()] == [1, 7]
    first.stop()
    second.stop()


def test_processes_of_ray_keep_no_copies_when_other_work_begins(on_ray: Engine) -> None:
    counters = on_ray.share([on_ray.copied(Counter, 0), on_ray.copied(Counter, 5)])
    asked = list(on_ray.in_order(copies_after, ((counters,) for _ in range(20))))
    assert {held for _, held in asked} == {2}
    others = list(on_ray.in_order(copies_after, ((on_ray.share([]),) for _ in range(20))))
    assert {process for process, _ in asked} & {process for process, _ in others}
    assert {held for _, held in others} == {0}


def test_a_task_whose_process_died_asks_the_object_of_its_next(on_ray: Engine, tmp_path: Path) -> None:
    shared = on_ray.share([on_ray.copied(Counter, 5)])
    arguments = [(number, shared, str(tmp_path / "died")) for number in range(4)]
    with usage.collect() as used:
        found = list(on_ray.in_order(asked_by_the_second, arguments))
    assert found == [([number**2 + 5], True) for number in range(4)]
    assert used.retries == 1


def test_a_pool_gives_results_in_the_order_of_the_arguments(each: Engine) -> None:
    pool = each.pool(Counter, NEEDS, 2, 0)
    try:
        assert list(pool.each("square", [(number,) for number in range(20)])) == [n**2 for n in range(20)]
    finally:
        pool.stop()


def test_a_pool_works_with_those_actors_that_there_is_room_for(on_ray: Engine) -> None:
    held = on_ray.gang(Counter, WHOLE, [(0,), (0,)])
    pool = on_ray.pool(Counter, WHOLE, 2, 0)
    try:
        assert list(pool.each("square", [(number,) for number in range(9)])) == [n**2 for n in range(9)]
    finally:
        pool.stop()
        for actor in held:
            actor.stop()


@pytest.mark.parametrize(
    ("cpus", "each", "expected"),
    [((8, 8), 2.5, 5), ((2, 2), 1.5, 1), ((4,), 1, 3), ((1, 1), 0.5, 2), ((0.5, 0.5), 0.5, 0)],
)
def test_a_cpu_that_is_left_over_is_one_of_a_single_node(
    cpus: tuple[float, ...], each: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {str(number): {"resources": {"CPU": count}} for number, count in enumerate(cpus)}
    monkeypatch.setattr("pipeline.cluster.on_ray.nodes", lambda: found)
    monkeypatch.setattr(OnRay, "connect", lambda _: None)
    assert OnRay(None)._fits({"CPU": each, "GPU": 0}, spare=1) == expected


def test_who_asks_for_gpus_where_no_node_has_one_is_told_how_to_do_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there: dict[str, Any] = {"head": {"resources": {"CPU": 8.0}}}
    monkeypatch.setattr(on_ray, "connect", lambda: None)
    monkeypatch.setattr(on_ray, "nodes", lambda: there)
    message = r"extract: one actor needs 1 CPU and 1 GPU .* nodes have 8 CPU and 0 GPU\. Lower the resources "
    cure = r"\(with `hardware: cpu` it needs no GPU\) "
    with pytest.raises(UserError, match=message + "in the config " + cure + "or add nodes"):
        OnRay(None).capacity({"CPU": 1, "GPU": 1}, "extract")
    there["other"] = {"resources": {"CPU": 0.5, "GPU": 1.0}}
    with pytest.raises(UserError, match=message.split(" nodes")[0]) as refused:
        OnRay(None).capacity({"CPU": 1, "GPU": 1}, "extract")
    assert "hardware" not in str(refused.value)


def test_a_gang_that_finds_no_room_steps_back_so_that_the_tasks_of_another_go_on(
    on_ray: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeline.cluster.on_ray._PATIENCE", 1.0)
    first = on_ray.gang(Counter, WHOLE, [(0,), (1,)])
    late: list[Any] = []
    waiting = threading.Thread(target=lambda: late.extend(on_ray.gang(Counter, WHOLE, [(5,)])))
    waiting.start()  # takes the last CPU
    time.sleep(0.5)
    found = list(on_ray.in_order(asked_for, [(number, *first) for number in range(9)]))
    assert found == [(n**2, n**2 + 1) for n in range(9)]
    assert not late
    for actor in first:
        actor.stop()
    waiting.join(timeout=60)
    (actor,) = late
    assert actor.ask("square", 2)() == 9
    actor.stop()
    assert any(
        line.startswith("Counter: 1 actors with 1 CPU each and a CPU for tasks found no room at once")
        for line in caplog.messages
    )


def test_work_that_has_to_wait_for_the_cluster_says_so(
    on_ray: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    on_ray.cpus()  # connects
    assert list(on_ray.in_order(scaled, [(2, on_ray.share(3))])) == [6]
    assert not caplog.messages
    remote = ray.remote(taken).options(num_cpus=3).remote(LAG + 2)
    time.sleep(1)
    assert list(on_ray.in_order(scaled, [(2, on_ray.share(3))])) == [6]
    assert caplog.messages == ["scaled: waits, as other work holds the cluster (3 CPU)"]
    ray.get(remote)


def test_rows_go_through_decoding_and_workers_once_each(each: Engine) -> None:
    rows = [{"number": number} for number in range(12)]
    found = list(each.stream(rows, (decoded, (4,), 2**60), (Halver, (2.0,)), NEEDS, 2))
    assert {row["number"]: row["half"] for row in found} == {number: 2.0 * number for number in range(12)}
    assert len(found) == 12
    for number, message in ((99, "is too large"), (98, "cannot be written")):
        with pytest.raises(UserError, match=rf"^number: {number} {message}"):
            list(each.stream([{"number": number}], (decoded, (4,), 2**60), (Halver, (2.0,)), NEEDS, 1))


def test_a_worker_has_the_next_row_while_one_is_finished(on_ray: Engine) -> None:
    rows = [{"number": number, "rows": 5} for number in range(5)]
    found = list(on_ray.stream(rows, None, (Relay, ()), NEEDS, 1))
    assert [receipt["alone"] for receipt in found] == [True] * 5
    assert sum(receipt["overtaken"] for receipt in found) == 4


def test_rows_that_need_no_decoding_go_to_workers_in_their_order(engine: Engine) -> None:
    stream = engine.stream([{"number": 6}, {"number": 99}], None, (Halver, (2.0,)), NEEDS, 1)
    assert next(stream) == {"number": 6, "half": 3.0}
    with pytest.raises(UserError, match=r"^number: 99 is too large"):
        next(stream)


def test_a_log_that_cannot_be_written_costs_no_work(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file in the place of the folder")
    full = logs.Logs(tmp_path / "logs")
    with logs.writing(full):
        sys.stdout.write("said to nobody\n")
        logging.getLogger("mine").warning("lost")
    full.merge()
    assert (tmp_path / "logs").read_text() == "a file in the place of the folder"


def test_logs_are_merged_once_even_if_they_could_not_be_deleted(tmp_path: Path, monkeypatch) -> None:
    mine = logs.Logs(tmp_path, logging.INFO, "one")
    with logs.writing(mine):
        logging.getLogger("mine").info("first")
        sys.stdout.write("second\nthird\n")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        mine.merge()
    mine.merge()
    merged = (tmp_path / "workers.log").read_text().splitlines()
    assert [line.rpartition(": ")[2] for line in merged] == ["first", "second", "third"]
    assert [file.name for file in tmp_path.iterdir()] == ["workers.log"]


def refuse(*_: Any, **__: Any) -> None:
    raise PermissionError("not yours")


def test_threads_are_the_inline_engines() -> None:
    with pytest.raises(UserError, match=r"^--threads: only the inline engine has threads"):
        opened("ray", threads=2)


@pytest.mark.parametrize(
    ("asked", "images", "plain", "address", "expected"),
    [
        ("auto", SMALL, True, None, "inline"),
        ("auto", SMALL + 1, True, None, "ray"),
        ("auto", 10, False, None, "ray"),
        ("auto", 10, True, "auto", "ray"),
        ("ray", 10, True, None, "ray"),
        ("inline", 10**9, False, "auto", "inline"),
    ],
)
def test_a_few_images_stay_in_this_process_unless_a_cluster_or_more_than_a_cpu_is_meant(
    asked, images, plain, address, expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as where nobody imported it
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert chosen(asked, images, plain) == expected


@pytest.mark.parametrize(
    "given",
    [{"gpus_per_actor": 0.5}, {"cpus_per_actor": 2}, {"device": "cuda"}, {"resources": {"a100": 0.1}}],
)
def test_workers_that_ask_for_more_than_a_cpu_are_not_plain(given) -> None:
    assert Extract(cpus_per_actor=0.5).plain
    assert not Extract(**given).plain
    assert not Index(**{name.replace("actor", "shard"): value for name, value in given.items()}).plain


def test_a_connection_that_is_open_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    assert chosen("auto", 1, plain=True) == "ray"


def where(_: int) -> tuple[int, set[int], int]:
    libraries = {library["num_threads"] for library in threadpool_info()}
    return threading.get_ident(), libraries, torch.get_num_threads()


@pytest.mark.parametrize("threads", [1, 3])
def test_tasks_in_this_process_compute_with_one_thread_each(threads: int) -> None:
    with opened("inline", threads=threads) as engine:
        found = list(engine.in_order(where, [(number,) for number in range(30)]))
    assert {one for _, libraries, _ in found for one in libraries} == {1}
    assert len({ident for ident, _, _ in found}) <= threads
    if threads == 1:
        assert found[0][0] == threading.get_ident()


def test_torch_is_given_back_as_it_was(settings, load, execute) -> None:
    settings["detectors"] = ["msp"]
    before = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    torch.set_num_threads(before[0] + 1)
    torch.backends.cudnn.allow_tf32 = True
    try:
        execute(load(settings), last="extract")
        assert (torch.get_num_threads(), torch.backends.cudnn.allow_tf32) == (before[0] + 1, True)
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


NOISY = """
import logging, warnings
from pipeline.quickstart import resnet

def build():
    print("built with love")
    warnings.warn("a warning of mine")
    logging.getLogger("mine").info("quiet word")
    return resnet.build()
"""


@pytest.fixture
def noisy(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The small evaluation with a network that prints, warns and logs."""
    (tmp_path / "noisy.py").write_text(NOISY)
    settings["model"]["name"] = "noisy.py:build"
    return {**settings, "datasets": settings["datasets"][1:3], "detectors": ["msp"]}


@pytest.mark.filterwarnings("ignore:a warning of mine")
def test_what_workers_say_lies_in_one_file_of_the_run(noisy, load, execute, ray_session) -> None:
    folder = execute(load(noisy), engine="ray", level=logging.INFO, last="extract").folder
    assert [file.name for file in (folder / "logs").iterdir()] == ["workers.log"]
    lines = (folder / "logs" / "workers.log").read_text("utf-8").splitlines()
    for text in (
        "stdout: built with love",
        "a warning of mine",
        "mine: quiet word",
        "part-00000.parquet: 128",
    ):
        assert any(text in line for line in lines), text
    stamped = [line[:23] for line in lines if line[:2] == "20"]
    assert stamped == sorted(stamped)
    assert str(os.getpid()) not in {line.split()[2] for line in lines if line[:2] == "20"}
    execute(load(noisy), level=logging.INFO, last="score")
    later = (folder / "logs" / "workers.log").read_text("utf-8").splitlines()
    assert later[: len(lines)] == lines
    assert sum("part-00000.parquet: 150 rows" in line for line in later) == 1


def test_an_error_of_a_worker_comes_with_the_last_lines_of_its_log(ray_session: None, tmp_path: Path) -> None:
    kept = logs.Logs(tmp_path, logging.WARNING)
    with (
        opened("ray", logs=kept) as engine,
        pytest.raises(RayTaskError, match="MemoryError: no room for this batch") as failure,
    ):
        list(engine.stream([{"number": 2}], None, (Chatty, ()), NEEDS, 1))
    notes = "\n".join(failure.value.__notes__)
    assert "The last lines of" in notes
    assert "counted with love" in notes
    assert "quiet word" not in notes


@pytest.mark.parametrize("work", ["tasks", "workers"])
def test_work_that_kills_its_process_is_given_up_and_the_images_are_named(
    on_ray: Engine, work: str, tmp_path: Path
) -> None:
    folder = str(tmp_path)
    if work == "tasks":
        found = on_ray.in_order(deadly, [(number, folder) for number in range(4)])
    else:
        found = on_ray.stream(
            [{"number": number} for number in range(4)], None, (Deadly, (folder,)), NEEDS, 1
        )
    with pytest.raises(UserError) as refusal:
        list(found)
    assert "counting: the process died again and again" in str(refusal.value)
    assert "3 times after a restart, the last time at 2 images: image 2, image 3." in str(refusal.value)
    assert [file.name for file in tmp_path.iterdir()] == [".attempts-counting-part-2.json"]


def test_a_connection_lasts_as_long_as_the_outermost_block(monkeypatch: pytest.MonkeyPatch) -> None:
    open_now, closed = [False], []

    class Ray:
        is_initialized = staticmethod(lambda: open_now[0])

        @staticmethod
        def shutdown() -> None:
            closed.append(True)
            open_now[0] = False

    monkeypatch.setattr(on_ray, "ray", Ray)
    with shared("ray"):
        for _ in range(2):
            with on_ray.session(None, None):
                open_now[0] = True
            assert not closed
    assert len(closed) == 1
    with on_ray.session(None, None):
        open_now[0] = True
    assert len(closed) == 2
