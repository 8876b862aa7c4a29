import base64
import getpass
import json
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import mlflow
import pyarrow as pa
import pytest
import yaml
from mlflow import MlflowClient
from pyarrow import csv, fs, parquet

from pipeline.errors import UserError, redact
from pipeline.results.mlflow import tracking
from pipeline.workspace import files, storage
from tests.servers import free_port, wait

# MLflow 3.17 asks SQLAlchemy 2.1 for a deprecated loader strategy in every query for a run.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

PASSWORD = "hunter2-0b5e"
SCORES = {
    ("energy", "cifar", "near_ood"): 0.71,
    ("energy", "near_ood", "near_ood"): 0.1 + 0.2,
    ("energy", "mnist", "far_ood"): 1.0,
    ("energy", "far_ood", "far_ood"): 1.0,
    ("energy", "mnist", "fs_far_ood"): 0.25,
    ("energy", "fs_far_ood", "fs_far_ood"): 0.125,
    ("knn-50", "cifar", "near_ood"): 0.5,
    ("classifier", "test", "id"): 0.934,
}


def dataset(role: str, **changes: Any) -> dict[str, Any]:
    entry = {"role": role, "format": "npz", "path": f"/data/{role}", "rows": 10, "features": 9, "errors": 1}
    return entry | {"hash": f"hash of {role}", "digest": f"{role:-<64}", "accuracy": None} | changes


def write_run(
    run: Path, scores: Mapping[tuple[str, str, str], float | None] = SCORES, **changes: Any
) -> Path:
    """A finished run folder with AUROC and one threshold per detector."""
    (run / "report").mkdir(parents=True, exist_ok=True)
    detectors = {
        "energy": {"method": "energy", "title": "Energy (2020)", "parameters": {"temperature": 1.0}},
        "knn-50": {"method": "knn", "title": "KNN (2022)", "parameters": {"k": 50, "bank": {"share": 0.5}}},
    }
    manifest = {
        "name": "quick",
        "fingerprint": "f1",
        "status": "finished",
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:01:00+00:00",
        "seed": 0,
        "versions": {"ood-pipeline": "0.1.0", "ray": "2.60.0"},
        "git_commit": "abc123",
        "model": {"source": "factory", "name": "resnet", "weights": "w.pt", "weights_digest": "77"},
        "datasets": {"test": dataset("id", accuracy=0.934), "cifar": dataset("near_ood")},
        "detectors": {k: v | {"uses_ood": k == "energy", "columns": []} for k, v in detectors.items()},
        "not_applicable": {"featurenorm": "the model has no block with maps."},
        "notices": {"energy": ["T is high.", "Very."]},
        "passes": [],
        "index": {"knn-50": {"rows": 10, "kind": "flat", "recall_at_1": 0.75}},
        "stages": {"extract": {"seconds": 12.5, "images_per_second": 2100.0}, "fit": {"seconds": 3.0}},
    }
    config = {
        "name": "quick",
        "seed": 0,
        "model": {"blocks": ["a", "b"], "weights": None},
        "datasets": [{"name": "test", "role": "id"}, {"name": "cifar", "role": "near_ood"}],
        "detectors": [{"energy": {"temperature": 1.0}}, {"knn-50": {"method": "knn"}}],
    }
    manifest |= {key: value for key, value in changes.items() if key in manifest}
    config |= changes.get("config", {})
    columns = ("detector", "dataset", "group", "metric", "value")
    metric = {"classifier": "id_accuracy"}
    rows = [(*key, metric.get(key[0], "auroc"), value) for key, value in scores.items()]
    table = pa.table([pa.array(column) for column in zip(*rows, strict=True)], names=columns)
    parquet.write_table(table, run / "metrics.parquet")
    csv.write_csv(table, run / "metrics.csv")
    (run / "metrics.json").write_text(json.dumps(table.to_pylist()))
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "thresholds.json").write_text(json.dumps({"energy": -7.5, "knn-50": 0.25}))
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "report" / "index.html").write_text("<p>é</p>", "utf-8")
    (run / "report" / "roc.png").write_bytes(bytes(range(256)))
    return run


