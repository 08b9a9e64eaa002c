"""The fleet over real NATS and etcd: membership, lost events, new incarnations, lost workers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from dynamo_lite.config import EtcdAddress
from dynamo_lite.config import Router as Weights
from dynamo_lite.embedded import EmbeddedServer
from dynamo_lite.plane.bus import Bus
from dynamo_lite.plane.wire import Incarnation
from dynamo_lite.router.fleet import Fleet
from dynamo_lite.router.router import Router
from kvbm.hashing import block_hashes
from tests.instances import matched, record

from .conftest import SUBJECTS, Plane

DEADLINE_S = 20.0
D0, D1 = record("decode-0"), record("decode-1")
PROMPT = list(range(1000, 1320))  # 20 blocks
HASHES = block_hashes(PROMPT, 16)


async def until(fleet: Fleet, holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        await fleet.until(holds)


async def test_a_fleet_opens_with_the_blocks_of_the_workers_that_are_there(plane: Plane) -> None:
    async with plane.worker(D0) as worker:
        await worker.store(*HASHES[:12])
        async with plane.fleet() as fleet:
            assert matched(fleet, HASHES) == {D0.incarnation: 12}
            await worker.store(*HASHES[12:])
            await until(fleet, lambda: fleet.index.seq(D0.incarnation) == 2)
            placement = Router(fleet, Weights()).place(PROMPT)
            assert placement.decode == D0
            assert placement.overlap_blocks == 19
            assert worker.snapshots == 1


async def test_a_worker_that_joins_later_is_asked_and_one_that_leaves_is_forgotten(plane: Plane) -> None:
    async with plane.fleet() as fleet:
        async with plane.worker(D0) as worker:
            await until(fleet, lambda: D0.incarnation in fleet)
            await worker.store(1, 2, 3)
            await until(fleet, lambda: matched(fleet, [1, 2, 3]) == {D0.incarnation: 3})
        await until(fleet, lambda: D0.incarnation not in fleet)
        assert matched(fleet, [1, 2, 3]) == {}


async def test_a_lost_batch_is_noticed_at_the_next_one_and_made_up_for(plane: Plane) -> None:
    async with plane.fleet() as fleet, plane.worker(D0) as worker:
        await until(fleet, lambda: D0.incarnation in fleet and not fleet.refreshing(D0.incarnation))
        await worker.store(1)
        await worker.store(2, lose=True)
        await worker.store(3)
        await until(fleet, lambda: matched(fleet, [1, 2, 3]) == {D0.incarnation: 3})
        assert worker.snapshots == 2


async def test_a_lost_last_batch_is_noticed_from_load_reports(plane: Plane) -> None:
    async with plane.fleet() as fleet, plane.worker(D0) as worker:
        await until(fleet, lambda: D0.incarnation in fleet and not fleet.refreshing(D0.incarnation))
        await worker.store(1, lose=True)
        await worker.report()
        await worker.report()
        await until(fleet, lambda: matched(fleet, [1]) == {D0.incarnation: 1})


async def test_batches_that_arrive_while_the_snapshot_is_under_way_are_not_lost(plane: Plane) -> None:
    async with plane.worker(D0) as worker:
        worker.held_back.clear()
        async with plane.fleet() as fleet, asyncio.timeout(DEADLINE_S):
            # Nobody waits for ever for a worker's blocks: the fleet is open, and D0 can be placed on.
            assert fleet.refreshing(D0.incarnation)
            assert Router(fleet, Weights()).place(PROMPT).decode == D0
            await worker.store(1, 2)
            await worker.store(3)
            worker.held_back.set()
            await until(fleet, lambda: matched(fleet, [1, 2, 3]) == {D0.incarnation: 3})


async def test_a_worker_that_does_not_serve_snapshots_yet_is_asked_again(plane: Plane) -> None:
    async with plane.fleet() as fleet, plane.worker(D0) as worker:
        await worker.subscription.close()
        await worker.store(1)
        async with plane.worker(msgspec.structs.replace(D0, name="decode-0b")) as again:
            again.ledger, again.seq = worker.ledger, worker.seq
            await until(fleet, lambda: matched(fleet, [1]) == {D0.incarnation: 1})


async def test_a_new_incarnation_shares_nothing_with_the_old_one(plane: Plane) -> None:
    reborn = msgspec.structs.replace(D0, incarnation=Incarnation("decode-0-second"))
    async with plane.fleet() as fleet:
        async with plane.worker(D0) as worker:
            await worker.store(*HASHES)
            await until(fleet, lambda: matched(fleet, HASHES) == {D0.incarnation: 20})
        async with plane.worker(reborn):
            await until(fleet, lambda: reborn.incarnation in fleet and D0.incarnation not in fleet)
            placement = Router(fleet, Weights()).place(PROMPT)
            assert (placement.decode, placement.overlap_blocks) == (reborn, 0)


async def test_two_routers_see_each_others_requests_through_the_workers_reports(plane: Plane) -> None:
    async with plane.fleet() as here, plane.fleet() as there, plane.worker(D0) as one, plane.worker(D1) as two:
        for fleet in (here, there):
            await until(fleet, lambda fleet=fleet: len(fleet.usable([D0.role])) == 2)  # type: ignore[misc]
        await two.report()
        await one.report(used=20, running=1)  # a request that `there` placed on D0
        await until(here, lambda: any(each.load.sequences for each in here.usable([D0.role])))
        router = Router(here, Weights())
        assert [router.place(PROMPT).decode for _ in range(3)] == [D1] * 3


async def test_placement_goes_on_from_the_last_view_while_etcd_is_down(
    plane: Plane, etcd_server: EmbeddedServer[EtcdAddress]
) -> None:
    async with plane.worker(D0) as worker, plane.fleet() as fleet:
        await etcd_server.stop()
        await worker.store(*HASHES)
        await until(fleet, lambda: fleet.index.seq(D0.incarnation) == 1)
        assert Router(fleet, Weights()).place(PROMPT).overlap_blocks == 19
        await etcd_server.restart()


async def test_a_message_nobody_can_read_is_dropped(plane: Plane) -> None:
    async with plane.fleet() as fleet, plane.worker(D0) as worker, Bus.connect(plane.nats, "stranger") as bus:
        await bus.publish(SUBJECTS.kv_events(D0.incarnation), b"\x63 from another version")
        await bus.publish(SUBJECTS.load(D0.incarnation), b"")
        await worker.store(1)
        await until(fleet, lambda: matched(fleet, [1]) == {D0.incarnation: 1})
