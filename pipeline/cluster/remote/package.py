"""What is sent to a cluster to run an evaluation there: a folder with the code, the config and its files.

The code goes along, so the cluster runs what checked the config; what it depends on comes from the cluster's
environment. Paths in the config are those of the cluster, but for relative ones: they mean files of this
machine, which are sent too, a file of code with the modules beside it that it imports. Folders of data are
not, and no file whose time stamp is part of its identity.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pipeline import beside
from pipeline.cluster.remote import environment, start
from pipeline.config import loading, sweep
from pipeline.config.schema import Config, Start
from pipeline.errors import UserError

LIMIT = 90 * 2**20
"""Bytes of files that a config may name; Ray takes packages of 100 MiB, and the code needs some of them."""

CONFIG, FILES = "config.yaml", "files"
"""Names in the package."""

_STAMPED = ("webdataset", "parquet")
"""Formats whose images are told apart by size and time stamp of their file, which unpacking changes."""

_ELSEWHERE = "Give a folder that all nodes see, or a URI such as s3://bucket/prefix."


def fill(folder: Path, source: str, overrides: list[str], variables: Mapping[str, str]) -> dict[str, Config]:
    """Make the package of an evaluation in an empty folder.

    Args:
        folder: becomes the working directory of the job.
        source: a config file, or the name of a bundled one.
        overrides: `key.path=value` changes to it.
        variables: environment variables of the job.

    Returns:
        The configs that are sent, as `loading.read` gives them, with paths as they are in the package and on
        the cluster.

    Raises:
        UserError: whatever `config.load` refuses; workspace, data or another folder on this machine; a file
            that is not there or whose identity would be lost; files that are too large.
    """
    sent, files = _relocated(*loading.read(source, overrides))
    (folder / CONFIG).write_text(loading.dump_all(sent), encoding="utf-8")
    for name, file in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    fill_code(folder, variables)
    return sent


def fill_code(folder: Path, variables: Mapping[str, str]) -> None:
    """Make the package of a command that takes no config: code, what it needs, and environment variables."""
    code = folder / "pipeline"
    shutil.copytree(Path(__file__).parents[2], code, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(loading.bundled(), code / "configs", dirs_exist_ok=True)
    (folder / start.FILE).write_text("\n".join(start.requirements()), encoding="utf-8")
    environment.write(folder, variables)


def require_elsewhere(field: str, path: str) -> None:
    """Refuse a path that a job on a cluster would look for in its own folder, which is deleted.

    Raises:
        UserError: a relative path, or none.
    """
    if _is_here(path):
        raise UserError(f"{field}: {path or 'not given, and so'} lies in the job's own folder. {_ELSEWHERE}")


def contents(folder: Path) -> Iterator[tuple[str, int]]:
    """Names and sizes of all files of a package."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path.stat().st_size


def _relocated(found: Mapping[str, Config], base: Path) -> tuple[dict[str, Config], dict[str, Path]]:
    """The configs for the cluster, and the files that go along by their names in the package."""
    sending, sent = _Sending(base), {}
    for label, settings in found.items():
        try:
            _check(settings)
            sent[label] = loading.relocated(settings, partial(sending.place, settings.data is not None))
        except UserError as error:
            raise UserError(sweep.told(label, str(error))) from None
    _require_small(sending.files.values())
    return sent, sending.files


@dataclass
class _Sending:
    """The files that go along, by their names in the package, and a number for each place they come from."""

    base: Path
    """Folder of the config file."""
    files: dict[str, Path] = field(default_factory=dict)
    numbers: dict[Path, int] = field(default_factory=dict)

    def send(self, file: Path, origin: Path, name: Path) -> str:
        """One file; those of one origin lie together."""
        sent = f"{FILES}/{self.numbers.setdefault(origin, len(self.numbers))}/{name.as_posix()}"
        self.files[sent] = file
        return sent

    def place(self, has_data: bool, key: str, path: str, start: Start) -> str:
        """The path of a field in the package, or as it is if it is the cluster's.

        Args:
            has_data: whether the config names the folder that its data start from.
            key: of the path in the config.
            path: as it is written.
            start: what a relative one starts from.

        Raises:
            UserError: a folder of this machine, or a file that is not there.
        """
        if not _is_here(path) or (start == "data" and has_data):
            return path
        file = self.base / path
        if start == "current" or file.is_dir() or "*" in path:
            raise UserError(f"{key}: {path} lies on this machine. {_ELSEWHERE}")
        if not file.is_file():
            raise UserError(
                f"{key}: no such file: {file}. A relative path means a file of this machine, which is sent "
                "with the job; what the cluster has needs an absolute path or a URI."
            )
        if start != "file":
            return self.send(file, file, Path(file.name))
        code = file.resolve()
        root, found = beside.companions(code)
        for each in (part for module in found.values() for part in _parts(module)):
            self.send(each, root, each.relative_to(root))
        return self.send(code, root, code.relative_to(root))


def _require_small(files: Iterable[Path]) -> None:
    """Refuse files that Ray would not take."""
    sizes = {file: file.stat().st_size for file in files}
    total = sum(sizes.values())
    if total > LIMIT:
        largest = max(sizes, key=lambda file: sizes[file])
        raise UserError(
            f"{largest} has {_mib(sizes[largest])} MiB, all files of the config {_mib(total)}; at most "
            f"{_mib(LIMIT)} are sent with a job. Put it on storage that all nodes see; give its path there."
        )


def _parts(module: Path) -> list[Path]:
    """All files of a module or package but compiled and hidden ones."""
    if not module.is_dir():
        return [module]
    inside = ((file, file.relative_to(module).parts) for file in sorted(module.rglob("*")) if file.is_file())
    return [
        file for file, names in inside if not any(name.startswith((".", "__pycache__")) for name in names)
    ]


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"


def _is_here(path: str) -> bool:
    """Whether a path is relative; others mean the cluster's."""
    return "://" not in path and not path.startswith(("/", "~"))


def _check(settings: Config) -> None:
    """Refuse what a relative path to one file does not tell."""
    uri = settings.tracking.uri or ""
    if uri.startswith("sqlite:///") and _is_here(uri.removeprefix("sqlite:///")):
        raise UserError(
            f"tracking.uri: {uri} lies on this machine. Name a server (http://host:5000), or leave it out."
        )
    for dataset in settings.datasets if settings.data is None else ():
        where = f"datasets.{dataset.name}"
        if dataset.format in _STAMPED and _is_here(dataset.path):
            raise UserError(
                f"{where}.path: {dataset.path} lies on this machine, and no {dataset.format} file is sent, "
                f"because its time stamp is part of its identity. {_ELSEWHERE}"
            )
        if dataset.format == "imagelist" and _is_here(dataset.path) and dataset.root is None:
            raise UserError(
                f"{where}.root: not set, so images lie beside {dataset.path} on this machine. {_ELSEWHERE}"
            )
