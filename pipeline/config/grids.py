"""The section `tune` of a config: grids of detector parameters, and their points.

Grids are small and every point costs seconds, so all of them are tried: the result is exact, and nothing is
sampled or seeded.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from itertools import product
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError

from pipeline.config.explanations import explain
from pipeline.detectors.base import Detector
from pipeline.errors import UserError, unknown
from pipeline.metrics.fpr import FPR
from pipeline.metrics.metrics import against_ood, named
from pipeline.parameters import Frozen


def _decides(metric: str) -> str:
    """A metric of ID against OOD images that needs no labels."""
    known = [each.name for each in against_ood() if not each.needs_labels]
    with suppress(KeyError):
        if metric in known or isinstance(named(metric), FPR):
            return metric
    raise ValueError(unknown("metric", metric, known).rstrip("."))


class Tune(Frozen):
    """Parameters to be chosen on the images of the roles `id_val` and `ood_val`."""

    metric: Annotated[str, AfterValidator(_decides)] = Field(
        default="auroc",
        description="decides by its mean over the datasets with role ood_val: auroc, aupr_in, aupr_out, "
        "detection_error, fpr95_id or fpr95_ood, or FPR at another level, as fpr90_id",
    )
    grids: dict[str, dict[str, Any]] = Field(
        default={}, description="values to try by label and parameter: {knn: {k: [5, 20, 50]}}"
    )


def points(
    label: str, method: type[Detector], fixed: Mapping[str, Any], grid: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Every combination of values as the parameters of a detector, by names such as `knn[k=5]`.

    Args:
        label: the detector's label.
        method: its class, which validates each point.
        fixed: parameters that all points share unless the grid has them.
        grid: values by parameter; the last parameter varies fastest, equal points are one.

    Raises:
        UserError: unknown parameter, no list of values, or a value out of range.
    """
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(
                f"tune.grids.{label}.{name}: expected a list of values to try, e.g. [5, 20], got {values!r}."
            )
    found = {}
    for values in product(*grid.values()):
        given = dict(zip(grid, values, strict=True))
        try:
            detector = method.model_validate({**fixed, **given})
        except ValidationError as error:
            raise UserError("\n".join(explain(error, f"tune.grids.{label}.", method))) from None
        chosen = {name: detector.model_dump(mode="json")[name] for name in grid}
        text = ", ".join(f"{name}={value}" for name, value in chosen.items())
        found[f"{label}[{text}]"] = {**fixed, **chosen}
    return found
