import io
import json
import tarfile

import pytest

from pipeline.errors import UserError
from pipeline.workspace import storage


def rows(manifest, *names):
    table = manifest.read(0, manifest.rows)
    return [tuple(row[name] for name in names) for row in table.to_pylist()]


@pytest.fixture
def samples(png):
    """Members of five samples."""
    members = {}
    for number in range(5):
        members |= {f"{number}.png": png(number), f"{number}.cls": str(number).encode()}
    return members


def test_images_are_read_from_inside_the_tar(compiled, contents, write_tar, samples, tmp_path, png):
    path = write_tar(tmp_path / "a.tar", samples)
    manifest = compiled("webdataset", path, role="id")
    assert rows(manifest, "key", "label", "uri") == [(f"a/{n}", n, str(path)) for n in range(5)]
    assert contents(manifest) == [png(number) for number in range(5)]
    assert sorted(tmp_path.rglob("*.png")) == []


def test_members_may_be_named_in_any_case_and_script(compiled, contents, write_tar, tmp_path):
    names = ["x/1.JPG", "x/2.Jpeg", "x/3.webp", "Größe/猫.BMP", "y.1.png"]
    write_tar(tmp_path / "a.tar", {name: name.encode() for name in names})
    manifest = compiled("webdataset", tmp_path / "a.tar")
    assert rows(manifest, "key") == [("a/x/1",), ("a/x/2",), ("a/x/3",), ("a/Größe/猫",)]
    assert contents(manifest) == [name.encode() for name in names[:4]]
    counted, hint = manifest.notes
    assert counted == "1 of 5 members not read: .png after a second dot 1 (first: y.1.png)"
    assert "name ends at its first dot: rename members such as y.1.png" in hint


def test_members_that_are_neither_image_nor_label_are_counted_and_named(compiled, write_tar, tmp_path):
    members = {
        "1.png": b"x",
        "1.cls": b"0",
        "1.txt": b"a cat",
        "2.heic": b"x",
        "2.cls": b"0",
        "._1.png": b"x",
    }
    write_tar(tmp_path / "set" / "a.tar", members)
    write_tar(tmp_path / "set" / "b.tar", {"3.png": b"x", "3.cls": b"0", "3.txt": b"a dog"})
    (tmp_path / "set" / "index.txt").touch()
    files, members = compiled("webdataset", tmp_path / "set", role="id").notes
    assert files == "1 of 3 files not read: .txt 1 (first: index.txt)"
    assert members == "4 of 9 members not read: .txt 2, .heic 1, hidden 1 (first: 1.txt)"


def test_where_all_members_have_more_dots_the_refusal_says_what_to_write(compiled, write_tar, tmp_path):
    write_tar(tmp_path / "a.tar", {"v1.0000.png": b"x", "v1.0000.cls": b"0", "v1.0001.png": b"y"})
    with pytest.raises(
        UserError, match=r"no images in .*3 of 3 members not read: .*rename members such as v1"
    ):
        compiled("webdataset", tmp_path / "a.tar", role="id")


def test_of_samples_with_several_images_the_named_one_is_read(compiled, contents, write_tar, tmp_path):
    members = {}
    for name in "ab":
        members |= {f"{name}.{kind}": kind.encode() for kind in ("cls", "input.PNG", "target.png")}
    members = {name: b"1" if name.endswith("cls") else content for name, content in members.items()}
    write_tar(tmp_path / "a.tar", members)
    manifest = compiled("webdataset", tmp_path / "a.tar", role="id", images="input.png")
    assert rows(manifest, "key", "label") == [("a/a", 1), ("a/b", 1)]
    assert contents(manifest) == [b"input.PNG"] * 2
    assert len(manifest.notes) == 1
    assert "2 of 6 members not read" in manifest.notes[0]


@pytest.mark.parametrize("order", [("png", "cls"), ("cls", "png")])
def test_images_and_labels_that_do_not_follow_each_other_are_refused(compiled, write_tar, tmp_path, order):
    members = {f"{n}.{kind}": str(n).encode() for kind in order for n in range(3)}
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=r"sample '0' do not follow each other.*tar --sort=name"):
        compiled("webdataset", tmp_path / "a.tar", role="id")
    assert compiled("webdataset", tmp_path / "a.tar").rows == 3


def test_a_range_means_all_its_tars_and_misses_none(compiled, write_tar, tmp_path):
    for number in (8, 9, 10):
        write_tar(tmp_path / f"s-{number:03}.tar", {"1.png": b"x"})
    manifest = compiled("webdataset", tmp_path / "s-{008..010}.tar")
    assert rows(manifest, "key") == [("s-008/1",), ("s-009/1",), ("s-010/1",)]
    with pytest.raises(UserError, match=r"datasets\.set\.path: no such file or folder: .*s-011\.tar"):
        compiled("webdataset", tmp_path / "s-{008..999999999}.tar")


