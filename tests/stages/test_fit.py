from __future__ import annotations

import re
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import detectors
from pipeline.cluster.engine import Engine
from pipeline.cluster.inline import Inline
from pipeline.config import schema
from pipeline.detectors._steps import combined
from pipeline.detectors.ash import Ash
from pipeline.detectors.base import Detector, Training
from pipeline.detectors.energy import Energy
from pipeline.detectors.grood import Grood
from pipeline.detectors.knn import Knn
from pipeline.detectors.she import She
from pipeline.errors import UserError
from pipeline.learned.percentiles import Histogram, Percentiles
from pipeline.learned.statistics import Classes, ClassSums, Head, Scatter, Softmax, Statistic, Statistics, of
from pipeline.stages import banks, fit, statistics
from pipeline.workspace import artifacts, tables
from pipeline.workspace.artifacts import Store
from tests.damage import DAMAGES
from tests.stored import stored

FLAT = schema.Index()


def feature_table(folder: Path, rows: int, parts: list[int]) -> tables.Table:
    """A table of random rows cut into parts at the given places."""
    rng = np.random.default_rng(0)
    columns = {
        "key": np.array([f"k{row}" for row in range(rows)], dtype=object),
        "label": rng.integers(0, 5, rows).astype(np.int32),
        "prediction": rng.integers(0, 5, rows).astype(np.int32),
        "feature": rng.exponential(size=(rows, 6)).astype(np.float32),
        "logits": rng.normal(size=(rows, 5)).astype(np.float32),
    }
    whole = tables.arrow_columns(columns)
    cuts = pairwise([0, *parts, rows])
    return stored(folder, [whole.slice(start, stop - start) for start, stop in cuts])


HEAD = Head(np.zeros((5, 6), np.float32), np.zeros(5, np.float32))
WANTED: list[Statistic] = [Classes(), Classes(correct=True), Scatter(), Percentiles((10.0, 90.0)), Softmax()]
NAMES = ["feature", "logits", "label", "prediction"]


def fitted(engine: Engine, store: Store, table: tables.Table, wanted: list[Statistic]) -> Statistics:
    return statistics.fit_statistics(
        engine, store, statistics.Rows([table], ["features/of-test"]), wanted, HEAD
    )


