"""A storage tier in use: written behind, off when it fails, back when it works, and never believed without proof."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from kvbm.errors import TierFailed
from kvbm.events import BlocksRemoved, BlocksStored, KvEvent, Tier
from kvbm.hashing import FullHash, low64
from kvbm.manager import BlockManager
from kvbm.policy import OnboardCost, Part
from kvbm.storage import Storage, StoragePolicy
from kvbm.tiers.base import HostRecord
from kvbm.tiers.host import HostRecords
from tests.unit.kvbm.memory_tier import BLOCK_BYTES, MemoryTier, host_records


def named(number: int) -> FullHash:
    return FullHash(bytes([number]) * 32)


@dataclass
class World:
    """One worker's host memory with a tier beneath it."""

    records: HostRecords
    manager: BlockManager
    tier: MemoryTier
    storage: Storage
    changed: asyncio.Event
    told: list[KvEvent] = field(default_factory=list)

    async def to_host(self, *numbers: int) -> None:
        """As if the engine had offloaded them."""
        for number in numbers:
            (slot,) = self.manager.grant(1)
            self.records.view(slot)[:BLOCK_BYTES] = bytes([number]) * BLOCK_BYTES
            assert self.manager.filled(slot, named(number), 0, True)
            (checksum,) = await self.records.seal([HostRecord(named(number), slot)])
            self.manager.store(slot, checksum)
        self.storage.offer([named(number) for number in numbers])

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not holds():
                self.changed.clear()
                await self.changed.wait()

    def evict_host(self) -> None:
        """Everything that is not pinned."""
        for slot in self.manager.grant(self.manager.slots):
            self.manager.abandon(slot)

    def events(self) -> list[KvEvent]:
        return list(self.storage.events())


@asynccontextmanager
async def world(
    slots: int = 16, size: int = 100, *, interval_s: float = 0.0, watermark: int = 8, second_use: bool = False,
    opened: bool = True, timeout_s: float = 1.0,
) -> AsyncIterator[World]:  # fmt: skip
    changed = asyncio.Event()
    with host_records(slots) as records:
        manager, tier = BlockManager(slots, ranks=1), MemoryTier(records, size)
        policy = StoragePolicy(interval_s, watermark, second_use, timeout_s)
        storage = Storage(tier, policy, manager, records, OnboardCost(), changed.set)
        async with asyncio.TaskGroup() as group:
            if opened:
                await storage.open(1.0)
            tasks = [group.create_task(loop) for loop in storage.loops()]
            yield World(records, manager, tier, storage, changed)
            for task in tasks:
                task.cancel()
        manager.check()
        await storage.close()


async def test_what_comes_to_host_memory_is_written_behind_and_told() -> None:
    async with world() as here:
        await here.to_host(1, 2)
        await here.until(lambda: here.storage.counts.offloaded == 2)
        assert here.manager.pinned == {}
        stored = [event for event in here.events() if isinstance(event, BlocksStored)]
        assert {one for event in stored for one in event.hashes} == {low64(named(1)), low64(named(2))}
        assert {event.tier for event in stored} == {Tier.DISK}
        await here.until(lambda: here.tier.syncs > 0)


async def test_blocks_wait_for_each_other_until_enough_do() -> None:
    async with world(interval_s=60, watermark=3) as here:
        await here.to_host(1, 2)
        assert here.storage.waiting == 2
        await here.to_host(3)
        await here.until(lambda: here.storage.counts.offloaded == 3)
        assert here.tier.writes == [3]


async def test_at_the_end_what_waits_is_written() -> None:
    async with world(interval_s=60) as here:
        await here.to_host(1, 2)
        await here.storage.flush(5)
        assert set(here.tier.content) == {named(1), named(2)}


async def test_a_flush_also_waits_for_what_is_being_written_already() -> None:
    async with world() as here:
        here.tier.gate.clear()
        await here.to_host(1)
        async with asyncio.timeout(5):
            await here.tier.writing.wait()
        asyncio.get_running_loop().call_soon(here.tier.gate.set)
        await here.storage.flush(5)
        assert set(here.tier.content) == {named(1)}


async def test_a_flush_of_a_tier_that_hangs_ends_by_its_deadline() -> None:
    async with world(interval_s=60) as here:
        await here.to_host(1)
        here.tier.gate.clear()
        async with asyncio.timeout(5):
            await here.storage.flush(0.05)
        here.tier.gate.set()


