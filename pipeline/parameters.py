"""The base of everything that is configured: sections of the config, detectors, and what they ask for."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Frozen(BaseModel):
    """Immutable; unknown keys are refused, and so are infinite numbers and `yes` for a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        given = value if isinstance(value, list | tuple) else [value]
        field = cls.model_fields[str(info.field_name)]
        if any(isinstance(each, bool) for each in given) and not _takes(bool, field.annotation):
            raise ValueError("YAML reads yes, no, on, off, true and false as truth values; expected another")
        return value


def _takes(kind: type, annotation: Any) -> bool:
    """Whether a field may hold values of a type."""
    return annotation in (kind, Any, object) or any(_takes(kind, inner) for inner in get_args(annotation))