class Server:
    """A real MLflow server of a local store, started by the command that is printed for it."""

    def __init__(self, folder: Path, link: str) -> None:
        self.folder, log = folder, folder / "server.log"
        self.command = link
        installed = Path(sys.executable).parent / self.command
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                ["/bin/sh", "-c", f"{installed} --no-open"],
                stdout=stream,
                stderr=stream,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                cwd=self.folder,
                start_new_session=True,
            )
        try:
            found = wait(
                "the server", lambda: re.search(r"^(http\S+)/#/\S+$", log.read_text(), re.MULTILINE), 150
            )
        except TimeoutError:
            raise AssertionError(log.read_text()) from None
        self.page, self.uri = found[0], found[1]

    def tell(self, what: signal.Signals) -> None:
        """Send a signal to all its processes."""
        os.killpg(self.process.pid, what)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('embedded')}/work space é/mlflow.db"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, embedded: str) -> Iterator[Server]:
    folder = Path(embedded.removeprefix("sqlite:///")).parent
    workspace = tmp_path_factory.mktemp("server")
    session = begin(write_run(workspace / "runs" / "quick" / "0123"), embedded, "served")
    server = Server(folder, tracking.link(session))
    assert server.page == f"{server.uri}{tracking.page(session)}"
    yield server
    server.tell(signal.SIGKILL)
    server.process.wait()


@pytest.fixture(params=["embedded", pytest.param("server", marks=pytest.mark.slow)])
def uri(request: pytest.FixtureRequest) -> str:
    store = request.getfixturevalue(request.param)
    return store if isinstance(store, str) else str(store.uri)


@pytest.fixture
def experiment() -> str:
    return f"experiment {uuid4().hex}"


def begin(run: Path, uri: str, experiment: str, fingerprint: str = "f1") -> tracking.Session:
    return tracking.begin(run, uri, experiment, "quick", fingerprint)


def runs_of(session: tracking.Session) -> dict[str, Any]:
    """The runs of an experiment, those of detectors by their labels."""
    found = MlflowClient(session.uri).search_runs([session.experiment_id])
    return {run.data.tags.get("detector", run.info.run_name): run for run in found}


