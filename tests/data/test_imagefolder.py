import errno
import os
import re
import shutil
import threading
import time

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from pipeline.config.schema import Dataset
from pipeline.data.formats import _files, imagefolder
from pipeline.data.notes import Notes
from pipeline.errors import UserError
from pipeline.workspace import folders, storage
from tests import faults


def save(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(path, "PNG")
    return path


def rows(manifest):
    return manifest.read(0, manifest.rows).to_pylist()


def test_images_at_any_depth_are_rows_in_the_order_of_their_names(compiled, tmp_path):
    names = ["b/2.png", "a/deep/er/1.png", "c.png", "a/3.png"]
    for name in names:
        save(tmp_path / "set" / name)
    found = rows(compiled("imagefolder", tmp_path / "set"))
    assert [row["key"] for row in found] == sorted(names)
    for row in found:
        assert row["uri"] == str(tmp_path / "set" / row["key"])
        assert row["bytes"] is None
        assert row["shape"] is None


def test_only_files_with_the_ending_of_an_image_in_any_case_are_rows(compiled, tmp_path):
    for name in ("a.JPEG", "b.Png", "c.tIFF", "d.png.txt", "e", "png", "f.webp"):
        save(tmp_path / "set" / name)
    found = rows(compiled("imagefolder", tmp_path / "set"))
    assert [row["key"] for row in found] == ["a.JPEG", "b.Png", "c.tIFF", "f.webp"]


def test_names_that_are_not_ascii_are_keys(compiled, tmp_path):
    save(tmp_path / "set" / "Größe" / "猫 1.png")
    (row,) = rows(compiled("imagefolder", tmp_path / "set"))
    assert row["key"] == "Größe/猫 1.png"
    assert (tmp_path / "set" / row["key"]).samefile(row["uri"])


def test_a_name_that_is_not_utf8_is_read_and_its_key_spelled_out(compiled, contents, tmp_path):
    save(tmp_path / "set" / "a.png")
    shutil.copy(tmp_path / "set" / "a.png", os.fsencode(tmp_path / "set") + b"/b\xff.png")
    manifest = compiled("imagefolder", tmp_path / "set")
    assert [row["key"] for row in rows(manifest)] == ["a.png", r"b\udcff.png"]
    assert contents(manifest) == [(tmp_path / "set" / "a.png").read_bytes()] * 2


def test_class_folders_are_numbered_in_sorted_order(compiled, tmp_path):
    for number, name in enumerate(["n10", "n02", "N1", "n1"]):
        save(tmp_path / "set" / name / f"{number}.png")
    save(tmp_path / "set" / "n02" / "deep" / "x.png")
    (tmp_path / "set" / "n03").mkdir()
    manifest = compiled("imagefolder", tmp_path / "set", role="train")
    assert {row["key"]: row["label"] for row in rows(manifest)} == {
        "N1/2.png": 0,
        "n02/1.png": 1,
        "n02/deep/x.png": 1,
        "n1/3.png": 3,
        "n10/0.png": 4,
    }
    assert manifest.class_count == {0: 1, 1: 2, 3: 1, 4: 1}


@pytest.mark.parametrize("names", [range(12), range(1, 13), ["n10", "N9", "10", "9", "-1"]])
def test_classes_have_the_numbers_that_torchvision_gives_them(compiled, tmp_path, names):
    for name in names:
        save(tmp_path / "set" / str(name) / "a.png")
    manifest = compiled("imagefolder", tmp_path / "set", role="id")
    theirs = ImageFolder(tmp_path / "set").class_to_idx
    assert {row["key"].partition("/")[0]: row["label"] for row in rows(manifest)} == theirs


def test_numbers_in_another_order_are_told_and_labels_index_takes_them_as_classes(compiled, tmp_path):
    for number in range(12):
        save(tmp_path / "set" / str(number) / "a.png")
    (note,) = compiled("imagefolder", tmp_path / "set", role="id").notes
    assert "in the order of their names as text (0, 1, 10, 11, 2, ...)" in note
    assert note.endswith("set labels: index")
    by_number = compiled("imagefolder", tmp_path / "set", role="id", labels="index")
    assert {row["key"]: row["label"] for row in rows(by_number)} == {f"{n}/a.png": n for n in range(12)}
    assert by_number.notes == ()


@pytest.mark.parametrize("names", [range(10), ["00", "01", "10"], ["b", "a"], ["10", "9", "x"]])
def test_nothing_is_said_of_an_order_that_nobody_could_mistake(compiled, tmp_path, names):
    for name in names:
        save(tmp_path / "set" / str(name) / "a.png")
    assert compiled("imagefolder", tmp_path / "set", role="id").notes == ()


def test_files_that_are_left_out_are_counted_and_named(compiled, tmp_path):
    for name in ("a/1.png", "a/2.heic", "b/3.HEIC", "b/x.txt", "b/noending", ".DS_Store", ".git/4.png"):
        save(tmp_path / "set" / name)
    (note,) = compiled("imagefolder", tmp_path / "set").notes
    assert note == "6 of 7 files not read: hidden 2, .heic 2, no ending 1, .txt 1 (first: .DS_Store)"


def test_a_folder_of_which_nothing_is_read_says_what_is_there(compiled, tmp_path):
    save(tmp_path / "set" / "a.heic")
    with pytest.raises(UserError, match=r"no images in .*set.*1 of 1 files not read: \.heic 1"):
        compiled("imagefolder", tmp_path / "set")


def test_links_are_followed(compiled, tmp_path):
    save(tmp_path / "elsewhere" / "dog" / "a.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    (row,) = rows(compiled("imagefolder", tmp_path / "set", role="id"))
    assert (row["key"], row["label"]) == ("dog/a.png", 0)


def test_a_dangling_link_is_a_row(compiled, tmp_path):
    save(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "b.png").symlink_to(tmp_path / "nowhere.png")
    found = rows(compiled("imagefolder", tmp_path / "set"))
    assert [(row["key"], row["identity"] == "missing") for row in found] == [
        ("a.png", False),
        ("b.png", True),
    ]


@pytest.mark.parametrize("target", ["..", "loop"], ids=["its parent", "itself"])
@pytest.mark.parametrize("role", ["id", "far_ood"])
def test_a_link_that_goes_round_in_circles_is_refused(compiled, tmp_path, role, target):
    save(tmp_path / "set" / "dog" / "a.png")
    (tmp_path / "set" / "dog" / "loop").symlink_to(target)
    (tmp_path / "set" / "loop").symlink_to(target)
    with pytest.raises(UserError, match=r"datasets\.set\.path: cannot read .*loop.*symbolic links"):
        compiled("imagefolder", tmp_path / "set", role=role)


def test_an_image_at_the_root_of_a_labelled_folder_has_no_class_and_is_refused(compiled, tmp_path):
    save(tmp_path / "set" / "dog" / "a.png")
    save(tmp_path / "set" / "b.png")
    with pytest.raises(
        UserError, match=r"needs a label for every image, but 1 of 2 have none.*class folders"
    ):
        compiled("imagefolder", tmp_path / "set", role="id")
    assert compiled("imagefolder", tmp_path / "set").class_count == {-1: 2}


def test_a_labelled_folder_needs_class_folders(compiled, tmp_path):
    save(tmp_path / "set" / "a.png")
    with pytest.raises(UserError, match=r"datasets\.set\.path: .*set has no class folders; role 'id'"):
        compiled("imagefolder", tmp_path / "set", role="id")
    assert compiled("imagefolder", tmp_path / "set", role="train").class_count == {-1: 1}


def test_a_folder_without_images_is_refused(compiled, tmp_path):
    (tmp_path / "set" / "dog").mkdir(parents=True)
    (tmp_path / "set" / "dog" / "a.txt").write_text("no image")
    with pytest.raises(UserError, match=r"datasets\.set\.path: no images in .*set"):
        compiled("imagefolder", tmp_path / "set")


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.write_text("x")], ids=["none", "file"])
def test_a_path_that_is_no_folder_is_refused(compiled, tmp_path, make):
    make(tmp_path / "set")
    with pytest.raises(UserError, match=r"datasets\.set\.path: no such folder: .*set"):
        compiled("imagefolder", tmp_path / "set")


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: save(folder / "b.png", 7),
        lambda folder: (folder / "b.png").rename(folder / "c.png"),
        lambda folder: (folder / "b.png").unlink(),
        lambda folder: save(folder / "c.png"),
        lambda folder: os.utime(folder / "b.png", ns=(1, 1)),
    ],
    ids=["content", "name", "fewer", "more", "time stamp"],
)
def test_a_change_of_a_file_changes_the_digest(compiled, tmp_path, change):
    for name in ("a.png", "b.png"):
        os.utime(save(tmp_path / "set" / name), ns=(10**18, 10**18))
    before = compiled("imagefolder", tmp_path / "set").digest
    assert compiled("imagefolder", tmp_path / "set").digest == before
    change(tmp_path / "set")
    assert compiled("imagefolder", tmp_path / "set").digest != before


