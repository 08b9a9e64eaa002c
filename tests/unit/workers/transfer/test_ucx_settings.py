"""What UCX makes of the settings that `kv_transfer.transport` becomes, on a host without RDMA."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dynamo_lite.config import Config
from dynamo_lite.rdma import RdmaPort
from dynamo_lite.transfer_plan import TransferPlan

# It ends without C's destructors: that of libnl-route, in NIXL's wheel, crashes on some hosts.
AGENT = """
import os, sys, traceback
from workers.transfer.nixl import NixlAgent

code = 0
try:
    print(len(NixlAgent("a").metadata()))
except Exception:
    traceback.print_exc()
    code = 1
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""
PORT = RdmaPort("mlx5_0", 1, "InfiniBand", "ACTIVE")  # there is none: as if it had been taken away


def agent(transport: str) -> subprocess.CompletedProcess[str]:
    config = Config.model_validate({"kv_transfer": {"transport": transport}})
    ours = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
    environment = ours | dict(TransferPlan(config, [PORT]).environment("cpu"))
    return subprocess.run(
        [sys.executable, "-c", AGENT], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("transport", ["auto", "tcp", "shm"])
def test_an_agent_comes_up_with_what_the_transport_allows(transport: str) -> None:
    started = agent(transport)
    assert started.returncode == 0, started.stderr
    assert int(started.stdout.split()[-1]) > 0
    assert "unused environment variable" not in started.stdout + started.stderr, "UCX knows all of them"


@pytest.mark.skipif(os.path.exists("/sys/class/infiniband/mlx5_0"), reason="the port that is not there is")
def test_rdma_that_is_not_there_is_a_failure_and_not_tcp() -> None:
    failed = agent("rdma")
    assert failed.returncode == 1
    assert "TransferError: UCX has none of the transports or devices that it was told to use" in failed.stderr