def record_of(session: tracking.Session) -> dict[str, Any]:
    return dict(json.loads((session.run / "mlflow.json").read_text()))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_store_holds_what_the_folder_holds(tmp_path: Path, uri: str, experiment: str) -> None:
    session = begin(write_run(tmp_path / "quick"), uri, experiment)
    assert runs_of(session)["quick"].info.status == "RUNNING"
    tracking.publish(session)

    runs = runs_of(session)
    assert {name: run.info.status for name, run in runs.items()} == dict.fromkeys(
        ["quick", "energy", "knn-50"], "FINISHED"
    )
    parent = MlflowClient(uri).get_run(session.run_id)
    note = parent.data.tags.pop("mlflow.note.content")
    assert note == (
        "2 detectors of OOD images for `resnet` on test (id), cifar (near_ood).\n\n"
        "Best on near_ood: **energy**, AUROC 0.3000.\n\nBest on far_ood: **energy**, AUROC 1.0000.\n\n"
        "Best on fs_far_ood: **energy**, AUROC 0.1250."
    )
    assert {k: v for k, v in parent.data.tags.items() if k != "mlflow.runName"} == {
        "mlflow.source.name": "ood-pipeline",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": getpass.getuser(),
        "best_detector.near_ood": "energy",
        "best_detector.far_ood": "energy",
        "best_detector.fs_far_ood": "energy",
        "fingerprint": "f1",
        "model": "resnet",
        "weights_digest": "77",
        "features.test": "hash of id",
        "features.cifar": "hash of near_ood",
        "version.ood-pipeline": "0.1.0",
        "version.ray": "2.60.0",
        "not_applicable.featurenorm": "the model has no block with maps.",
        "notice.energy": "T is high. Very.",
        "git_commit": "abc123",
        "mlflow.source.git.commit": "abc123",
    }
    assert parent.data.params == {
        "name": "quick",
        "seed": "0",
        "model.blocks": '["a", "b"]',
        "model.weights": "null",
        "datasets.test.name": "test",
        "datasets.test.role": "id",
        "datasets.cifar.name": "cifar",
        "datasets.cifar.role": "near_ood",
        "detectors": "energy, knn-50",
    }
    assert parent.data.metrics == {
        "seconds/extract": 12.5,
        "images_per_second/extract": 2100.0,
        "seconds/fit": 3.0,
        "id_accuracy": 0.934,
        "accuracy/test": 0.934,
        **{
            f"{key}/{group}": value
            for key in ("best_auroc", "mean_auroc")
            for group, value in {"near_ood": 0.1 + 0.2, "far_ood": 1.0, "fs_far_ood": 0.125}.items()
        },
        **{
            f"{key}/{name}": n
            for key, n in [("rows", 10), ("features", 9), ("errors", 1)]
            for name in ("test", "cifar")
        },
    }
    energy, knn = runs["energy"], runs["knn-50"]
    assert energy.data.tags["mlflow.parentRunId"] == knn.data.tags["mlflow.parentRunId"] == session.run_id
    assert (energy.data.tags["method"], energy.data.tags["uses_ood"]) == ("energy", "true")
    assert (knn.data.tags["method"], knn.data.tags["uses_ood"]) == ("knn", "false")
    assert energy.info.run_name == f"energy ({tmp_path.name}/quick)"
    assert energy.data.params == {"temperature": "1.0"}
    assert knn.data.params == {"k": "50", "bank.share": "0.5"}
    assert energy.data.metrics == {
        "auroc/cifar": 0.71,
        "auroc/near_ood": 0.1 + 0.2,
        "auroc/mnist": 1.0,
        "auroc/far_ood": 1.0,
        "auroc/fs.mnist": 0.25,
        "auroc/fs_far_ood": 0.125,
        "threshold": -7.5,
    }
    assert knn.data.metrics == {
        "auroc/cifar": 0.5,
        "threshold": 0.25,
        "index/rows": 10,
        "index/recall_at_1": 0.75,
    }


def test_a_run_that_is_under_way_shows_what_it_is_and_how_far_it_has_come(
    tmp_path: Path, uri: str, experiment: str
) -> None:
    session = begin(write_run(tmp_path / "quick"), uri, experiment)
    for seconds, done in ((0.2, 5), (10.4, 70)):
        tracking.progress(session, "extract", done, seconds)
    client = MlflowClient(uri)
    found = client.get_run(session.run_id)
    assert found.info.status == "RUNNING"
    assert found.data.params["detectors"] == "energy, knn-50"
    assert found.data.tags["model"] == "resnet"
    assert {entry.dataset.name for entry in found.inputs.dataset_inputs} == {"test", "cifar"}
    history = client.get_metric_history(session.run_id, "done/extract")
    assert [(entry.step, entry.value) for entry in history] == [(0, 5.0), (10, 70.0)]


def test_datasets_are_inputs_with_their_role(tmp_path: Path, uri: str, experiment: str) -> None:
    session = begin(write_run(tmp_path / "quick"), uri, experiment)
    tracking.publish(session)

    inputs = MlflowClient(uri).get_run(session.run_id).inputs.dataset_inputs
    found = {
        entry.dataset.name: (entry.dataset.digest, entry.tags[0].key, entry.tags[0].value) for entry in inputs
    }
    assert found == {
        "test": (f"{'id':-<36}", "mlflow.data.context", "id"),
        "cifar": (f"{'near_ood':-<36}", "mlflow.data.context", "near_ood"),
    }
    sources = {entry.dataset.name: mlflow.data.get_source(entry.dataset).uri for entry in inputs}
    assert sources == {"test": "/data/id", "cifar": "/data/near_ood"}


