"""Discovery that survives the loss of a server: independent metadata servers, and an etcd cluster. All real."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from dynamo_lite import embedded
from dynamo_lite.config import EtcdAddress
from dynamo_lite.embedded import EmbeddedServer, etcd_binary
from dynamo_lite.errors import PlaneError
from dynamo_lite.plane import discovery_set
from dynamo_lite.plane.discovery import Discovery, Membership
from dynamo_lite.plane.discovery_set import Registry
from dynamo_lite.plane.wire import InstanceRecord
from dynamo_lite.processes import Child
from tests.instances import record

DEADLINE_S = 20.0
LEASE_TTL_S = 2
ONE, TWO, THREE = record("decode-0"), record("decode-1"), record("decode-2")


@asynccontextmanager
async def watching(etcd: EtcdAddress) -> AsyncIterator[tuple[Registry, Membership]]:
    """A registry and its membership, in a group that is cancelled at the end as a process's group is."""
    async with discovery_set.connect(etcd, "ns") as registry:
        try:
            async with asyncio.TaskGroup() as group:
                yield registry, await registry.membership(group)
                raise asyncio.CancelledError
        except asyncio.CancelledError:
            pass


async def names(membership: Membership, *wanted: InstanceRecord) -> None:
    """Wait until exactly these are members."""
    async with asyncio.timeout(DEADLINE_S):
        await membership.until(lambda instances: set(instances) == {each.incarnation for each in wanted})


def removals(membership: Membership) -> list[str]:
    """Filled with the names of those that are taken for gone."""
    gone: list[str] = []
    membership.add_listener(lambda added, removed: gone.append(removed.name) if removed and not added else None)
    return gone


@dataclass
class Servers:
    """Two independent metadata servers."""

    each: list[EmbeddedServer[EtcdAddress]]
    folder: Path

    @property
    def address(self) -> EtcdAddress:
        endpoints = tuple(server.address.endpoints[0] for server in self.each)
        return EtcdAddress(endpoints=endpoints, independent=True, lease_ttl_s=LEASE_TTL_S)

    async def kill(self, index: int) -> None:
        self.each[index].kill()
        await self.each[index].died()

    async def restart_empty(self, index: int) -> None:
        shutil.rmtree(self.folder / str(index) / "member")
        await self.each[index].restart()

    async def knows(self, index: int, *wanted: InstanceRecord) -> None:
        """Wait until that server by itself has these."""
        address = EtcdAddress(endpoints=self.each[index].address.endpoints)
        async with watching(address) as (_, membership):
            await names(membership, *wanted)


@pytest.fixture
async def servers(tmp_path: Path) -> AsyncIterator[Servers]:
    async with AsyncExitStack() as stack:
        each = [
            await stack.enter_async_context(
                embedded.etcd_server(tmp_path / str(index), tmp_path / f"{index}.log", LEASE_TTL_S)
            )
            for index in range(2)
        ]
        yield Servers(each, tmp_path)


async def test_a_worker_registers_with_every_server(servers: Servers) -> None:
    async with discovery_set.connect(servers.address, "ns") as registry, registry.register(ONE):
        await servers.knows(0, ONE)
        await servers.knows(1, ONE)
    await servers.knows(0)
    await servers.knows(1)


@pytest.mark.parametrize("killed", [0, 1])
async def test_the_loss_of_one_server_loses_nobody_and_keeps_nobody_out(servers: Servers, killed: int) -> None:
    async with (
        watching(servers.address) as (registry, membership),
        registry.register(ONE),
        discovery_set.connect(servers.address, "ns") as before,
    ):
        await names(membership, ONE)
        gone = removals(membership)
        await servers.kill(killed)
        async with before.register(TWO):
            await names(membership, ONE, TWO)
        await names(membership, ONE)
        async with discovery_set.connect(servers.address, "ns") as after, after.register(THREE):
            await names(membership, ONE, THREE)
        await names(membership, ONE)
        assert gone == ["decode-1", "decode-2"]


async def test_a_server_that_comes_back_empty_gets_everybody_again(servers: Servers) -> None:
    async with watching(servers.address) as (registry, membership), registry.register(ONE):
        await names(membership, ONE)
        gone = removals(membership)
        await servers.kill(0)
        await servers.restart_empty(0)
        await servers.knows(0, ONE)
        await servers.kill(1)
        async with registry.register(TWO):
            await names(membership, ONE, TWO)
        assert gone in ([], ["decode-1"])


