"""A finished evaluation as tables, for programs and notebooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from safetensors.numpy import load_file

from pipeline.columns import DIGEST, KEY, LABEL, PREDICTION, Float, Mask
from pipeline.config.schema import LABELLED_ROLES
from pipeline.errors import UserError, unknown
from pipeline.metrics import pairs
from pipeline.metrics.conformal import Calibration
from pipeline.metrics.metrics import LEVEL
from pipeline.results import calibrated
from pipeline.results.cautions import COMPARED
from pipeline.stages.decisions import DECISIONS, SCORES
from pipeline.stages.evaluate import PAIRS, spectra
from pipeline.stages.shards import DIGESTS
from pipeline.workspace import files, tables
from pipeline.workspace.files import Place
from pipeline.workspace.runs import located, workspace_of


@dataclass(frozen=True)
class Evaluation:
    """The folder of a run, and what lies in it."""

    folder: Place

    @cached_property
    def record(self) -> dict[str, Any]:
        """What was run on what, with which versions, and how long it took: `manifest.json`."""
        return dict(files.read_json(self.folder / "manifest.json"))

    @cached_property
    def metrics(self) -> pa.Table:
        """One row per detector, dataset or group, and metric.

        Columns: detector, dataset, group, metric, value, ci_low, ci_high (in [0, 1]), n_id, n_ood.
        """
        with tables.parquet(self.folder / "metrics.parquet") as file:
            return file.read()

    @cached_property
    def differences(self) -> pa.Table:
        """One row per pair of detectors, dataset or group, and metric, on the same images.

        Columns: detector, other, dataset, group, metric, difference (detector - other), ci_low, ci_high,
        p_value, p_holm (corrected for all pairs on the dataset).
        """
        with tables.parquet(self.folder / "comparisons.parquet") as file:
            return file.read()

    @cached_property
    def thresholds(self) -> dict[str, float]:
        """By detector: the score that 95 % of the ID images of the metrics do not exceed.

        Larger ones are flagged as OOD, unless the config has `thresholds`: then those of `decisions` flag.
        """
        return dict(files.read_json(self.folder / "thresholds.json"))

    @cached_property
    def calibration(self) -> dict[str, Calibration]:
        """By detector: what gives p-values, thresholds and flags; by predicted class if the run has it so.

        Raises:
            UserError: the config of the run has no `thresholds`.
        """
        self._require_calibrated()
        with files.local(self.folder / SCORES) as file:
            arrays = load_file(file)
        predictions = arrays.pop(PREDICTION)
        classes = predictions if self.record["thresholds"]["per_class"] else None
        return {label: Calibration(arrays[label], classes) for label in self.record["detectors"]}

    @cached_property
    def decisions(self) -> pa.Table:
        """One row per detector, false-alarm rate and dataset: its threshold and the images that it flags.

        Columns: detector, false_alarm, prediction (-1), threshold (null where each class has its own),
        n_calibration, dataset, role, n, flagged, share (with its 95% interval ci_low, ci_high). By class also
        one row per detector, rate and predicted class, with threshold and n_calibration, of no dataset.

        Raises:
            UserError: the config of the run has no `thresholds`.
        """
        self._require_calibrated()
        with tables.parquet(self.folder / DECISIONS) as file:
            return file.read()

    def _require_calibrated(self) -> None:
        if self.record.get("thresholds") is None:
            raise UserError(
                f"{self.folder}: thresholds: the run has none of held-out images. Set "
                "thresholds.false_alarm, e.g. [0.05], and run it again."
            )

    def scores(self, dataset: str, detectors: list[str] | None = None) -> pa.Table:
        """Key, label and prediction of every image of a dataset, and its scores; higher = more OOD.

        Null where a detector has no finite score; `record["unscored"]` counts and names these images. Of ID
        data of which a part calibrates, all images are there.

        Args:
            dataset: its name.
            detectors: labels; None = all. Memory grows with them and the images: 8 bytes each.

        Raises:
            UserError: no such dataset or detector.
        """
        folder = self.folder / "scores" / dataset
        if not folder.is_dir():
            known = [name for name, entry in self.record["datasets"].items() if entry["role"] != "train"]
            raise UserError(unknown("dataset with scores", dataset, known))
        labels = list(self.record["detectors"])
        for label in detectors or ():
            if label not in labels:
                raise UserError(unknown("detector", label, labels))
        wanted = labels if detectors is None else detectors
        told = [(KEY, pa.string()), (LABEL, pa.int32()), (PREDICTION, pa.int32())]
        schema = pa.schema([*told, *((label, pa.float64()) for label in wanted)])
        parts = tables.Table.open(folder).columns(schema.names)  # none where no image could be read
        return pa.concat_tables([schema.empty_table(), *parts])

    def against(self, other: Evaluation) -> pa.Table:
        """Differences of all detectors of this run and another one on the same images.

        Columns are those of `differences`. A detector goes by `<id of its run>/<label>`. Compared are the
        datasets that both runs have in the same role, on the rows that all detectors have scores of. Memory
        grows with rows and detectors: 8 bytes each.

        Raises:
            UserError: the runs are one, have no ID and OOD dataset in common, or other images in one.
        """
        shared = set(_shared_roles([self, other]).values())
        reason = other_images(self, other)
        if "id" not in shared or not shared & {"near_ood", "far_ood"}:
            reason = "no ID and OOD dataset of the same name and role in both"
        if self.folder == other.folder or reason:
            raise UserError(
                f"{self.folder} and {other.folder}: nothing to compare: {reason or 'they are one run'}. "
                "Run both on the same data."
            )
        rows = [
            {
                **asdict(found),
                "detector": f"{run.folder.name}/{label}",
                "other": f"{against.folder.name}/{beside}",
                "group": group,
            }
            for (run, label), (against, beside), group, found in differences([self, other])
        ]
        return pa.Table.from_pylist(rows, PAIRS)


Entry = tuple[Evaluation, str]
"""A detector of a run, by its label."""


def other_data(first: Evaluation, other: Evaluation) -> str:
    """Why two runs were not measured on the same images; empty if they were.

    The datasets that are compared must have the same names, roles and images, and the same of them be tested.
    """
    ours, theirs = (_roles(run) for run in (first, other))
    if ours != theirs:
        names = ", ".join(
            sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        )
        return f"other datasets than in the first run ({names})"
    if _split(first) != _split(other):
        return "other ID images are tested than in the first run (thresholds.calibrate_on, share, seed)"
    return other_images(first, other)


def _split(run: Evaluation) -> tuple[Any, ...]:
    """What decides which ID images are tested; nothing if all are."""
    wanted = run.record.get("thresholds")
    if wanted is None or wanted["calibrate_on"] != "id":
        return ()
    return wanted["share"], run.record["seed"]


def other_images(first: Evaluation, other: Evaluation) -> str:
    """In which dataset that two runs have in the same role they have other images; empty if in none.

    Images are the same if the digests of their listings are, which hold keys, labels, and what identifies
    each image; or else if keys, labels and the digests of their bytes are, which are beside the features.
    """
    for name in _shared_roles([first, other]):
        known, found = (run.record["datasets"][name] for run in (first, other))
        if known["digest"] == found["digest"]:
            continue
        same = known["rows"] == found["rows"] and _same_bytes(first, other, name)
        if same is None:
            return (
                f"another listing of {name} than in the first run (keys, labels, sizes and time stamps of "
                "files; `identity: content` avoids it)"
            )
        if not same:
            return f"other images in {name} ({found['rows']:,}) than in the first run ({known['rows']:,})"
    return ""


def _same_bytes(first: Evaluation, other: Evaluation, dataset: str) -> bool | None:
    """Whether two runs have the same keys, labels and bytes, in one order; None if one knows no bytes."""
    ours, theirs = (_listed(run, dataset) for run in (first, other))
    if ours is None or theirs is None:
        return None
    return all(one.equals(another) for one, another in zip(ours, theirs, strict=True))


def _listed(run: Evaluation, dataset: str) -> tuple[pa.Table, pa.Table] | None:
    """Keys and labels of all images, and keys and digests of the bytes of those that could be read."""
    entry, workspace = run.record["datasets"][dataset], workspace_of(run.folder)
    features = workspace / "features" / f"{dataset}-{entry['hash']}"
    listing = workspace / "manifests" / f"{dataset}-{entry['digest'][:16]}" / "rows.parquet"
    try:
        digests = pa.concat_tables(tables.Table.open(features / DIGESTS).columns([KEY, DIGEST]))
        with tables.parquet(listing) as file:
            return file.read([KEY, LABEL, "accepted"]), digests
    except FileNotFoundError:
        return None


def differences(runs: Sequence[Evaluation]) -> Iterator[tuple[Entry, Entry, str, pairs.Difference]]:
    """All pairs of detectors of runs on the same images: both, the group of the dataset, and the difference.

    On the rows that all of them have scores of, joined by their keys. p-values are corrected for all pairs.
    Memory grows with rows and detectors: 8 bytes each.

    Args:
        runs: finished ones, with the same images in the datasets that all have in the same role.
    """
    roles, level = _shared_roles(runs), runs[0].record.get("metrics", {}).get("fpr_level", LEVEL)
    seed = runs[0].record["seed"]
    rows = {name: _beside(runs, name) for name in roles}
    members = {
        role: [name for name in roles if roles[name] == role] for role in dict.fromkeys(roles.values())
    }
    for prefix, inside in spectra("shifted_id" in members).items():
        groups = {prefix + role: members[role] for role in ("near_ood", "far_ood") if role in members}
        group_of = {name: group for group, names in groups.items() for name in (*names, group)}

        def sampled(entry: Entry, inside: Sequence[str] = inside, groups: Any = groups) -> list[pairs.Sample]:
            known = [rows[name][entry] for role in inside for name in members[role]]
            values, right = (np.concatenate(each) for each in zip(*known, strict=True))
            outside = {name: rows[name][entry][0] for names in groups.values() for name in names}
            return pairs.sample(values, outside, groups, seed, right, level)

        yield from _paired(rows, sampled, group_of)
    for role in LABELLED_ROLES:
        for name in members.get(role, ()):

            def failing(entry: Entry, name: str = name) -> list[pairs.Sample]:
                return [pairs.sample_failures(name, *rows[name][entry], seed)]

            yield from _paired(rows, failing, {name: role})


def _paired(
    rows: Mapping[str, Mapping[Entry, Any]],
    sampled: Callable[[Entry], Sequence[pairs.Sample]],
    group_of: Mapping[str, str],
) -> Iterator[tuple[Entry, Entry, str, pairs.Difference]]:
    """The differences of samples of all detectors."""
    entries = {str(number): entry for number, entry in enumerate(next(iter(rows.values())))}
    for found in pairs.differences({name: sampled(entry) for name, entry in entries.items()}):
        yield entries[found.detector], entries[found.other], group_of[found.dataset], found


def _roles(run: Evaluation) -> dict[str, str]:
    """The datasets that are compared, and their roles."""
    datasets = run.record["datasets"].items()
    return {name: entry["role"] for name, entry in datasets if entry["role"] in COMPARED}


def _shared_roles(runs: Sequence[Evaluation]) -> dict[str, str]:
    """The datasets that are compared and have the same role in all runs, and their roles."""
    others = [_roles(run) for run in runs]
    return {name: role for name, role in others[0].items() if all(each.get(name) == role for each in others)}


def _beside(runs: Sequence[Evaluation], dataset: str) -> dict[Entry, tuple[Float, Mask]]:
    """Scores of all detectors of runs, and which rows the classifier has right, on the rows that all have."""
    columns: dict[Entry, pa.Array] = {}
    right: dict[Evaluation, pa.Array] = {}
    keys = None
    for run in runs:
        labels = list(run.record["detectors"])
        names = [KEY, LABEL, PREDICTION, *labels]
        parts = calibrated.columns(run.folder, run.record, dataset, names)
        table = pa.concat_tables(parts).combine_chunks()
        keys = table[KEY] if keys is None else keys
        if not table[KEY].equals(keys):
            table = table.take(pc.index_in(keys, value_set=table[KEY].combine_chunks()))
        right[run] = pc.equal(table[LABEL], table[PREDICTION])
        columns |= {(run, label): table[label] for label in labels}
    there = reduce(pc.and_, (column.is_valid() for column in columns.values()))
    return {
        (run, label): (column.filter(there).to_numpy(), right[run].filter(there).to_numpy())
        for (run, label), column in columns.items()
    }


def opened(run: str | Place) -> Evaluation:
    """A finished evaluation on disk or in an object store.

    Args:
        run: path or URI of its folder, `<workspace>/runs/<name>`.

    Raises:
        UserError: if there is none, or it is not finished.
    """
    found = Evaluation(located(str(run)))
    if found.record["status"] != "finished":
        raise UserError(
            f"{run}: the evaluation is {found.record['status']}, not finished. Run it again to go on."
        )
    return found
