from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.columns import padded
from pipeline.workspace import artifacts, tables
from tests.damage import DAMAGES
from tests.stored import stored

CUTS = ((0, 5), (5, 5), (5, 13))


@pytest.fixture
def table(tmp_path: Path) -> tuple[tables.Table, dict[str, np.ndarray]]:
    """Three parts of 5, 0 and 8 rows."""
    columns = {
        "key": np.array([f"k{row}" for row in range(13)], dtype=object),
        "feature": np.arange(39, dtype=np.float32).reshape(13, 3),
    }
    whole = tables.arrow_columns(columns)
    return stored(tmp_path, [whole.slice(start, stop - start) for start, stop in CUTS]), columns


@pytest.mark.parametrize(("start", "stop"), [(0, 13), (0, 5), (4, 6), (5, 13), (12, 13), (3, 100)])
def test_rows_are_read_across_parts(table, start: int, stop: int) -> None:
    opened, columns = table
    found = opened.read(start, stop, ["feature", "key"])
    np.testing.assert_array_equal(found["feature"], columns["feature"][start:stop])
    np.testing.assert_array_equal(found["key"], columns["key"][start:stop])


def test_slices_do_not_depend_on_how_rows_lie_in_parts(table) -> None:
    opened, _ = table
    assert opened.rows == 13
    assert opened.slices(6) == [(0, 6), (6, 12), (12, 13)]


def test_vectors_are_stored_as_fixed_size_lists(table) -> None:
    opened, _ = table
    assert pq.read_schema(opened.parts()[0]).field("feature").type == pa.list_(pa.float32(), 3)


def test_fixed_batches_have_one_shape_and_say_what_is_real() -> None:
    rows = np.arange(10)
    found = list(tables.fixed_batches({"x": rows}, 4))
    assert [count for _, count in found] == [4, 4, 2]
    assert all(batch["x"].shape == (4,) for batch, _ in found)
    np.testing.assert_array_equal(np.concatenate([batch["x"][:count] for batch, count in found]), rows)
    np.testing.assert_array_equal(found[-1][0]["x"], [8, 9, 9, 9])


def test_padding_repeats_the_last_row() -> None:
    np.testing.assert_array_equal(padded(np.array([[1], [2]]), 4), [[1], [2], [2], [2]])


def test_a_folder_whose_removal_is_interrupted_has_no_marker_left(tmp_path: Path, monkeypatch) -> None:
    folders = [tmp_path / "whole", tmp_path / "whole" / "column", tmp_path / "whole" / "scores" / "test"]
    for folder in folders:
        stored(folder, [tables.arrow_columns({"row": np.arange(3)})])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(artifacts.files, "remove_folder", Mock(side_effect=KeyboardInterrupt))
        artifacts.remove_folder(tmp_path / "whole")
    assert all((folder / tables.part_name(0)).is_file() for folder in folders)
    assert not list(tmp_path.rglob(artifacts.RECORD))
    artifacts.remove_folder(tmp_path / "whole")
    assert not list(tmp_path.iterdir())


def test_a_bit_that_flipped_on_the_disk_is_noticed(tmp_path) -> None:
    path = tmp_path / "part-00000.parquet"
    vectors = np.random.default_rng(0).random((2048, 8), dtype=np.float32)
    tables.write_table(path, tables.arrow_columns({"row": np.arange(2048), "feature": vectors}))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(OSError, match="CRC checksum verification failed"):
        tables.read_rows(path, 0, 2048)


@pytest.mark.parametrize("damage", [*DAMAGES, "deleted"])
def test_a_damaged_part_is_never_read(table, damage, tmp_path) -> None:
    opened, _ = table
    path = tmp_path / tables.part_name(2)
    path.unlink() if damage == "deleted" else path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert len(opened.read(0, 5, ["feature"])["feature"]) == 5
    for read in (lambda: opened.read(4, 6, ["feature"]), lambda: list(opened.columns(["key"]))):
        with pytest.raises(artifacts.Damaged, match=f"{path} is damaged"):
            read()
