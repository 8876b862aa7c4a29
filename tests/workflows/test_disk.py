"""A disk that is full, and one that may not be written to: real ones, where mounting is allowed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError


def mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], check=False, capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Mounts a small disk where the workspace will be; calling it changes its options."""
    folder = tmp_path / "workspace"
    folder.mkdir()
    if os.geteuid() or not mount("-t", "tmpfs", "-o", "size=700k", "none", str(folder)):
        pytest.skip("needs the right to mount")
    yield lambda options: assert_mounted(options, folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def assert_mounted(options: str, folder: Path) -> None:
    assert mount("-o", f"remount,{options}", str(folder))


def test_a_full_disk_is_a_clear_error_and_the_run_goes_on_when_there_is_room(
    disk: Callable[[str], None],
    settings: dict[str, Any],
    load: Callable[..., Any],
    execute: Callable[..., Any],
    tmp_path: Path,
) -> None:
    loaded = load(settings)
    with pytest.raises(UserError, match=r"cannot write .*: no space left on the disk of .* Free some space"):
        execute(loaded)
    features = tmp_path / "workspace" / "features"
    assert len(list(features.glob("*/_manifest.json"))) < len(settings["datasets"])
    assert all(path.suffix == ".json" for path in features.rglob(".part-*"))  # receipts; no drafts
    disk("size=20m")
    resumed = execute(loaded).folder
    undisturbed = execute(load(settings, "elsewhere")).folder
    assert (resumed / "metrics.json").read_bytes() == (undisturbed / "metrics.json").read_bytes()

    disk("ro")
    with pytest.raises(UserError, match=r"workspace: cannot write to .*: Read-only file system"):
        execute(loaded, fresh=True)
