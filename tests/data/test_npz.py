import struct
import zipfile

import numpy as np
import pytest

from pipeline.config.schema import Dataset
from pipeline.data.formats import npz
from pipeline.data.notes import Notes
from pipeline.errors import UserError

GREY = np.arange(5 * 4 * 6, dtype=np.uint8).reshape(5, 4, 6)
LABELS = np.array([2, 0, 1, 2, 0])


class Bomb:
    """Leaves a trace if it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_and_labels_come_out_as_they_were_saved(compiled, pixels, tmp_path, images, save):
    save(tmp_path / "a.npz", x=images, y=LABELS)
    manifest = compiled("npz", tmp_path / "a.npz", role="id", images="x", labels="y")
    np.testing.assert_array_equal(pixels(manifest), images)
    np.testing.assert_array_equal(manifest.labels(), LABELS)
    assert manifest.read(0, 5)["key"].to_pylist() == [f"x/{row:08d}" for row in range(5)]


def test_compression_does_not_change_the_dataset(compiled, tmp_path):
    np.savez(tmp_path / "a.npz", x=GREY)
    np.savez_compressed(tmp_path / "b.npz", x=GREY)
    assert compiled("npz", tmp_path / "a.npz").digest == compiled("npz", tmp_path / "b.npz").digest


def test_the_only_array_needs_no_name(compiled, tmp_path):
    np.savez(tmp_path / "a.npz", anything=GREY)
    assert compiled("npz", tmp_path / "a.npz").rows == 5


def test_one_of_several_arrays_must_be_named(compiled, tmp_path):
    np.savez(tmp_path / "a.npz", x=GREY, y=LABELS)
    with pytest.raises(UserError, match=r"datasets\.set\.images: the file has several arrays.*x, y"):
        compiled("npz", tmp_path / "a.npz")


@pytest.mark.parametrize("field", ["images", "labels"])
def test_an_array_that_is_not_there_is_refused_with_the_closest_name(compiled, tmp_path, field):
    np.savez(tmp_path / "a.npz", images=GREY, labels=LABELS)
    names = {"images": "images", "labels": "labels"} | {field: f"{field}_x"}
    with pytest.raises(UserError, match=rf"datasets\.set\.{field}: unknown array.*mean '{field}'"):
        compiled("npz", tmp_path / "a.npz", role="id", **names)


def test_a_member_that_is_no_array_is_not_offered(compiled, tmp_path):
    np.savez(tmp_path / "a.npz", x=GREY)
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("readme.txt", "hello")
    assert compiled("npz", tmp_path / "a.npz").rows == 5
    with pytest.raises(UserError, match=r"unknown array 'readme.txt'.* Known: x\."):
        compiled("npz", tmp_path / "a.npz", images="readme.txt")


@pytest.mark.parametrize(
    "wrong",
    [
        GREY.astype(np.float32),
        GREY.astype(np.uint16),
        GREY.astype(bool),
        GREY[0],
        GREY.reshape(5, 4, 3, 2),
        np.array([{"a": 1}], dtype=object),
    ],
    ids=["float", "16 bits", "bool", "one image", "two channels", "objects"],
)
def test_images_of_another_type_or_shape_are_refused(compiled, tmp_path, wrong):
    np.savez(tmp_path / "a.npz", x=wrong)
    with pytest.raises(UserError, match=r"datasets\.set\.images: images are .*expected uint8 \(N, H, W\)"):
        compiled("npz", tmp_path / "a.npz")


def test_fortran_order_is_refused(compiled, tmp_path):
    np.savez(tmp_path / "a.npz", x=np.asfortranarray(GREY))
    with pytest.raises(UserError, match=r"datasets\.set\.images: the array is in Fortran order"):
        compiled("npz", tmp_path / "a.npz")


@pytest.mark.parametrize(
    "wrong",
    [LABELS[:4], LABELS.astype(float), np.stack([LABELS] * 2, 1)],
    ids=["short", "float", "two-dimensional"],
)
def test_labels_must_be_one_integer_per_image(compiled, tmp_path, wrong):
    np.savez(tmp_path / "a.npz", x=GREY, y=wrong)
    with pytest.raises(UserError, match=r"datasets\.set\.labels: (y: )?labels are .*expected (5 )?integers"):
        compiled("npz", tmp_path / "a.npz", role="id", images="x", labels="y")


def test_pickled_labels_are_refused_and_never_run(compiled, tmp_path):
    trace = tmp_path / "trace"
    np.savez(tmp_path / "a.npz", x=GREY, y=np.array([Bomb(str(trace))] * 5, dtype=object))
    with pytest.raises(UserError, match=r"datasets\.set\.labels: y: labels are object .*expected integers"):
        compiled("npz", tmp_path / "a.npz", role="id", images="x", labels="y")
    assert not trace.exists()


def test_a_missing_file_is_refused(compiled, tmp_path):
    with pytest.raises(UserError, match=r"datasets\.set\.path: no such file: .*a\.npz"):
        compiled("npz", tmp_path / "a.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(compiled, tmp_path, save, share):
    noise = np.random.default_rng(0).integers(256, size=(50, 8, 8), dtype=np.uint8)
    save(tmp_path / "a.npz", x=noise)
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"a\.npz is not a readable \.npz file"):
        compiled("npz", tmp_path / "a.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_file_is_refused(compiled, tmp_path, save):
    noise = np.random.default_rng(0).integers(256, size=(50, 8, 8), dtype=np.uint8)
    save(tmp_path / "a.npz", x=noise)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    for position in range(1000, 1100):
        content[position] ^= 255
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npz is not a readable \.npz file"):
        compiled("npz", tmp_path / "a.npz")


def test_an_array_that_ends_early_is_refused(compiled, tmp_path):
    np.save(tmp_path / "x.npy", GREY)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", (tmp_path / "x.npy").read_bytes()[:-30])
    with pytest.raises(UserError, match=r"a\.npz: the file ends inside image 3 of 5"):
        compiled("npz", tmp_path / "a.npz")


def test_a_member_with_the_name_but_not_the_content_of_an_array_is_refused(compiled, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", "hello, this is no array")
    with pytest.raises(UserError, match=r"datasets\.set\.images: x is not a NumPy array"):
        compiled("npz", tmp_path / "a.npz")


def test_an_array_without_images_is_refused(compiled, tmp_path):
    np.savez(tmp_path / "a.npz", x=GREY[:0])
    with pytest.raises(UserError, match=r"datasets\.set\.path: no images in .*a\.npz"):
        compiled("npz", tmp_path / "a.npz")


def test_labels_that_are_no_class_indices_are_refused(tmp_path):
    """2**32 + 3 would become class 3."""
    path = tmp_path / "large.npz"
    np.savez(path, x=np.zeros((2, 4, 4), np.uint8), y=np.array([0, 2**32 + 3], np.uint64))
    given = {"name": "large", "role": "id", "format": "npz", "path": str(path), "images": "x", "labels": "y"}
    with pytest.raises(UserError, match="labels go from 0 to 4294967299; expected class indices"):
        list(npz.read(Dataset(**given), Notes()))


def header(shape, dtype="|u1", text=None):
    text = text or f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode("latin1")


@pytest.mark.parametrize("shape", [(2**40,), (2**33, 2**7), (-5,), (5, -1)])
def test_labels_whose_header_lies_are_refused_before_they_take_memory(compiled, tmp_path, shape):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", header((5, 4, 4)) + bytes(80))
        archive.writestr("y.npy", header(shape, "<i8") + bytes(40))
    with pytest.raises(UserError, match=r"datasets\.set\.labels: y: (the header says|labels are) int64"):
        compiled("npz", tmp_path / "a.npz", role="id", images="x", labels="y")


@pytest.mark.parametrize(
    "shape", [(5, 2**31, 2**31), (5, -4, -4), (-5, 4, 4), (5, 0, 4), (5, 2**20, 2**10, 3)]
)
def test_images_whose_header_lies_are_refused_before_they_take_memory(compiled, tmp_path, shape):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", header(shape) + bytes(80))
    with pytest.raises(UserError, match=r"datasets\.set\.images: the header says .*Is it damaged"):
        compiled("npz", tmp_path / "a.npz")


def test_more_images_than_there_are_bytes_are_refused(compiled, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", header((2**40, 4, 4)) + bytes(80))
    with pytest.raises(UserError, match="ends inside image 5 of 1099511627776"):
        compiled("npz", tmp_path / "a.npz")


def test_a_header_that_is_nested_too_deeply_is_refused(compiled, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", header(None, text="(" * 5000 + ")" * 5000))
    with pytest.raises(UserError, match=r"datasets\.set\.images: x is not a NumPy array"):
        compiled("npz", tmp_path / "a.npz")


def test_labels_in_one_column_are_labels(compiled, tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((5, 4, 4), np.uint8), y=np.arange(5)[:, None])
    manifest = compiled("npz", tmp_path / "a.npz", role="id", images="x", labels="y")
    assert manifest.labels().tolist() == [0, 1, 2, 3, 4]
