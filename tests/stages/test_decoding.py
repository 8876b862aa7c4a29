"""Why an image is among the errors, in words for people."""

from __future__ import annotations

import errno
import struct

import pytest

from pipeline.data.decode import decode
from pipeline.stages.decoding import reason
from pipeline.workspace.storage import TooLarge


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a.png"),
            "there is no such file: it was",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "a.png"), "no permission to read the file"),
        (
            OSError(errno.EINVAL, "not a regular file but a pipe", "a.png"),
            "cannot be read: not a regular file",
        ),
        (TooLarge(1000, 10), "1,000 bytes, more than the 10 that are read"),
        (EOFError("the archive does not hold all of this image"), "the archive does not hold all"),
        (
            OSError("When reading 'k': AWS Error ACCESS_DENIED\nmore"),
            "cannot be read: When reading 'k': AWS Err",
        ),
        (MemoryError(), "cannot be read: MemoryError"),
    ],
)
def test_a_reason_is_one_line_without_names_of_classes(error: Exception, told: str) -> None:
    found = reason(error)
    assert found.startswith(told)
    assert "\n" not in found
    assert f"{type(error).__name__}:" not in found


def test_what_a_decoder_raises_becomes_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    from pipeline.config.schema import Transform

    target = Transform(crop=2, mean=(0.5,) * 3, std=(0.5,) * 3)

    def fail(*given: object, **options: object) -> None:
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ValueError, match="damaged or incomplete image: unpack requires") as raised:
        decode(b"x", None, target)
    assert reason(raised.value) == "damaged or incomplete image: unpack requires a buffer of 4 bytes"
