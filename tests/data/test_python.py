import numpy as np
import pytest

from pipeline.errors import UserError

SOURCE = """
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IMAGES = np.arange(5 * 4 * 6, dtype=np.uint8).reshape(5, 4, 6)


@dataclass
class Kept:  # looks its module up
    size: int = 5


def labelled():
    return IMAGES, [2, 0, 1, 2, 0]


def plain():
    return list(IMAGES), None


def alone():
    return IMAGES


def ragged():
    return [IMAGES[0], IMAGES[0, 0]], None


def floats():
    return IMAGES / 255, None


def short():
    return IMAGES, [1, 2]


def broken():
    raise ValueError("no network")


NUMBER = 3
"""
IMAGES = np.arange(5 * 4 * 6, dtype=np.uint8).reshape(5, 4, 6)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "images.py"
    path.write_text(SOURCE)
    return path


def test_a_function_in_a_file_gives_images_and_labels(compiled, pixels, source):
    manifest = compiled("python", f"{source}:labelled", role="id")
    np.testing.assert_array_equal(pixels(manifest), IMAGES)
    assert manifest.labels().tolist() == [2, 0, 1, 2, 0]
    assert manifest.read(4, 5)["key"].to_pylist() == ["labelled/00000004"]


def test_a_function_in_a_package_gives_images(compiled):
    assert compiled("python", "pipeline.quickstart:digits").rows == 1797


def test_images_may_come_as_a_list_and_without_labels(compiled, pixels, source):
    manifest = compiled("python", f"{source}:plain")
    np.testing.assert_array_equal(pixels(manifest), IMAGES)
    assert manifest.class_count == {-1: 5}


def test_two_files_of_one_name_are_two_modules(compiled, source, tmp_path):
    other = tmp_path / "other" / "images.py"
    other.parent.mkdir()
    other.write_text(SOURCE.replace("5 * 4 * 6", "3 * 4 * 6").replace("(5, 4, 6)", "(3, 4, 6)"))
    assert compiled("python", f"{source}:plain").rows == 5
    assert compiled("python", f"{other}:plain").rows == 3


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("alone", r"path: .*:alone\(\) must return \(images, labels or None\)"),
        ("ragged", r"path: .*:ragged\(\) must return \(images, labels or None\)"),
        ("broken", r"path: .*:broken\(\) must return .*no network"),
        ("floats", r"images are float64 \(5, 4, 6\); expected uint8"),
        ("short", r"labels are int64 \(2,\); expected 5 integers"),
        ("labeled", r"path: unknown function 'labeled'\. Did you mean 'labelled'"),
        ("NUMBER", r"path: unknown function 'NUMBER'\."),
    ],
)
def test_a_function_that_gives_no_dataset_is_refused(compiled, source, function, expected):
    with pytest.raises(UserError, match=rf"datasets\.set.*{expected}"):
        compiled("python", f"{source}:{function}", role="id")


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("pipeline.quickstart", "expected 'package.module:function'"),
        ("pipeline.quickstart:", "expected 'package.module:function'"),
        (":digits", "expected 'package.module:function'"),
        ("./images:labelled", "expected 'package.module:function'"),
        ("no_such_package.x:digits", "cannot import 'no_such_package.x'"),
        ("/nowhere/images.py:digits", "no such file: /nowhere/images.py"),
    ],
)
def test_a_reference_to_nothing_is_refused(compiled, reference, expected):
    with pytest.raises(UserError, match=rf"datasets\.set\.path: .*{expected}"):
        compiled("python", reference)


def test_an_error_in_the_users_file_is_raised_as_it_is(compiled, tmp_path):
    path = tmp_path / "images.py"
    path.write_text("1 / 0")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            compiled("python", f"{path}:images")
