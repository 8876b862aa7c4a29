"""`include_labels`, `limit_per_class` and `limit`."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import Dataset
from pipeline.data.manifest import compile_manifest
from pipeline.errors import UserError
from pipeline.workspace.tables import ROW_GROUP

ROWS = 3000


@pytest.fixture
def arrays(tmp_path):
    """More rows than two row groups, of seven classes that are not equally frequent."""
    labels = np.random.default_rng(0).choice(7, size=ROWS, p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.04, 0.01])
    np.savez(tmp_path / "a.npz", x=np.zeros((ROWS, 1, 1), np.uint8), y=labels)
    return tmp_path / "a.npz", labels


@pytest.fixture
def filtered(arrays, tmp_path):
    """Compile it with filters."""

    def filtered(seed=0, role="id", **fields):
        dataset = Dataset(
            name="set", role=role, format="npz", path=str(arrays[0]), images="x", labels="y", **fields
        )
        return compile_manifest(dataset, tmp_path / "manifests", seed)

    return filtered


def rows(manifest):
    return [int(key[2:]) for key in manifest.read(0, manifest.rows)["key"].to_pylist()]


def test_a_limit_keeps_a_uniform_sample_in_the_order_of_the_data(filtered, arrays):
    kept = rows(filtered(limit=1200))
    assert len(kept) == 1200
    assert kept == sorted(kept)
    assert np.mean(kept) == pytest.approx(ROWS / 2, rel=0.03)
    shares = np.bincount(arrays[1][kept], minlength=7) / 1200
    np.testing.assert_allclose(shares, np.bincount(arrays[1], minlength=7) / ROWS, atol=0.03)


def test_a_sample_is_the_same_on_every_machine(filtered):
    assert rows(filtered(limit=5)) == [1167, 1218, 1495, 1785, 1945]


def test_a_smaller_sample_is_part_of_a_larger_one_and_another_seed_is_another_sample(filtered):
    small, large, other = (
        rows(filtered(limit=100)),
        rows(filtered(limit=500)),
        rows(filtered(seed=1, limit=100)),
    )
    assert set(small) < set(large)
    assert len(set(small) & set(other)) < 20


def test_a_limit_per_class_keeps_so_many_of_each_class(filtered, arrays):
    manifest = filtered(limit_per_class=50)
    present = np.bincount(arrays[1], minlength=7)
    assert manifest.class_count == {label: min(50, count) for label, count in enumerate(present.tolist())}
    assert rows(manifest) == sorted(rows(manifest))


def test_included_labels_are_all_kept_and_no_others(filtered, arrays):
    manifest = filtered(include_labels=[5, 2])
    assert rows(manifest) == np.flatnonzero(np.isin(arrays[1], [2, 5])).tolist()
    assert {label for label, count in manifest.class_count.items() if count} == {2, 5}


def test_filters_apply_one_after_the_other(filtered):
    manifest = filtered(include_labels=[0, 1, 2], limit_per_class=100, limit=150)
    assert manifest.rows == 150
    both = set(rows(filtered(include_labels=[0, 1, 2], limit_per_class=100)))
    assert set(rows(manifest)) < both
    assert len(both) == 300


def test_filtered_manifests_can_be_read_in_slices(filtered):
    manifest = filtered(limit=2 * ROW_GROUP + 7)
    with pq.ParquetFile(manifest.path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    assert sizes == [ROW_GROUP, ROW_GROUP, 7]


def test_filters_change_the_digest_and_a_limit_that_keeps_everything_does_not(filtered):
    digests = [filtered(**fields).digest for fields in ({}, {"limit": 2999}, {"include_labels": [0]})]
    assert len(set(digests)) == 3
    assert filtered(limit=ROWS).digest == filtered(limit_per_class=ROWS).digest == digests[0]


def test_filters_may_use_labels_that_an_ood_role_drops(filtered):
    manifest = filtered(role="near_ood", include_labels=[3], limit_per_class=20)
    assert manifest.class_count == {-1: 20}


def test_an_image_with_several_labels_is_kept_for_each_of_them(compiled, tmp_path):
    table = pa.table({"image": [b"a", b"b", b"c"], "label": [[1, 2], [2], [3, 1]]})
    pq.write_table(table, tmp_path / "a.parquet")

    def kept(label):
        found = compiled("parquet", tmp_path / "a.parquet", role="id", include_labels=[label])
        return [int(key[-1]) for key in found.read(0, found.rows)["key"].to_pylist()]

    assert [kept(label) for label in (1, 2, 3)] == [[0, 2], [0, 1], [2]]


@pytest.mark.parametrize("role", ["id", "near_ood"])
@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (None, ["n01443537"], ["n01443537/1.png"]),
        ("imagenet1k", ["n01443537", 281], ["n01443537/1.png", "n02123045/2.png"]),
        (None, [1], ["n02123045/2.png"]),
        ("imagenet1k", [1], ["n01443537/1.png"]),
    ],
)
def test_classes_of_folders_may_be_named(compiled, tmp_path, png, role, labels, names, expected):
    for name in ("n01443537/1.png", "n02123045/2.png", "n15075141/3.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True)
        (tmp_path / "set" / name).write_bytes(png())
    found = compiled("imagefolder", tmp_path / "set", role=role, labels=labels, include_labels=names)
    assert found.read(0, found.rows)["key"].to_pylist() == expected
    with pytest.raises(UserError, match=r"set\.include_labels: the class 'n0144353' .*Closest: 'n01443537'"):
        compiled("imagefolder", tmp_path / "set", role=role, labels=labels, include_labels=["n0144353"])


def test_names_where_there_are_none_and_filters_that_keep_nothing_are_refused(filtered):
    with pytest.raises(UserError, match=r"include_labels: got 'cat', but classes of the format 'npz'"):
        filtered(include_labels=["cat"])
    with pytest.raises(UserError, match=r"datasets\.set: include_labels keeps none of its 3000 images"):
        filtered(include_labels=[99])
