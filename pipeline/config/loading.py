"""From a config file to a validated run: `extends`, overrides, and paths that are absolute."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config import inherit, sweep
from pipeline.config.documents import Section
from pipeline.config.explanations import explain, place_told
from pipeline.config.overrides import apply_override
from pipeline.config.schema import BY_HARDWARE, CLASS_FILES, Config, Dataset, DetectorEntry, Start, sound
from pipeline.errors import UserError


def load(source: str, overrides: list[str] | None = None) -> Config:
    """Read a config file of one model, or a bundled one by name, and apply `key.path=value` overrides.

    A file may build on another (`extends`, see `inherit.read`); overrides come last.

    Raises:
        UserError: missing file, invalid YAML, unknown key, value of a wrong type or out of range,
            unknown detector, several `models`; the message names file and key.
    """
    first, *others = found = load_all(source, overrides)
    if others:
        raise UserError(
            f"{source}: models: {', '.join(each.name for each in found)} are a run each; expected one. "
            "Choose its model by the label, with --set model=LABEL."
        )
    return first


def load_all(source: str, overrides: list[str] | None = None) -> list[Config]:
    """As `load`, with a config for each of the file's `models`; their names end in the model's label.

    Raises:
        UserError: as `load`, but for several models.
    """
    found, base = read(source, overrides)
    return [_absolute(config, base) for config in found.values()]


def read(source: str, overrides: list[str] | None = None) -> tuple[dict[str, Config], Path]:
    """The configs as `load_all` validates them, with paths as they are written, and the folder of the file.

    They go by the labels of their models; that of a file without `models` by "".

    Raises:
        UserError: as `load_all`.
    """
    path = locate(source)
    data = inherit.read(path, bundled())
    for override in overrides or []:
        apply_override(data, override)
    try:
        sections = sweep.spread(data)
    except UserError as error:
        raise UserError(f"{path}: {place_told(str(error), data)}") from None
    wrong: dict[str, None] = {}
    found = {}
    for label, section in sections.items():
        config, mistakes = _validated(section, path.parent)
        wrong |= dict.fromkeys(sweep.told(label, line) for line in mistakes)
        if config is not None:
            found[label] = config
    if wrong:
        raise UserError("\n".join(f"{path}: {line}" for line in wrong))
    return found, path.parent


def _validated(data: Section, base: Path) -> tuple[Config | None, list[str]]:
    """The config of one model, and all that is wrong with it."""
    wrong: list[str] = []
    try:
        config = Config.model_validate(data)
        entries = list(_absolute(config, base).detectors)
    except ValidationError as error:
        wrong, config = explain(error, "", Config, data), None
        entries = sound(data.get("detectors"))
    for entry in entries:
        wrong += _mistakes(entry.build, data)
    if config is not None and not wrong:
        wrong = _mistakes(_absolute(config, base).points, data)
    return config, wrong


def _mistakes(made: Callable[[], object], data: Section) -> list[str]:
    """What is wrong with a detector, or with a grid, each with its line in the file."""
    try:
        made()
    except UserError as error:
        return [place_told(line, data) for line in str(error).split("\n")]
    return []


def locate(source: str) -> Path:
    """Path of a config file, given its path or the name of a bundled one."""
    path = Path(source)
    if path.is_file():
        return path
    folder = bundled()
    if (folder / f"{source}.yaml").is_file():
        return folder / f"{source}.yaml"
    known = ", ".join(sorted(found.stem for found in folder.glob("*.yaml")))
    raise UserError(f"{source}: no such config file. Give a path, or the name of a bundled one: {known}.")


def bundled() -> Path:
    """Folder of the configs that come with the package."""
    installed = Path(str(files("pipeline"))) / "configs"
    return installed if installed.is_dir() else Path(str(files("pipeline"))).parent / "configs"


def resolve(path: str) -> Path:
    """File behind a configured path; 'package://module/file' lies inside an installed package."""
    if not path.startswith("package://"):
        return Path(path)
    module, _, name = path.removeprefix("package://").partition("/")
    try:
        spec = find_spec(module)
    except (ModuleNotFoundError, ValueError):
        spec = None
    if spec is None or spec.submodule_search_locations is None:
        raise UserError(f"{path}: no package named {module!r} is installed.")
    return Path(str(files(module))) / name


def _labels_are_a_file(dataset: Dataset) -> bool:
    named = dataset.format in ("imagefolder", "imagelist") and (dataset.labels or "").endswith(CLASS_FILES)
    return dataset.format == "idx" or named


def is_name(weights: str) -> bool:
    """Whether configured weights are a name (`IMAGENET1K_V1`, `random`) and no path."""
    return not re.search(r"[./\\]", weights)


def dump(config: Config) -> str:
    """The resolved config as YAML; loads back to an equal config."""
    return _yaml(_plain(config))


def dump_all(found: Mapping[str, Config]) -> str:
    """The configs of `read` as one YAML, from which it reads equal ones."""
    return _yaml(sweep.gathered({label: _plain(config) for label, config in found.items()}))


def _plain(config: Config) -> dict[str, Any]:
    """All keys but those that `hardware` says, so that it can be set anew."""
    found = config.model_dump(mode="json")
    for section, key in BY_HARDWARE:
        if found[section][key] == (config.hardware == "gpu"):
            del found[section][key]
    return found


def _yaml(content: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)


def relocated(config: Config, place: Callable[[str, str, Start], str]) -> Config:
    """The config with each of its paths replaced; names of weights, labels, modules and detectors stay.

    Args:
        config: the config.
        place: gives the new path for a field, its path, and what a relative path in that field starts from.
    """

    def code(field: str, reference: str) -> str:
        file, separator, name = reference.rpartition(":")
        return f"{place(field, file, 'file')}:{name}" if separator and file.endswith(".py") else reference

    def data(field: str, path: str | None) -> str | None:
        return None if path is None else place(field, path, "data")

    def dataset(given: Dataset) -> Dataset:
        where = f"datasets.{given.name}"
        source = (code if given.format == "python" else data)(f"{where}.path", given.path)
        labels = data(f"{where}.labels", given.labels) if _labels_are_a_file(given) else given.labels
        root = data(f"{where}.root", given.root)
        return given.model_copy(update={"path": source, "root": root, "labels": labels})

    def detector(given: DetectorEntry) -> DetectorEntry:
        method = code(f"detectors.{given.label}.method", given.method)
        return given.model_copy(update={"method": method, "steps": tuple(map(detector, given.steps))})

    model = config.model
    find = {"factory": code, "exported": data}.get(model.source, lambda _, name: name)
    name = find("model.name", model.name)
    named = model.weights is not None and is_name(model.weights)
    weights = model.weights if named else data("model.weights", model.weights)
    return config.model_copy(
        update={
            "workspace": place("workspace", config.workspace, "current"),
            "data": None if config.data is None else place("data", config.data, "current"),
            "model": model.model_copy(update={"name": name, "weights": weights}),
            "datasets": tuple(map(dataset, config.datasets)),
            "detectors": tuple(map(detector, config.detectors)),
            "report": config.report.model_copy(
                update={"metadata": data("report.metadata", config.report.metadata)}
            ),
        }
    )


def _absolute(config: Config, base: Path) -> Config:
    """Paths become absolute: workspace and data from the current folder, code from the config file.

    Datasets and weights start from `data`; from the folder of the config file if there is none.
    """
    current = str(Path.cwd())
    data = str(base) if config.data is None else _beside(current, config.data)
    starts = {"current": current, "file": str(base), "data": data}
    return relocated(config, lambda _, path, start: _beside(starts[start], path))


def _beside(start: str, path: str) -> str:
    """A path as a URI or an absolute one, given where relative ones start."""
    if "://" in path:
        return path
    if "://" in start and not path.startswith(("/", "~")):
        return f"{start.rstrip('/')}/{path}"
    return os.path.realpath(Path(start) / Path(path).expanduser())  # a loop of links is told when it is used
