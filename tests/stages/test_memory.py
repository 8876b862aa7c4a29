"""What tasks ask for is what they hold, from the widths of their columns alone."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from pipeline import detectors
from pipeline.cluster.engine import Actor, Engine
from pipeline.columns import FEATURE, KEY, LABEL, LOGITS, PREDICTION
from pipeline.config import schema
from pipeline.detectors.base import Training
from pipeline.detectors.dice import Dice
from pipeline.detectors.knn import Knn
from pipeline.detectors.mds import Mds
from pipeline.detectors.nnguide import LargestEnergy
from pipeline.learned.percentiles import DimensionPercentiles, Percentiles
from pipeline.learned.statistics import Classes, Head, Scatter
from pipeline.stages import banks, fit, index, memory, score, statistics
from pipeline.workspace import tables
from pipeline.workspace.artifacts import Artifact, Store
from tests.stages.test_index import bank, train
from tests.stored import stored

COLUMNS = (KEY, LABEL, PREDICTION, FEATURE, LOGITS)
WANTED = [Classes(), Classes(correct=True), Scatter(), Percentiles((90.0,)), DimensionPercentiles((90.0,))]


class Noted:
    """An engine that notes what tasks ask for."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tasks: list[tuple[Callable[..., Any], tuple[Any, ...], int, Sequence[int]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def copied(self, kind: type, *arguments: Any) -> Actor:
        """As on Ray: other processes can ask it."""
        from pipeline.cluster.on_ray import OnRay

        return OnRay(None).copied(kind, *arguments)

    def in_order(
        self,
        function: Callable[..., Any],
        arguments: Iterable[tuple[Any, ...]],
        memory: Callable[..., int],
        beside: Sequence[int] = (),
    ) -> Iterator[Any]:
        def noted(given: tuple[Any, ...]) -> tuple[Any, ...]:
            self.tasks.append((function, given, memory(*given), beside))
            return given

        return self.engine.in_order(function, map(noted, arguments))

    def asked(self, name: str) -> list[int]:
        return [memory for function, _, memory, _ in self.tasks if function.__name__ == name]


def worked(
    engine: Engine,
    folder: Path,
    rows: int,
    width: int,
    classes: int,
    searching: bool = True,
    shards: int | Literal["auto"] = 2,
) -> Noted:
    """The engine after statistics, a bank and scores of made-up rows, whose features are kept in 16 bits."""
    noted, rng = Noted(engine), np.random.default_rng(0)
    label = rng.integers(0, classes, rows).astype(np.int32)
    feature = rng.exponential(size=(rows, width)) + 3 * (label[:, None] == np.arange(width) % classes)
    columns = {
        KEY: np.array([f"made-up/{row:08d}" for row in range(rows)], dtype=object),
        LABEL: label,
        PREDICTION: label,
        FEATURE: feature.astype(np.float16),
        LOGITS: rng.normal(size=(rows, classes)).astype(np.float32),
    }
    table = stored(folder / "table", [tables.arrow_columns(columns)])
    head = Head(rng.normal(size=(classes, width)).astype(np.float32), np.zeros(classes, np.float32))
    store = Store(folder / "fits")
    known = statistics.fit_statistics(noted, store, statistics.Rows([table], ["features/x"]), WANTED, head)
    training = Training(head.weight, head.bias, train=statistics.Statistics(known))
    scorers = {"dice": Dice().fit(training), "mds": Mds().fit(training), "knn": Knn(k=5).fit(training)}
    built = banks.build_bank(noted, store, scorers["knn"].bank, table, {"of": "test"}, {})
    searched = index.start(noted, [built], schema.Index(shards=shards)) if searching else None
    if searched is None:
        del scorers["knn"]
    scoring = score.Scoring(scorers, COLUMNS, {"knn": built.folder}, searched)
    places = {label: Artifact(folder / "scores" / label, score.FORMAT, {}) for label in scorers}
    score.run(noted, [score.ScoreJob("set", table, places)], scoring)
    if searched is not None:
        searched.stop()
    return noted