def test_artifacts_are_the_files_of_the_folder(
    tmp_path: Path, uri: str, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    run = write_run(tmp_path / "quick")
    session = begin(run, uri, experiment)
    tracking.publish(session)

    wanted = snapshot(run)
    for unsent in ("mlflow.json", "metrics.parquet", "thresholds.json"):
        del wanted[unsent]
    fetched = MlflowClient(uri).download_artifacts(session.run_id, "", str(tmp_path))
    assert {name: data for name, data in snapshot(Path(fetched)).items() if name in wanted} == wanted
    sent = MlflowClient(uri).list_artifacts(session.run_id)
    assert {entry.path for entry in sent} == {name.partition("/")[0] for name in wanted}
    assert not list(elsewhere.iterdir())


def test_publishing_again_adds_nothing(tmp_path: Path, uri: str, experiment: str) -> None:
    run = write_run(tmp_path / "quick")
    first = begin(run, uri, experiment)
    tracking.publish(first)
    before, ids = runs_of(first), record_of(first)["children"]
    assert record_of(first)["published"]

    again = begin(run, uri, experiment)
    assert again == first
    assert runs_of(first)["quick"].info.status == "RUNNING"
    assert not record_of(first)["published"]
    tracking.publish(again)

    after = runs_of(first)
    assert {n: (r.info.run_id, r.data.to_dictionary()) for n, r in after.items()} == {
        n: (r.info.run_id, r.data.to_dictionary()) for n, r in before.items()
    }
    assert after["quick"].info.status == "FINISHED"
    assert record_of(first)["children"] == ids == {n: r.info.run_id for n, r in after.items() if n != "quick"}
    history = MlflowClient(uri).get_metric_history(ids["energy"], "auroc/cifar")
    assert [entry.value for entry in history] == [0.71]
    assert len(after["quick"].inputs.dataset_inputs) == 2


def test_a_changed_metric_is_replaced_and_a_changed_parameter_is_not(
    tmp_path: Path, embedded: str, experiment: str
) -> None:
    session = begin(write_run(tmp_path / "quick"), embedded, experiment)
    tracking.publish(session)
    write_run(
        tmp_path / "quick", SCORES | {("energy", "cifar", "near_ood"): 0.3}, config={"seed": 1, "new": 2}
    )
    tracking.publish(session)

    runs = runs_of(session)
    assert runs["energy"].data.metrics["auroc/cifar"] == 0.3
    assert (runs["quick"].data.params["seed"], runs["quick"].data.params["new"]) == ("0", "2")


@pytest.mark.parametrize("change", ["fingerprint", "experiment", "deleted"])
def test_another_evaluation_gets_its_own_parent(tmp_path: Path, embedded: str, change: str) -> None:
    names = [f"experiment {uuid4().hex}" for _ in range(2)]
    run = write_run(tmp_path / "quick")
    first = begin(run, embedded, names[0])
    tracking.publish(first)
    if change == "deleted":
        MlflowClient(embedded).delete_run(first.run_id)
    second = begin(run, embedded, names[change == "experiment"], "f2" if change == "fingerprint" else "f1")
    assert second.run_id != first.run_id
    assert record_of(second)["children"] == {}
    tracking.publish(second)

    children = record_of(second)["children"]
    assert len(children) == 2
    client = MlflowClient(embedded)
    assert {client.get_run(i).data.tags["mlflow.parentRunId"] for i in children.values()} == {second.run_id}


def test_children_the_record_does_not_know_are_found_again(tmp_path: Path, uri: str, experiment: str) -> None:
    session = begin(write_run(tmp_path / "quick"), uri, experiment)
    unreadable = session.run / "report" / "bad.html"
    unreadable.write_bytes(b"\xff")
    with pytest.raises(tracking.TrackingError, match="UnicodeDecodeError"):
        tracking.publish(session)
    unreadable.unlink()
    assert record_of(session)["children"] == {}
    children = {name: run.info.run_id for name, run in runs_of(session).items() if name != "quick"}
    assert set(children) == {"energy", "knn-50"}
    tracking.publish(session)

    assert record_of(session)["children"] == children
    assert len(runs_of(session)) == 3


def test_a_run_in_an_object_store_is_published_like_one_in_a_folder(
    tmp_path: Path, embedded: str, experiment: str, bucket: str
) -> None:
    run = files.at(bucket) / "runs" / "quick"
    system, place = storage.located(str(run))
    fs.copy_files(str(write_run(tmp_path / "quick")), place, destination_filesystem=system)
    session = tracking.begin(run, embedded, experiment, "quick", "f1")
    tracking.publish(session)

    assert files.read_json(run / "mlflow.json")["published"]
    assert {found.info.status for found in runs_of(session).values()} == {"FINISHED"}
    sent = MlflowClient(embedded).download_artifacts(session.run_id, "report/roc.png", str(tmp_path))
    assert Path(sent).read_bytes() == bytes(range(256))


def test_the_run_ends_when_the_evaluation_ended(tmp_path: Path, uri: str, experiment: str) -> None:
    run = write_run(tmp_path / "quick", finished="2100-01-01T00:00:00+00:00")
    session = begin(run, uri, experiment)
    tracking.publish(session)
    assert runs_of(session)["quick"].info.end_time == 4102444800_000


def test_publishing_gives_up_in_time_and_goes_on_later(
    tmp_path: Path, embedded: str, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = begin(write_run(tmp_path / "quick"), embedded, experiment)
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "PATIENCE", -1.0)
        with pytest.raises(tracking.TrackingError, match="TimeoutError"):
            tracking.publish(session)
    assert not record_of(session)["published"]
    tracking.publish(session)
    assert {run.info.status for run in runs_of(session).values()} == {"FINISHED"}


def test_a_failed_run_is_marked_and_may_still_be_finished(tmp_path: Path, uri: str, experiment: str) -> None:
    session = begin(write_run(tmp_path / "quick"), uri, experiment)
    tracking.fail(session, "KeyboardInterrupt: ", killed=True)
    assert runs_of(session)["quick"].info.status == "KILLED"
    tracking.fail(session, f"UserError: no such file: s3://key:{PASSWORD}@bucket/x", killed=False)
    failed = runs_of(session)["quick"]
    assert failed.info.status == "FAILED"
    assert failed.data.tags["failure"] == "UserError: no such file: s3://bucket/x"

    tracking.publish(begin(session.run, uri, experiment))
    finished = runs_of(session)["quick"]
    assert finished.info.run_id == failed.info.run_id
    assert finished.info.status == "FINISHED"
    assert "failure" not in finished.data.tags


def test_an_undefined_metric_is_named_instead_of_logged(
    tmp_path: Path, embedded: str, experiment: str
) -> None:
    scores = SCORES | {("energy", "cifar", "near_ood"): math.nan, ("energy", "mnist", "far_ood"): None}
    session = begin(write_run(tmp_path / "quick", scores), embedded, experiment)
    tracking.publish(session)

    runs = runs_of(session)
    assert runs["energy"].data.tags["undefined_metrics"] == "auroc/cifar, auroc/mnist"
    assert not {"auroc/cifar", "auroc/mnist"} & set(runs["energy"].data.metrics)
    assert "undefined_metrics" not in runs["knn-50"].data.tags


def test_any_dataset_name_gets_a_key_of_its_own(tmp_path: Path, uri: str, experiment: str) -> None:
    wanted = {
        "my set@v2 (b)": "my set_v2 _b_",
        "my set_v2 _b_": "my set_v2 _b_-2",
        "数据集": "数据集",
        "e\N{COMBINING ACUTE ACCENT}": "é",
        "a/b:c": "a_b_c",
        "..": "_",
        "far_ood": "far_ood-2",
        "fs.x": "fs.x",
        "x" * 300: "x" * 234,
    }
    scores = {("energy", name, "near_ood"): i / 16 for i, name in enumerate(wanted)}
    scores |= {("energy", "far_ood", "far_ood"): 0.9, ("energy", "x", "fs_near_ood"): 0.8}
    datasets = {name: dataset("near_ood", path=f"/d/{i}") for i, name in enumerate(wanted)}
    session = begin(write_run(tmp_path / "quick", scores, datasets=datasets), uri, experiment)
    tracking.publish(session)

    metrics = {f"auroc/{key}": i / 16 for i, key in enumerate(wanted.values())}
    metrics |= {"auroc/far_ood": 0.9, "auroc/fs.x-2": 0.8, "threshold": -7.5}
    assert runs_of(session)["energy"].data.metrics == metrics
    inputs = MlflowClient(uri).get_run(session.run_id).inputs.dataset_inputs
    assert {entry.dataset.name for entry in inputs} == set(wanted)


def test_long_values_are_cut_visibly(tmp_path: Path, uri: str, experiment: str) -> None:
    config = {"fits": "é" * 6000, "long": "é" * 6001, "empty": "", "list": [], "@key": {"ü/ä": 1}}
    session = begin(write_run(tmp_path / "quick", config=config, git_commit="c" * 9000), uri, experiment)
    tracking.publish(session)

    data = runs_of(session)["quick"].data
    assert data.params["fits"] == "é" * 6000
    assert data.params["long"] == "é" * 5999 + "…"
    assert (data.params["empty"], data.params["list"], data.params["_key.ü_ä"]) == ("", "[]", "1")
    assert data.tags["git_commit"] == "c" * 7999 + "…"


def test_a_password_in_the_uri_is_used_but_written_nowhere(
    tmp_path: Path,
    server: Server,
    experiment: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    uri = server.uri.replace("://", f"://user:{PASSWORD}@")
    secret = f"s3://user:{PASSWORD}@host/bucket"
    run = write_run(
        tmp_path / "quick",
        config={"tracking": {"uri": uri}, "list": [secret]},
        datasets={"test": dataset("id", path=secret)},
        stages={},
    )
    (run / "report" / "index.html").write_text(f'<a href="{secret}/x">')
    planted = set(snapshot(run))
    session = begin(run, uri, experiment)
    tracking.publish(session)
    tracking.publish(begin(run, uri, experiment))
    shown = [repr(session), tracking.link(session), *capfd.readouterr(), caplog.text]

    secret_bytes = PASSWORD.encode()
    assert not [text for text in shown if PASSWORD in text]
    assert {name for name, data in snapshot(run).items() if secret_bytes in data} <= planted
    assert not [name for name, data in snapshot(server.folder).items() if secret_bytes in data]
    assert runs_of(session)["quick"].data.params["tracking.uri"] == server.uri
    html = MlflowClient(server.uri).download_artifacts(session.run_id, "report/index.html", str(tmp_path))
    assert Path(html).read_text() == '<a href="s3://host/bucket/x">'


class _Refusing(BaseHTTPRequestHandler):
    authorization = ""

    def do_GET(self) -> None:
        type(self).authorization = self.headers["Authorization"]
        self.send_error(401, "no")

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


def test_a_refusal_is_told_without_the_password(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as refusing:
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{refusing.server_port}"
        try:
            with pytest.raises(tracking.TrackingError, match="401") as caught:
                begin(tmp_path / "quick", f"http://user:{PASSWORD}@{host}", "e")
        finally:
            refusing.shutdown()
    assert _Refusing.authorization == "Basic " + base64.b64encode(f"user:{PASSWORD}".encode()).decode()
    assert str(caught.value).startswith(f"http://{host}: ")
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))
    assert not (tmp_path / "quick").exists()


def test_a_server_that_is_down_costs_seconds_and_nothing_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "quick")
    before = snapshot(run)
    started = time.monotonic()
    with pytest.raises(tracking.TrackingError, match="`ood-pipeline report CONFIG --track`") as caught:
        begin(run, f"http://user:{PASSWORD}@127.0.0.1:{free_port()}", "e")
    assert time.monotonic() - started < 20
    assert snapshot(run) == before
    assert PASSWORD not in "".join(traceback.format_exception(caught.value)) + "".join(capfd.readouterr())


