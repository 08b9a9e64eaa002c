"""Blocks on their way from the tiers beneath to host memory: each is brought once, whoever waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvbm.storage import Storage
from kvbm.tiers.slots import Stored

_BATCH_BYTES = 8 * 2**20  # of one read: what came first can be copied on while the rest is still read
_AT_ONCE = 2  # batches


@dataclass(slots=True)
class Load:
    """Blocks that are read together."""

    storage: Storage
    blocks: Sequence[Stored]
    over: asyncio.Event = field(default_factory=asyncio.Event)  # each is here, or will not come


class Loads:
    """On the event loop; reads are tasks of `group`, and go on when nobody wants them any more: they hold slots."""

    def __init__(self, stride: int, group: asyncio.TaskGroup) -> None:
        """`stride`: bytes of a record."""
        self._most = max(1, _BATCH_BYTES // stride)
        self._group = group
        self._of_slot: dict[int, Load] = {}

    def bring(self, storage: Storage, blocks: Sequence[Stored]) -> None:
        """Read blocks that the manager expects, in this order."""
        loads = [Load(storage, blocks[start : start + self._most]) for start in range(0, len(blocks), self._most)]
        for load in loads:
            self._of_slot.update((block.slot, load) for block in load.blocks)
        self._group.create_task(self._bring(loads))

    def load_of(self, block: Stored) -> Load | None:
        """None where the block is here already."""
        return None if block.here else self._of_slot.get(block.slot)

    def hang(self, block: Stored) -> bool:
        """It is on its way from a tier that is off by now: nobody knows when that lets go of it."""
        load = self.load_of(block)
        return load is not None and not load.storage.on

    async def _bring(self, loads: Sequence[Load]) -> None:
        free = asyncio.Semaphore(_AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for load in loads:
                await free.acquire()
                group.create_task(self._read(load, free))

    async def _read(self, load: Load, free: asyncio.Semaphore) -> None:
        try:
            await load.storage.read(load.blocks)
        finally:
            for block in load.blocks:
                if self._of_slot.get(block.slot) is load:  # a failed one's may be the next load's
                    del self._of_slot[block.slot]
            load.over.set()
            free.release()

    @property
    def blocks(self) -> int:
        """How many are on their way."""
        return len(self._of_slot)