def test_a_moved_folder_is_the_same_dataset_and_its_images_are_found(compiled, tmp_path):
    save(tmp_path / "set" / "a.png")
    before = compiled("imagefolder", tmp_path / "set")
    (tmp_path / "set").rename(tmp_path / "moved")
    after = compiled("imagefolder", tmp_path / "moved")
    assert after == before
    assert [row["uri"] for row in rows(after)] == [str(tmp_path / "moved" / "a.png")]


def test_more_images_than_a_row_group_are_all_there(compiled, tmp_path):
    (tmp_path / "set").mkdir()
    for number in range(1030):
        (tmp_path / "set" / f"{number:04d}.png").touch()
    manifest = compiled("imagefolder", tmp_path / "set")
    assert [row["key"] for row in rows(manifest)] == [f"{number:04d}.png" for number in range(1030)]


def test_hidden_files_and_folders_are_no_part_of_the_dataset(compiled, tmp_path):
    for name in ("a/1.png", "b/2.png", ".ipynb_checkpoints/1.png", "a/.thumbnail.png"):
        save(tmp_path / "set" / name)
    found = rows(compiled("imagefolder", tmp_path / "set", role="id"))
    assert [(row["key"], row["label"]) for row in found] == [("a/1.png", 0), ("b/2.png", 1)]


