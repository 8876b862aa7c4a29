"""Class names in every way they can be given a meaning."""

import json

import pytest

from pipeline.config.loading import bundled
from pipeline.errors import UserError

WNIDS = ["n02123045", "n01443537", "n15075141"]
MAPPINGS = {
    "a.txt": "cat\ndog\n\n猫\n",
    "a.csv": "name,index\ndog,1\ncat,0\n猫,2\n",
    "b.csv": "dog,1\n猫,2\ncat,0\n",
    "a.json": json.dumps({"猫": 2, "cat": 0, "dog": 1}),
    "b.json": json.dumps(["cat", "dog", "猫"]),
    "a.yaml": "cat: 0\ndog: 1\n猫: 2\n",
    "b.yml": "- cat\n- dog\n- 猫\n",
}


@pytest.fixture
def tree(tmp_path, png):
    """A folder with one image at each of some places."""

    def tree(*names):
        for value, name in enumerate(names):
            (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / name).write_bytes(png(value))
        return tmp_path / "set"

    return tree


def labels(manifest):
    table = manifest.read(0, manifest.rows)
    return dict(zip(table["key"].to_pylist(), table["label"].to_pylist(), strict=True))


@pytest.mark.parametrize("name", MAPPINGS)
def test_every_way_to_write_a_mapping_agrees(compiled, tree, tmp_path, name):
    (tmp_path / name).write_text(MAPPINGS[name])
    folder = tree("猫/1.png", "dog/2.png", "dog/3.png")
    manifest = compiled("imagefolder", folder, role="id", labels=str(tmp_path / name))
    assert labels(manifest) == {"dog/2.png": 1, "dog/3.png": 1, "猫/1.png": 2}
    (tmp_path / "list.txt").write_text("猫/1.png 猫\ndog/2.png dog\ndog/3.png dog;cat\n")
    listed = compiled(
        "imagelist", tmp_path / "list.txt", role="id", root=str(folder), labels=str(tmp_path / name)
    )
    assert labels(listed) == labels(manifest)


def test_a_mapping_may_lie_on_s3(compiled, tree, tmp_path, upload):
    (tmp_path / "a.txt").write_text("cat\ndog\n")
    uri = upload(tmp_path / "a.txt", "a.txt")
    assert labels(compiled("imagefolder", tree("dog/1.png"), role="id", labels=uri)) == {"dog/1.png": 1}


def test_wordnet_ids_have_the_standard_index_also_if_there_are_only_some(compiled, tree):
    folder = tree(*(f"{wnid}/1.JPEG" for wnid in WNIDS))
    manifest = compiled("imagefolder", folder, role="id", labels="imagenet1k")
    assert labels(manifest) == {f"{n}/1.JPEG": i for n, i in zip(WNIDS, (281, 1, 999), strict=True)}


def test_the_shipped_list_has_a_thousand_wordnet_ids_in_sorted_order():
    wnids = (bundled() / "labels" / "imagenet1k.txt").read_text().split()
    assert len(set(wnids)) == 1000
    assert wnids == sorted(wnids)
    assert (wnids[0], wnids[207], wnids[999]) == ("n01440764", "n02099601", "n15075141")


def test_with_a_mapping_the_folder_an_image_lies_in_is_its_class(compiled, tree):
    folder = tree("blur/1/n02123045/a.JPEG", "blur/2/n02123045/a.JPEG", "fog/5/n01443537/b.JPEG")
    manifest = compiled("imagefolder", folder, role="shifted_id", labels="imagenet1k")
    assert manifest.class_count == {1: 1, 281: 2}


def test_numbers_as_folder_names_are_sorted_as_text_and_may_be_the_index(compiled, tree):
    folder = tree("0/a.png", "2/a.png", "10/a.png", "9/a.png")
    by_order = labels(compiled("imagefolder", folder, role="id"))
    assert by_order == {"0/a.png": 0, "10/a.png": 1, "2/a.png": 2, "9/a.png": 3}
    by_name = labels(compiled("imagefolder", folder, role="id", labels="index"))
    assert by_name == {"0/a.png": 0, "2/a.png": 2, "9/a.png": 9, "10/a.png": 10}


@pytest.mark.parametrize(
    ("name", "named", "expected"),
    [
        (
            "n0212304",
            "imagenet1k",
            r"n0212304/a\.png: the class 'n0212304' is not among the 1000 .*'n02123045'",
        ),
        ("cat", "index", r"cat/a\.png: 'cat' is no class index"),
        ("cat", "imagenet", r"labels: unknown list 'imagenet'\. Did you mean 'imagenet1k'\?.*ends in \.txt"),
        ("cat", "none.txt", r"labels: no such file: none\.txt"),
    ],
)
def test_a_folder_that_has_no_index_is_refused(compiled, tree, name, named, expected):
    with pytest.raises(UserError, match=rf"datasets\.set\.labels.*{expected}|datasets\.set\.{expected}"):
        compiled("imagefolder", tree("n01443537/1.png", f"{name}/a.png"), role="id", labels=named)


def test_folders_of_ood_images_need_no_index(compiled, tree):
    manifest = compiled("imagefolder", tree("unheard of/1.png"), labels="imagenet1k")
    assert manifest.class_count == {-1: 1}


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "", "it is empty"),
        ("a.txt", "cat\ncat\n", "a name occurs twice"),
        ("a.csv", "name,index\ncat,zero\n", "'cat' has no index"),
        ("a.json", '{"cat": -1}', "'cat' has no index"),
        ("a.json", '{"cat": true}', "'cat' has no index"),
        ("a.json", '{"cat": "0"}', "'cat' has no index"),
        ("a.json", "3", "expected a mapping or a list"),
        ("a.json", "{", "cannot be read"),
        ("a.yaml", "a: [", "cannot be read"),
        ("a.yaml", "!!python/object/apply:os.getcwd []", "cannot be read"),
        ("a.txt", b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(compiled, tree, tmp_path, name, text, expected):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=rf"datasets\.set\.labels: .*{name} .*{expected}"):
        compiled("imagefolder", tree("cat/1.png"), role="id", labels=str(tmp_path / name))
