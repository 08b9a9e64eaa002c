"""Discovery on a real etcd."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from dynamo_lite.config import EtcdAddress
from dynamo_lite.embedded import EmbeddedServer, etcd_binary
from dynamo_lite.errors import PlaneError
from dynamo_lite.plane.discovery import Discovery, Membership
from dynamo_lite.plane.wire import PROTOCOL, InstanceRecord
from dynamo_lite.processes import Child, running
from tests.instances import record

DEADLINE_S = 20.0
ONE, TWO = record("decode-0"), record("decode-1")

HOLDER = """
import asyncio, sys
from dynamo_lite.config import EtcdAddress
from dynamo_lite.plane.discovery import Discovery
from tests.instances import record

async def main():
    async with Discovery.connect(EtcdAddress.model_validate_json(sys.argv[1]), "ns") as discovery:
        async with discovery.register(record("decode-0")):
            await asyncio.Event().wait()

asyncio.run(main())
"""


@asynccontextmanager
async def watching(etcd: EtcdAddress, namespace: str = "ns") -> AsyncIterator[tuple[Discovery, Membership]]:
    """A discovery and its membership, in a group that is cancelled at the end as a process's group is."""
    async with Discovery.connect(etcd, namespace) as discovery:
        try:
            async with asyncio.TaskGroup() as group:
                yield discovery, await discovery.membership(group)
                raise asyncio.CancelledError
        except asyncio.CancelledError:
            pass


async def names(membership: Membership, *wanted: InstanceRecord) -> None:
    """Wait until exactly these are members."""
    async with asyncio.timeout(DEADLINE_S):
        await membership.until(lambda instances: set(instances) == {each.incarnation for each in wanted})


async def test_a_registration_is_visible_while_it_lasts(etcd: EtcdAddress) -> None:
    changes: list[tuple[InstanceRecord | None, InstanceRecord | None]] = []
    async with watching(etcd) as (_, membership), Discovery.connect(etcd, "ns") as worker:
        membership.add_listener(lambda added, removed: changes.append((added, removed)))
        async with worker.register(ONE):
            await names(membership, ONE)
            assert membership.instances[ONE.incarnation] == ONE
        await names(membership)
    assert changes == [(ONE, None), (None, ONE)]


async def test_a_membership_lists_who_registered_before_it_was_opened(etcd: EtcdAddress) -> None:
    async with (
        Discovery.connect(etcd, "ns") as worker,
        worker.register(ONE),
        worker.register(TWO),
        watching(etcd) as (_, membership),
    ):
        assert set(membership.instances.values()) == {ONE, TWO}


async def test_deployments_in_one_etcd_do_not_see_each_other(etcd: EtcdAddress) -> None:
    async with (
        watching(etcd, "ns2") as (other, membership),
        Discovery.connect(etcd, "ns") as worker,
        worker.register(ONE),
        other.register(TWO),
    ):
        await names(membership, TWO)


async def test_a_registration_outlives_its_lease_time(etcd: EtcdAddress) -> None:
    removed: list[InstanceRecord] = []
    async with watching(etcd) as (discovery, membership), discovery.register(ONE):
        await names(membership, ONE)
        membership.add_listener(lambda added, gone: removed.append(gone) if gone else None)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2 * etcd.lease_ttl_s):
                await membership.changed()
    assert [each for each in removed if each is not ONE] == [ONE]  # only the end of the body removed it


