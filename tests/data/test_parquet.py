import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.fetch import fetch
from pipeline.errors import UserError
from pipeline.workspace import storage

BYTES = [f"image {number}".encode() for number in range(10)]


def rows(manifest, *names):
    table = manifest.read(0, manifest.rows)
    return [tuple(row[name] for name in names) for row in table.to_pylist()]


@pytest.fixture
def written(compiled, tmp_path):
    """Write a file and compile it."""

    def written(columns, role="id", size=3, **fields):
        pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=size)
        return compiled("parquet", tmp_path / "a.parquet", role=role, **fields)

    return written


def hub(paths):
    return pa.array([{"bytes": content, "path": path} for content, path in zip(BYTES, paths, strict=True)])


@pytest.mark.parametrize("name", ["image", "bytes", "img", "jpg"])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_bytes_in_a_column_of_a_usual_name_are_found(written, contents, name, kind):
    manifest = written({"label": range(10), name: pa.array(BYTES, kind)})
    assert contents(manifest) == BYTES
    assert rows(manifest, "key", "label") == [(f"a.parquet#{row}", row) for row in range(10)]


def test_columns_may_be_named(written, contents):
    columns = {"image": range(10), "raw": BYTES, "label": ["?"] * 10, "fine": range(10)}
    manifest = written(columns, images="raw", labels="fine")
    assert contents(manifest) == BYTES
    assert rows(manifest, "label") == [(row,) for row in range(10)]


@pytest.mark.parametrize("size", [1, 3, 10])
def test_images_of_the_hub_have_their_paths_as_keys(written, contents, size):
    names = [f"n0{number}/猫 {number}.JPEG" for number in range(10)]
    manifest = written({"image": hub(names), "label": range(10)}, size=size)
    assert contents(manifest) == BYTES
    assert rows(manifest, "key") == [(name,) for name in names]


@pytest.mark.parametrize("paths", [["a.png"] * 10, [None, *(f"{n}.png" for n in range(9))], [None] * 10])
def test_paths_that_are_no_keys_are_replaced_by_file_and_row(written, paths):
    manifest = written({"image": hub(paths), "label": range(10)})
    assert rows(manifest, "key") == [(f"a.parquet#{row}",) for row in range(10)]


def test_a_column_of_paths_gives_the_keys(written):
    manifest = written({"image": BYTES, "path": [f"{n}.png" for n in range(10)], "label": range(10)})
    assert rows(manifest, "key")[3] == ("3.png",)


def test_paths_are_keys_only_if_they_are_unique_in_all_files(compiled, tmp_path):
    for name in ("a", "deep/b"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        table = pa.table({"image": hub([f"{n}.png" for n in range(10)]), "label": range(10)})
        pq.write_table(table, tmp_path / "set" / f"{name}.parquet")
    manifest = compiled("parquet", tmp_path / "set", role="id")
    assert rows(manifest, "key")[9:11] == [("a.parquet#9",), ("deep/b.parquet#0",)]
    assert rows(compiled("parquet", tmp_path / "set" / "a*.parquet"), "key")[9] == ("9.png",)


@pytest.mark.parametrize("values", [[[1, 2], [3]] * 5, ["1;2", "3"] * 5])
def test_several_accepted_labels_may_be_lists_or_text(written, values):
    manifest = written({"image": BYTES, "label": values})
    assert rows(manifest, "label", "accepted") == [(1, [1, 2]), (3, None)] * 5


@pytest.mark.parametrize(
    ("columns", "fields", "expected"),
    [
        ({"photo": BYTES, "label": range(10)}, {}, r"no column 'image'.*`images:`.*photo \(binary\), label"),
        ({"image": BYTES}, {}, r"no column 'label'.*`labels:`.*columns are: image \(binary\)"),
        ({"image": BYTES, "label": range(10)}, {"images": "img"}, r"no column 'img'"),
        ({"image": BYTES, "label": range(10)}, {"labels": "fine"}, r"no column 'fine'"),
        ({"image": ["a.png"] * 10, "label": range(10)}, {}, r"the column 'image' holds no bytes"),
        ({"image": [{"path": "a"}] * 10, "label": range(10)}, {}, r"the column 'image' holds no bytes"),
        ({"image": BYTES, "label": ["cat"] * 10}, {}, r"a\.parquet, row 0: 'cat' is no class index"),
        ({"image": BYTES, "label": [0, 2**31, *range(8)]}, {}, r"row 1: the label is 2147483648; expected"),
        ({"image": BYTES, "label": [0.5] * 10}, {}, r"row 0: the label is 0\.5; expected a class index"),
        ({"image": BYTES, "label": [None, *range(9)]}, {}, r"1 of 10 have none"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int8())}, {}, r"no images in"),
    ],
)
def test_columns_that_are_not_there_or_not_right_are_refused(written, columns, fields, expected):
    with pytest.raises(UserError, match=rf"datasets\.set.*{expected}"):
        written(columns, **fields)


