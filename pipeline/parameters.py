"""The base of everything that is configured: sections of the config, detectors, and what they ask for."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from pipeline.errors import has_credentials


class Frozen(BaseModel):
    """Immutable; refuses unknown keys, infinite numbers, `yes` for a number, and credentials."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        given = value if isinstance(value, list | tuple) else [value]
        field = cls.model_fields[str(info.field_name)]
        if any(isinstance(each, bool) for each in given) and not _takes(bool, field.annotation):
            raise ValueError("YAML reads yes, no, on, off, true and false as truth values; expected another")
        if any(isinstance(each, str) and has_credentials(each) for each in given):
            raise ValueError(
                "a config must not hold credentials; set them in the environment, e.g. AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return value


def _takes(kind: type, annotation: Any) -> bool:
    """Whether a field may hold values of a type."""
    return annotation in (kind, Any, object) or any(_takes(kind, inner) for inner in get_args(annotation))
