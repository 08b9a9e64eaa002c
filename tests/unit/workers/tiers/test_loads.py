"""Blocks on their way to host memory."""

from __future__ import annotations

import asyncio

from kvbm.hashing import FullHash
from kvbm.manager import BlockManager
from kvbm.policy import OnboardCost
from kvbm.storage import Storage, StoragePolicy
from tests.unit.kvbm.memory_tier import STRIDE, MemoryTier, host_records
from workers.tiers.loads import Loads


async def test_a_slot_that_a_block_gave_back_is_the_next_ones_while_the_others_of_its_load_are_dealt_with() -> None:
    wrong, right = FullHash(b"w" * 32), FullHash(b"r" * 32)
    with host_records(1) as records:
        manager, tier = BlockManager(1, ranks=1), MemoryTier(records)
        storage = Storage(tier, StoragePolicy(0, 1, False, 10.0), manager, records, OnboardCost(), lambda: None)
        await storage.open(1.0)
        tier.content[wrong] = bytes(records.layout.bytes)
        tier.forgets.clear()
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            loads = Loads(STRIDE, group)
            (first,) = manager.expect([wrong])
            loads.bring(storage, [first])
            over = loads.load_of(first)
            assert over is not None
            await tier.forgetting.wait()
            tier.gate.clear()
            (second,) = manager.expect([right])
            assert second.slot == first.slot
            loads.bring(storage, [second])
            tier.forgets.set()
            await over.over.wait()
            assert loads.load_of(second) is not None
            tier.gate.set()
        assert loads.blocks == 0