def test_labels_of_another_label_space_are_not_needed(written):
    assert written({"image": BYTES}, role="far_ood").class_count == {-1: 10}


def test_a_row_without_bytes_fails_alone(written, contents):
    manifest = written({"image": [*BYTES[:4], None, *BYTES[5:]]}, role="far_ood")
    assert contents(manifest) == [*BYTES[:4], "ValueError", *BYTES[5:]]
    nothing = [*hub(["a"] * 10).to_pylist()[:9], None]
    assert contents(written({"image": pa.array(nothing)}, role="far_ood"))[8:] == [BYTES[8], "ValueError"]


def test_rows_are_read_in_order_from_no_more_row_groups_than_they_lie_in(written, monkeypatch):
    many = [f"image {number}".encode() for number in range(1000)]
    manifest = written({"image": many}, role="far_ood", size=100)
    touched = []
    iter_batches = pq.ParquetFile.iter_batches

    def counted(self, *args, row_groups, **kwargs):
        touched.extend(row_groups)
        return iter_batches(self, *args, row_groups=row_groups, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    assert list(fetch(manifest.read(150, 420))) == many[150:420]
    assert touched == [1, 2, 3, 4]
    some = np.array([3, 99, 100, 555, 999])
    assert list(fetch(manifest.take(some))) == [many[row] for row in some]
    assert touched[4:] == [0, 1, 5, 9]


def test_a_file_that_is_no_parquet_after_it_was_listed_is_refused(written, contents, tmp_path):
    manifest = written({"image": BYTES}, role="far_ood")
    (tmp_path / "a.parquet").write_bytes(b"hello")
    with pytest.raises(storage.Changed, match=r"a\.parquet was changed after it was listed"):
        contents(manifest)


def test_a_damaged_row_group_fails_alone(written, contents, tmp_path):
    manifest = written({"image": BYTES}, role="far_ood")
    path = tmp_path / "a.parquet"
    stat = path.stat()
    with pq.ParquetFile(path) as file:
        chunk = file.metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the disk did it
    assert contents(manifest) == [*BYTES[:3], *["OSError"] * 3, *BYTES[6:]]


def test_a_file_that_is_no_parquet_is_refused(compiled, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"hello" * 100)
    with pytest.raises(UserError, match=r"datasets\.set\.path: a\.parquet is not a readable Parquet file"):
        compiled("parquet", tmp_path / "a.parquet")


def test_a_path_without_files_is_refused(compiled, tmp_path):
    with pytest.raises(UserError, match=r"datasets\.set\.path: no such file or folder: .*none"):
        compiled("parquet", tmp_path / "none")
    with pytest.raises(UserError, match=r"datasets\.set\.path: no \.parquet files in"):
        compiled("parquet", tmp_path)


def test_another_column_of_images_changes_the_digest(written):
    columns = {"image": BYTES, "other": BYTES}
    first, second = (written(columns, role="far_ood", images=name).digest for name in ("image", "other"))
    assert first != second


def test_a_flipped_byte_anywhere_is_one_message_or_changes_a_value(compiled, tmp_path):
    path = tmp_path / "a.parquet"
    labels = [number % 7 for number in range(500)]
    table = pa.table({"image": [b"x%d" % number for number in range(500)], "label": labels})
    pq.write_table(table, path, row_group_size=100)
    content = path.read_bytes()
    for place in np.linspace(0, len(content) - 1, 40, dtype=int):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            manifest = compiled("parquet", path, role="id")
        except UserError as error:
            assert "datasets.set" in str(error)
        else:
            assert manifest.rows == 500
