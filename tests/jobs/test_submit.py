"""Evaluations as jobs of a real head: refused, stopped, resumed; and never indiscreet."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import re
import secrets
import shutil
import signal
import subprocess
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pyarrow.parquet as pq
import pytest
import yaml
from packaging.requirements import Requirement
from ray.job_submission import JobStatus
from rich.console import Console
from typer.testing import CliRunner, Result

from pipeline.cli import main
from pipeline.cluster.remote import start, submit
from pipeline.errors import UserError
from pipeline.workspace import claims
from tests.jobs.conftest import Head
from tests.servers import wait
from tests.stored import newest

ROOT = Path(__file__).parent.parent.parent

NET = """
import hashlib, os, time
import pipeline
from torch import nn

class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x):
        if len(x) == 16:
            time.sleep(float(os.environ["OOD_TEST_NAP"]))
        return self.relu(self.conv(x))

def build():
    sent = "_ray_pkg_" in pipeline.__file__
    assert sent or "OOD_TEST_HERE" in os.environ, "not the code that was sent: " + pipeline.__file__
    found = hashlib.sha256(os.environ["OOD_TEST_SECRET"].encode()).hexdigest()
    assert found == "{digest}", "the variable did not come along"
    return nn.Sequential(Block(1), Block(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
"""


@dataclass(frozen=True)
class Story:
    """What became of one evaluation that was submitted again and again."""

    secret: str
    workspace: Path
    first: str
    """Submission id of the job that was stopped."""
    interrupted: subprocess.CompletedProcess[str]
    """The command that waited for it."""
    refused: subprocess.CompletedProcess[str]
    """Submitted while the workspace was in use."""
    stopped: subprocess.CompletedProcess[str]
    after_stop: dict[str, Any]
    """Record of the stopped run, and whether its workspace was free."""
    resumed: subprocess.CompletedProcess[str]
    """The command that followed the job which went on."""
    results: list[tuple[int, list[bytes]]]
    """Images forwarded and files of results, of that job and of an undisturbed run on the laptop."""


@pytest.fixture(scope="module")
def evaluation(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    """Config file, secret, and workspace; the config names files beside it."""
    folder = tmp_path_factory.mktemp("laptop")
    secret = f"planted-{secrets.token_hex(12)}"
    (folder / "net.py").write_text(NET.format(digest=hashlib.sha256(secret.encode()).hexdigest()))
    shutil.copy(images, folder / "images.npz")

    def dataset(name: str, role: str, limit: int, **labels: str) -> dict[str, Any]:
        given = {"name": name, "role": role, "limit": limit, "format": "npz", "path": "images.npz"}
        return given | {"images": f"{name}_x"} | labels

    raw = {
        "name": "small",
        "model": {
            "source": "factory",
            "name": "./net.py:build",
            "weights": "random",
            "transform": {"crop": 28, "mean": [0.286], "std": [0.353], "channels": 1},
        },
        "datasets": [
            dataset("train", "train", 128, labels="train_y"),
            dataset("test", "id", 64, labels="test_y"),
            dataset("textures", "far_ood", 48),
        ],
        "detectors": ["msp", "dice"],
        "extract": {"batch_size": 16, "shard_rows": 16, "actors": 1},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(raw))
    return str(folder / "small.yaml"), secret, tmp_path_factory.mktemp("shared") / "workspace"


@pytest.fixture(scope="module")
def story(head: Head, evaluation: tuple[str, str, Path]) -> Story:
    """Submit and wait, interrupt the waiting, submit again, stop the job, resume it."""
    source, secret, workspace = evaluation
    arguments = ("submit", source, "--workspace", str(workspace), "--env", "OOD_TEST_*")
    slow, fast = ({"OOD_TEST_SECRET": secret, "OOD_TEST_NAP": nap} for nap in ("1.5", "0"))
    waiting = head.start(*arguments, **slow)
    wait("a run", lambda: any(workspace.glob("runs/small/latest")), 90)
    waiting.send_signal(signal.SIGINT)
    interrupted = head.finish(waiting)
    first = submission(interrupted)
    refused = head.command(*arguments, **fast)
    wait("features", lambda: any(workspace.glob("features/*/part-*")))
    stopped = head.command("stop", first)
    after_stop = json.loads((newest(workspace) / "manifest.json").read_text())
    with claims.opened(workspace) as ours:
        after_stop["busy"] = ours.kind.busy()
    last = head.command(*arguments, "--no-wait", **fast)
    resumed = head.command("status", submission(last), "--follow", "--quiet")
    undisturbed = workspace.with_name("undisturbed")
    here = ("run", source, "--workspace", str(undisturbed), "--engine", "inline", "--threads", "1")
    done = head.command(*here, "--set", "tracking.enabled=false", OOD_TEST_HERE="yes", **fast)
    assert done.returncode == 0, done
    results = [outcome(workspace), outcome(undisturbed)]
    return Story(secret, workspace, first, interrupted, refused, stopped, after_stop, resumed, results)


def submission(done: subprocess.CompletedProcess[str]) -> str:
    """The id that a command printed."""
    found = re.search(r"^job +(small-[0-9a-f]{8})\n", done.stdout, re.MULTILINE)
    assert found, done
    return found[1]


def outcome(workspace: Path) -> tuple[int, list[bytes]]:
    """Images forwarded, and results as they are on disk."""
    run = newest(workspace)
    record = json.loads((run / "manifest.json").read_text())
    assert record["status"] == "finished"
    files = [run / "metrics.json", run / "thresholds.json", *sorted(run.glob("scores/*/*.parquet"))]
    forwarded = record["executions"][-1]["stages"]["extract"]["forward_images"]
    return forwarded, [path.read_bytes() for path in files]


def test_a_command_that_is_interrupted_leaves_the_job_running_and_says_how_to_go_on(story, head):
    assert story.interrupted.returncode == 130
    assert "state     RUNNING" in story.interrupted.stdout
    for command in ("status", "stop"):
        line = f"{command:<9} ood-pipeline {command} {story.first} --address {head.address}\n"
        assert line in story.interrupted.stdout
    assert "The job goes on." in story.interrupted.stdout


def test_a_workspace_in_use_is_refused_by_the_job_with_the_owners_name(story):
    assert story.refused.returncode == 2
    assert re.search(
        r"error: .*/runs/small/\w+ is being made by process \d+ on .* \(since", story.refused.stdout
    )
    assert "state     FAILED\nexit      2\nmessage   Job entrypoint" in story.refused.stdout


def test_a_job_that_is_stopped_gives_its_workspace_back_and_marks_its_run_as_interrupted(story, head):
    assert story.stopped.returncode == 0
    assert "state     STOPPED" in story.stopped.stdout
    assert (story.after_stop["status"], story.after_stop["busy"]) == ("interrupted", False)
    told = head.command("status", story.first)
    assert told.returncode == 0
    assert re.search(r"state +STOPPED\nstarted +20.*\nended +20.*\nexit +1\nmessage +Job was", told.stdout)
    assert head.command("status", story.first, "--follow").returncode == 1


def test_a_job_that_is_submitted_again_resumes_with_the_results_of_an_undisturbed_one(story):
    assert (story.resumed.returncode, story.resumed.stderr) == (0, "")
    assert re.search(r"extract +\d.* images forwarded", story.resumed.stdout)
    (again, resumed), (all_images, undisturbed) = story.results
    assert 0 < again < all_images == 240
    assert resumed == undisturbed


def test_another_command_runs_as_a_job_with_its_exit_status(story, head):
    folder = newest(story.workspace)
    done = head.command("submit", str(folder), "--command", "verify", "--follow", "--", "--json")
    assert done.returncode == 0
    assert '"good": true' in done.stdout
    assert '"good": false' not in done.stdout


@pytest.mark.slow
def test_tune_bundle_and_apply_run_as_jobs_with_the_results_of_this_machine(
    head, settings, images, load, execute, tmp_path
):
    given = {"format": "npz", "path": str(images)}
    settings["datasets"] += [
        {"name": "held", "role": "id_val", "images": "held_x", "labels": "held_y", **given},
        {"name": "val", "role": "ood_val", "images": "val_x", **given},
    ]
    settings |= {"name": "other", "detectors": ["msp", "knn"], "tune": {"grids": {"knn": {"k": [1, 5]}}}}
    execute(load(settings))
    source, workspace = str(tmp_path / "config.yaml"), ("--workspace", str(tmp_path / "workspace"))
    run, bundle = str(newest(tmp_path / "workspace", "other")), str(tmp_path / "d.ood")

    def submitted(first: str, command: str, *others: str) -> None:
        where = () if command == "bundle" else workspace
        done = head.command("submit", first, "--command", command, "--follow", *where, "--", *others)
        assert done.returncode == 0, done

    what = (str(images), "--images", "textures_x", "--out")
    submitted(run, "bundle", "--weights", "--out", bundle)
    submitted(source, "tune", "--output", str(tmp_path / "there.yaml"))
    submitted(bundle, "apply", *what, str(tmp_path / "there.parquet"))
    own = str(tmp_path / "own")  # in the other one, the jobs' scores would be found again
    inline = ("--workspace", own, "--engine", "inline")
    for command, *arguments in (
        ("extract", source),
        ("fit", source),
        ("tune", source, "--output", str(tmp_path / "here.yaml")),
        ("apply", bundle, *what, str(tmp_path / "here.parquet")),
    ):
        assert head.command(command, *arguments, *inline).returncode == 0
    tuned, here = (yaml.safe_load((tmp_path / f"{name}.yaml").read_text()) for name in ("there", "here"))
    assert tuned | {"workspace": own} == here
    there, here = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("there", "here"))
    assert len(there) == 130
    assert there.equals(here)


def test_the_jobs_of_a_cluster_are_listed(story, head):
    listed = head.command("status")
    states = re.findall(r"(STOPPED|FAILED|SUCCEEDED) *│ (\d) *│ (small-\w+)", listed.stdout)
    assert [found[:2] for found in reversed(states)] == [
        ("STOPPED", "1"),
        ("FAILED", "2"),
        ("SUCCEEDED", "0"),
    ]
    assert states[-1][2] == story.first


def test_values_of_variables_are_nowhere_but_in_the_unpacked_package(story, head):
    """Nor is the token in what commands print."""
    secret = story.secret.encode()
    assert not [text for text in head.printed if story.secret in text or head.token in text]
    assert secret not in head.get("/api/jobs/").content
    for job in head.get("/api/jobs/").json():
        log = head.get(f"/api/jobs/{job['submission_id'] or job['job_id']}")
        assert secret not in log.content
    session = (head.folder / "session_latest").resolve()
    assert len(files(session / "logs")) > 10
    assert len(files(story.workspace)) > 20
    assert (story.workspace / "mlflow.db").is_file()
    found = {path for path in files(session) | files(story.workspace) if secret in path.read_bytes()}
    assert found
    for path in found:
        assert path.is_relative_to(session / "runtime_resources" / "working_dir_files")
        assert path.name == ".environment.json"
        assert path.stat().st_mode & 0o777 == 0o600


def files(folder: Path) -> set[Path]:
    """All regular files below a folder."""
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        (
            ["status"],
            {"RAY_AUTH_MODE": "disabled"},
            r"the cluster asks for a token\. Set RAY_AUTH_MODE=token",
        ),
        (
            ["status"],
            {"RAY_AUTH_TOKEN": "wrong"},
            r"the cluster does not accept the token\. Set RAY_AUTH_MODE",
        ),
        (["status", "nonsense"], {}, r"nonsense: no such job\. `ood-pipeline status --address .*` lists"),
        (["stop", "nonsense"], {}, r"nonsense: no such job\."),
    ],
)
def test_what_the_cluster_refuses_is_one_clear_error(head, arguments, variables, expected):
    done = head.command(*arguments, "--quiet", **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.match(rf"error: (--address {head.address}: )?{expected}", done.stderr), done.stderr
    assert len(done.stderr.splitlines()) == 1


class Fake(http.server.BaseHTTPRequestHandler):
    """A head with another version of Ray, on which every id is taken and some service that fails."""

    version = "2.60.0"
    asked: ClassVar[dict[str, Any]] = {}
    """By the last job."""

    def do_GET(self) -> None:
        answer = {"ray_version": self.version, "version": "4"}
        self.answer(200, json.dumps(answer).encode())

    def do_PUT(self) -> None:
        self.answer(200, b"")

    def do_POST(self) -> None:
        Fake.asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(400, b"Traceback (most recent call last):\n  File x\nValueError: Job a already exists.\n")

    def answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of the fake head."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fake) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("version", ["2.9.3", "2.70.0"])
def test_a_cluster_with_another_ray_is_refused(fake, monkeypatch, tmp_path, version):
    monkeypatch.setattr(Fake, "version", version)
    with pytest.raises(UserError, match=rf"the cluster runs Ray {version}, but .* is needed there\. Use"):
        submit.Cluster(fake).submit("a", "true", tmp_path)


def test_an_id_that_is_taken_is_refused_without_the_servers_traceback(fake, tmp_path):
    with pytest.raises(UserError, match=r"^a: there is a job of this name already\. Submit again to get ano"):
        submit.Cluster(fake).submit("a", "true", tmp_path)


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "http://anna:s3cret@127.0.0.1:1"])
def test_an_address_that_does_not_answer_is_refused_without_its_password(address, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    message = r"^--address http://127\.0\.0\.1:1: no answer \(ConnectionError\)\. Give the address of"
    with pytest.raises(UserError, match=message):
        submit.Cluster(address)


@pytest.mark.parametrize("address", ["head:8265", "ray://head:10001", "auto"])
def test_an_address_that_is_no_dashboard_is_refused(address):
    with pytest.raises(UserError, match=rf"^--address: got '{address}'; expected .* http://head:8265"):
        submit.Cluster(address)


def test_the_versions_of_ray_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (ray,) = [found for found in map(Requirement, project["dependencies"]) if found.name == "ray"]
    assert ray.specifier == submit.RAY


def dry(*arguments: str) -> Result:
    """What `submit` would send."""
    words = ["submit", "--dry-run", "--address", "http://a", *arguments]
    return CliRunner().invoke(main.app, words, env={"COLUMNS": "200"})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["C"], "run config.yaml"),
        (["C", "--fresh", "-vv"], "run config.yaml --fresh -v -v"),
        (["C", "--", "--seeds", "0,1"], "run config.yaml --seeds 0,1"),
        (["C", "--command", "score"], "score config.yaml"),
        (
            ["C", "--command", "tune", "--", "--output", "s3://b/t.yaml", "--metric", "fpr95_id"],
            "tune config.yaml --output s3://b/t.yaml --metric fpr95_id",
        ),
        (
            ["/d.ood", "--command", "apply", "--workspace", "/w", "--", "s3://b/new images", "--out", "/o"],
            "apply /d.ood 's3://b/new images' --out /o --workspace=/w",
        ),
        (
            ["s3://b/runs/a", "--command", "bundle", "--", "--weights", "--out", "/d.ood"],
            "bundle s3://b/runs/a --weights --out /d.ood",
        ),
        (["/w/runs/a", "--command", "verify"], "verify /w/runs/a"),
        (["/w/runs/a", "--command", "verify", "-v"], "verify /w/runs/a"),
        (["/w/a", "--command", "bundle", "-v", "--", "--out", "/d.ood"], "bundle /w/a --out /d.ood"),
        (["C", "--command", "report", "-v"], "report config.yaml"),
        (
            ["C", "--", "--weights", "random", "--weights", "/shared/w.pt"],
            "run config.yaml --weights random --weights /shared/w.pt",
        ),
    ],
)
def test_the_command_of_a_job_is_the_one_that_was_asked_for(evaluation, arguments, expected):
    given = [evaluation[0] if word == "C" else word for word in arguments]
    where = ["--workspace", "/shared"] if "C" in arguments else []
    shown = dry(*where, *given)
    assert shown.exit_code == 0, shown.output
    assert f"\ncommand   python -m {start.MODULE} {expected}\n" in shown.stdout
    assert (" config.yaml\n" in shown.stdout) == ("C" in arguments)


APPLY = ("/d.ood", "--command", "apply", "--workspace", "/w", "--")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["quickstart", "--command", "fot"], r"--command: unknown command 'fot'\. Did you mean 'fit'\?"),
        (
            ["quickstart", "--command", "tune"],
            r"--command tune: output: not given, and so lies in the job's own",
        ),
        (
            ["d.ood", "--command", "apply", "--", "/x", "--out", "/o"],
            r"--command apply: bundle: d\.ood lies in",
        ),
        (
            ["/d.ood", "--command", "apply", "--", "/x", "--out", "/o"],
            r"--command apply: workspace: \./workspace ",
        ),
        (
            [*APPLY, "/x", "--out", "/o", "--set", "model.weights=./w.pt"],
            r"--set model\.weights=\./w\.pt: of a bundle only keys of extract and of index can be set",
        ),
        (
            [*APPLY, "/x", "--out", "/o", "--set", "extract.batch_size=0"],
            r"--set extract\.batch_size: Input should be greater than or equal to 1, got 0\.",
        ),
        ([*APPLY, "/x", "--out", "/o", "--set", "index.device"], r"--set index\.device: expected key\.path="),
        ([*APPLY, "./x", "--out", "/o"], r"--command apply: data: \./x lies in"),
        (["/w/runs/a", "--command", "bundle", "--", "--out", "x"], r"--command bundle: out: x lies in"),
        (
            ["/w/a", "--command", "bundle", "--", "--out", "/x", "--export", "/g.pt2", "--export", "g.onnx"],
            r"--command bundle: export: g\.onnx lies in",
        ),
        (["quickstart", "--", "--weights", "random", "--weights", "./w.pt"], r"--weights: \./w\.pt lies in"),
        (["quickstart", "--", "--workspace", "./mine"], r"--workspace: after --, .* Give it before the --\."),
        (["quickstart", "--command", "fit", "--", "--set", "seed=1"], r"--set: after --, .* before the --\."),
        (
            ["photos-sweep", "--command", "tune", "--workspace", "/w", "--", "--output", "/o.yaml"],
            r"photos-sweep: models: .* Choose its model by the label",
        ),
    ],
)
def test_what_a_job_cannot_do_or_would_lose_is_refused(arguments, expected):
    shown = dry(*arguments)
    assert isinstance(shown.exception, UserError)
    assert re.match(expected, str(shown.exception)), shown.exception


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["quickstart", "--command", "fit", "--fresh"], "No such option: --fresh"),
        (["/d.ood", "--command", "apply"], "Missing argument 'DATA'"),
    ],
)
def test_what_the_command_of_a_job_does_not_take_is_refused_before_it_is_sent(arguments, expected):
    shown = dry(*arguments)
    assert shown.exit_code == 2
    assert expected in shown.stderr


def test_what_the_code_needs_is_installed_if_that_is_asked_for(fake, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="already"):
        submit.Cluster(fake).submit("a", "true", tmp_path, start.requirements())
    found = Fake.asked["runtime_env"]["pip"]
    packages = found["packages"] if isinstance(found, dict) else found
    assert any(text.startswith("typer") for text in packages)
    assert not any(text.startswith("ray") for text in packages)
    with pytest.raises(UserError, match="already"):
        submit.Cluster(fake).submit("a", "true", tmp_path)
    assert "pip" not in Fake.asked["runtime_env"]


def test_what_to_install_is_shown_and_refused_where_nobody_knows_it(monkeypatch):
    shown = dry("/w/runs/a", "--command", "verify", "--pip")
    assert re.search(r"^packages  .*typer", shown.stdout, re.MULTILINE)
    monkeypatch.setattr(start, "requirements", list)
    refused = dry("/w/runs/a", "--command", "verify", "--pip")
    assert str(refused.exception).startswith("--pip: what the code needs stands in the metadata")
    order = submit.Order("/w/runs/a", [], "verify", pip=True)
    with pytest.raises(UserError, match=r"^--pip: .* Install it"):
        submit.submit(order, "http://127.0.0.1:1", Console(), follow=False, wait=False)


def test_a_job_that_was_followed_to_its_end_has_its_status_if_the_head_goes_then(monkeypatch):
    gone = submit.Unanswered("gone")
    monkeypatch.setattr(submit, "Cluster", lambda _: Scripted(info(JobStatus.FAILED, 7), gone))
    shown = CliRunner().invoke(main.app, ["status", "a-0", "--address", "http://a", "--follow"])
    assert (shown.exit_code, shown.stdout) == (7, "a line\nstate     FAILED\n")


def test_a_log_is_not_followed_without_waiting():
    order = submit.Order("quickstart", [])
    with pytest.raises(UserError, match=r"^--follow: .* but --no-wait is set\. Leave one out"):
        submit.submit(order, "http://127.0.0.1:1", Console(), follow=True, wait=False)


class Scripted:
    """A cluster that answers what it was told; an exception is raised."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def info(self, _: str) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def log(self, _: str) -> str:
        return "a line\n"


def info(status: JobStatus, code: int | None = None) -> Any:
    """What a server knows of a job."""
    return SimpleNamespace(status=status, driver_exit_code=code, message="the reason")


def watched(*answers: Any, follow: bool = False) -> tuple[int, str]:
    """Exit status and output of watching a job."""
    output = io.StringIO()
    status = submit.watch(Scripted(*answers), "a", Console(file=output), follow)  # type: ignore[arg-type]
    return status, output.getvalue()


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (info(JobStatus.SUCCEEDED, 0), 0),
        (info(JobStatus.SUCCEEDED), 0),
        (info(JobStatus.FAILED, 7), 7),
        (info(JobStatus.FAILED, -9), 137),
        (info(JobStatus.FAILED), 1),
        (info(JobStatus.STOPPED), 1),
    ],
)
def test_watching_has_the_exit_status_of_the_job(last, expected):
    status, output = watched(last)
    assert status == expected
    assert output == f"state     {last.status}\nexit      {expected}\nmessage   the reason\n"


