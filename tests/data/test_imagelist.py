import os
import threading
import time
from pathlib import Path
from weakref import WeakValueDictionary

import pytest

from pipeline.data.formats import imagelist
from pipeline.errors import UserError
from pipeline.workspace import storage


@pytest.fixture
def root(tmp_path, png):
    """A folder with images of three classes."""
    for value, name in enumerate(["n01440764/a b.png", "n01443537/1.JPEG", "n02123045/猫.png"]):
        (tmp_path / "root" / name).parent.mkdir(parents=True)
        (tmp_path / "root" / name).write_bytes(png(value))
    return tmp_path / "root"


@pytest.fixture
def listed(compiled, root, tmp_path):
    """Compile a list, given by its text."""

    def listed(text, role="id", ending=".txt", **fields):
        path = tmp_path / f"list{ending}"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return compiled("imagelist", path, role=role, **{"root": str(root)} | fields)

    return listed


def rows(manifest, *names):
    table = manifest.read(0, manifest.rows)
    return [tuple(row[name] for name in names) for row in table.to_pylist()]


def test_each_line_is_a_row_in_the_order_of_the_list(listed, root):
    manifest = listed("n02123045/猫.png 281\n\nn01440764/a b.png 0\r\nn01443537/1.JPEG\t1")
    assert rows(manifest, "key", "label", "uri") == [
        ("n02123045/猫.png", 281, str(root / "n02123045/猫.png")),
        ("n01440764/a b.png", 0, str(root / "n01440764/a b.png")),
        ("n01443537/1.JPEG", 1, str(root / "n01443537/1.JPEG")),
    ]


def test_paths_are_relative_to_the_folder_of_the_list_unless_a_root_is_named(compiled, root, contents, png):
    (root / "list.txt").write_text("n01443537/1.JPEG 1\n")
    assert contents(compiled("imagelist", root / "list.txt", role="id")) == [png(1)]


def test_a_csv_file_has_columns_in_any_order_and_quotes(listed):
    text = '\ufefflabel,note,path\n3,"a, b","n01440764/a b.png"\n'
    assert rows(listed(text, ending=".csv"), "key", "label") == [("n01440764/a b.png", 3)]


@pytest.mark.parametrize(
    ("text", "ending"),
    [("n01443537/1.JPEG 282;281;282\n", ".txt"), ("path,label\nn01443537/1.JPEG, 282 ; 281\n", ".csv")],
)
def test_several_accepted_labels_are_kept_in_order(listed, text, ending):
    manifest = listed(text, ending=ending)
    assert rows(manifest, "label", "accepted") == [(282, [282, 281])]
    assert manifest.class_count == {281: 1, 282: 1}


def test_another_accepted_label_changes_the_digest(listed):
    one, two, three = (listed(f"n01443537/1.JPEG {label}\n").digest for label in ("7", "7;8", "7;9"))
    assert len({one, two, three}) == 3


def test_names_of_classes_mean_what_labels_say(listed):
    manifest = listed(
        "n01440764/a b.png n01440764\nn02123045/猫.png n02123045;n01443537", labels="imagenet1k"
    )
    assert rows(manifest, "label", "accepted") == [(0, None), (281, [281, 1])]


def test_a_name_that_labels_lack_is_refused_with_its_line_and_the_closest_ones(listed):
    with pytest.raises(UserError, match=r"list\.txt, line 2: the class 'n0144076' .* Closest: 'n01440764'"):
        listed("n01443537/1.JPEG n01443537\nn01440764/a b.png n0144076\n", labels="imagenet1k")


def test_a_line_that_points_nowhere_is_a_row_that_fails(listed, contents, png):
    manifest = listed("n01443537/1.JPEG 1\nn01443537/2.JPEG 1\nnowhere/3.png 1\n")
    assert contents(manifest) == [png(1), "FileNotFoundError", "FileNotFoundError"]


@pytest.mark.parametrize(
    ("text", "ending", "expected"),
    [
        ("a.png 1\nb.png\n", ".txt", r"list\.txt, line 2: got 'b\.png'; expected `path label`"),
        ("a.png 1\nmy photo.png\n", ".txt", r"list\.txt, line 2: 'photo\.png' is no class index"),
        ("a.png 1;\n", ".txt", r"list\.txt, line 1: '' is no class index"),
        ("a.png 3.5\n", ".txt", r"list\.txt, line 1: '3\.5' is no class index"),
        ("a.png 99999999999\n", ".txt", r"list\.txt, line 1: '99999999999' is no class index"),
        ("path,label\na.png,1\nb,c.png,1\n", ".csv", r"list\.csv, line 3: expected 2 values: path,label"),
        ("path,label\na.png\n", ".csv", r"list\.csv, line 2: expected 2 values"),
        ("path,label\na.png,cat\n", ".csv", r"list\.csv, line 2: 'cat' is no class index"),
        ("file,label\na.png,1\n", ".csv", r"list\.csv: no column 'path'; the columns are: file, label"),
        ("", ".csv", r"list\.csv: no column 'path'; the columns are: none"),
    ],
)
def test_a_malformed_line_is_refused_with_its_number(listed, text, ending, expected):
    with pytest.raises(UserError, match=rf"datasets\.set\.path: .*{expected}"):
        listed(text, ending=ending)


