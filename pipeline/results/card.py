"""What is to be known of a bundle, in words: its `README.md`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.results.evaluation import Evaluation
from pipeline.stages import bundle

_SHOWN = ("auroc", "fpr95_id")


def text(document: Mapping[str, Any], evaluation: Evaluation) -> str:
    """The card of a bundle of a run.

    Args:
        document: `bundle.json`.
        evaluation: the run.
    """
    parts = [_opening(document), _use(), _detectors(document), _numbers(document, evaluation)]
    parts += [_thresholds(document), _data(document), _limits(document)]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _opening(document: Mapping[str, Any]) -> Iterator[str]:
    run, model = document["run"], document["model"]
    count, width = (document["network"]["taps"]["head"], document["network"]["digest"][:12])
    yield f"# Detectors of {run['name']}"
    yield ""
    yield (
        f"Fitted out-of-distribution detectors of the evaluation `{run['name']}/{run['id']}`, finished "
        f"{run['finished']}, made with ood-pipeline {document['versions']['ood-pipeline']}."
    )
    held = (
        "in this folder"
        if document["holds_weights"]
        else f"not in this folder: {model['weights'] or model['name']}"
    )
    yield (
        f"The network is `{model['name']}` ({model['source']}); its last layer is `{count}`, its weights "
        f"(digest {width}) are {held}."
    )


def _use() -> Iterator[str]:
    yield "## Use"
    yield ""
    yield "```python"
    yield "import pipeline"
    yield 'detect = pipeline.load_bundle("detector.ood")  # this folder'
    yield 'detect(["one.jpg", "two.jpg"]).to_pandas()      # paths, bytes, PIL images or uint8 arrays'
    yield "```"
    yield ""
    yield "On many images, here or on a cluster: `ood-pipeline apply detector.ood IMAGES --out scores`."


def _detectors(document: Mapping[str, Any]) -> Iterator[str]:
    yield "## Detectors"
    yield ""
    yield "Higher scores are more OOD, for every detector."
    yield ""
    for label, entry in document["detectors"].items():
        marked = " Uses OOD images." if entry["uses_ood"] else ""
        notices = "".join(f" Note: {notice}" for notice in entry["notices"])
        yield f"* `{label}`: {entry['title']}. {entry['reading']}{marked}{notices}"


def _numbers(document: Mapping[str, Any], evaluation: Evaluation) -> Iterator[str]:
    yield "## Measured"
    yield ""
    yield "On the ID and OOD images of the evaluation, with 95 % intervals:"
    yield ""
    yield "| detector | dataset | metric | value | interval |"
    yield "| --- | --- | --- | --- | --- |"
    for row in evaluation.metrics.to_pylist():
        if row["detector"] in document["detectors"] and row["metric"] in _SHOWN:
            interval = f"{row['ci_low']:.4f} to {row['ci_high']:.4f}"
            names = f"`{row['detector']}` | {row['dataset']} | {row['metric']}"
            yield f"| {names} | {row['value']:.4f} | {interval} |"


def _thresholds(document: Mapping[str, Any]) -> Iterator[str]:
    yield "## Thresholds"
    yield ""
    calibration = document["calibration"]
    if calibration is None:
        yield (
            "None: the evaluation had no held-out ID images (role id_val). There are scores, and no p-values "
            "and no flags."
        )
        return
    rates = ", ".join(f"{rate:g}" for rate in document["false_alarm"])
    by_class = ", those of the same predicted class" if calibration["per_class"] else ""
    yield (
        f"An image is compared with {calibration['images']:,} held-out ID images of "
        f"{', '.join(calibration['datasets'])}{by_class}: its p-value is the share of them, and of itself, "
        f"whose score is at least as high. It is called OOD if that is at most the false-alarm rate: {rates}."
        " Of new images like the held-out ones no more than this share is flagged on average."
    )
    learned = [label for label, entry in document["detectors"].items() if entry["learned_on_held"]]
    if learned and calibration["role"] == "id_val":
        yield (
            f"Parameters of {', '.join(learned)} were fitted to the same held-out images, so that their "
            "p-values are not exactly those of new images."
        )


def _data(document: Mapping[str, Any]) -> Iterator[str]:
    yield "## Data of the evaluation"
    yield ""
    for name, entry in document["data"].items():
        yield f"* {name}: role {entry['role']}, {entry['rows']:,} images, digest {entry['digest'][:12]}"


def _limits(document: Mapping[str, Any]) -> Iterator[str]:
    yield "## Limits"
    yield ""
    yield (
        "* Rates hold for images that are drawn as the held-out ones were. A camera, a country or a season "
        "more, and they are to be calibrated again."
    )
    yield "* A score says how unusual an image is to this network, not why, nor whether its class is right."
    machines = "; ".join(document["machines"])
    yield f"* Scores have the same bits on machines of one kind, and nearly on others. Made on: {machines}."
    for label, entry in document["detectors"].items():
        for part in (entry["config"], *entry["config"]["steps"]):
            if bundle.holds(part["method"]):
                yield (
                    f"* Code of `{label}` is in this folder, named by its digest: "
                    f"`{part['method'].rpartition(':')[0]}`. It runs only where that is allowed "
                    "(`--trust-code`)."
                )
    source = document["model"]["source"]
    if source == "factory":
        yield (
            f"* The code that builds the network, `{document['model']['name']}`, is not in this folder and "
            "must be installed where it is used."
        )