async def test_a_killed_worker_disappears_with_its_lease(etcd: EtcdAddress, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", HOLDER, etcd.model_dump_json()]
    async with watching(etcd) as (_, membership), running(Child.start("w", argv, tmp_path / "w.log"), 1.0) as holder:
        await names(membership, ONE)
        holder.kill()
        await names(membership)


async def test_a_lease_lost_behind_our_back_is_granted_again(etcd: EtcdAddress, tmp_path: Path) -> None:
    removals = 0

    def count(added: InstanceRecord | None, removed: InstanceRecord | None) -> None:
        nonlocal removals
        removals += removed is not None

    async with watching(etcd) as (discovery, membership), discovery.register(ONE):
        await names(membership, ONE)
        membership.add_listener(count)
        (lease,) = [line for line in (await etcdctl(etcd, tmp_path, "lease", "list")).split() if len(line) == 16]
        await etcdctl(etcd, tmp_path, "lease", "revoke", lease)
        async with asyncio.timeout(DEADLINE_S):
            await membership.until(lambda instances: removals == 1 and not instances)
        await names(membership, ONE)


async def test_while_etcd_is_down_the_last_view_is_kept_and_afterwards_it_is_true_again(
    etcd_server: EmbeddedServer[EtcdAddress],
) -> None:
    etcd = etcd_server.address
    async with watching(etcd) as (_, membership), AsyncExitStack() as workers:
        staying = await workers.enter_async_context(Discovery.connect(etcd, "ns"))
        await workers.enter_async_context(staying.register(ONE))
        async with Discovery.connect(etcd, "ns") as leaving, leaving.register(TWO):
            await names(membership, ONE, TWO)
            etcd_server.kill()
            await etcd_server.died()
        assert set(membership.instances.values()) == {ONE, TWO}  # TWO left, and nobody could say so
        await etcd_server.restart()
        await names(membership, ONE)  # TWO's lease ran out
        async with staying.register(TWO):
            await names(membership, ONE, TWO)


async def test_a_registration_survives_an_etcd_that_lost_its_data(
    etcd_server: EmbeddedServer[EtcdAddress], tmp_path: Path
) -> None:
    async with watching(etcd_server.address) as (discovery, membership), discovery.register(ONE):
        await names(membership, ONE)
        etcd_server.kill()
        await etcd_server.died()
        (tmp_path / "etcd" / "member").rename(tmp_path / "lost")
        await etcd_server.restart()
        async with watching(etcd_server.address) as (_, fresh):
            await names(fresh, ONE)
        await names(membership, ONE)


async def test_compaction_does_not_stop_the_watch(etcd_server: EmbeddedServer[EtcdAddress], tmp_path: Path) -> None:
    etcd = etcd_server.address
    async with Discovery.connect(etcd, "ns") as discovery, discovery.register(ONE):
        membership = Membership()
        old = await discovery._list(membership)
        for number in range(5):
            await etcdctl(etcd, tmp_path, "put", "/elsewhere", str(number))
        await etcdctl(etcd, tmp_path, "compact", str(old + 4))
        try:
            async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
                group.create_task(
                    discovery._follow(membership, old, lambda _: None)
                )  # as if this revision were long ago
                async with discovery.register(TWO):
                    await names(membership, ONE, TWO)
                raise asyncio.CancelledError
        except asyncio.CancelledError:
            pass


async def test_a_record_of_another_version_is_ignored(etcd: EtcdAddress, tmp_path: Path) -> None:
    async with watching(etcd) as (discovery, membership):
        await etcdctl(etcd, tmp_path, "put", "/dynamo-lite/ns/instances/future", '{"shape": "unknown"}')
        older = msgspec.json.encode(msgspec.structs.replace(TWO, protocol=PROTOCOL - 1)).decode()
        await etcdctl(etcd, tmp_path, "put", "/dynamo-lite/ns/instances/past", older)
        async with discovery.register(ONE):
            await names(membership, ONE)


async def test_etcd_credentials_are_used_and_renewed_after_a_restart(
    etcd_server: EmbeddedServer[EtcdAddress], tmp_path: Path
) -> None:
    open_etcd = etcd_server.address
    for command in ("user add root:secret", "role add root", "user grant-role root root", "auth enable"):
        await etcdctl(open_etcd, tmp_path, *command.split())
    etcd = open_etcd.model_copy(update={"user": "root", "password": "secret"})
    for wrong in (open_etcd, etcd.model_copy(update={"password": "wrong"})):
        with pytest.raises(PlaneError, match="etcd refuses"):
            async with Discovery.connect(wrong, "ns"):
                pass
    async with watching(etcd) as (discovery, membership), discovery.register(ONE):
        await names(membership, ONE)
        etcd_server.kill()  # etcd forgets its tokens
        await etcd_server.died()
        await etcd_server.restart()
        async with discovery.register(TWO):
            await names(membership, ONE, TWO)


@pytest.mark.parametrize("endpoint", ["http://no-such-host.invalid:2379", "https://127.0.0.1:2379"])
async def test_an_unusable_etcd_address_is_refused_at_once(endpoint: str) -> None:
    with pytest.raises(PlaneError):
        async with Discovery.connect(EtcdAddress(endpoints=(endpoint,)), "ns"):
            pass


async def test_discovery_works_on_uvloop(etcd: EtcdAddress) -> None:
    code = HOLDER.replace("await asyncio.Event().wait()", "pass").replace("asyncio.run", "__import__('uvloop').run")
    process = await asyncio.create_subprocess_exec(sys.executable, "-W", "error", "-c", code, etcd.model_dump_json())
    assert await process.wait() == 0


async def etcdctl(etcd: EtcdAddress, folder: Path, *arguments: str) -> str:
    """The output of etcdctl, as an operator would use it."""
    binary = etcd_binary().with_name("etcdctl")
    log = folder / f"etcdctl-{'-'.join(arguments).replace('/', '_')[:80]}.log"
    argv = [str(binary), f"--endpoints={etcd.endpoints[0]}", *arguments]
    async with running(Child.start("etcdctl", argv, log), 1.0) as child:
        code = await child.wait()
    output = await asyncio.to_thread(log.read_text)
    assert code == 0, output
    return output
