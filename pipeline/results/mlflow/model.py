"""A bundle as a model of MLflow: logged with its run, registered, loaded and served as `pyfunc`.

The model holds the bundle as it is and the name of this module, which loads it; nothing in it is a pickle.
"""

from __future__ import annotations

import base64
import binascii
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import __version__
from pipeline.columns import ERROR
from pipeline.errors import UserError
from pipeline.results.mlflow import tracking
from pipeline.stages import detect
from pipeline.stages.bundle import Bundle
from pipeline.workspace import storage
from pipeline.workspace.files import Place

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]

IMAGE = "image"
"""Column of the input: bytes or text in base64 of an encoded image, or pixels."""


def log(bundle: Bundle, run: Place, uri: str, register: str | None = None) -> str:
    """Log a bundle as a model of the MLflow run of an evaluation.

    Args:
        bundle: what is logged.
        run: folder of the evaluation.
        uri: of the store.
        register: name under which it becomes a version of a registered model.

    Returns:
        URI of the model, as `models:/m-...`; of the version where it was registered.

    Raises:
        UserError: the evaluation is not in this store.
        TrackingError: if MLflow fails.
    """
    session = tracking.session_of(run)
    with tracking.sending(uri, "take the model"):
        client = tracking.connected(uri)
        with _using(uri):
            model = _logged(bundle, session.run_id)
            return _registered(client, model, register) if register else str(model.model_uri)


def _logged(bundle: Bundle, run_id: str) -> Any:
    """What MLflow knows of a bundle that it was given."""
    import mlflow
    from mlflow.models import Model

    return Model.log(
        artifact_path=None,
        name=_name(bundle.name),
        flavor=mlflow.pyfunc,
        run_id=run_id,
        loader_module=__name__,
        data_path=str(bundle.folder),
        model_config={"device": "auto", "trust_code": False},  # MLflow lets a caller set these alone
        pip_requirements=[f"ood-pipeline=={__version__}"],
        signature=_signature(bundle),
        metadata={"bundle": bundle.content, "run": bundle.document["run"]},
    )


def _registered(client: Any, model: Any, name: str) -> str:
    """Make a model a version of a registered one, which is made if there is none; returns its URI."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = client.create_model_version(name, model.model_uri, model.run_id, model_id=model.model_id)
    return f"models:/{name}/{version.version}"


def _name(bundle: str) -> str:
    """A name that MLflow allows, of the path or URI of a bundle."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", storage.name_of(bundle))


@contextmanager
def _using(uri: str) -> Iterator[None]:
    """In the block MLflow's own functions, which know one store alone, use this one, and give no advice."""
    import mlflow

    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(uri)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        mlflow.set_tracking_uri(before)


def _signature(bundle: Bundle) -> Any:
    """What goes in and comes out."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import AnyType, ColSpec, DataType, ParamSchema, ParamSpec, Schema

    columns = [ColSpec(DataType.string, "key"), ColSpec(DataType.integer, "prediction", required=False)]
    columns.append(ColSpec(DataType.string, ERROR, required=False))
    kinds = {"": DataType.double, "p.": DataType.double, "is_ood.": DataType.boolean}
    columns += [
        ColSpec(kind, prefix + label, required=False)
        for prefix, kind in kinds.items()
        for label in bundle.labels
    ]
    exact = ParamSchema([ParamSpec("exact", DataType.boolean, False)])
    return ModelSignature(Schema([ColSpec(AnyType(), IMAGE)]), Schema(columns), exact)


class Served:
    """What MLflow calls."""

    def __init__(self, detector: detect.OodDetector) -> None:
        self.detector = detector

    def predict(self, images: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """A row of results for each image of the column `image`; None where there is none.

        Args:
            images: bytes, text in base64, or pixels of each.
            params: `exact`, as of `OodDetector`.

        Raises:
            UserError: no such column, or something in it that is no image.
        """
        if IMAGE not in images:
            raise UserError(f"no column {IMAGE!r}; got {', '.join(map(str, images.columns))}.")
        given = [_image(value, number) for number, value in enumerate(images[IMAGE])]
        table = self.detector(given, exact=bool((params or {}).get("exact", False)))
        found = table.to_pandas()
        for name in table.column_names:
            if table[name].null_count:  # a NaN is no JSON
                found[name] = type(found[name])(table[name].to_pylist(), dtype=object)
        return found


def _image(value: Any, number: int) -> Any:
    """An image as `OodDetector` takes it."""
    if isinstance(value, str):
        try:
            return base64.b64decode(value, validate=True)
        except binascii.Error:
            raise UserError(f"{IMAGE} {number} is text that is no base64. Encode the bytes so.") from None
    if isinstance(value, bytes):
        return value
    pixels = np.asarray(value)
    if pixels.dtype != np.uint8 and pixels.dtype.kind in "iu" and pixels.size:
        if pixels.min() < 0 or pixels.max() > 255:
            raise UserError(f"{IMAGE} {number} has values outside of 0 to 255.")
        return pixels.astype(np.uint8)
    return pixels


def _load_pyfunc(data_path: str, model_config: Mapping[str, Any] | None = None) -> Served:
    """What MLflow asks this module for; `model_config` may name `device` and `trust_code`."""
    given = model_config or {}
    trusted = bool(given.get("trust_code", False))
    return Served(detect.load(data_path, given.get("device", "auto"), trust_code=trusted))