def test_folders_beside_each_other_are_listed_at_once_and_come_in_their_order(compiled, tmp_path, far):
    """As over a network, where each takes an answer of a server."""
    for number in range(32):
        save(tmp_path / "set" / f"{number:02d}" / "deep" / "1.png", number)
    alone = compiled("imagefolder", tmp_path / "set")
    far(folders, "listing", 0.05)
    began = time.perf_counter()
    assert compiled("imagefolder", tmp_path / "set") == alone
    assert time.perf_counter() - began < 65 * 0.05 * 0.8


def test_class_folders_on_s3_are_listed_many_at_once(compiled, upload, endpoint, tmp_path, monkeypatch):
    """The first one, too, and more than pyarrow's client has threads by itself."""
    for number in range(24):
        save(tmp_path / "set" / f"{number:02d}" / "1.png", number)
    uri = upload(tmp_path / "set", "many")
    alone = compiled("imagefolder", uri)
    together = threading.Barrier(12, timeout=10)

    def wait(method, path):
        if re.search(r"prefix=many(/|%2F)[0-9]", path):
            together.wait()

    with faults.proxy(endpoint) as proxy:
        monkeypatch.setattr(proxy, "fault", wait)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{proxy.address}")
        assert compiled("imagefolder", f"{uri}?endpoint_override={proxy.address}&scheme=http") == alone
    assert not together.broken


