"""Commands as jobs of a Ray cluster: sent, watched and stopped from a machine that is no part of it.

A job outlives the command that sent it. What is sent is made by `package`; the rest is done by `run`.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import requests
from packaging.specifiers import SpecifierSet
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient
from rich.console import Console
from rich.table import Table

from pipeline.cluster.remote import environment, package, start
from pipeline.cluster.remote.start import COMMANDS, OF_CONFIGS
from pipeline.config import sweep
from pipeline.errors import UserError, redact, unknown

RAY = SpecifierSet(">=2.58,<2.64")
"""Versions of Ray that this package runs on; a cluster brings its own."""

TIMEOUT = 10.0
"""Seconds after which an address that does not answer is given up."""

POLL = 1.0
"""Seconds between two looks at a job."""

RETRIES = 60
"""Looks in a row that may fail while a job is watched, as when a laptop changes its network."""

_GRACE = {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
"""Seconds that Ray leaves a stopped job to give its workspace back; its default is 3."""


class Unanswered(UserError):
    """The job server did not answer, or not as expected; it may the next time."""


@dataclass(frozen=True)
class Order:
    """A command to be run on a cluster."""

    source: str
    """Its first argument: a config, or a path or URI as the cluster has it."""
    overrides: list[str]
    """Changes to the config."""
    command: str = "run"
    arguments: tuple[str, ...] = ()
    """The others."""
    patterns: tuple[str, ...] = ()
    """Names of the environment variables that travel, or patterns."""
    pip: bool = False
    """Whether Ray installs what the code needs for the job."""

    @property
    def line(self) -> list[str]:
        """The command as the job runs it.

        Raises:
            UserError: an unknown command.
        """
        if self.command not in COMMANDS:
            raise UserError(f"--command: {unknown('command', self.command, COMMANDS)}")
        first = package.CONFIG if self.command in OF_CONFIGS else self.source
        return [self.command, first, *self.arguments]

    @property
    def entrypoint(self) -> str:
        """The same for a shell of the cluster."""
        return shlex.join(["python", "-m", start.MODULE, *self.line])

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables that travel.

        Raises:
            UserError: a name that is not set here.
        """
        return environment.chosen(self.patterns, os.environ)

    @property
    def packages(self) -> list[str]:
        """What Ray installs for the job.

        Raises:
            UserError: it is asked for, but nobody knows what the code needs.
        """
        found = start.requirements() if self.pip else []
        if self.pip and not found:
            raise UserError(
                "--pip: what the code needs stands in the metadata of an installed ood-pipeline, and this "
                "one is not installed. Install it (pip install -e . in a checkout), or leave --pip out."
            )
        return found

    @contextmanager
    def packed(self) -> Iterator[tuple[Path, str]]:
        """The folder that is sent, gone after the block, and the name of the evaluation or the command.

        Raises:
            UserError: whatever `package.fill` refuses.
        """
        with TemporaryDirectory(prefix="ood-pipeline-") as folder:
            if self.command not in OF_CONFIGS:
                package.fill_code(Path(folder), self.variables)
                yield Path(folder), self.command
                return
            sent = package.fill(Path(folder), self.source, self.overrides, self.variables)
            (label, first), *_ = sent.items()
            yield Path(folder), sweep.whole(label, first.name)


