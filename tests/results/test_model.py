"""A bundle as a model of MLflow: logged with its run, registered, loaded and served."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from PIL import Image

import pipeline
from pipeline.errors import UserError
from pipeline.results.mlflow import model
from pipeline.workflows import bundle
from tests.conftest import small
from tests.servers import answers, free_port, wait
from tests.workflows.test_bundle import evaluated

pytestmark = pytest.mark.slow

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:DeprecationWarning", "ignore::UserWarning:mlflow"
)


@dataclass(frozen=True)
class Logged:
    """A registered model and what it was made of."""

    evaluation: pipeline.Evaluation
    folder: Path
    uri: str
    store: str

    @property
    def pixels(self) -> np.ndarray:
        with np.load(self.evaluation.record["datasets"]["test"]["path"]) as arrays:
            key = self.evaluation.scores("test")["key"][0].as_py()
            return arrays["test_x"][int(key.rpartition("/")[2])]

    @property
    def encoded(self) -> bytes:
        content = io.BytesIO()
        Image.fromarray(self.pixels).save(content, "png")
        return content.getvalue()


@pytest.fixture(scope="module")
def logged(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Logged:
    folder, raw = tmp_path_factory.mktemp("model"), small(images)
    raw["datasets"] = [entry | {"limit": 40} for entry in raw["datasets"] if entry["role"] != "train"]
    raw |= {"detectors": ["energy"], "tracking": {"enabled": True}}
    with pytest.MonkeyPatch.context() as patch:
        from pipeline.results.report import plots

        for name in ("histograms", "roc", "norm_ratio"):
            patch.setattr(plots, name, lambda *_: bytes(16) + (2).to_bytes(4, "big"))
        evaluation = evaluated(raw, folder)
    made = bundle.make(str(evaluation.folder), folder / "energy.ood", bundle.Options(weights=True))
    before = mlflow.get_tracking_uri()
    uri = bundle.log_model(made, str(evaluation.folder), "energy")
    assert mlflow.get_tracking_uri() == before
    return Logged(evaluation, made.folder, uri, f"sqlite:///{folder}/workspace/mlflow.db")


@pytest.fixture
def tracked(logged: Logged) -> Logged:
    """The same while MLflow's own functions use its store."""
    mlflow.set_tracking_uri(logged.store)
    yield logged
    mlflow.set_tracking_uri(None)


def test_it_is_logged_with_its_run_and_registered(logged) -> None:
    assert logged.uri == "models:/energy/1"
    client = MlflowClient(logged.store)
    version = client.get_model_version("energy", "1")
    record = json.loads((logged.evaluation.folder / "mlflow.json").read_text())
    assert version.run_id == record["run_id"]
    assert client.get_run(record["run_id"]).info.status == "FINISHED"


def test_it_takes_bytes_base64_arrays_and_lists_and_gives_the_scores_of_the_run(tracked) -> None:
    loaded = mlflow.pyfunc.load_model(tracked.uri)
    expected = tracked.evaluation.scores("test")["energy"][0].as_py()
    text, pixels = base64.b64encode(tracked.encoded).decode(), tracked.pixels
    for value in (tracked.encoded, text, pixels, pixels.tolist()):
        found = loaded.predict(pd.DataFrame({"image": [value, b"no"]}), params={"exact": True})
        assert found["energy"].tolist() == [expected, None]
        assert found["error"].tolist()[0] is None and "not a readable" in found["error"].tolist()[1]
        assert found["p.energy"].tolist() == [None, None]


def test_what_a_caller_allows_reaches_the_bundle(tracked, monkeypatch) -> None:
    asked, load = [], model.detect.load

    def spied(path, device, trust_code):
        asked.append((device, trust_code))
        return load(path, device, trust_code=trust_code)

    monkeypatch.setattr(model.detect, "load", spied)
    mlflow.pyfunc.load_model(tracked.uri)
    mlflow.pyfunc.load_model(tracked.uri, model_config={"trust_code": True, "device": "cpu"})
    assert asked == [("auto", False), ("cpu", True)]


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({"image": ["no base64!"]}, "image 0 is text that is no base64"),
        ({"image": [[[300]]]}, "image 0 has values outside of 0 to 255"),
        ({"picture": [b""]}, r"no column 'image'; got picture"),
    ],
)
def test_what_is_no_image_is_refused(logged, frame, message) -> None:
    with pytest.raises(UserError, match=message):
        model.Served(pipeline.load_bundle(logged.folder)).predict(pd.DataFrame(frame))


def test_a_run_that_is_not_in_mlflow_is_refused(logged, tmp_path) -> None:
    record = logged.evaluation.folder / "mlflow.json"
    content = record.read_text()
    record.unlink()
    try:
        with pytest.raises(UserError, match="was not sent to MLflow"):
            bundle.log_model(pipeline.load_bundle(logged.folder).bundle, str(logged.evaluation.folder))
    finally:
        record.write_text(content)


def test_it_is_served(logged, tmp_path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", logged.uri, "--env-manager", "local"]
    folder = str(Path(sys.executable).parent)
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": logged.store,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
    }
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait("the model's server", lambda: answers(f"http://127.0.0.1:{port}/ping"), 120)
        body = {"dataframe_records": [{"image": base64.b64encode(logged.encoded).decode()}]}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            json.dumps(body | {"params": {"exact": True}}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            (row,) = json.loads(answer.read())["predictions"]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    assert row["energy"] == logged.evaluation.scores("test")["energy"][0].as_py()
    assert row["p.energy"] is None
