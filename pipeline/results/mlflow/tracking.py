"""Sends a run folder to MLflow; the only module that knows MLflow.

The folder is the journal: all that is sent is read from it, so sending can be repeated and a server that is
down costs nothing. MLflow is imported inside functions, because that takes seconds, and is given explicit run
ids only, so other users of MLflow in the process are not disturbed.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import re
import shlex
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from filelock import FileLock

from pipeline.errors import UserError, redact
from pipeline.results.mlflow.content import MAX_TAG, Content, limited, of_detector, of_run
from pipeline.stages.decisions import DECISIONS
from pipeline.workspace import files, storage, tables
from pipeline.workspace.files import Place

PATIENCE = 120.0
"""Seconds after which `publish` begins no further detector; publishing again sends the rest."""

PORTS = range(5000, 5010)
"""Where servers of local stores are looked for."""

_SQLITE = "sqlite:///"
_HTTP = re.compile(r"https?://([^\s/?#@]+@)?(\[[\da-fA-F:]+\]|[\w.-]+)(:\d+)?(/[^\s?#@]*)?")
_VIEW = (
    "/#/experiments/{}/runs?compareRunsMode=CHART&workflowType=machine_learning"
    "&searchFilter=tags.mlflow.parentRunId%20%3D%20%27{}%27"
    "&orderByKey=metrics.%60{}%60&orderByAsc=false"
)
"""Charts of the detectors, best first; without an order the page shows only the parent and hides them."""
_ORIGIN = {"mlflow.source.name": "ood-pipeline", "mlflow.source.type": "LOCAL"}
_ARTIFACTS = ("config.yaml", "manifest.json", "metrics.csv", "metrics.json", DECISIONS)
_TEXT = {".yaml", ".json", ".csv", ".html", ".md", ".svg"}
_MAX_DIGEST = 36


class TrackingError(Exception):
    """MLflow could not be reached or refused; the results on disk are not affected."""


@dataclass(frozen=True)
class Session:
    """One evaluation in one MLflow store."""

    run: Place
    uri: str = field(repr=False)
    """With its credentials; never written anywhere."""
    experiment_id: str
    run_id: str

    @property
    def name(self) -> str:
        """Of the evaluation, to tell its detectors from those of others: `<name>/<id>`."""
        place = str(self.run)
        return f"{storage.name_of(storage.parent(place))}/{storage.name_of(place)}"


def complete(run: Place, uri: str, experiment: str, fingerprint: str) -> Session | None:
    """The session in which all of a run folder was sent, as far as is known here; MLflow is not asked."""
    uri, old = _absolute(uri), _record(run)
    wanted = {"uri": redact(uri), "experiment": experiment, "fingerprint": fingerprint, "published": True}
    lost = uri.startswith(_SQLITE) and not Path(uri.removeprefix(_SQLITE)).is_file()
    if lost or not wanted.items() <= old.items():
        return None
    return Session(run, uri, old["experiment_id"], old["run_id"])


def begin(run: Place, uri: str, experiment: str, name: str, fingerprint: str) -> Session:
    """Open the parent run of an evaluation, or continue the one that `<run>/mlflow.json` names.

    Creates the store, the experiment and the run, so that nothing is created while workers run. Another
    fingerprint, store or experiment than recorded means a new parent run.

    Raises:
        UserError: if the URI is neither an SQLite file nor an HTTP server.
        TrackingError: if MLflow fails; only what was complete there is then noted as not complete any more.
    """
    uri, old = _absolute(uri), _record(run)
    if old.get("published"):
        files.write_json(run / "mlflow.json", old | {"published": False})
    record = {"uri": redact(uri), "experiment": experiment, "fingerprint": fingerprint}
    with sending(uri, "open the run"):
        client = connected(uri)
        record["experiment_id"] = experiment_id = _experiment(client, uri, experiment)
        if record.items() <= old.items() and _reopened(client, old["run_id"]):
            run_id, children = old["run_id"], old["children"]
        else:
            tags = {"fingerprint": fingerprint, **_ORIGIN, "mlflow.user": _user()}
            opened = client.create_run(experiment_id, tags=tags, run_name=name)
            run_id, children = opened.info.run_id, {}
        if (run / "manifest.json").is_file():
            manifest = files.read_json(run / "manifest.json")
            config = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
            _log(client, client.get_run(run_id), of_run(manifest, config, []))
            client.log_inputs(run_id, _inputs(manifest["datasets"]))
    files.write_json(
        run / "mlflow.json", record | {"run_id": run_id, "children": children, "published": False}
    )
    return Session(run, uri, experiment_id, run_id)


def publish(session: Session) -> None:
    """Send everything in the run folder and finish the runs; may be repeated.

    What the store already holds is not sent again. A parameter keeps its first value, as MLflow demands.

    Raises:
        TrackingError: if MLflow fails or takes longer than `PATIENCE`.
    """
    run, deadline = session.run, time.monotonic() + PATIENCE
    manifest, thresholds = files.read_json(run / "manifest.json"), files.read_json(run / "thresholds.json")
    with tables.parquet(run / "metrics.parquet") as file:
        rows = file.read().to_pylist()
    decided: list[dict[str, Any]] = []
    if manifest.get("thresholds") is not None:
        with tables.parquet(run / DECISIONS) as file:
            decided = file.read().to_pylist()
    parent = of_run(manifest, yaml.safe_load((run / "config.yaml").read_text("utf-8")), rows)
    children = {
        label: of_detector(label, manifest, rows, thresholds[label], decided)
        for label in manifest["detectors"]
    }
    with sending(session.uri, "take the results"), TemporaryDirectory() as folder:
        client = connected(session.uri)
        found = client.get_run(session.run_id)
        _log(client, found, parent)
        client.log_inputs(session.run_id, _inputs(manifest["datasets"]))
        ids = _log_children(client, session, children, deadline)
        _stage(run, Path(folder))
        client.log_artifacts(session.run_id, folder)
        if "failure" in found.data.tags:
            client.delete_tag(session.run_id, "failure")
        finished = round(datetime.fromisoformat(manifest["finished"]).timestamp() * 1000)
        client.set_terminated(session.run_id, "FINISHED", max(finished, found.info.start_time))
    files.write_json(run / "mlflow.json", _record(run) | {"children": ids, "published": True})


def progress(session: Session, stage: str, done: int, seconds: float) -> None:
    """Say how far a stage has come: `done/<stage>` over the seconds since it began.

    Raises:
        TrackingError: if MLflow fails.
    """
    with sending(session.uri, "take the progress"):
        connected(session.uri).log_metric(
            session.run_id, f"done/{stage}", done, step=round(seconds), synchronous=True
        )


def fail(session: Session, why: str, killed: bool) -> None:
    """Mark the parent run as failed, or as killed if it was interrupted.

    Raises:
        TrackingError: if MLflow fails.
    """
    with sending(session.uri, "mark the run as failed"):
        client = connected(session.uri)
        client.set_tag(session.run_id, "failure", limited(why, MAX_TAG))
        client.set_terminated(session.run_id, "KILLED" if killed else "FAILED")


def session_of(run: Place) -> Session:
    """The session in which a run folder was sent, as its `mlflow.json` names it.

    Raises:
        UserError: if it was never sent.
    """
    found = _record(run)
    if "run_id" not in found:
        raise UserError(
            f"{run}: was not sent to MLflow. `ood-pipeline report CONFIG --track` sends its results."
        )
    uri: str = found["uri"]
    if uri.startswith(_SQLITE) and not Path(uri.removeprefix(_SQLITE)).is_file():
        raise UserError(
            f"{run}: was sent to {uri}, which is gone. `ood-pipeline report CONFIG --track` sends it again."
        )
    return Session(run, uri, found["experiment_id"], found["run_id"])


def link(session: Session) -> str:
    """URL of the charts; for a local store that no server shows the command that starts one."""
    if (found := address(session)) is not None:
        return found + page(session)
    return f"ood-pipeline ui {shlex.quote(str(session.run))}"


def address(session: Session) -> str | None:
    """A server that shows the run: that of its store, or one of this machine; None if none runs."""
    if not session.uri.startswith(_SQLITE):
        return redact(session.uri)
    ports = (port for port in PORTS if not _is_free(port) and shows(session, port))
    return next(map(local, ports), None)


def page(session: Session) -> str:
    """Path and query of the charts of an evaluation at any server of its store."""
    datasets = files.read_json(session.run / "manifest.json")["datasets"].values()
    roles = {dataset["role"] for dataset in datasets}
    groups = (group for group in ("near_ood", "far_ood") if group in roles)
    order = next((f"auroc%2F{group}" for group in groups), "threshold")
    return _VIEW.format(session.experiment_id, session.run_id, order)


def shows(session: Session, port: int) -> bool:
    """Whether a server at a port of this machine shows the run, and not that of another store."""
    asked = f"{local(port)}/api/2.0/mlflow/runs/get?run_id={session.run_id}"
    with suppress(OSError, ValueError, KeyError), urllib.request.urlopen(asked, timeout=2) as answer:
        return bool(json.load(answer)["run"]["info"]["run_id"] == session.run_id)
    return False


def command(session: Session, port: int) -> list[str]:
    """The command of a server for the store of a session, reachable from this machine alone."""
    own = ["--backend-store-uri", session.uri, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return [sys.executable, "-m", "mlflow", "server", *own]


def free_port() -> int:
    """The first port that a server of a local store may take."""
    return next(port for port in range(PORTS.start, 65536) if _is_free(port))


def local(port: int) -> str:
    """The address of a server of this machine."""
    return f"http://127.0.0.1:{port}"


def _user() -> str:
    """Whose process this is; accounts of containers may have no name."""
    with suppress(OSError, KeyError):
        return getpass.getuser()
    return "unknown"


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that a server just left is free
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _absolute(uri: str) -> str:
    path = uri.removeprefix(_SQLITE)
    if uri.startswith(_SQLITE) and path and "?" not in path:
        return f"{_SQLITE}{Path(path).absolute()}"
    if _HTTP.fullmatch(uri):
        return uri.rstrip("/")
    raise UserError(
        f"tracking.uri: not an MLflow store, got a URI that begins with {uri.split(':')[0]!r};"
        " expected sqlite:///<path>.db or http(s)://<host>:<port>. Correct it; a password in it must be"
        " percent-encoded, and is better given in MLFLOW_TRACKING_PASSWORD."
    )


@contextmanager
def sending(uri: str, what: str) -> Iterator[None]:
    """Turn whatever MLflow raises (its own, SQLAlchemy's, alembic's or requests' errors) into one error.

    The cause is not chained, because its text may hold the credentials of the URI.
    """
    try:
        yield
    except Exception as error:
        text = redact(" ".join(str(error).split()))[:400]
        raise TrackingError(
            f"{redact(uri)}: MLflow did not {what}, got {type(error).__name__}: {text}. Nothing on disk is"
            " lost; once MLflow can be reached, `ood-pipeline report CONFIG --track`, with the run's own "
            "`--set` and `--workspace`, sends the results."
        ) from None


def import_mlflow() -> None:
    """Import MLflow, which reads some of its settings then."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    # Otherwise MLflow prints the URI, with its password, whenever a run ends.
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    import mlflow  # noqa: F401


def connected(uri: str) -> Any:
    """A client of an MLflow store, which is made if it is a file that is not there."""
    import_mlflow()
    from mlflow import MlflowClient

    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if uri.startswith(_SQLITE):
        _create_store(Path(uri.removeprefix(_SQLITE)), MlflowClient)
    return MlflowClient(uri)


def _create_store(path: Path, open_store: Any) -> None:
    """Create the database elsewhere and rename it: one that is half migrated cannot be mended."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(f"{path}.lock", timeout=60),
        TemporaryDirectory(dir=path.parent, prefix=".mlflow-") as folder,
    ):
        if not path.exists():
            new = Path(folder) / path.name
            open_store(f"{_SQLITE}{new}")
            new.rename(path)


def _experiment(client: Any, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    local = uri.startswith(_SQLITE)
    location = (Path(uri.removeprefix(_SQLITE)).parent / "mlartifacts").as_uri() if local else None
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found.lifecycle_stage != "active":
        raise ValueError(
            f"experiment {name!r} was deleted; restore it in MLflow or change tracking.experiment"
        )
    return str(found.experiment_id)


def _reopened(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        if client.get_run(run_id).info.lifecycle_stage != "active":
            return False
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    client.update_run(run_id, "RUNNING")
    return True


def _log(client: Any, found: Any, content: Content) -> None:
    """Log what the run does not hold yet."""
    from mlflow.entities import Metric, Param, RunTag

    have, now = found.data, int(time.time() * 1000)
    client.log_batch(
        found.info.run_id,
        [
            Metric(key, value, now, 0)
            for key, value in content.metrics.items()
            if have.metrics.get(key) != value
        ],
        [Param(key, value) for key, value in content.params.items() if key not in have.params],
        [RunTag(key, value) for key, value in content.tags.items() if have.tags.get(key) != value],
        synchronous=True,
    )


def _log_children(
    client: Any, to: Session, children: Mapping[str, Content], deadline: float
) -> dict[str, str]:
    """Log one nested run per detector, known by its tag `detector`; returns the run ids by label."""
    found = client.search_runs([to.experiment_id], f"tags.mlflow.parentRunId = '{to.run_id}'")
    known = {run.data.tags.get("detector"): run for run in found}
    for label, content in children.items():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not done after {PATIENCE:.0f} s")
        if label not in known:
            own = {"mlflow.parentRunId": to.run_id, "mlflow.user": _user(), **_ORIGIN}
            tags = content.tags | own
            name = f"{label} ({to.name})"
            known[label] = client.create_run(to.experiment_id, tags=tags, run_name=name)
        _log(client, known[label], content)
        if known[label].info.status != "FINISHED":
            client.set_terminated(known[label].info.run_id, "FINISHED")
    return {label: known[label].info.run_id for label in children}


def _inputs(datasets: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """What `mlflow.data.MetaDataset` stores and the number of images, without its guess at the source."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for name, dataset in datasets.items():
        path = redact(dataset["path"])
        kind = path.partition("://")[0] if "://" in path else "local"
        source, profile = json.dumps({"uri": path}), json.dumps({"num_rows": dataset["rows"]})
        entity = Dataset(name, dataset["digest"][:_MAX_DIGEST], kind, source, profile=profile)
        inputs.append(DatasetInput(entity, [InputTag("mlflow.data.context", dataset["role"])]))
    return inputs


def _stage(run: Place, folder: Path) -> None:
    """Copy the files to upload, without credentials."""
    files = {name: run / name for name in _ARTIFACTS}
    files |= {f"report/{source.name}": source for source in (run / "report").glob("*")}
    for name, source in files.items():
        if source.is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            content = source.read_bytes()
            if target.suffix in _TEXT:
                content = redact(content.decode("utf-8")).encode("utf-8")
            target.write_bytes(content)


def _record(run: Place) -> dict[str, Any]:
    path = run / "mlflow.json"
    return files.read_json(path) if path.is_file() else {}
