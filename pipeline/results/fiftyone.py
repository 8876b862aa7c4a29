"""The images of a run that are worth a look as a dataset of FiftyOne, whose pages sort and filter them.

FiftyOne is imported by what needs it; its own server keeps the dataset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.columns import KEY, P_VALUE
from pipeline.data.decode import as_file
from pipeline.data.fetch import fetch
from pipeline.errors import UserError
from pipeline.results import calibrated
from pipeline.results.evaluation import opened
from pipeline.results.report.review import Review, Shown, chosen, listed
from pipeline.results.report.tables import Results
from pipeline.stages.progress import SILENT, Stage
from pipeline.workspace import files, storage


@dataclass
class Exported:
    """What became of the images."""

    name: str
    """Of the dataset."""
    samples: int = 0
    inside: int = 0
    """Images left out that are no files of their own on this machine."""
    gone: list[str] = field(default_factory=list)
    """Dataset and key of images left out that can be read no more."""


def export(
    run: str,
    name: str = "",
    images: int = 100,
    folder: str = "",
    force: bool = False,
    stage: Stage = SILENT,
) -> Exported:
    """Make a dataset of FiftyOne, which it keeps, of the images that `chosen` finds.

    A sample has the dataset, its role and why it was chosen as tags, `ground_truth` (where the class is
    known) and `prediction` as classifications by the number of the class, `key`, the `percentile` of the best
    detector's score among the ID images, `score_<detector>`, higher = more OOD, and in runs with thresholds
    `p_<detector>`.

    Args:
        run: path or URI of its folder.
        name: of the dataset; "" = that of the run and its id.
        images: how many of each kind and dataset.
        folder: where images that are no files of their own on this machine are written; "" = left out.
        force: replace a dataset of that name.
        stage: is told what is done, and of every image.

    Raises:
        UserError: no such run, no FiftyOne, its database does not answer, a dataset of that name, detectors
            whose fields have one name, a listing that is gone, a file that was changed since it was listed,
            a folder that is remote or cannot be written to, or no image is left.
    """
    results = Results.read(opened(run).folder)
    stage.doing("starts FiftyOne")
    voxel = _package()
    stage.doing("chooses images")
    exported = Exported(name or f"{results.manifest['name']}-{results.folder.name}")
    _require_free(voxel, exported.name, force)
    place = _local(folder) if folder else None
    made = voxel.Dataset()
    try:
        _fill(made, voxel, results, chosen(results, images), place, exported, stage)
        if not exported.samples:
            raise UserError(
                f"{run}: no image is left to show: {exported.inside:,} are no files of their own on this "
                f"machine (--files FOLDER writes them there), {len(exported.gone):,} can be read no more."
            )
        _keep(made, voxel, exported.name, force)
    except BaseException:
        made.delete()
        raise
    return exported


def _fill(
    made: Any,
    voxel: ModuleType,
    results: Results,
    found: Review,
    folder: Path | None,
    exported: Exported,
    stage: Stage,
) -> None:
    """Add the samples to a dataset, one of the run after the other."""
    made.info = {"run": str(results.folder), "detector": found.detector}
    stage.count("images", len(found.images))
    for dataset, images in groupby(found.images, attrgetter("dataset")):
        shown: dict[str, list[Shown]] = {}
        for image in images:
            shown.setdefault(image.key, []).append(image)
        said = _said(results, dataset, shown)
        paths = _files(results, dataset, shown, folder, exported)
        role = results.manifest["datasets"][dataset]["role"]
        made.add_samples(
            [_sample(voxel, file, role, shown[key], said[key]) for key, file in paths.items()], progress=False
        )
        exported.samples += len(paths)
        stage.advance(sum(map(len, shown.values())))


def _local(folder: str) -> Path:
    """A folder of this machine that can be written to."""
    if storage.is_remote(folder):
        raise UserError(
            f"--files: {folder} is not on this machine, where FiftyOne reads. Give a local folder."
        )
    files.require_writable(folder, "--files")
    return Path(storage.located(folder)[1])


def _require_free(voxel: ModuleType, name: str, force: bool) -> None:
    """Refuse the name of a dataset that is not to be replaced."""
    if voxel.dataset_exists(name) and not force:
        raise UserError(
            f"--name: FiftyOne has a dataset {name}. Choose another name, or --force replaces it."
        )


def _keep(made: Any, voxel: ModuleType, name: str, force: bool) -> None:
    """Give a dataset its name, which may be that of an old one if it is to be replaced, and make it last."""
    _require_free(voxel, name, force)  # others may have made one meanwhile
    if voxel.dataset_exists(name):
        voxel.delete_dataset(name)
    try:
        made.name, made.persistent = name, True
    except ValueError as error:
        raise UserError(f"--name: FiftyOne takes no {name!r}: {error}. Choose another.") from None


def _package() -> ModuleType:
    """FiftyOne, whose database answers."""
    try:
        import fiftyone
    except ImportError as error:
        raise UserError(
            f"FiftyOne cannot be imported ({error}). pip install 'ood-pipeline[fiftyone]'"
        ) from None
    except Exception as error:  # it reads its settings then, and may start a database
        raise UserError(
            f"FiftyOne fails when it is imported: {type(error).__name__}: {error}. Check its "
            "installation and its settings (FIFTYONE_... variables, ~/.fiftyone)."
        ) from error
    try:
        fiftyone.list_datasets()
    except Exception as error:
        raise UserError(
            f"FiftyOne does not start: {error}. Set FIFTYONE_DATABASE_URI to a MongoDB that it can reach."
        ) from error
    return fiftyone  # type: ignore[no-any-return]


def _said(results: Results, dataset: str, keys: Collection[str]) -> dict[str, dict[str, float | None]]:
    """Scores and p-values of some images by key, named as fields: FiftyOne allows no dots in them."""
    names = _plain(results.manifest["detectors"])
    fields = {label: f"score_{name}" for label, name in names.items()}
    if results.decisions:
        fields |= {P_VALUE + label: f"p_{name}" for label, name in names.items()}
    wanted, found = pa.array(sorted(keys), pa.string()), {}
    for table in calibrated.columns(results.folder, results.manifest, dataset, [KEY, *fields]):
        for row in table.filter(pc.is_in(table[KEY], wanted)).to_pylist():
            found[row[KEY]] = {field: row[column] for column, field in fields.items()}
    return found


def _plain(labels: Iterable[str]) -> dict[str, str]:
    """Labels of detectors without dots, by label."""
    taken: dict[str, str] = {}
    for label in labels:
        other = taken.setdefault(label.replace(".", "_"), label)
        if other != label:
            raise UserError(
                f"detectors: {other} and {label} are one name in FiftyOne, which allows no dots. Give one of "
                "them another label and run again."
            )
    return {label: name for name, label in taken.items()}


def _files(
    results: Results, dataset: str, keys: Collection[str], folder: Path | None, exported: Exported
) -> dict[str, Path]:
    """The files of some images by key; those that have none and get none are counted."""
    try:
        rows = listed(results.folder, results.manifest, dataset, keys)
    except FileNotFoundError:
        raise UserError(
            f"{results.folder}: the listing of {dataset} is gone. Run the evaluation again, which lists anew."
        ) from None
    except OSError as error:
        raise UserError(
            f"{results.folder}: the listing of {dataset} cannot be read: {error}. Check the rights."
        ) from None
    own = {row[KEY]: _own(row) for row in rows.select([KEY, "uri", "offset", "column"]).to_pylist()}
    apart = pa.array([file is not None for file in own.values()], pa.bool_())
    found = {key: file for key, _ in _read(rows.filter(apart)) if (file := own[key]) is not None}
    inside = rows.filter(pc.invert(apart))
    if folder is None:
        exported.inside += len(inside)
    else:  # a listing has its own: another one may have the same keys for other images
        digest = results.manifest["datasets"][dataset]["digest"][:16]
        found |= _written(inside, folder / f"{dataset}-{digest}")
    wanted = [key for key, file in own.items() if file is not None or folder is not None]
    exported.gone += [f"{dataset}/{key}" for key in wanted if key not in found]
    return found


def _own(row: Mapping[str, Any]) -> Path | None:
    """The file that an image of a listing is on this machine; None if it is a part of one, or far away."""
    uri = row["uri"]
    part = uri is None or row["offset"] is not None or row["column"] is not None
    return None if part or storage.is_remote(uri) else Path(storage.located(uri)[1])


def _read(rows: pa.Table) -> Iterator[tuple[str, bytes]]:
    """Key and bytes of images of a listing, as far as they can be read; refuses what was changed."""
    for key, content in zip(rows[KEY].to_pylist(), fetch(rows), strict=True):
        if isinstance(content, bytes):
            yield key, content


def _written(rows: pa.Table, folder: Path) -> dict[str, Path]:
    """Images of a listing as new files by key, as far as they can be read. Keys are no names of files."""
    found = {}
    shapes = dict(zip(rows[KEY].to_pylist(), rows["shape"].to_pylist(), strict=True))
    for key, content in _read(rows):
        try:
            file, ending = as_file(content, shapes[key])
        except ValueError:
            continue
        path = folder / (hashlib.sha256(key.encode()).hexdigest()[:16] + ending)
        _write(path, file)
        found[key] = path.absolute()
    return found


def _write(path: Path, content: bytes) -> None:
    """Write a file of the folder that was asked for."""
    try:
        with files.roomy(path, path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    except OSError as error:
        raise UserError(f"--files: cannot write {path}: {error.strerror}. Choose another folder.") from None


def _sample(
    voxel: ModuleType, file: Path, role: str, images: Sequence[Shown], said: Mapping[str, float | None]
) -> Any:
    """One image, for whatever it was chosen."""
    first = images[0]
    classes = {"ground_truth": first.label, "prediction": first.prediction}
    return voxel.Sample(
        filepath=str(file),
        tags=[first.dataset, role, *(image.why for image in images)],
        key=first.key,
        percentile=first.percentile,
        **{name: voxel.Classification(label=str(label)) for name, label in classes.items() if label >= 0},
        **said,
    )
