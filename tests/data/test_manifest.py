import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config.schema import LABELLED_ROLES, Dataset
from pipeline.data.formats import _arrays
from pipeline.data.manifest import SCHEMA, compile_manifest, table_digest
from pipeline.errors import UserError
from pipeline.workspace.tables import ROW_GROUP

IMAGES = np.random.default_rng(0).integers(256, size=(6, 4, 4), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 0])
LARGE = 2 * ROW_GROUP + 100


def save(path, images=IMAGES, labels=LABELS, name="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: images, "y": labels})
    return path


def labelled(compiled, path, name="x"):
    return compiled("npz", path, role="id", images=name, labels="y")


@pytest.fixture
def large(compiled, tmp_path):
    """More rows than two row groups; image and label of a row are made of its number."""
    numbers = np.arange(LARGE)
    images = np.stack([numbers % 256, numbers // 256], axis=1).astype(np.uint8).reshape(-1, 1, 2)
    return labelled(compiled, save(tmp_path / "a.npz", images, numbers % 7))


def number(row):
    return row["bytes"][0] + 256 * row["bytes"][1]


def test_rows_labels_and_counts_are_those_of_the_data(compiled, tmp_path):
    manifest = labelled(compiled, save(tmp_path / "a.npz"))
    assert manifest.rows == 6
    assert manifest.class_count == {0: 3, 1: 2, 2: 1}
    assert manifest.labels().tolist() == LABELS.tolist()
    assert manifest.labels().dtype == np.int32


def test_a_dataset_that_is_larger_than_a_row_group_loses_nothing(large):
    rows = large.read(0, LARGE).to_pylist()
    assert [number(row) for row in rows] == list(range(LARGE))
    assert len({row["key"] for row in rows}) == LARGE
    assert large.class_count == {label: len(range(label, LARGE, 7)) for label in range(7)}
    with pq.ParquetFile(large.path) as file:
        groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    assert groups == [ROW_GROUP, ROW_GROUP, 100]


@pytest.mark.parametrize("size", [1, 300, 1023, 1024, 1025, 5000])
def test_rows_do_not_depend_on_the_batches_a_format_gives(monkeypatch, compiled, tmp_path, large, size):
    monkeypatch.setattr(_arrays, "CHUNK", size)
    images = np.arange(LARGE)
    assert labelled(compiled, tmp_path / "a.npz") == large
    assert [number(row) for row in large.read(0, LARGE).to_pylist()] == images.tolist()


@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, 1), (0, LARGE), (5, 9), (1000, 1050), (1023, 1024), (1024, 1025), (1024, 2048), (2040, LARGE)],
)
def test_read_gives_the_rows_of_a_range(large, start, stop):
    assert [number(row) for row in large.read(start, stop).to_pylist()] == list(range(start, stop))


@pytest.mark.parametrize(
    "wanted", [[0], [LARGE - 1], [3, 1, 2], [2047, 1023, 1024, 0, 2048], [1500, 4], list(range(0, LARGE, 97))]
)
def test_take_gives_the_named_rows_in_ascending_order(large, wanted):
    assert [number(row) for row in large.take(np.array(wanted)).to_pylist()] == sorted(wanted)


