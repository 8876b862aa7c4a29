"""What tests on a GPU share; without a GPU they are refused, not skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


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
    from pipeline.network.classifier import settings_kept

    with settings_kept():
        yield


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray with four logical CPUs and the real GPU."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            num_cpus=4,
            num_gpus=1,
            object_store_memory=300 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        yield
        ray.shutdown()
