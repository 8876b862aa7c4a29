"""What disks, networks and kills do to files."""

from __future__ import annotations

from collections.abc import Callable


def flipped(content: bytes) -> bytes:
    """One bit in the middle is another one."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def torn(content: bytes) -> bytes:
    """The end is missing."""
    return content[: len(content) // 2]


def emptied(content: bytes) -> bytes:
    """Nothing is left but the name."""
    return b""


DAMAGES: dict[str, Callable[[bytes], bytes]] = {"flipped": flipped, "torn": torn, "empty": emptied}