@pytest.mark.parametrize(
    ("read", "groups"), [((1030, 1040), [1]), ((0, 1024), [0]), ((1000, 1030), [0, 1]), ((2048, 2100), [2])]
)
def test_read_touches_only_the_row_groups_it_needs(monkeypatch, large, read, groups):
    touched = []
    read_row_groups = pq.ParquetFile.read_row_groups

    def counted(self, numbers, *args, **kwargs):
        touched.extend(numbers)
        return read_row_groups(self, numbers, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", counted)
    large.read(*read)
    assert touched == groups


def changed_image(images, labels):
    images[3, 1, 1] ^= 1


def changed_label(images, labels):
    labels[3] = 2


def swapped(images, labels):
    images[[0, 1]] = images[[1, 0]]
    labels[[0, 1]] = labels[[1, 0]]


@pytest.mark.parametrize("change", [changed_image, changed_label, swapped])
def test_a_change_of_the_data_changes_the_digest(compiled, tmp_path, change):
    before = labelled(compiled, save(tmp_path / "a.npz")).digest
    images, labels = IMAGES.copy(), LABELS.copy()
    change(images, labels)
    assert labelled(compiled, save(tmp_path / "a.npz", images, labels)).digest != before


def test_a_change_of_shape_or_number_changes_the_digest(compiled, tmp_path):
    digests = {
        labelled(compiled, save(tmp_path / "a.npz", images, LABELS[: len(images)])).digest
        for images in (IMAGES, IMAGES[:5], IMAGES.reshape(6, 2, 8), IMAGES[..., None])
    }
    assert len(digests) == 4


def test_the_name_of_the_array_is_part_of_the_keys_and_of_the_digest(compiled, tmp_path):
    first = labelled(compiled, save(tmp_path / "a.npz"))
    second = labelled(compiled, save(tmp_path / "a.npz", name="z"), "z")
    assert second.read(0, 1)["key"].to_pylist() == ["z/00000000"]
    assert first.digest != second.digest


def test_arrays_in_another_place_are_the_same_dataset(compiled, tmp_path):
    first = labelled(compiled, save(tmp_path / "a.npz"))
    second = labelled(compiled, save(tmp_path / "elsewhere" / "b.npz"))
    assert second == first


def test_the_digest_does_not_depend_on_the_datasets_name_or_labelled_role(compiled, tmp_path):
    path = save(tmp_path / "a.npz")
    fields = {"images": "x", "labels": "y"}
    assert (
        compiled("npz", path, role="train", name="one", **fields).digest
        == compiled("npz", path, role="shifted_id", name="two", **fields).digest
    )


@pytest.mark.parametrize("role", ["near_ood", "far_ood", "ood_val", "unlabelled"])
def test_labels_of_another_label_space_are_dropped(compiled, tmp_path, role):
    manifest = compiled("npz", save(tmp_path / "a.npz"), role=role, images="x", labels="y")
    assert manifest.class_count == {-1: 6}
    assert manifest.labels().tolist() == [-1] * 6


def test_held_out_images_keep_the_labels_that_they_name_and_need_none(compiled, tmp_path):
    path, fields = save(tmp_path / "a.npz"), {"role": "id_val", "images": "x"}
    assert compiled("npz", path, labels="y", **fields) == labelled(compiled, path)
    assert compiled("npz", path, **fields).class_count == {-1: 6}


@pytest.mark.parametrize("role", LABELLED_ROLES)
def test_a_role_with_labels_needs_them(compiled, tmp_path, role):
    path = save(tmp_path / "a.npz")
    with pytest.raises(UserError, match=rf"datasets\.set: role '{role}' needs a label .* 6 of 6 have none"):
        compiled("npz", path, role=role, images="x")


def test_a_key_that_occurs_twice_is_refused(compiled, tmp_path, monkeypatch):
    rows = _arrays.rows

    def doubled(name, chunks, labels):
        batches = list(rows(name, chunks, labels))
        return iter([*batches, batches[0].slice(2, 1)])

    monkeypatch.setattr(_arrays, "rows", doubled)
    with pytest.raises(UserError, match=r"datasets\.set: the key 'x/00000002' occurs more than once"):
        labelled(compiled, save(tmp_path / "a.npz"))


def test_an_unknown_format_is_refused_with_the_closest_one(compiled, tmp_path):
    with pytest.raises(UserError, match=r"datasets\.set\.format: unknown format 'nzp'.*mean 'npz'"):
        compiled("nzp", tmp_path / "a.npz")


def test_equal_datasets_share_one_manifest(compiled, tmp_path):
    path = save(tmp_path / "a.npz")
    first, second = labelled(compiled, path), labelled(compiled, path)
    assert first == second
    assert [file.name for file in (tmp_path / "manifests").iterdir()] == [f"set-{first.digest[:16]}"]


def test_a_failure_leaves_nothing_behind(compiled, tmp_path):
    path = save(tmp_path / "a.npz")
    content = path.read_bytes()
    with pytest.raises(UserError):
        compiled("npz", path, role="id", images="x")
    path.write_bytes(content[:-40])
    with pytest.raises(UserError):
        labelled(compiled, path)
    assert list((tmp_path / "manifests").iterdir()) == []


def test_the_digest_is_that_of_the_rows_and_not_of_the_code_that_wrote_them(tmp_path):
    """Workspaces stay valid: the digest of this dataset must never change."""
    path = save(tmp_path / "a.npz", np.arange(32, dtype=np.uint8).reshape(2, 4, 4), np.array([1, 0]))
    dataset = Dataset(name="set", role="id", format="npz", path=str(path), images="x", labels="y")
    group = hashlib.sha256()
    for row, label in enumerate([1, 0]):
        group.update(f'["x/{row:08d}", [4, 4], {label}, "", false]'.encode())
        group.update(hashlib.sha256(bytes(range(16 * row, 16 * row + 16))).digest())
    expected = hashlib.sha256(group.digest()).hexdigest()
    assert compile_manifest(dataset, tmp_path / "manifests").digest == expected


def test_the_digest_is_that_of_the_rows_as_json(compiled, tmp_path):
    """Datasets keep the names they have."""
    names = ['quoted "\\.png', "Ångström\n.png", "smile 😀.png"]
    for name in names:
        Image.fromarray(IMAGES[0]).save(tmp_path / name, "PNG")
    folder = compiled("imagefolder", tmp_path, role="near_ood")
    arrays = labelled(compiled, save(tmp_path / "arrays" / "a.npz"))
    for manifest in (folder, arrays):
        whole = hashlib.sha256()
        table = manifest.read(0, manifest.rows)
        for row in table.to_pylist():
            known = [row["key"], row["shape"], row["label"], row["identity"], row["bytes"] is None]
            whole.update(json.dumps(known + ([row["accepted"]] if row["accepted"] else [])).encode())
            whole.update(hashlib.sha256(row["bytes"] or b"").digest())
        assert table_digest(table) == whole.digest()


def test_the_digest_of_any_rows_is_that_of_each_as_json():
    """However they lie in chunks: what is the same in all of them is spelled once."""
    rows = [
        {"key": 'a"\\\x7f\n', "label": 3, "accepted": [3, 5], "identity": "1-2"},
        {"key": "b", "label": -1, "identity": "é", "bytes": b""},
        {"key": "c", "label": 0, "identity": "", "bytes": b"\xff\0", "shape": [1, 2]},
        {"key": "d", "label": 1, "identity": "missing", "shape": []},
    ]
    for some in ([0], [1], [2], [3], [0, 1, 2, 3], [3, 0], [1, 2]):
        chosen = [rows[number] for number in some]
        tables = [pa.Table.from_pylist([row], SCHEMA) for row in chosen]
        whole = hashlib.sha256()
        for row in chosen:
            known = [row["key"], row.get("shape") or None, row["label"], row["identity"], "bytes" not in row]
            whole.update(json.dumps(known + ([row["accepted"]] if "accepted" in row else [])).encode())
            whole.update(hashlib.sha256(row.get("bytes", b"")).digest())
        assert table_digest(pa.concat_tables(tables)) == whole.digest()


def test_a_row_of_a_damaged_list_without_a_label_is_no_row_less():
    row = pa.Table.from_pylist([{"key": "a", "identity": "1-2"}], SCHEMA)
    expected = b'["a", null, None, "1-2", true]' + hashlib.sha256(b"").digest()
    assert table_digest(row) == hashlib.sha256(expected).digest()
