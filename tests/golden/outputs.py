"""What an evaluation leaves behind, as arrays by name: features, statistics and scores.

Names are those of detectors, datasets, classes and parameters; hashes, versions and modules are no part of
them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors.numpy import load_file

from pipeline.config import schema
from tests.stored import newest

Arrays = Mapping[str, NDArray[Any]]

_NOT_OWN = ("features", "statistic", "version", "after", "pass", "train", "held out", "detector", "code")
"""Parts of an artefact's identity that say what it is made of, or what kind it is."""


KINDS = ("features", "statistics", "scores")


@dataclass(frozen=True, repr=False)
class Outputs:
    """All that the golden files guard."""

    arrays: dict[str, dict[str, Arrays]]
    """Of each of `KINDS`: by dataset and column, by statistic and array, by detector and dataset."""
    metrics: dict[str, dict[str, list[float]]]
    """By detector: value, interval and both counts by dataset and metric; the threshold."""


def read(loaded: schema.Config) -> Outputs:
    """What lies in the workspace of a config after its run."""
    workspace = Path(loaded.workspace)
    folder = newest(workspace, loaded.name)
    features = {dataset.name: _features(workspace, dataset.name, loaded) for dataset in loaded.datasets}
    statistics = dict(_statistics(workspace))
    found = zip(KINDS, (features, statistics, _scores(folder, loaded)), strict=True)
    return Outputs(dict(found), _metrics(folder))


def _features(workspace: Path, dataset: str, loaded: schema.Config) -> Arrays:
    """All columns of a dataset; the extra ones under the names of the detectors that read them."""
    (folder,) = workspace.glob(f"features/{dataset}-*")
    found = dict(_table(folder))
    for column, name in _extras(loaded).items():
        if (folder / column).is_dir():
            found[name] = _table(folder / column)[column]
    return found


def _extras(loaded: schema.Config) -> dict[str, str]:
    """Column of every extra, and what it is called here."""
    readers: dict[str, list[str]] = {}
    for label, detector in loaded.built().items():
        for number, extra in enumerate(detector.extras()):
            readers.setdefault(extra.column, []).append(f"{label}.{number}")
    return {column: f"{_plain(column)} of {', '.join(labels)}" for column, labels in readers.items()}


def _plain(column: str) -> str:
    """Name of a column without the hash at its end."""
    return re.sub(r"-[0-9a-f]{12}$", "", column)


def _table(folder: Path) -> Arrays:
    """Columns of all parts of a folder."""
    table = pa.concat_tables([pq.read_table(part) for part in sorted(folder.glob("part-*.parquet"))])
    return {name: _array(table[name].combine_chunks()) for name in table.column_names}


def _array(column: pa.Array) -> NDArray[Any]:
    if pa.types.is_fixed_size_list(column.type):
        values: NDArray[Any] = column.flatten().to_numpy().reshape(len(column), column.type.list_size)
        return values
    return column.to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]


def _statistics(workspace: Path) -> Iterator[tuple[str, Arrays]]:
    """Name and arrays of every artefact."""
    datasets = {}
    for marker in workspace.glob("features/*/_manifest.json"):
        datasets[f"features/{marker.parent.name}"] = json.loads(marker.read_text())["facts"]["dataset"]
    for folder in sorted(workspace.glob("fits/*")):
        record = json.loads((folder / "_manifest.json").read_text())
        if record["kind"].startswith(("detector ", "index ")):
            continue
        pieces = sorted(folder.glob("bank-*.npy"))
        vectors = {"vectors": np.concatenate([np.load(piece) for piece in pieces])} if pieces else {}
        yield _name(record, datasets), vectors or load_file(folder / "arrays.safetensors")


def _name(record: dict[str, Any], datasets: Mapping[str, str]) -> str:
    """What an artefact is: kind or class, its version, its parameters, and the rows of a statistic."""
    kind, identity = record["kind"], record["identity"]
    if kind.startswith("bank "):
        name, versions, parameters = identity["detector"][:3]
        return f"{name} {'.'.join(map(str, versions))} {kind} {_shown(parameters)}"
    if not kind.startswith("statistic "):
        return f"{kind} {_shown(identity['pass'])}"
    rows = ", ".join(datasets[name] for name in identity["features"])
    own = {name: value for name, value in identity.items() if name not in _NOT_OWN}
    version = kind.rpartition(" ")[2]
    return f"{identity['statistic'].rpartition('.')[2]} {version} of {rows} {_shown(own)}"


def _shown(parameters: Mapping[str, Any]) -> str:
    """Parameters in the order of their names."""
    plain = {name: _plain(value) if isinstance(value, str) else value for name, value in parameters.items()}
    return json.dumps(plain, sort_keys=True)


def _scores(folder: Path, loaded: schema.Config) -> dict[str, Arrays]:
    """Columns of the score tables by detector."""
    found: dict[str, dict[str, NDArray[Any]]] = {label: {} for label in loaded.built()}
    for table in sorted((folder / "scores").iterdir()):
        columns = _table(table)
        for label in found:
            found[label][table.name] = columns[label]
            if f"is_ood.{label}" in columns:
                found[label][f"{table.name} flags"] = columns[f"is_ood.{label}"]
    return dict(found)


def _metrics(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Rows of the metrics and the threshold by detector."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in json.loads((folder / "metrics.json").read_text()):
        name = f"{row['dataset']} ({row['group']}) {row['metric']}"
        numbers = [row[each] for each in ("value", "ci_low", "ci_high", "n_id", "n_ood")]
        found.setdefault(row["detector"], {})[name] = numbers
    for label, threshold in json.loads((folder / "thresholds.json").read_text()).items():
        found[label]["threshold"] = [threshold]
    return found
