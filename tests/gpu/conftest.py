"""What tests on a GPU share; without a GPU they are refused, not skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers import ray


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse to run tests on a GPU where torch sees none."""
    if any(item.get_closest_marker("gpu") for item in session.items):
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError(
                f"tests marked gpu need an NVIDIA GPU, and torch {torch.__version__} sees none; none was run"
            )


@pytest.fixture(autouse=True)
def settings_of_torch() -> Iterator[None]:
    """Each test finds torch as it comes: no thread count or flag of another one."""
    from pipeline.network.known import settings_kept

    with settings_kept():
        yield


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray with four logical CPUs and the real GPU."""
    with ray(cpus=4, gpus=1):
        yield