def test_a_silent_server_is_given_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(tracking.TrackingError, match=r"timed out|timeout"):
            begin(tmp_path / "quick", f"http://127.0.0.1:{silent.getsockname()[1]}", "e")
    assert time.monotonic() - started < 20


def test_what_a_silent_server_missed_is_sent_when_it_answers_again(
    tmp_path: Path, server: Server, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "quick")
    session = begin(run, server.uri, experiment)
    before = snapshot(run)
    server.tell(signal.SIGSTOP)
    try:
        with monkeypatch.context() as patch:
            patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
            patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
            with pytest.raises(tracking.TrackingError, match="take the results"):
                tracking.publish(session)
            with pytest.raises(tracking.TrackingError, match="mark the run"):
                tracking.fail(session, "UserError: x", killed=False)
        assert snapshot(run) == before
    finally:
        server.tell(signal.SIGCONT)
    again = begin(run, server.uri, experiment)
    tracking.publish(again)
    assert tracking.complete(run, server.uri, experiment, "f1") == again
    assert tracking.complete(run, server.uri, experiment, "f2") is None
    with monkeypatch.context() as patch, pytest.raises(tracking.TrackingError):
        patch.setattr(tracking, "connected", lambda _: 1 / 0)
        begin(run, server.uri, experiment)
    assert tracking.complete(run, server.uri, experiment, "f1") is None

    assert again.run_id == session.run_id
    assert {n: r.info.status for n, r in runs_of(session).items()} == dict.fromkeys(
        ["quick", "energy", "knn-50"], "FINISHED"
    )