def test_what_is_asked_follows_from_rows_widths_and_neighbours(engine: Engine, tmp_path: Path) -> None:
    noted = worked(engine, tmp_path, rows=3000, width=40, classes=5)
    widths = {KEY: 100, LABEL: 4, PREDICTION: 4, FEATURE: 4 * 40, LOGITS: 4 * 5}
    whole = sum(widths.values())
    sums = [(given[1], asked) for function, given, asked, _ in noted.tasks if function is statistics._sums]
    assert len(sums) >= 2
    for some, asked in sums:
        row = sum(widths[name] for name in {name for statistic, *_ in some for name in statistic.columns})
        own = [8 * (sum(widths[name] for name in each.columns) // 4) ** 2 for each, *_ in some]
        more = [1 if isinstance(each, Classes) else 2 for each, *_ in some]  # these are merged in place
        merging = max(times * size for times, size in zip(more, own, strict=True))
        assert asked == memory.PROCESS + 3000 * 10 * row + sum(own) + merging
    assert noted.asked("_write_bank") == [memory.PROCESS + 3000 * 6 * whole]
    found = 3 * 16 * 1024 * 5 * 2  # batches under way, bytes, rows, neighbours, shards
    assert noted.asked("score_part") == [memory.PROCESS + 18 * 1024 * whole + found]
    shard = memory.PROCESS + int(1.1 * 4 * 1500 * 40)
    assert [beside for *_, beside in noted.tasks if beside] == [(shard, shard)]


def test_a_task_asks_for_the_vectors_that_it_holds_itself(engine: Engine, tmp_path: Path) -> None:
    noted = worked(engine, tmp_path, rows=3000, width=40, classes=5, shards="auto")
    row, found = 100 + 4 + 4 + 4 * 40 + 4 * 5, 16 * 1024 * 5
    assert noted.asked("score_part") == [memory.PROCESS + 18 * 1024 * row + found + 2 * 4 * 3000 * 40]
    assert [beside for *_, beside in noted.tasks if beside] == []


def test_wide_rows_are_read_in_smaller_ranges_of_whole_row_groups(tmp_path: Path) -> None:
    assert memory.narrowed(8192, 4 * (2048 + 1000)) == 8192
    assert memory.narrowed(8192, 4 * (2048 + 21_843)) == tables.ROW_GROUP
    assert memory.narrowed(8192, 2**30) == tables.ROW_GROUP
    assert memory.narrowed(10, 2**30) == 10
    table = stored(tmp_path, [tables.arrow_columns({FEATURE: np.zeros((4, 2**14), np.float32)})])
    assert memory.cuts(table, (FEATURE,), 100, 5000) == [(100, 2148), (2148, 4196), (4196, 5000)]


def test_scores_and_vectors_are_the_same_in_whatever_ranges_rows_are_read(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bound in (2**27, 1):
        monkeypatch.setattr(memory, "_BYTES", bound)
        worked(engine, tmp_path / str(bound), rows=3000, width=20, classes=5)
    whole, cut = (
        {file.relative_to(tmp_path / bound): file.read_bytes() for file in (tmp_path / bound).rglob("part-*")}
        | {file.name: file.read_bytes() for file in (tmp_path / bound).rglob("bank-*")}
        for bound in (str(2**27), "1")
    )
    assert len(whole) > 4
    assert whole == cut


def test_statistics_of_wide_rows_are_of_fewer_at_once_and_other_artifacts(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = worked(engine, tmp_path / "whole", rows=3000, width=40, classes=5, searching=False)
    monkeypatch.setattr(statistics, "SLICE", 2048)
    monkeypatch.setattr(statistics, "_WIDEST", 2048 * 4 * 40 - 1)
    cut = worked(engine, tmp_path / "cut", rows=3000, width=40, classes=5, searching=False)
    lengths = [
        [
            [stop - start for _, start, stop in given[0]]
            for function, given, *_ in noted.tasks
            if function is statistics._sums
        ]
        for noted in (whole, cut)
    ]
    assert lengths == [[[3000]] * len(lengths[0]), [[1024, 1024, 952]] * len(lengths[0])]
    names = [{folder.name for folder in (tmp_path / each / "fits").iterdir()} for each in ("whole", "cut")]
    assert len(names[0] & names[1]) == 1  # the bank


def test_a_part_that_is_not_there_asks_for_a_process(tmp_path: Path) -> None:
    table = tables.Table(str(tmp_path / "nothing"), "", (10,))
    assert memory.of_rows(table, COLUMNS, 10, 2) == memory.PROCESS


def peak(function: Callable[..., Any], given: tuple[Any, ...]) -> int:
    """Bytes: the most memory that this process had, once it has done some work."""
    function(*given)
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(("width", "searching"), [(512, False), (512, True)])
def test_tasks_hold_no_more_than_they_ask_for_and_not_much_less(
    engine: Engine, tmp_path: Path, width: int, searching: bool
) -> None:
    noted = worked(engine, tmp_path, statistics.SLICE, width, 100, searching, shards="auto")
    assert {function for function, *_ in noted.tasks} == {
        statistics._sums,
        banks._write_bank,
        score.score_part,
    }
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for function, given, asked, _ in noted.tasks:
            held = pool.apply(peak, (function, given))
            assert held <= asked <= 2.5 * held, (function.__name__, held >> 20, asked >> 20)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("kind", ["flat", "IVF4,Flat"])
def test_a_shard_holds_no_more_than_it_is_counted_with_and_not_much_less(tmp_path: Path, kind: str) -> None:
    vectors = np.random.default_rng(0).normal(size=(40_000, 1024)).astype(np.float32)
    files, settings = bank(tmp_path, vectors, pieces=5), schema.Index(kind=kind, shards=1)
    train(files, shards=1, kind=kind)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        held = pool.apply(peak, (loaded, (files, settings)))
    asked = index._shard_bytes([vectors.shape], 1, settings)
    assert held <= asked <= 2.5 * held, (held >> 20, asked >> 20)


def loaded(files: index.BankFiles, settings: schema.Index) -> None:
    """What the actor of the only shard does before it is asked."""
    from pipeline.stages.faiss_shard import IndexShard

    IndexShard(0, 1, settings, {files.folder: files}).load(files.folder)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_sums_of_many_classes_are_few_at_a_time(engine: Engine, tmp_path: Path) -> None:
    rows, width, classes, rng = statistics.SLICE, 1024, 9000, np.random.default_rng(0)
    label = rng.integers(0, classes, rows).astype(np.int32)
    columns = {
        LABEL: label,
        PREDICTION: label,
        FEATURE: rng.exponential(size=(rows, width)).astype(np.float32),
    }
    logits = rng.normal(size=(1024, classes)).astype(np.float32)
    columns[LOGITS] = np.tile(logits, (rows // 1024, 1))
    table = stored(tmp_path / "table", [tables.arrow_columns(columns)])
    head, noted = Head(np.zeros((classes, width), np.float32), np.zeros(classes, np.float32)), Noted(engine)
    wanted = [Classes(), Classes(correct=True), Classes(unit=True), LargestEnergy()]
    store = Store(tmp_path / "fits")
    statistics.fit_statistics(noted, store, statistics.Rows([table], ["features/x"]), wanted, head)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for function, given, asked, _ in noted.tasks:
            held = pool.apply(peak, (function, given))
            assert held <= min(asked, 2**30), (function.__name__, held >> 20, asked >> 20)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_tasks_that_fit_detectors_hold_no_more_than_they_ask_for(engine: Engine, tmp_path: Path) -> None:
    rows, width, classes, rng = 4096, 1024, 50, np.random.default_rng(0)
    label = rng.integers(0, classes, rows).astype(np.int32)
    columns = {
        LABEL: label,
        PREDICTION: label,
        FEATURE: rng.exponential(size=(rows, width)).astype(np.float32),
        LOGITS: rng.normal(size=(rows, classes)).astype(np.float32),
    }
    table = stored(tmp_path / "table", [tables.arrow_columns(columns)])
    head, noted = (
        Head(rng.normal(size=(classes, width)).astype(np.float32), np.zeros(classes, np.float32)),
        (Noted(engine)),
    )
    names = ("msp", "dice", "mds", "rmds", "mds_l2", "residual", "gradorth", "vim", "neco")
    chosen = {name: detectors.get(name)() for name in names}
    needs = [need for each in chosen.values() for need in (*each.statistics(), *each.calibration())]
    store = Store(tmp_path / "fits")
    found = statistics.fit_statistics(engine, store, statistics.Rows([table], ["features/x"]), needs, head)
    known = statistics.Statistics(found)
    training = Training(head.weight, head.bias, train=known, id_val=known)
    fit.fit_detectors(
        noted, chosen, training, store, table, lambda each, _: ({"of": each.name}, {}), schema.Index()
    )
    assert {function for function, *_ in noted.tasks} == {fit._fit}
    assert sorted(len(given[0]) for _, given, *_ in noted.tasks) == [1, 1, 1, 1, 1, 2, 2]
    found.read.clear()
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        process = pool.apply(peak, (fit._fit, (noted.tasks[-1][1][0][:0], noted.tasks[-1][1][1])))
        for function, given, asked, _ in noted.tasks:
            held = pool.apply(peak, (function, given)) - process + memory.PROCESS
            assert held <= asked, ([each.name for each, _ in given[0]], held >> 20, asked >> 20)
