"""Real nats-server and etcd for tests that need them, one each a test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dynamo_lite import embedded
from dynamo_lite.config import EtcdAddress, NatsAddress
from dynamo_lite.embedded import EmbeddedServer

LEASE_TTL_S = 2


@pytest.fixture
async def nats_server(tmp_path: Path) -> AsyncIterator[EmbeddedServer[NatsAddress]]:
    """A nats-server that a test may kill and restart."""
    async with embedded.nats_server(tmp_path / "nats", tmp_path / "logs" / "nats.log") as server:
        yield server


@pytest.fixture
def nats(nats_server: EmbeddedServer[NatsAddress]) -> NatsAddress:
    """The address of a running nats-server."""
    return nats_server.address


@pytest.fixture
async def etcd_server(tmp_path: Path) -> AsyncIterator[EmbeddedServer[EtcdAddress]]:
    """An etcd, with short leases, that a test may kill and restart."""
    async with embedded.etcd_server(tmp_path / "etcd", tmp_path / "logs" / "etcd.log", LEASE_TTL_S) as server:
        yield server


@pytest.fixture
def etcd(etcd_server: EmbeddedServer[EtcdAddress]) -> EtcdAddress:
    """The address of a running etcd."""
    return etcd_server.address
