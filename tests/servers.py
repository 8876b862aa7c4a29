"""What tests with servers of their own share: a local Ray, ports that are free, waiting until one answers."""

from __future__ import annotations

import socket
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on, each another one."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in sockets]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    return free_ports(1)[0]


def wait(for_what: str, condition: Callable[[], Any], seconds: float = 60) -> Any:
    """The first true value of a condition.

    Raises:
        TimeoutError: if there is none in that time.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.01)
    raise TimeoutError(for_what)


@contextmanager
def ray(cpus: int, gpus: int, environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """A local Ray for the time of a block.

    Args:
        cpus: logical ones.
        gpus: the same; they need not be there.
        environment: variables that workers inherit.
    """
    import ray

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RAY_USAGE_STATS_ENABLED": "0", **(environment or {})}.items():
            patch.setenv(name, value)
        ray.init(
            address="local",
            num_cpus=cpus,
            num_gpus=gpus,
            object_store_memory=300 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        yield
        ray.shutdown()


def answers(url: str) -> bool:
    """Whether a server is up."""
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True