def test_a_listing_has_what_entries_have(tmp_path):
    """Also where one is a link, hidden, a folder, no image, or has a name that is no UTF-8."""
    for name in ("b.png", "a/1.png", ".x", "Größe.txt", "😀.png"):
        save(tmp_path / name)
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "linked").symlink_to("a")
    shutil.copy(tmp_path / "b.png", os.fsencode(tmp_path) + b"/\xff.png")
    entries = storage.entries(str(tmp_path))
    listed = folders.listing(str(tmp_path))
    assert listed == {entry.name: "" if entry.folder else entry.identity for entry in entries}
    assert folders.uris(str(tmp_path), sorted(listed)) == [entry.uri for entry in entries]
    assert len(listed) == 8


def test_names_that_are_no_utf8_have_the_order_that_python_gives_them(compiled, tmp_path):
    """Before what has larger code points, whatever their bytes."""
    save(tmp_path / "a.png")
    for name in (b"\xff.png", b"\xf0\x9f\x98\x80.png", b"\xee\x80\x80.png"):
        save(tmp_path / "set" / "b.png")
        shutil.copy(tmp_path / "a.png", os.fsencode(tmp_path) + b"/set/" + name)
    found = [row["key"] for row in rows(compiled("imagefolder", tmp_path / "set"))]
    assert found == ["b.png", r"\udcff.png", "\ue000.png", "😀.png"]


def test_files_and_folders_come_in_one_order_of_names(compiled, tmp_path):
    names = ["a-b/2.png", "a.png", "a/1.png", "a/b/3.png", "a/b.png", "c/d/4.png", "c.txt", "e.png/5.png"]
    for name in names:
        save(tmp_path / "set" / name)
    manifest = compiled("imagefolder", tmp_path / "set")
    expected = ["a/1.png", "a/b/3.png", "a/b.png", "a-b/2.png", "a.png", "c/d/4.png", "e.png/5.png"]
    assert [row["key"] for row in rows(manifest)] == expected
    assert manifest.notes == ("1 of 8 files not read: .txt 1 (first: c.txt)",)


def test_endings_are_compared_as_python_does_and_not_by_unicode_folding(compiled, tmp_path):
    for name in ("a.png", "b.g\u0130f", "c.TI\uff26", "d.png\n"):
        save(tmp_path / "set" / name)
    assert [row["key"] for row in rows(compiled("imagefolder", tmp_path / "set"))] == ["a.png"]


def test_a_folder_without_access_is_named(compiled, tmp_path, monkeypatch):
    for name in ("a/1.png", "b/2.png"):
        save(tmp_path / "set" / name)
    opened = os.open

    def refused(path, *arguments, **options):
        if str(path).endswith("/b"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(UserError, match=r"datasets\.set\.path: cannot read .*/set/b: Permission denied"):
        compiled("imagefolder", tmp_path / "set")


def test_a_file_that_vanishes_while_its_folder_is_listed_is_a_row_that_is_missing(
    compiled, tmp_path, monkeypatch
):
    for name in ("a.png", "b.png"):
        save(tmp_path / "set" / name)
    status = storage.status

    def vanished(entry):
        if entry.name == "b.png":
            (tmp_path / "set" / "b.png").unlink()
        return status(entry)

    monkeypatch.setattr(storage, "status", vanished)
    found = rows(compiled("imagefolder", tmp_path / "set"))
    assert [(row["key"], row["identity"] == "missing") for row in found] == [
        ("a.png", False),
        ("b.png", True),
    ]


def test_a_folder_of_more_files_than_are_held_at_once_is_whole(compiled, tmp_path, monkeypatch):
    for number in range(30):
        save(tmp_path / "set" / f"{number * 7 % 30:02d}.png")
    whole = compiled("imagefolder", tmp_path / "set")
    monkeypatch.setattr(_files, "ROW_GROUP", 7)
    assert compiled("imagefolder", tmp_path / "set") == whole
    assert [row["key"] for row in rows(whole)] == [f"{number:02d}.png" for number in range(30)]


def test_folders_of_one_file_become_batches_together(tmp_path):
    for number in range(30):
        save(tmp_path / "set" / f"{number:02d}" / "1.png")
    dataset = Dataset(name="set", role="id", format="imagefolder", path=str(tmp_path / "set"))
    (batch,) = imagefolder.read(dataset, Notes())
    assert batch["label"].to_pylist() == list(range(30))