async def test_what_host_memory_could_not_keep_so_long_is_counted_and_not_written() -> None:
    async with world(slots=4, interval_s=60) as here:
        await here.to_host(1, 2)
        here.evict_host()
        await here.storage.flush(5)
        assert here.storage.counts.missed == 2
        assert here.tier.content == {}


async def test_a_full_tier_counts_what_it_did_not_take() -> None:
    async with world(size=1) as here:
        await here.to_host(1, 2, 3)
        await here.until(lambda: here.storage.counts.missed == 2)
        assert here.storage.counts.offloaded == 1


async def test_only_what_a_second_request_has_is_written_when_told_so() -> None:
    async with world(second_use=True) as here:
        here.storage.used([named(1), named(2)])
        await here.to_host(1, 2)
        assert here.storage.waiting == 0
        here.storage.used([named(1)])
        await here.until(lambda: here.storage.counts.offloaded == 1)
        here.storage.used([named(2), named(3)])
        here.storage.used([named(3)])
        await here.to_host(3)
        await here.until(lambda: here.storage.counts.offloaded == 3)


async def test_what_is_not_right_in_host_memory_any_more_does_not_go_further() -> None:
    async with world(interval_s=60) as here:
        await here.to_host(1, 2)
        block = here.manager.find(named(1))
        assert block is not None
        here.records.view(block.slot)[5] ^= 1
        await here.storage.flush(5)
        assert set(here.tier.content) == {named(2)}
        assert here.manager.counts.corrupt == 1
        assert here.manager.find(named(1)) is None


async def expected(here: World, *numbers: int) -> None:
    blocks = here.manager.expect([named(number) for number in numbers])
    assert len(blocks) == len(numbers)
    await here.storage.read(blocks)


async def test_blocks_are_read_back_byte_for_byte_and_can_be_found_in_host_memory() -> None:
    async with world() as here:
        await here.to_host(1, 2)
        await here.until(lambda: here.storage.counts.offloaded == 2)
        here.evict_host()
        await expected(here, 1, 2)
        for number in (1, 2):
            block = here.manager.find(named(number))
            assert block is not None
            assert bytes(here.records.view(block.slot)[:BLOCK_BYTES]) == bytes([number]) * BLOCK_BYTES
        assert sorted(here.manager.gained()) == [named(1), named(2)]
        assert here.storage.counts.onboarded == 2


async def test_a_changed_byte_is_found_counted_and_its_block_forgotten() -> None:
    async with world() as here:
        await here.to_host(1, 2)
        await here.until(lambda: here.storage.counts.offloaded == 2)
        here.evict_host()
        changed = bytearray(here.tier.content[named(1)])
        changed[17] ^= 1
        here.tier.content[named(1)] = bytes(changed)
        await expected(here, 1, 2)
        assert here.storage.counts.corrupt == 1
        assert here.manager.find(named(1)) is None
        assert named(1) not in here.storage
        assert here.manager.find(named(2)) is not None
        assert here.storage.on


async def test_a_block_that_was_taken_away_meanwhile_fails_alone() -> None:
    async with world() as here:
        await here.to_host(1, 2)
        await here.until(lambda: here.storage.counts.offloaded == 2)
        here.evict_host()
        del here.tier.content[named(1)]
        await expected(here, 1, 2)
        assert (here.manager.find(named(1)), here.storage.counts.corrupt, here.storage.on) == (None, 0, True)


