"""Which files that are left out are worth a warning."""

from __future__ import annotations

import pytest

from pipeline.data.notes import Seen, harmless


@pytest.mark.parametrize(
    ("left_out", "expected"),
    [
        ([".DS_Store"], True),
        ([".DS_Store", "a/labels.csv", "README.MD"], True),
        ([".DS_Store", "a.heic"], False),
        (["README"], False),
        (["a.txt, b"], False),
        ([f"a.{ending}" for ending in ("csv", "txt", "md", "ini", "xml", "raw")], False),
    ],
)
def test_only_what_nobody_takes_for_images_is_harmless(left_out: list[str], expected: bool) -> None:
    seen = Seen("files")
    seen.read(1234)
    for name in left_out:
        seen.leave_out(name)
    assert harmless(seen.sentence) is expected


def test_other_notes_are_not() -> None:
    assert not harmless("class folders are numbered as torchvision's ImageFolder does it")