def header(name, size, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE], ids=repr)
@pytest.mark.parametrize("size", [2**43, 2**80, -512, -1024])
def test_a_header_that_lies_about_its_size_is_a_lost_row_or_one_message(compiled, tmp_path, png, kind, size):
    good = header("1.png", 3) + b"abc".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(good + header("2.png", size, kind) + bytes(2048))
    try:
        manifest = compiled("webdataset", tmp_path / "a.tar")
    except UserError as error:
        assert "a.tar: no tar header at byte 1024" in str(error)
    else:
        assert rows(manifest, "uri") == [(str(tmp_path / "a.tar"),), (None,)]


def test_a_label_of_absurd_size_or_depth_is_refused(compiled, write_tar, tmp_path):
    for name, content, expected in (
        ("1.json", b"[" * 100_000, "not valid JSON, or nested too deeply"),
        ("1.json", b"9" * 5_000, "not valid JSON"),
        ("1.cls", bytes(2**26 + 1), "67,108,865 bytes are no label"),
    ):
        write_tar(tmp_path / "a.tar", {"1.png": b"x", name: content})
        with pytest.raises(UserError, match=rf"member {name}: {expected}"):
            compiled("webdataset", tmp_path / "a.tar", role="id")


def test_names_that_are_long_or_not_utf8_are_read(compiled, contents, tmp_path):
    names = ["long/" * 60 + "1.png", b"b\xff.png".decode("utf-8", "surrogateescape")]
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
    manifest = compiled("webdataset", tmp_path / "a.tar")
    assert rows(manifest, "key") == [("a/" + "long/" * 60 + "1",), (r"a/b\udcff",)]
    assert contents(manifest) == [b"abc", b"abc"]


@pytest.mark.parametrize(
    ("content", "labels", "expected"),
    [
        ({"label": 3, "b": 4}, None, (3, None)),
        ({"label": 3, "b": 4}, "b", (4, None)),
        ({"label": [5, 6]}, None, (5, [5, 6])),
        ({"label": "5;6"}, None, (5, [5, 6])),
    ],
)
def test_labels_may_come_from_json(compiled, write_tar, tmp_path, content, labels, expected):
    write_tar(tmp_path / "a.tar", {"1.png": b"x", "1.json": json.dumps(content).encode()})
    manifest = compiled("webdataset", tmp_path / "a.tar", role="id", labels=labels)
    assert rows(manifest, "label", "accepted") == [expected]


@pytest.mark.parametrize(
    ("members", "labels", "expected"),
    [
        ({"1.cls": b"cat"}, None, r"a\.tar, member 1\.cls: 'cat' is no class index"),
        ({"1.json": b"{"}, None, r"a\.tar, member 1\.json: not valid JSON"),
        ({"1.json": b'{"a": 1, "b": 2}'}, "label_", r"no key 'label_'; there are: a, b"),
        ({"1.json": b'{"label": true}'}, None, r"the label is True; expected a class index"),
        ({"1.json": b'{"label": []}'}, None, r"the label is \[\]; expected a class index"),
        ({"1.json": b'{"a": 1}'}, None, r"needs a label for every image, but 1 of 1 have none"),
    ],
)
def test_a_label_that_is_none_is_refused(compiled, write_tar, tmp_path, members, labels, expected):
    write_tar(tmp_path / "a.tar", {"1.png": b"x", **members})
    with pytest.raises(UserError, match=rf"datasets\.set.*{expected}"):
        compiled("webdataset", tmp_path / "a.tar", role="id", labels=labels)
    assert compiled("webdataset", tmp_path / "a.tar", labels=labels).rows == 1


def test_a_folder_and_a_pattern_mean_all_their_tars(compiled, write_tar, tmp_path):
    for name in ("s-1.tar", "s-0.tar", "deep/s-2.tar", "other.tar"):
        write_tar(tmp_path / "set" / name, {"1.png": name.encode(), "._1.png": b"hidden"})
    (tmp_path / "set/readme.txt").write_text("hello")
    every = [("deep/s-2/1",), ("other/1",), ("s-0/1",), ("s-1/1",)]
    assert rows(compiled("webdataset", tmp_path / "set"), "key") == every
    assert rows(compiled("webdataset", tmp_path / "set" / "s-*.tar"), "key") == [("s-0/1",), ("s-1/1",)]


