"""What a Ray that is started on this machine alone listens to."""

from __future__ import annotations

import ipaddress
import os
import subprocess
import sys

import pytest

SCRIPT = """
import psutil
from pipeline.cluster.engine import opened

with opened("ray") as engine:
    assert list(engine.in_order(abs, [(-1,), (-2,)])) == [1, 2]
    this = psutil.Process()
    ours = {process.pid: process.name() for process in [this, *this.children(recursive=True)]}
    for found in psutil.net_connections("inet"):
        if found.status == "LISTEN" and found.pid in ours:
            print(ours[found.pid], found.laddr.ip)
with opened("ray") as engine:  # another one, after the first is gone
    assert list(engine.in_order(abs, [(-3,)])) == [3]
"""


@pytest.mark.cluster
def test_ray_on_this_machine_alone_can_be_reached_from_nowhere_else() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["HOME"] = "/dev/null"  # Ray's own token would lie there
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    listening = [line.rpartition(" ") for line in done.stdout.splitlines()]
    assert {"gcs_server", "raylet"} <= {name for name, _, _ in listening}
    elsewhere = []
    for name, _, text in listening:
        address = ipaddress.ip_address(text)
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        if not (mapped or address).is_loopback:
            elsewhere.append((name, text))
    assert elsewhere == []
