"""Tables of metadata: which are read, and what is said of others."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import metadata
from pipeline.errors import UserError


def test_csv_and_parquet_are_text_by_key_and_dataset(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("site,dataset,key\n007,one,a\n8,two,a\n,one,b\n")
    pq.write_table(pa.table({"key": ["a", "b"], "site": [7, None]}), tmp_path / "b.parquet")
    found = metadata.read(str(tmp_path / "a.csv"))
    assert found.columns == ["site"]
    keys = pa.array(["b", "a", "c"])
    assert found.of("one", keys, "site") == [None, "007", None]
    assert found.of("two", keys, "site") == [None, "8", None]
    assert found.of("three", keys, "site") == [None, None, None]
    assert metadata.read(str(tmp_path / "b.parquet")).of("any", keys, "site") == [None, "7", None]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name,site\na,1\n", r"expected the columns key, .*; it has name, site\."),
        ("key\na\n", r"expected the columns key, .*; it has key\."),
        ("key,site\na,1\na,2\n", r"key 'a' is there 2 times\. Drop one, or add a column dataset\."),
        ("dataset,key,site\nx,a,1\nx,a,2\ny,a,2\n", r"key 'a' is there 2 times\. Drop one\."),
        ("key,a b,a-b\na,1,2\n", r"2 columns are called a-b in files\. Rename one\."),
        ("key,site\na\n", r"meta\.csv: .*Expected .* columns.* Expected a \.csv file with a line of names"),
        ("", r"meta\.csv: .*Empty CSV file.*Expected a \.csv file"),
    ],
)
def test_what_is_no_such_table_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "meta.csv").write_text(text)
    with pytest.raises(UserError, match=f"^report\\.metadata: .*{reason}"):
        metadata.read(str(tmp_path / "meta.csv"))


def test_a_column_with_as_many_values_as_images_is_refused(tmp_path: Path) -> None:
    table = pa.table({"key": [str(number) for number in range(1001)], "time": range(1001)})
    pq.write_table(table, tmp_path / "meta.parquet")
    with pytest.raises(UserError, match=r"time has 1,001 values; images are told apart by at most 1,000"):
        metadata.read(str(tmp_path / "meta.parquet"))


def test_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^report\.metadata: no such file: .*none\.csv"):
        metadata.read(str(tmp_path / "none.csv"))