@pytest.mark.parametrize("name", ["none.tar", "none-*.tar", "empty"])
def test_a_path_without_tars_is_refused(compiled, tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"datasets\.set\.path: no (such|\.tar) file.*(none|empty)"):
        compiled("webdataset", tmp_path / name)


@pytest.mark.parametrize("path", ["set", "set/a.tar.gz", "set/*"])
def test_a_compressed_tar_is_refused(compiled, tmp_path, path):
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "a.tar.gz", "w:gz"):
        pass
    with pytest.raises(UserError, match=r"datasets\.set\.path: a\.tar\.gz is compressed.*Decompress it"):
        compiled("webdataset", tmp_path / path)


@pytest.mark.parametrize("content", [b"", b"hello", b"hello" * 300], ids=["empty", "short", "long"])
def test_a_file_that_is_no_tar_is_refused(compiled, tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"datasets\.set\.path: a\.tar: no tar header at byte 0"):
        compiled("webdataset", tmp_path / "a.tar")


def test_a_damaged_header_is_refused_with_its_place(compiled, write_tar, samples, tmp_path):
    path = write_tar(tmp_path / "a.tar", samples)
    content = bytearray(path.read_bytes())
    content[4096:4196] = b"\xff" * 100
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"datasets\.set\.path: a\.tar: no tar header at byte 4096"):
        compiled("webdataset", path, role="id")


@pytest.mark.parametrize("role", ["id", "far_ood"])
def test_wherever_a_tar_is_cut_the_rows_before_are_there_and_one_row_fails(
    compiled, contents, write_tar, samples, tmp_path, png, role
):
    path = write_tar(tmp_path / "a.tar", samples)
    content = path.read_bytes()
    end = 5 * 2 * 1024  # each member takes a header and one block
    for cut in range(100, end, 300):
        path.write_bytes(content[:cut])
        if cut < 512:
            with pytest.raises(UserError, match="no tar header at byte 0"):
                compiled("webdataset", path, role=role)
            continue
        manifest = compiled("webdataset", path, role=role)
        found = contents(manifest)
        assert found[-1] == "EOFError", cut
        whole = manifest.rows - 1
        assert found[:-1] == [png(number) for number in range(whole)]
        assert whole >= cut // 2048 - 1
        if role == "id":
            assert manifest.class_count == {label: 1 for label in range(whole)}


def test_a_tar_without_its_end_is_counted_as_cut(compiled, contents, write_tar, samples, tmp_path):
    path = write_tar(tmp_path / "a.tar", samples)
    path.write_bytes(path.read_bytes()[: 5 * 2048])
    manifest = compiled("webdataset", path, role="id")
    assert rows(manifest, "key")[-1] == ("a/(cut off at byte 10240)",)
    assert contents(manifest)[-1] == "EOFError"
    assert manifest.rows == 6


def test_a_tar_that_is_cut_after_it_was_listed_is_refused(compiled, contents, write_tar, samples, tmp_path):
    path = write_tar(tmp_path / "a.tar", samples)
    manifest = compiled("webdataset", path)
    path.write_bytes(path.read_bytes()[: 3 * 2048 + 520])
    with pytest.raises(storage.Changed, match=r"a\.tar was changed after it was listed"):
        contents(manifest)


def test_a_link_in_a_tar_is_a_row_that_fails(compiled, contents, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("a.png")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    assert contents(compiled("webdataset", tmp_path / "a.tar")) == [b"abc", "EOFError"]


def test_two_images_in_one_sample_are_refused(compiled, write_tar, tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": b"x", "1.jpg": b"y"})
    with pytest.raises(UserError, match="the key 'a/1' occurs more than once"):
        compiled("webdataset", tmp_path / "a.tar")


@pytest.mark.parametrize("name", ["/etc/1.png", "a/../../1.png", "../1.png"])
def test_a_member_outside_of_the_archive_is_refused(compiled, write_tar, tmp_path, png, name):
    path = write_tar(tmp_path / "a.tar", {name: png(1)})
    with pytest.raises(UserError, match=r"datasets\.set\.path: a\.tar: the member '.*1\.png' lies outside"):
        compiled("webdataset", path)


def test_a_tar_without_images_is_refused(compiled, write_tar, tmp_path):
    write_tar(tmp_path / "a.tar", {"1.txt": b"x"})
    with pytest.raises(UserError, match=r"datasets\.set\.path: no images in .*a\.tar"):
        compiled("webdataset", tmp_path / "a.tar")


def test_a_changed_tar_changes_the_digest(compiled, write_tar, samples, tmp_path):
    before = compiled("webdataset", write_tar(tmp_path / "a.tar", samples)).digest
    changed = compiled("webdataset", write_tar(tmp_path / "a.tar", samples | {"4.txt": b"more"}))
    assert changed.digest != before