def test_statistics_have_the_same_bits_however_rows_lie_in_parts(
    engine, on_ray, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(statistics, "SLICE", 700)
    monkeypatch.setattr(statistics, "EVERY", 3)
    one = feature_table(tmp_path / "one", 5000, [2500])
    many = feature_table(tmp_path / "many", 5000, [1, 50, 1999, 3000, 4990])
    found = [
        fitted(where, Store(tmp_path / f"fits{number}"), table, WANTED)
        for number, (where, table) in enumerate(((on_ray, one), (on_ray, many), (engine, many)))
    ]
    whole = of(one.read(0, 5000, NAMES), WANTED, HEAD)
    for statistic in WANTED:
        arrays = [each[statistic].arrays() for each in found]
        for name, expected in whole[statistic].arrays().items():
            np.testing.assert_array_equal(arrays[0][name], arrays[1][name])
            np.testing.assert_array_equal(arrays[0][name], arrays[2][name])
            np.testing.assert_allclose(arrays[0][name], expected, rtol=1e-11)


def test_only_statistics_that_are_not_there_are_computed(engine, tmp_path, monkeypatch) -> None:
    table, store = feature_table(tmp_path / "table", 100, []), Store(tmp_path / "fits")
    sweeps = []

    def sweep(engine, rows, group, head, known, stage):
        sweeps.append(list(group))
        return original(engine, rows, group, head, known, stage)

    original = statistics._sweep
    monkeypatch.setattr(statistics, "_sweep", sweep)
    first = fitted(engine, store, table, [Classes()])
    for _ in range(2):
        more = fitted(engine, store, table, [Scatter(), Classes(), Percentiles((50.0,)), Scatter()])
    fitted(engine, Store(tmp_path / "fits", "frozen"), table, [Scatter(), Percentiles((50.0,))])
    assert sweeps == [[Classes()], [Scatter(), Histogram()], [Percentiles((50.0,))]]
    np.testing.assert_array_equal(first[Classes()].class_sum, more[Classes()].class_sum)
    with pytest.raises(UserError, match="no statistic in the workspace"):
        fitted(engine, Store(tmp_path / "fits", "frozen"), table, [Percentiles((51.0,))])


def test_tables_one_after_the_other_have_the_statistics_of_all_their_rows(engine, tmp_path) -> None:
    one, two = feature_table(tmp_path / "one", 30, []), feature_table(tmp_path / "two", 50, [])
    rows = statistics.Rows([one, two], ["features/one", "features/two"])
    found = statistics.fit_statistics(engine, Store(tmp_path / "fits"), rows, [Scatter()], HEAD)[Scatter()]
    parts = [one.read(0, 30, ["feature"])["feature"], two.read(0, 50, ["feature"])["feature"]]
    np.testing.assert_allclose(found.covariance, np.cov(np.concatenate(parts).T, ddof=0), rtol=1e-12)


def test_a_bank_holds_the_kept_rows_in_order(engine, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(banks, "SLICE", 300)
    table = feature_table(tmp_path / "table", 1000, [123, 700])
    scorer = Knn(k=3).fit(Training(np.zeros((5, 6), np.float32), np.zeros(5, np.float32)))
    files = banks.build_bank(engine, Store(tmp_path / "fits"), scorer.bank, table, {"some": "identity"}, {})
    found = np.concatenate(list(files.ranges(0, 1000)))
    feature = table.read(0, 1000, ["feature"])["feature"].astype(np.float64)
    expected = feature / np.linalg.norm(feature, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (files.rows, files.width) == (1000, 6)


def made_of(detector: Detector, without: Collection[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """What a detector is fitted to, where rows and network are always the same."""
    return {"detector": detectors.identity(detector, without)}, {}


def test_detectors_that_differ_in_k_alone_share_a_bank(engine, tmp_path) -> None:
    table = feature_table(tmp_path / "table", 60, [])
    rows = {name: table.read(0, 60, NAMES)[name] for name in NAMES}
    chosen: dict[str, Detector] = {
        **{f"knn{k}": Knn(k=k) for k in (5, 50, 20)},
        **{f"grood{k}": Grood(k=k, prototype="proto_mean") for k in (1, 2)},
        "shifted": Grood(prototype="ood_val"),
        "energy": Energy(),
    }
    wanted = {need for each in chosen.values() for need in (*each.statistics(), *each.ood_statistics())}
    found = of(rows, wanted, HEAD)
    training = Training(HEAD.weight, HEAD.bias, train=found, ood_val=found)
    fitted = fit.fit_detectors(engine, chosen, training, Store(tmp_path / "fits"), table, made_of, FLAT)
    folders = {label: bank.folder for label, bank in fitted.banks.items()}
    assert len(set(folders.values())) == 3
    assert folders["knn5"] == folders["knn50"] == folders["knn20"]
    assert folders["grood1"] == folders["grood2"] != folders["shifted"]


def test_detectors_that_learn_from_the_same_are_fitted_by_one_task(
    engine, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {name: detectors.get(name)() for name in ("mds", "energy", "rmds", "she", "msp")}
    table = feature_table(tmp_path / "table", 60, [])
    rows = {name: table.read(0, 60, NAMES)[name] for name in NAMES}
    found = of(rows, {need for each in chosen.values() for need in each.statistics()}, HEAD)
    training = Training(HEAD.weight, HEAD.bias, train=found)
    tasks, spectra = list[list[str]](), list[int]()
    in_order, eigh = Inline.in_order, np.linalg.eigh

    def noted(own: Inline, function: Any, arguments: Any, *more: Any) -> Any:
        given = list(arguments)
        tasks.extend([each.name for each, _ in some] for some, _ in given)
        return in_order(own, function, given, *more)

    monkeypatch.setattr(Inline, "in_order", noted)
    monkeypatch.setattr(np.linalg, "eigh", lambda matrix: spectra.append(1) or eigh(matrix))
    fitted = fit.fit_detectors(engine, chosen, training, Store(tmp_path / "fits"), None, made_of, FLAT)
    assert tasks == [["mds", "rmds"], ["energy", "msp"], ["she"]]
    assert len(spectra) == 2  # within classes, which both read, and of all
    assert list(fitted.scorers) == list(chosen)


def test_large_arrays_of_what_was_learned_are_pages_of_their_files(engine, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(artifacts, "_LARGE", 200)
    table, store = feature_table(tmp_path / "table", 60, []), Store(tmp_path / "fits")
    (wanted,) = She().statistics()
    known = Statistics(fitted(engine, store, table, [wanted]))
    training, sums = Training(HEAD.weight, HEAD.bias, train=known), known[wanted]
    found = fit.fit_detectors(engine, {"she": She()}, training, store, None, made_of, FLAT)
    large = sums.class_sum, found.scorers["she"].patterns  # (5, 6) float64
    assert [each.flags.owndata for each in (*large, sums.class_count)] == [False, False, True]
    assert not any(each.flags.writeable for each in (*large, sums.class_count))


def test_what_fails_where_statistics_are_read_is_no_refusal_of_a_detector(
    engine, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(Statistics):
        def __getitem__(self, wanted: Any) -> Any:
            raise UserError("no space left on the disk of /tmp")

    nothing = Full({each: ClassSums(*(np.zeros(()) for _ in range(4))) for each in She().statistics()})
    training = Training(HEAD.weight, HEAD.bias, train=nothing)
    store, chosen = Store(tmp_path / "fits"), {"she": She()}
    monkeypatch.setattr(fit, "size_of", lambda *_: 0)
    with pytest.raises(UserError, match=r"^no space left on the disk"):
        fit.fit_detectors(engine, chosen, training, store, None, made_of, FLAT, {"she"})
    assert not list(tmp_path.rglob("refused.json"))


def test_a_bank_smaller_than_k_is_refused_with_the_detector_named(engine, tmp_path) -> None:
    table = feature_table(tmp_path / "table", 20, [])
    training = Training(np.zeros((5, 6), np.float32), np.zeros(5, np.float32))
    chosen = {"far": Knn(k=21)}
    with pytest.raises(UserError, match=re.escape("detectors.far: k is 21 but only 20 training rows")):
        fit.fit_detectors(engine, chosen, training, Store(tmp_path / "fits"), table, made_of, FLAT)


def test_optional_detectors_that_the_training_rows_do_not_serve_are_left_out(engine, tmp_path) -> None:
    table, nothing = feature_table(tmp_path / "table", 20, []), Classes(correct=True)
    wrong = ClassSums(np.zeros(5, np.int64), np.zeros((5, 6)), np.zeros(6), np.array(0))
    training = Training(HEAD.weight, HEAD.bias, train=Statistics({nothing: wrong}))
    chosen = {"near": Knn(k=20), "far": Knn(k=21), "she": She()}
    for store in (Store(tmp_path / "fits"), Store(tmp_path / "fits", "frozen")):
        found = fit.fit_detectors(engine, chosen, training, store, table, made_of, FLAT, {"far", "she"})
        assert list(found.scorers) == list(found.banks) == ["near"]
        assert found.not_applicable["far"].startswith("k is 21 but only 20 training rows enter the bank")
        assert found.not_applicable["she"].startswith("she: patterns need training rows")
    with pytest.raises(UserError, match=r"^detectors\.she: she: patterns need"):
        fit.fit_detectors(engine, chosen, training, Store(tmp_path / "fits"), table, made_of, FLAT, {"far"})


def test_notices_of_a_detector_are_kept_with_it(engine, tmp_path) -> None:
    training = Training(HEAD.weight, HEAD.bias)
    chosen = {"plain": Energy(), "ash": Ash(), "pruned": combined(Energy(), [Ash(p=80), Ash()])}
    found = [
        fit.fit_detectors(engine, chosen, training, Store(tmp_path / "fits"), None, made_of, FLAT)
        for _ in range(2)
    ]
    assert found[0].notices == found[1].notices
    assert list(found[0].notices) == ["ash", "pruned"]
    (notice,) = found[0].notices["ash"]
    assert "this network has 5 classes" in notice


def test_a_bank_that_is_not_there_yet_is_no_reason_to_leave_a_detector_out(engine, tmp_path) -> None:
    table = feature_table(tmp_path / "table", 20, [])
    store, training = Store(tmp_path / "fits", "frozen"), Training(HEAD.weight, HEAD.bias)
    with pytest.raises(UserError, match="fit: no detector in the workspace"):
        fit.fit_detectors(engine, {"near": Knn(k=1)}, training, store, table, made_of, FLAT, {"near"})


class Killed(BaseException):
    """What ends a process, here between two pieces of work."""


@pytest.mark.parametrize("after", [1, 2, 5])
def test_statistics_that_were_interrupted_go_on_where_they_were(engine, tmp_path, monkeypatch, after) -> None:
    monkeypatch.setattr(statistics, "SLICE", 10)
    monkeypatch.setattr(statistics, "EVERY", 2)
    table = feature_table(tmp_path / "table", 95, [])
    whole = fitted(engine, Store(tmp_path / "whole"), table, WANTED)
    read = tables.Table.read

    def dying(self, start, stop, names):
        if start // 10 == after:
            raise Killed
        seen.append(start)
        return read(self, start, stop, names)

    seen: list[int] = []
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(tables.Table, "read", dying)
        fitted(engine, Store(tmp_path / "fits"), table, WANTED)
    assert not list(tmp_path.glob(f"fits/*/{artifacts.RECORD}"))
    seen.clear()
    monkeypatch.setattr(tables.Table, "read", lambda *given: (seen.append(given[1]), read(*given))[1])
    found = fitted(engine, Store(tmp_path / "fits"), table, WANTED)
    assert seen[0] == 10 * (after - after % 2)
    for statistic in WANTED:
        for name, expected in whole[statistic].arrays().items():
            np.testing.assert_array_equal(found[statistic].arrays()[name], expected)
    left = {path.name for path in tmp_path.glob("fits/*/*")}
    assert left == {artifacts.RECORD, "arrays.safetensors", ".arrays.safetensors.json", "_inputs.json"}


@pytest.mark.parametrize("damage", [None, "flipped", "sums are gone"])
def test_sums_of_pieces_are_merged_without_reading_rows_again(engine, tmp_path, monkeypatch, damage) -> None:
    monkeypatch.setattr(statistics, "SLICE", 10)
    monkeypatch.setattr(statistics, "EVERY", 2)
    table, wanted = feature_table(tmp_path / "table", 95, []), [Scatter()]
    whole = fitted(engine, Store(tmp_path / "whole"), table, wanted)[Scatter()]
    seal = artifacts._seal

    def killed(*_: object) -> None:
        raise Killed

    def before_the_record(path, content):
        return killed() if path.name == artifacts.RECORD else seal(path, content)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        if damage == "sums are gone":
            patch.setattr(artifacts, "_seal", before_the_record)
        else:
            patch.setattr(statistics, "_whole", killed)
        fitted(engine, Store(tmp_path / "fits"), table, wanted)
    pieces = sorted(tmp_path.glob("fits/*/piece-*"))
    assert len(pieces) == (0 if damage == "sums are gone" else 5)
    if damage == "flipped":
        pieces[3].write_bytes(DAMAGES[damage](pieces[3].read_bytes()))
        with pytest.raises(artifacts.Damaged, match="other bytes than were written") as found:
            fitted(engine, Store(tmp_path / "fits"), table, wanted)
        artifacts.mend(found.value)
    read, seen = tables.Table.read, []
    monkeypatch.setattr(tables.Table, "read", lambda *given: (seen.append(given[1]), read(*given))[1])
    again = fitted(engine, Store(tmp_path / "fits"), table, wanted)[Scatter()]
    assert seen == ([60, 70] if damage == "flipped" else [])
    for name, expected in whole.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], expected)


def test_a_bank_that_was_interrupted_keeps_its_pieces(engine, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(banks, "SLICE", 30)
    table, written, sent = feature_table(tmp_path / "table", 100, []), [], []
    write = banks._write_bank

    def dying(*arguments):
        written.append(Path(arguments[-1]).name)
        sent.append(arguments[0])
        if len(written) == 3:
            raise Killed
        return write(*arguments)

    monkeypatch.setattr(banks, "_write_bank", dying)
    bank = Knn(k=3).fit(Training(HEAD.weight, HEAD.bias)).bank
    with pytest.raises(Killed):
        banks.build_bank(engine, Store(tmp_path / "fits"), bank, table, {}, {})
    found = banks.build_bank(engine, Store(tmp_path / "fits"), bank, table, {}, {})
    assert [name[5:10] for name in written] == ["00000", "00001", "00002", "00002", "00003"]
    assert len(set(map(id, sent))) == 2, "what the detector learned is sent once for all pieces"
    assert found.rows == 100


@pytest.mark.parametrize("damage", [*DAMAGES, "deleted"])
@pytest.mark.parametrize("name", ["bank-00001.npy", ".bank-00001.npy.json", artifacts.RECORD])
def test_a_damaged_bank_is_made_again_as_far_as_it_must(engine, tmp_path, monkeypatch, damage, name) -> None:
    monkeypatch.setattr(banks, "SLICE", 30)
    table, store = feature_table(tmp_path / "table", 100, []), Store(tmp_path / "fits")
    bank = Knn(k=3).fit(Training(HEAD.weight, HEAD.bias)).bank
    before = banks.build_bank(engine, store, bank, table, {}, {})
    files_before = {path: path.read_bytes() for path in Path(before.folder).iterdir()}
    path = Path(before.folder) / name
    path.unlink() if damage == "deleted" else path.write_bytes(DAMAGES[damage](path.read_bytes()))
    for _ in range(2):
        after = banks.build_bank(engine, store, bank, table, {}, {})
        try:
            assert sum(len(piece) for piece in after.ranges(0, 100)) == 100
            break
        except artifacts.Damaged as damaged:
            artifacts.mend(damaged)
    assert after == before
    if name != ".bank-00001.npy.json":
        assert {path: path.read_bytes() for path in Path(before.folder).iterdir()} == files_before


def made(store: Store, value: float = 1, **identity: str) -> dict[str, np.ndarray]:
    """The arrays of an artifact; the value is what it is made of if it is made."""
    artifact = store.artifact("thing 1", identity)
    return store.kept([artifact], lambda _: [{"x": np.full(100, value), "n": np.array(7)}])[0].arrays()


def test_an_artifact_is_made_once_and_afresh_once_more(tmp_path) -> None:
    stores = [Store(tmp_path, mode) for mode in ("reuse", "reuse", "frozen", "fresh", "reuse")]
    found = [made(store, value, of="x")["x"][0] for value, store in enumerate(stores)]
    assert found == [0, 0, 0, 3, 3]
    assert made(stores[3], 9, of="x")["x"][0] == 3
    assert made(stores[0], 5, of="y")["x"][0] == 5
    with pytest.raises(UserError, match=r"^fit: no thing in the workspace\. Run `ood-pipeline fit` first\."):
        made(Store(tmp_path, "frozen"), of="z")


@pytest.mark.parametrize("damage", [*DAMAGES, "deleted"])
@pytest.mark.parametrize("name", ["arrays.safetensors", artifacts.RECORD])
def test_damaged_arrays_are_never_read(tmp_path, damage, name, caplog) -> None:
    before = made(Store(tmp_path), 1)
    (path,) = tmp_path.glob(f"*/{name}")
    path.unlink() if damage == "deleted" else path.write_bytes(DAMAGES[damage](path.read_bytes()))
    if damage == "flipped" and name != artifacts.RECORD:  # found when it is read, not when it is looked at
        with pytest.raises(artifacts.Damaged, match="other bytes than were written") as found:
            made(Store(tmp_path), 2)
        artifacts.mend(found.value)
    elif name != artifacts.RECORD or damage != "deleted":
        with pytest.raises(artifacts.Damaged, match=f"{path} is damaged"):
            made(Store(tmp_path, "frozen"), 2)
    assert made(Store(tmp_path), 1)["x"].tolist() == before["x"].tolist()
    assert damage == "deleted" or f"{path} is damaged" in caplog.text


def test_what_was_made_of_other_bytes_is_made_again(tmp_path, caplog) -> None:
    def made_of(content: str, value: float) -> float:
        artifact = Store(tmp_path).artifact("thing 1", {}, {"features/a": content})
        return Store(tmp_path).kept([artifact], lambda _: [{"x": np.array(value)}])[0].arrays()["x"]

    assert [made_of("one", 1), made_of("one", 2), made_of("two", 3), made_of("two", 4)] == [1, 1, 3, 3]
    assert "was made of files that are others by now" in caplog.text


def test_an_artifact_that_failed_is_not_taken_for_complete(tmp_path) -> None:
    artifact = Store(tmp_path).artifact("thing 1", {})

    def fails(_: list[int]) -> list[dict[str, np.ndarray]]:
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        Store(tmp_path).kept([artifact], fails)
    assert made(Store(tmp_path), 4)["x"][0] == 4