@pytest.mark.parametrize(("text", "ending"), [("", ".txt"), ("\n\n", ".txt"), ("path,label\n", ".csv")])
def test_an_empty_list_is_refused(listed, text, ending):
    with pytest.raises(UserError, match=r"datasets\.set\.path: no images in .*list"):
        listed(text, ending=ending)


def test_a_path_twice_in_a_list_is_refused(listed):
    with pytest.raises(UserError, match=r"the key 'n01443537/1\.JPEG' occurs more than once"):
        listed("n01443537/1.JPEG 1\nn01440764/a b.png 0\nn01443537/1.JPEG 1\n")


def test_a_label_that_is_not_known_is_refused_only_where_it_is_needed(listed):
    for text, ending in (("n01443537/1.JPEG -1\n", ".txt"), ("path,label\nn01443537/1.JPEG,\n", ".csv")):
        assert listed(text, role="far_ood", ending=ending).class_count == {-1: 1}
        with pytest.raises(UserError, match="role 'id' needs a label for every image, but 1 of 1 have none"):
            listed(text, ending=ending)


def test_a_name_that_is_not_utf8_is_read_and_its_key_spelled_out(listed, root, contents, png):
    Path(os.fsdecode(os.fsencode(root) + b"/b\xff.png")).write_bytes(png(9))
    manifest = listed(b"b\xff.png 1\n")
    assert rows(manifest, "key") == [(r"b\udcff.png",)]
    assert contents(manifest) == [png(9)]


def test_a_list_that_is_not_there_is_refused(compiled, tmp_path):
    with pytest.raises(UserError, match=r"datasets\.set\.path: no such file: .*list\.txt"):
        compiled("imagelist", tmp_path / "list.txt")


def test_a_changed_image_changes_the_digest(listed, root, png):
    before = listed("n01443537/1.JPEG 1\n").digest
    (root / "n01443537/1.JPEG").write_bytes(png(1) + b"more")
    assert listed("n01443537/1.JPEG 1\n").digest != before


def test_files_of_a_slow_disk_are_looked_at_many_at_once_and_come_in_the_order_of_the_list(
    compiled, tmp_path, png, far
):
    """As over a network, where each takes an answer of a server."""
    lines = [f"{number % 7}/{number}.png {number}\n" for number in range(256)]
    for number in range(0, 256, 2):
        (tmp_path / str(number % 7)).mkdir(exist_ok=True)
        (tmp_path / f"{number % 7}/{number}.png").write_bytes(png(number))
    (tmp_path / "list.txt").write_text("".join(lines))
    alone = compiled("imagelist", tmp_path / "list.txt", role="id")
    far(storage, "local_identities", 0.004 * 32)
    began = time.perf_counter()
    assert compiled("imagelist", tmp_path / "list.txt", role="id") == alone
    assert time.perf_counter() - began < 256 * 0.004 * 0.6
    assert {key: identity == storage.MISSING for key, identity in rows(alone, "key", "identity")} == {
        line.split()[0]: number % 2 == 1 for number, line in enumerate(lines)
    }


def test_folders_on_s3_are_listed_many_at_once_and_each_once(compiled, upload, tmp_path, png, monkeypatch):
    """However often, and in whatever order, a list comes back to them."""
    names = [f"{number % 12}/{number}.png" for number in range(36)]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png())
    (tmp_path / "list.txt").write_text("".join(f"{name} 1\n" for name in [*names, "12/1.png"]))
    uri, asked, together = upload(tmp_path, "many"), [], threading.Barrier(13, timeout=10)
    entries = storage.entries

    def wait(folder):
        asked.append(folder)
        together.wait()
        return entries(folder)

    monkeypatch.setattr(storage, "entries", wait)
    manifest = compiled("imagelist", f"{uri}/list.txt", role="id")
    assert sorted(asked) == sorted(f"{uri}/{number}" for number in range(13))
    missing = [key for key, identity in rows(manifest, "key", "identity") if identity == storage.MISSING]
    assert missing == ["12/1.png"] and manifest.rows == 37


def test_only_so_many_listings_of_folders_on_s3_are_in_memory_at_once(compiled, tmp_path, monkeypatch):
    """Also where the next lines are all in other folders."""

    class Listed(dict):
        pass

    alive, held = WeakValueDictionary(), []

    def listing(folder):
        found = alive[folder] = Listed()
        held.append(len(alive))
        return found

    monkeypatch.setattr(imagelist, "_listing", listing)
    monkeypatch.setattr(imagelist, "FOLDERS", 20)
    monkeypatch.setattr(imagelist, "ROW_GROUP", 10)
    (tmp_path / "list.txt").write_text("".join(f"{number}/1.png 1\n" for number in range(400)))
    assert compiled("imagelist", tmp_path / "list.txt", role="id", root="s3://bucket/set").rows == 400
    assert len(held) == 400 and max(held) <= 20 + 2 * 10