class Cluster:
    """The job server of a cluster.

    All methods raise `UserError`: the server does not answer (`Unanswered`), wants another token, or knows no
    such job. No message holds a token.
    """

    def __init__(self, address: str) -> None:
        """Connect to the server, whose address is that of the cluster's dashboard."""
        self.address = redact(address)
        if not re.fullmatch(r"https?://[^\s/?#]+[^\s?#]*", address):
            raise UserError(
                f"--address: got {self.address!r}; expected that of the head, e.g. http://head:8265"
            )
        for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers the variable to the argument
        with self._asked():
            requests.get(address, timeout=TIMEOUT)
            self._client = JobSubmissionClient(address)

    def submit(self, name: str, entrypoint: str, folder: Path, pip: Sequence[str] = ()) -> None:
        """Start a job with this submission id in a copy of the folder, and packages installed for it."""
        found = self._client._server_ray_version
        if not RAY.contains(found, prereleases=True):
            raise UserError(
                f"--address {self.address}: the cluster runs Ray {found}, but {RAY} is needed there. Use "
                "another image for the cluster, or the version of ood-pipeline that fits it."
            )
        sent: dict[str, Any] = {"working_dir": str(folder), "env_vars": _GRACE}
        if pip:
            sent["pip"] = list(pip)
        if (folder / environment.FILE).exists():
            sent["worker_process_setup_hook"] = environment.HOOK
        with self._asked(name):
            self._client.submit_job(entrypoint=entrypoint, submission_id=name, runtime_env=sent)

    def info(self, name: str) -> Any:
        """What the server knows of a job."""
        with self._asked(name):
            return self._client.get_job_info(name)

    def log(self, name: str) -> str:
        """What a job has printed so far."""
        with self._asked(name):
            return str(self._client.get_job_logs(name))

    def jobs(self) -> list[Any]:
        """What the server knows of all submitted jobs, the latest first."""
        with self._asked():
            found = [info for info in self._client.list_jobs() if info.submission_id]
        return sorted(found, key=lambda info: -(info.start_time or 0))

    def stop(self, name: str) -> None:
        """Ask a job to stop; nothing if it has ended."""
        with self._asked(name):
            self._client.stop_job(name)

    @contextmanager
    def _asked(self, name: str = "") -> Iterator[None]:
        where = f"--address {self.address}"
        try:
            yield
        except AuthenticationError as error:
            what = "does not accept the token" if "failed" in error.message else "asks for a token"
            raise UserError(
                f"{where}: the cluster {what}. Set RAY_AUTH_MODE=token, and its token as RAY_AUTH_TOKEN, in "
                "the file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token."
            ) from None
        except OSError as error:
            raise Unanswered(
                f"{where}: no answer ({type(error).__name__}). Give the address of the cluster's dashboard; "
                "if only the cluster's network reaches it, forward its port."
            ) from None
        except RuntimeError as error:
            raise self._refusal(where, name, str(error)) from None

    def _refusal(self, where: str, name: str, text: str) -> UserError:
        if "status code 404" in text and name:
            return UserError(
                f"{name}: no such job. `ood-pipeline status --address {self.address}` lists those there are."
            )
        if "already exists" in text:
            return UserError(f"{name}: there is a job of this name already. Submit again to get another.")
        lines = [line for line in map(str.strip, text.splitlines()) if line.strip(".")]
        return Unanswered(f"{where}: the cluster answered: {(lines or ['nothing'])[-1].rstrip('.')[:300]}.")


def show(order: Order, console: Console, each: bool) -> None:
    """Print what would be sent: files added up by folder, or each of them.

    Raises:
        UserError: as `submit`, but for what needs the cluster.
    """
    entrypoint, packages = order.entrypoint, order.packages
    with order.packed() as (folder, _):
        files = list(package.contents(folder))
    folders: dict[str, list[int]] = {}
    for name, size in files:
        above, _, rest = name.partition("/")
        place = name if each or not rest else f"{above}/"
        folders.setdefault(place, []).append(size)
    for place, sizes in folders.items():
        count = f"  {len(sizes)} files" if place.endswith("/") else ""
        console.print(f"file      {sum(sizes):>12,}  {place}{count}", markup=False, soft_wrap=True)
    console.print(f"in all    {sum(size for _, size in files):>12,}  bytes in {len(files)} files")
    console.print(f"command   {entrypoint}", markup=False, soft_wrap=True)
    console.print(f"variables {', '.join(order.variables) or 'none'}", markup=False, soft_wrap=True)
    if packages:
        console.print(f"packages  {', '.join(packages)}", markup=False, soft_wrap=True)