async def test_an_empty_server_alone_is_not_believed_before_workers_had_the_time_to_register(servers: Servers) -> None:
    only_one = EtcdAddress(endpoints=servers.address.endpoints[1:])
    async with (
        Discovery.connect(only_one, "ns") as other,
        watching(servers.address) as (_, membership),
        other.register(ONE),
    ):
        await names(membership, ONE)
        await servers.kill(0)
        await servers.restart_empty(0)
        await servers.kill(1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(LEASE_TTL_S / 2):
                await membership.changed()
        await names(membership)  # it had the time


async def test_with_all_servers_gone_the_last_view_is_kept(servers: Servers) -> None:
    async with watching(servers.address) as (registry, membership), registry.register(ONE):
        await names(membership, ONE)
        await servers.kill(0)
        await servers.kill(1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2 * LEASE_TTL_S):
                await membership.changed()
        assert set(membership.instances) == {ONE.incarnation}
        await servers.restart_empty(0)
        await servers.knows(0, ONE)


async def test_a_start_needs_one_server_whatever_its_place_in_the_list(servers: Servers) -> None:
    address = servers.address.model_copy(
        update={"endpoints": ("http://no-such-host.invalid:2379", *servers.address.endpoints)}
    )
    await servers.kill(0)
    async with watching(address) as (registry, membership), registry.register(ONE):
        await names(membership, ONE)


async def test_a_start_without_any_server_says_which_it_asked(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery_set, "CONNECT_DEADLINE_S", 0.5)
    await servers.kill(0)
    await servers.kill(1)
    with pytest.raises(PlaneError, match=r"none of the discovery services http://127\.0\.0\.1:\d+, http"):
        async with discovery_set.connect(servers.address, "ns"):
            pass


@dataclass
class Member:
    """One of an etcd cluster."""

    child: Child
    argv: list[str]

    async def kill(self) -> None:
        self.child.kill()
        await self.child.wait()

    def start_again(self) -> None:
        self.child = Child.start("etcd", self.argv, self.child.log)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


@asynccontextmanager
async def etcd_cluster(folder: Path, size: int) -> AsyncIterator[tuple[EtcdAddress, list[Member]]]:
    """A real cluster on loopback; its members are killed at the end."""
    ports = free_ports(2 * size)
    clients, peers = ([f"http://127.0.0.1:{port}" for port in half] for half in (ports[:size], ports[size:]))
    members = []
    for index in range(size):
        options = {
            "name": f"m{index}",
            "data-dir": str(folder / f"m{index}"),
            "listen-client-urls": clients[index],
            "advertise-client-urls": clients[index],
            "listen-peer-urls": peers[index],
            "initial-advertise-peer-urls": peers[index],
            "initial-cluster": ",".join(f"m{each}={peers[each]}" for each in range(size)),
            "heartbeat-interval": "50",
            "election-timeout": "500",
        }
        argv = [str(etcd_binary()), *(f"--{name}={value}" for name, value in options.items())]
        members.append(Member(Child.start("etcd", argv, folder / f"m{index}.log"), argv))
    try:
        yield EtcdAddress(endpoints=tuple(clients), lease_ttl_s=LEASE_TTL_S), members
    finally:
        for member in members:
            await member.kill()


async def test_a_cluster_survives_the_loss_of_each_of_its_members(tmp_path: Path) -> None:
    async with (
        etcd_cluster(tmp_path, 3) as (address, members),
        watching(address) as (registry, membership),
        registry.register(ONE),
    ):
        await names(membership, ONE)
        gone = removals(membership)
        for member in members:  # one of them carries the watch, one leads
            await member.kill()
            async with discovery_set.connect(address, "ns") as fresh, fresh.register(TWO):
                await names(membership, ONE, TWO)
            await names(membership, ONE)
            member.start_again()
        assert gone == ["decode-1"] * 3


async def test_a_member_that_lost_the_others_ends_the_watch(tmp_path: Path) -> None:
    async with etcd_cluster(tmp_path, 3) as (address, members):
        last = EtcdAddress(endpoints=address.endpoints[2:])
        async with Discovery.connect(last, "ns") as discovery, asyncio.timeout(DEADLINE_S):
            revision = await discovery._list(Membership())
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(ended(discovery, revision))
                await members[0].kill()
                await members[1].kill()
                assert await watch


async def ended(discovery: Discovery, revision: int) -> bool:
    with contextlib.suppress(grpc.aio.AioRpcError):
        await discovery._watch(Membership(), revision)
    return True
