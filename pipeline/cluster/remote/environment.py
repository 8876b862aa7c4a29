"""Environment variables that travel with a submitted job: chosen on the laptop, set in driver and workers.

Ray would take them in its runtime environment, but shows their values to whoever lists jobs. So they lie in a
file of the package that the job is sent as, readable by its owner alone; no command, log or result has them.
They do lie, unencrypted, where Ray keeps packages: in the memory of the head node and, until Ray deletes the
unpacked package, in the session folder of each node; whoever may submit jobs can read them there. Better
than secrets that travel are those that the cluster has: instance roles, workload identities, or Kubernetes
secrets in the environment of its pods.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from pipeline.errors import UserError

FILE = ".environment.json"
HOOK = f"{__name__}.load"
"""What Ray calls in each new worker."""


def chosen(patterns: Iterable[str], have: Mapping[str, str]) -> dict[str, str]:
    """The variables that names, or patterns such as `AWS_*`, select.

    Raises:
        UserError: a name, not a pattern, that is not set.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        names = [name for name in sorted(have) if fnmatchcase(name, pattern)]
        if not names and not set(pattern) & set("*?["):
            raise UserError(f"--env {pattern}: not set here. Export it, or leave it out.")
        found |= {name: have[name] for name in names}
    return found


def write(folder: Path, variables: Mapping[str, str]) -> None:
    """Put the variables into a package; nothing if there are none.

    Ray names a package by a hash of its content and shows the name, so values could be guessed and checked;
    a random word beside them rules that out.
    """
    if variables:
        path = folder / FILE
        path.touch(mode=0o600)
        path.write_text(
            json.dumps({"variables": dict(variables), "salt": secrets.token_hex()}), encoding="utf-8"
        )


def load() -> None:
    """Set the variables that lie beside the package this module is part of, if any do."""
    path = Path(__file__).parents[3] / FILE
    if path.is_file():
        os.environ.update(json.loads(path.read_text(encoding="utf-8"))["variables"])