def submit(
    order: Order,
    address: str,
    console: Console,
    follow: bool,
    wait: bool,
    sending: AbstractContextManager[object] = nullcontext(),  # noqa: B008 - holds nothing
) -> int:
    """Send an evaluation to a cluster; what it does there goes on without this process.

    Args:
        order: what is run.
        address: of the cluster.
        console: for the job, its states and its log.
        follow: whether to show its log.
        wait: whether to wait for its end.
        sending: tells for the time of the block that files are sent.

    Returns:
        The exit status of the job if it was waited for, 130 if waiting was interrupted, else 0.

    Raises:
        UserError: options that exclude each other; whatever `package.fill` and `Cluster` refuse.
    """
    entrypoint, packages = order.entrypoint, order.packages
    if follow and not wait:
        raise UserError(
            "--follow: shows the log while the command waits, but --no-wait is set. Leave one out."
        )
    with sending, order.packed() as (folder, name):
        cluster = Cluster(address)
        job = f"{name}-{secrets.token_hex(4)}"
        cluster.submit(job, entrypoint, folder, packages)
    console.print(f"job       {job}", markup=False, soft_wrap=True)
    for command in ("status", "stop"):
        line = f"ood-pipeline {command} {job} --address {cluster.address}"
        console.print(f"{command:<9} {line}", markup=False, soft_wrap=True)
    if not wait:
        return 0
    try:
        return watch(cluster, job, console, follow)
    except KeyboardInterrupt:
        console.print("\nThe job goes on. The commands above show and stop it; add --follow to see its log.")
        return 130


def watch(cluster: Cluster, job: str, console: Console, follow: bool) -> int:
    """Wait for the end of a job and print its states, or also its log.

    Returns:
        The exit status of the job; 1 if it has none and did not succeed.

    Raises:
        UserError: no such job; `Unanswered` if the server does not answer for a minute.
    """
    state, shown, failures = "", 0, 0
    while True:
        try:
            info = cluster.info(job)
            text = cluster.log(job) if follow else ""
        except Unanswered:
            failures += 1
            if failures > RETRIES:
                raise
            time.sleep(POLL)
            continue
        failures = 0
        console.out(text[shown:], end="", highlight=False)
        shown = len(text)
        if info.status != state:
            state = info.status
            console.print(f"state     {state}")
        if info.status.is_terminal():
            break
        time.sleep(POLL)
    if not follow:
        _tell(info, console)
    return _exit_status(info)


def stop(cluster: Cluster, job: str, console: Console) -> None:
    """Stop a job and wait until it has stopped.

    Raises:
        UserError: as `watch`.
    """
    cluster.info(job)
    cluster.stop(job)
    watch(cluster, job, console, follow=False)


def described(info: Any) -> dict[str, Any]:
    """What a job is and how it ended; its exit status only then."""
    return {
        "job": info.submission_id,
        "state": str(info.status),
        "started": _time(info.start_time),
        "ended": _time(info.end_time),
        "exit": _exit_status(info) if info.status.is_terminal() else None,
        "message": info.message or "",
    }


def describe(info: Any, console: Console) -> None:
    """Print the state of a job."""
    found = described(info)
    for name in ("job", "state", "started", "ended"):
        console.print(f"{name:<9} {found[name] or '-'}", markup=False, soft_wrap=True)
    _tell(info, console)


def table(infos: Sequence[Any], console: Console) -> None:
    """Print jobs, a line each."""
    found = Table("started", "state", "exit status")
    found.add_column("job", no_wrap=True)
    for each in map(described, infos):
        status = "" if each["exit"] is None else str(each["exit"])
        found.add_row(each["started"] or "-", each["state"], status, each["job"])
    console.print(found)


def _tell(info: Any, console: Console) -> None:
    """Exit status and message of a job."""
    if info.status.is_terminal():
        console.print(f"exit      {_exit_status(info)}")
    console.print(f"message   {info.message or ''}".rstrip(), markup=False, soft_wrap=True)


def _exit_status(info: Any) -> int:
    """As a shell would give it; Ray has none for a job that was stopped."""
    code = info.driver_exit_code
    if code is None:
        return int(str(info.status) != "SUCCEEDED")
    return int(code) if code >= 0 else 128 - int(code)


def _time(milliseconds: int | None) -> str | None:
    if not milliseconds:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(" ", "seconds")