BEGIN = """
import sys
from pathlib import Path
from pipeline.results.mlflow import tracking as track
run, uri = Path(sys.argv[1]), sys.argv[2]
print(track.begin(run, uri, "shared", run.name, "f").experiment_id)
"""


def start_begin(run: Path, uri: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BEGIN, str(run), uri]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_may_open_one_new_store_that_a_third_left_half_made(tmp_path: Path) -> None:
    """This one begins as soon as the other has begun to make the tables."""
    store = tmp_path / "new" / "mlflow.db"
    uri = f"sqlite:///{store}"

    def begun(process: subprocess.Popen[str], drafts: int) -> bool:
        return len(list(store.parent.glob(".mlflow-*/mlflow.db"))) == drafts or process.poll() is not None

    killed = start_begin(tmp_path / "killed", uri)
    wait("a store", lambda: begun(killed, 1))
    killed.kill()
    killed.communicate()
    assert not store.exists()
    other = start_begin(tmp_path / "theirs", uri)
    wait("another", lambda: begun(other, 2))
    session = tracking.begin(tmp_path / "ours", uri, "shared", "ours", "f")

    assert other.communicate(timeout=120) == ("1\n", "")
    runs = MlflowClient(uri).search_runs([session.experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["ours", "theirs"]


def test_many_may_create_one_experiment_together(tmp_path: Path, uri: str, experiment: str) -> None:
    with ThreadPoolExecutor(6) as threads:
        sessions = list(threads.map(lambda i: begin(tmp_path / f"run{i}", uri, experiment), range(6)))
    assert len({session.experiment_id for session in sessions}) == 1
    assert len({session.run_id for session in sessions}) == 6


def test_a_deleted_experiment_is_reported(tmp_path: Path, embedded: str, experiment: str) -> None:
    session = begin(tmp_path / "quick", embedded, experiment)
    MlflowClient(embedded).delete_experiment(session.experiment_id)
    with pytest.raises(tracking.TrackingError, match=f"{experiment}' was deleted"):
        begin(tmp_path / "quick", embedded, experiment)


def test_a_damaged_store_is_reported(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database")
    with pytest.raises(tracking.TrackingError, match=r"mlflow\.db: MLflow did not open the run"):
        begin(tmp_path / "quick", f"sqlite:///{tmp_path}/mlflow.db", "e")


def test_the_active_run_of_someone_else_is_left_alone(tmp_path: Path, embedded: str, experiment: str) -> None:
    theirs = f"sqlite:///{tmp_path}/theirs.db"
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(theirs)
    try:
        with mlflow.start_run() as active:
            tracking.publish(begin(write_run(tmp_path / "quick"), embedded, experiment))
            assert mlflow.active_run().info.run_id == active.info.run_id
            assert mlflow.get_tracking_uri() == theirs
            data = MlflowClient(theirs).get_run(active.info.run_id).data
            assert (data.metrics, data.params) == ({}, {})
    finally:
        mlflow.set_tracking_uri(before)


def test_the_link_of_a_server_orders_its_detectors_by_what_they_have(
    tmp_path: Path, server: Server, experiment: str
) -> None:
    session = begin(write_run(tmp_path / "quick"), f"{server.uri}/", experiment)
    page = f"{server.uri}/#/experiments/{session.experiment_id}/runs?compareRunsMode=CHART"
    assert tracking.link(session).startswith(f"{page}&workflowType=machine_learning&")
    assert session.run_id in tracking.link(session)
    for roles, key in (
        (("id", "near_ood", "far_ood"), "%60auroc%2Fnear_ood%60"),
        (("id", "far_ood"), "%60auroc%2Ffar_ood%60"),
        (("id",), "%60threshold%60"),
    ):
        write_run(session.run, datasets={role: dataset(role) for role in roles})
        assert f"&orderByKey=metrics.{key}&" in tracking.link(session)


def test_the_command_for_a_local_store_serves_its_artifacts(
    tmp_path: Path, embedded: str, server: Server, experiment: str
) -> None:
    session = begin(write_run(tmp_path / "quick"), embedded, experiment)
    tracking.publish(session)
    assert server.command.startswith("ood-pipeline ui ")
    assert tracking.link(session) == f"{server.uri}{tracking.page(session)}", "it runs"
    page = f"{server.uri}/get-artifact?path=report%2Froc.png&run_uuid={session.run_id}"
    with urllib.request.urlopen(page, timeout=20) as answer:
        assert answer.read() == bytes(range(256))


@pytest.mark.parametrize(
    "uri",
    [
        f"postgresql://user:{PASSWORD}@host/db",
        f"http://user:{PASSWORD}#x@host:5000",
        f"http://user:12/{PASSWORD}@host",
        f"http://user:x@{PASSWORD}@host",
        "sqlite:///",
        "sqlite:///a.db?timeout=1",
        "./mlruns",
    ],
)
def test_a_store_that_cannot_be_used_is_refused_at_once(tmp_path: Path, uri: str) -> None:
    with pytest.raises(UserError, match=r"tracking\.uri: .*; expected sqlite:///") as caught:
        begin(tmp_path / "quick", uri, "e")
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("to http://u:p@h:1/a and https://t@h.", "to http://h:1/a and https://h."),
        ("http://u:p@q@h/x@y", "http://h/x@y"),
        ("http://h/a mail a@b.c", "http://h/a mail a@b.c"),
        ("sqlite:////tmp/a@b/m.db", "sqlite:////tmp/a@b/m.db"),
        ('<a href="http://h"> a@b', '<a href="http://h"> a@b'),
    ],
)
def test_redact_takes_only_the_credentials(text: str, wanted: str) -> None:
    assert redact(text) == wanted