@pytest.mark.parametrize("operation", ["read", "write"])
async def test_a_tier_that_fails_is_off_and_back_with_its_blocks_once_it_works(
    operation: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with world() as here:
        await here.to_host(1)
        await here.until(lambda: here.storage.counts.offloaded == 1)
        here.events()
        here.tier.failure = "no_space"
        if operation == "read":
            here.evict_host()
            await expected(here, 1)
            assert here.manager.find(named(1)) is None
        else:
            await here.to_host(2)
        await here.until(lambda: not here.storage.on)
        assert here.events() == [BlocksRemoved((low64(named(1)),), Tier.DISK)]
        assert named(1) not in here.storage
        await here.to_host(3)
        here.tier.failure = ""
        await here.until(lambda: here.storage.on)
        assert low64(named(1)) in {one for event in here.events() for one in getattr(event, "hashes", ())}
        assert named(1) in here.storage
        await here.until(lambda: named(3) in here.tier.content)
        assert (named(2) in here.tier.content) == (operation == "write"), "what could not be written is written now"
        warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert len(warnings) == 2, "one when it is off, one when it works again"
        assert "no_space" in warnings[0]


async def test_a_tier_that_does_not_work_at_the_start_comes_later() -> None:
    async with world(opened=False) as here:
        here.tier.failure = "denied"
        await here.storage.open(1.0)
        assert not here.storage.on
        async with asyncio.timeout(5):
            await here.tier.probed.wait()
        here.tier.failure = ""
        await here.until(lambda: here.storage.on)


async def test_a_tier_that_hangs_at_the_start_is_off() -> None:
    async with world(opened=False) as here:
        here.tier.gate.clear()
        await here.storage.open(0.05)
        assert not here.storage.on
        here.tier.gate.set()
        await here.until(lambda: here.storage.on)


@pytest.mark.parametrize("reading", [True, False])
async def test_a_tier_that_hangs_in_a_read_or_a_write_is_off_though_its_slots_are_not_let_go(reading: bool) -> None:
    async with world(timeout_s=0.01) as here, asyncio.TaskGroup() as group:
        here.tier.gate.clear()
        (block,) = here.manager.expect([named(2)])
        if reading:
            read = group.create_task(here.storage.read([block]))
        else:
            await here.to_host(1)
        await here.until(lambda: not here.storage.on)
        assert here.storage.counts.failures == 1
        if reading:
            assert not read.done()
            assert here.manager.find(named(2)) is block
        else:
            assert here.manager.pinned == {"disk write": 1}
            here.manager.failed(block)
        here.tier.gate.set()
        await here.until(lambda: here.storage.on)


async def test_the_time_of_reads_is_learnt_with_what_was_queued_before_them() -> None:
    cost = OnboardCost()
    with host_records(8) as records:
        manager, tier = BlockManager(8, ranks=1), MemoryTier(records)
        storage = Storage(tier, StoragePolicy(0, 1, False, 1.0), manager, records, cost, lambda: None)
        await storage.open(1.0)
        tier.gate.clear()
        async with asyncio.TaskGroup() as group:
            reads = [group.create_task(storage.read(manager.expect([named(number)]))) for number in (1, 2)]
            await asyncio.sleep(0)  # both have begun
            assert storage.queued == 2 * records.layout.bytes
            tier.failure = "deadline"
            tier.gate.set()
        assert all(read.done() for read in reads)
        assert storage.queued == 0
    assert cost.forecast([Part(Tier.DISK, 1)], 1, 1).onboard_s is None, "a read that failed says nothing"


async def test_blocks_that_are_verified_are_right_wrong_or_gone_and_the_wrong_ones_go() -> None:
    async with world() as here:
        await here.to_host(1, 2, 3)
        await here.until(lambda: here.storage.counts.offloaded == 3)
        here.events()
        here.tier.content[named(2)] = here.tier.content[named(2)][:-1] + b"x"
        del here.tier.content[named(3)]
        slots = here.manager.lend(3)
        records = [HostRecord(named(number), slot) for number, slot in zip((1, 2, 3), slots, strict=True)]
        assert await here.storage.verify(records) == [True, False, None]
        here.manager.give_back(slots)
        assert here.storage.counts.corrupt == 1
        assert here.storage.queued == 0
        assert set(here.tier.content) == {named(1)}
        assert BlocksRemoved((low64(named(2)), low64(named(3))), Tier.DISK) in [
            BlocksRemoved(tuple(sorted(event.hashes)), event.tier)
            for event in here.events()
            if isinstance(event, BlocksRemoved)
        ]


@pytest.mark.parametrize("act", ["verify", "purge"])
async def test_a_tier_that_fails_an_operator_is_off(act: str) -> None:
    async with world() as here:
        await here.to_host(1)
        await here.until(lambda: here.storage.counts.offloaded == 1)
        here.tier.failure = "denied"
        record = HostRecord(named(1), here.manager.lend(1)[0])
        with pytest.raises(TierFailed, match="denied"):
            await (here.storage.purge() if act == "purge" else here.storage.verify([record]))
        assert not here.storage.on
        with pytest.raises(TierFailed, match="is off"):
            await here.storage.verify([record])
        here.manager.give_back([record.slot])


async def test_a_purge_waits_for_what_is_being_written_and_removes_that_too() -> None:
    async with world() as here:
        here.tier.gate.clear()
        await here.to_host(1)
        await here.tier.writing.wait()
        await here.to_host(2)
        async with asyncio.TaskGroup() as group:
            purging = group.create_task(here.storage.purge())
            here.tier.gate.set()
        assert purging.result() == 1
        assert not here.tier.content
        assert here.storage.waiting == 0
        assert here.tier.syncs >= 1, "it lasts"
