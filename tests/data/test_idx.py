import gzip
import struct

import numpy as np
import pytest

from pipeline.errors import UserError

IMAGES = np.random.default_rng(0).integers(256, size=(5, 4, 6), dtype=np.uint8)
LABELS = np.array([2, 0, 1, 2, 0], dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    """The format as it is documented on the page of MNIST."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(path, content):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_images_and_labels_come_out_as_they_were_saved(compiled, pixels, tmp_path, suffix):
    x = write(tmp_path / f"x-ubyte{suffix}", idx(IMAGES))
    y = write(tmp_path / f"y-ubyte{suffix}", idx(LABELS))
    manifest = compiled("idx", x, role="id", labels=str(y))
    np.testing.assert_array_equal(pixels(manifest), IMAGES)
    np.testing.assert_array_equal(manifest.labels(), LABELS)
    assert manifest.read(0, 2)["key"].to_pylist() == ["x-ubyte/00000000", "x-ubyte/00000001"]


def test_gzip_does_not_change_the_dataset(compiled, tmp_path):
    plain, packed = write(tmp_path / "x", idx(IMAGES)), write(tmp_path / "x.gz", idx(IMAGES))
    assert compiled("idx", plain).digest == compiled("idx", packed).digest


@pytest.mark.parametrize(
    "magic", [b"", b"\0\0", b"\0\0\x09\x03", b"\0\0\x08\x01", b"\x01\0\x08\x03", b"\x89PNG"]
)
def test_a_wrong_magic_number_is_refused(compiled, tmp_path, magic):
    path = write(tmp_path / "x", magic + idx(IMAGES)[4:] if len(magic) == 4 else magic)
    with pytest.raises(
        UserError, match=r"datasets\.set\.path: .*x: not an IDX file of unsigned bytes with 3"
    ):
        compiled("idx", path)


def test_images_in_place_of_labels_are_refused(compiled, tmp_path):
    path = write(tmp_path / "x", idx(IMAGES))
    with pytest.raises(UserError, match=r"datasets\.set\.labels: .*x: not an IDX file of .* 1 dimension"):
        compiled("idx", path, role="id", labels=str(path))


def test_a_file_that_ends_inside_its_header_is_refused(compiled, tmp_path):
    with pytest.raises(UserError, match="ends inside its header"):
        compiled("idx", write(tmp_path / "x", idx(IMAGES)[:10]))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_file_that_ends_inside_an_image_is_refused(compiled, tmp_path, suffix):
    with pytest.raises(UserError, match="the file ends inside image 3 of 5"):
        compiled("idx", write(tmp_path / f"x{suffix}", idx(IMAGES)[:-25]))


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-20], lambda content: content[:40] + b"\xff" * 40 + content[80:]],
    ids=["truncated", "overwritten"],
)
def test_a_damaged_gzip_file_is_refused(compiled, tmp_path, damage):
    path = tmp_path / "x.gz"
    path.write_bytes(damage(gzip.compress(idx(IMAGES))))
    with pytest.raises(UserError, match=r"datasets\.set: .*x\.gz is damaged"):
        compiled("idx", path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_file_that_goes_on_after_its_images_is_refused(compiled, tmp_path, suffix):
    with pytest.raises(UserError, match="goes on after its 5 images"):
        compiled("idx", write(tmp_path / f"x{suffix}", idx(IMAGES) + b"more"))


def test_a_plain_file_named_gz_is_refused(compiled, tmp_path):
    path = tmp_path / "x.gz"
    path.write_bytes(idx(IMAGES))
    with pytest.raises(UserError, match=r"datasets\.set: .*x\.gz is damaged: Not a gzipped file"):
        compiled("idx", path)


@pytest.mark.parametrize("labels", [idx(LABELS[:4]), idx(LABELS)[:-1]], ids=["few", "short"])
def test_every_image_needs_a_label(compiled, tmp_path, labels):
    x, y = write(tmp_path / "x", idx(IMAGES)), write(tmp_path / "y", labels)
    with pytest.raises(UserError, match=r"datasets\.set\.labels: labels are uint8 \(4,\); expected 5"):
        compiled("idx", x, role="id", labels=str(y))


@pytest.mark.parametrize("field", ["path", "labels"])
def test_a_missing_file_is_refused_with_its_field(compiled, tmp_path, field):
    names = {"path": write(tmp_path / "x", idx(IMAGES)), "labels": write(tmp_path / "y", idx(LABELS))}
    names[field] = tmp_path / "nowhere"
    with pytest.raises(UserError, match=rf"datasets\.set\.{field}: no such file: .*nowhere"):
        compiled("idx", names["path"], role="id", labels=str(names["labels"]))


@pytest.mark.parametrize("sizes", [(2, 2**32 - 1, 2**32 - 1), (2, 0, 4)])
def test_a_header_of_impossible_images_is_refused(compiled, tmp_path, sizes):
    (tmp_path / "x").write_bytes(struct.pack(">BBBB3I", 0, 0, 8, 3, *sizes) + bytes(100))
    with pytest.raises(UserError, match=r"datasets\.set\.path: .*x: the header says \(2, .*Is it damaged"):
        compiled("idx", tmp_path / "x")


def test_headers_that_promise_more_than_there_is_are_refused(compiled, tmp_path):
    (tmp_path / "x").write_bytes(struct.pack(">BBBB3I", 0, 0, 8, 3, 2**32 - 1, 4, 4) + bytes(100))
    (tmp_path / "y").write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, 2**32 - 1) + bytes(100))
    with pytest.raises(UserError, match=f"ends inside image 6 of {2**32 - 1}"):
        compiled("idx", tmp_path / "x")
    with pytest.raises(UserError, match=rf"labels are uint8 \(100,\); expected {2**32 - 1} integers"):
        compiled("idx", tmp_path / "x", role="id", labels=str(tmp_path / "y"))