def test_a_server_that_is_silent_for_a_while_is_asked_again(monkeypatch):
    monkeypatch.setattr(submit, "POLL", 0)
    silence = submit.Unanswered("silent")
    running, done = info(JobStatus.RUNNING), info(JobStatus.SUCCEEDED, 0)
    status, output = watched(running, silence, silence, running, done, follow=True)
    assert (status, output) == (0, "a line\nstate     RUNNING\nstate     SUCCEEDED\n")
    with pytest.raises(UserError, match="silent"):
        watched(running, *[silence] * (submit.RETRIES + 1), done)


def test_the_status_of_jobs_as_json(monkeypatch):
    def of(name: str, status: JobStatus, code: int | None = None, ended: int | None = None) -> Any:
        known = {"submission_id": name, "start_time": 1_700_000_000_000, "end_time": ended}
        return SimpleNamespace(**vars(info(status, code)), **known)

    found = [of("a-1", JobStatus.RUNNING), of("a-0", JobStatus.FAILED, 2, 1_700_000_060_000)]

    class Known(Scripted):
        def __init__(self, _: str) -> None:
            super().__init__(found[1], found[1])

        def jobs(self) -> list[Any]:
            return found

    monkeypatch.setattr(submit, "Cluster", Known)
    shown = partial(CliRunner().invoke, main.app)
    listed = json.loads(shown(["status", "--address", "http://a", "--json"]).stdout)
    running = {"job": "a-1", "state": "RUNNING", "started": "2023-11-14 22:13:20+00:00", "ended": None}
    failed = {"job": "a-0", "state": "FAILED", "exit": 2, "ended": "2023-11-14 22:14:20+00:00"}
    assert listed[0] == {**running, "exit": None, "message": "the reason"}
    assert failed.items() <= listed[1].items()
    one = shown(["status", "a-0", "--address", "http://a", "--json", "--follow", "-q"])
    assert (one.exit_code, json.loads(one.stdout), one.stderr) == (2, listed[1], "a line\nstate     FAILED\n")
