"""Where a job begins: what the cluster's Python lacks is told at once, in one message; then the command runs.

Imports nothing but Python's own modules, as all others may be what it lacks.
"""

from __future__ import annotations

import os
import re
import runpy
import sys
from collections.abc import Iterable
from pathlib import Path

FILE = "requirements.txt"
"""Beside the package in a job: what its code needs, as pip has it."""

MODULE = "pipeline.cluster.remote.start"

OF_CONFIGS = ("run", "extract", "fit", "score", "evaluate", "report", "tune")
"""Commands whose first argument is a config, which is sent."""

COMMANDS = (*OF_CONFIGS, "bundle", "apply", "verify")
"""Commands that take long, or need what only the cluster sees."""


def requirements() -> list[str]:
    """What this package needs besides the cluster's Ray; nothing where it is run without being installed."""
    from importlib.metadata import PackageNotFoundError, requires  # every command imports this module

    try:
        found = requires("ood-pipeline") or []
    except PackageNotFoundError:
        return []
    return [text for text in found if "extra ==" not in text and _name(text) != "ray"]


def missing(needed: Iterable[str]) -> list[str]:
    """The requirements of which no version at all is installed here."""
    return [text for text in needed if not _is_installed(_name(text))]


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def _is_installed(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def main() -> None:
    """Run the command of a job."""
    file = Path(__file__).parents[3] / FILE
    lacking = missing(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else []
    if lacking:
        sys.stderr.write(
            f"error: {sys.executable} on {os.uname().nodename} lacks {', '.join(lacking)}. Start the cluster "
            "from the image of docker/Dockerfile (.cpu without GPUs), or submit with --pip.\n"
        )
        raise SystemExit(2)
    sys.argv[0] = "ood-pipeline"
    runpy.run_module("pipeline.cli", run_name="__main__", alter_sys=False)


if __name__ == "__main__":
    main()
