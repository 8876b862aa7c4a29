"""Dates of images, by the folders in their keys or a column of their tables."""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import Dataset
from pipeline.data.dates import date_of, of_column
from pipeline.data.manifest import Manifest, compile_manifest
from pipeline.errors import UserError


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("2025-01-31/a.jpg", "2025-01-31"),
        ("camera/20250131_night/b/a.jpg", "2025-01-31"),
        ("2025/01/31/a.jpg", "2025-01-31"),
        ("2024-12-31/2025-01-31/a.jpg", "2025-01-31"),
        ("2025-01-31.tar/a", "2025-01-31"),
        ("2025-13-31/a.jpg", ""),
        ("120250131/a.jpg", ""),
        ("a/2025-01-31.jpg", ""),
        ("a.jpg", ""),
    ],
)
def test_dates_are_those_of_folders(key: str, expected: str) -> None:
    assert date_of(key) == expected


def listed(folder: Path, *files: list[Any], name: str = "taken") -> Manifest:
    """A dataset of Parquet files with a column."""
    (folder / "data").mkdir()
    for number, values in enumerate(files):
        table = pa.table({"image": [b""] * len(values), name: values})
        pq.write_table(table, folder / "data" / f"{number}.parquet", row_group_size=2)
    data = Dataset(name="data", role="unlabelled", format="parquet", path=str(folder / "data"))
    return compile_manifest(data, folder / "manifests")


@pytest.mark.parametrize(
    "values",
    [
        [datetime(2025, 1, 31, 23, 59), datetime(2025, 2, 1), None],
        [date(2025, 1, 31), date(2025, 2, 1), None],
        ["2025-01-31T23:59:00Z", "2025-02-01", "yesterday"],
    ],
)
def test_a_column_tells_the_dates_of_those_that_could_be_read(tmp_path: Path, values: list[Any]) -> None:
    dates = of_column(listed(tmp_path, values, values), "taken")
    assert dates(["0.parquet#0", "0.parquet#2"]) == ["2025-01-31", ""]
    assert dates([]) == []
    assert dates(["1.parquet#1"]) == ["2025-02-01"]


def test_a_column_that_tells_none_is_refused(tmp_path: Path) -> None:
    manifest = listed(tmp_path, [1, 2])
    with pytest.raises(
        UserError, match=r"--time: .*0\.parquet: unknown column 'take'\. Did you mean 'taken'"
    ):
        of_column(manifest, "take")
    with pytest.raises(UserError, match=r"the column 'taken' is int64; expected dates, times, or texts"):
        of_column(manifest, "taken")


def test_images_that_are_files_have_no_columns(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    one = Dataset(name="one", role="unlabelled", format="image", path=str(tmp_path / "a.png"))
    with pytest.raises(UserError, match="--time: only Parquet files have columns"):
        of_column(compile_manifest(one, tmp_path / "manifests"), "taken")
