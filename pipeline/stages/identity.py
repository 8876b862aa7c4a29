"""What features depend on: with the same, they have the same bits on machines of a kind."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeline.config import schema
from pipeline.data import decode
from pipeline.data.manifest import Manifest
from pipeline.errors import UserError
from pipeline.network.description import Description


def identity(network: Description, manifest: Manifest, settings: schema.Extract) -> dict[str, Any]:
    """What the features of a dataset depend on; on machines of a kind, equal ones have bit-equal features."""
    return {
        **described(network),
        "transform": network.transform.model_dump(mode="json"),
        "decoder": settings.decoder,
        "limits": {**decode.limits(), "mib": settings.max_image_mib},
        "images": manifest.digest,
        "numerics": {
            **settings.model_dump(include={"batch_size", "precision", "channels_last", "compile"}),
            "feature_dtype": settings.feature_dtype,
            "device": device(settings.device, settings.gpus_per_actor),
            **extra_numerics(settings),
        },
    }


def extra_numerics(settings: schema.Extract) -> dict[str, Any]:
    """What columns beside the features depend on in addition: a batch size, if they have one of their own."""
    size = settings.extras_size
    return {} if size == settings.batch_size else {"extras_batch_size": size}


def described(network: Description) -> dict[str, Any]:
    """What a network is, and where it is tapped."""
    return {
        "weights": network.digest,
        "architecture": network.architecture,
        "head": network.taps.head,
        "blocks": list(network.taps.blocks),
    }


def require_decoder(name: str) -> None:
    """Refuse a decoder that is not installed.

    Raises:
        UserError: what to install.
    """
    try:
        version(name)
    except PackageNotFoundError:
        raise UserError(
            f"extract.decoder: {name} is not installed. `pip install {name}`, or set it to pillow."
        ) from None


def device(configured: str, gpus: float) -> str:
    """'cpu' or 'cuda', decided by the config alone."""
    if configured == "auto":
        return "cuda" if gpus > 0 else "cpu"
    return configured
