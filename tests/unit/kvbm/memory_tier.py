"""A storage tier in a dict, which fails when it is told to; and host memory for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NoReturn

from kvbm.errors import TierFailed
from kvbm.events import Tier
from kvbm.hashing import FullHash
from kvbm.tiers.base import Changes, HostRecord
from kvbm.tiers.host import HostMemory, HostRecords
from kvbm.tiers.record import Records

BLOCK_BYTES = 1000
STRIDE = 4096


@contextmanager
def host_records(slots: int) -> Iterator[HostRecords]:
    memory = HostMemory(slots * STRIDE)
    with ThreadPoolExecutor(1) as threads:
        yield HostRecords(memory, Records(BLOCK_BYTES, 1), threads)
    memory.close()


class MemoryTier:
    """See `kvbm.tiers.base.StorageTier`."""

    tier = Tier.DISK
    evicted = 0

    def __init__(self, records: HostRecords, size: int = 100) -> None:
        self._records, self._size = records, size
        self.content: dict[FullHash, bytes] = {}
        self._told: set[FullHash] = set()
        self.failure = ""  # what every operation fails with
        self.gate = asyncio.Event()  # open, unless a test closes it
        self.gate.set()
        self.forgetting = asyncio.Event()
        self.forgets = asyncio.Event()  # open, unless a test closes it
        self.forgets.set()
        self.writes: list[int] = []  # records of each write
        self.syncs = self.probes = 0
        self.probed = asyncio.Event()
        self.writing = asyncio.Event()

    async def _work(self) -> None:
        await self.gate.wait()
        if self.failure:
            raise TierFailed(self.tier, self.failure, f"the test says {self.failure}")

    async def open(self) -> None:
        await self._work()

    def loops(self, changed: Callable[[], None]) -> list[Coroutine[object, object, NoReturn]]:
        return []

    async def probe(self) -> None:
        self.probes += 1
        self.probed.set()
        await self._work()

    def __contains__(self, block_hash: FullHash) -> bool:
        return block_hash in self.content

    def hashes(self) -> tuple[FullHash, ...]:
        return tuple(self.content)

    async def write(self, records: Sequence[HostRecord]) -> int:
        self.writing.set()
        await self._work()
        self.writes.append(len(records))
        stored = list(records)[: self._size - len(self.content)]
        for record in stored:
            self.content[record.hash] = bytes(self._records.view(record.slot))
        return len(stored)

    async def read(self, records: Sequence[HostRecord], *, use: bool = True) -> list[bool]:
        await self._work()
        for record in records:
            if record.hash in self.content:
                self._records.view(record.slot)[:] = self.content[record.hash]
        return [record.hash in self.content for record in records]

    def used(self, hashes: Sequence[FullHash]) -> None:
        return

    async def forget(self, block_hash: FullHash) -> None:
        self.content.pop(block_hash, None)
        self.forgetting.set()
        await self.forgets.wait()

    async def purge(self) -> int:
        await self._work()
        count = len(self.content)
        self.content.clear()
        return count

    async def sync(self) -> None:
        await self._work()
        self.syncs += 1

    def changes(self) -> Changes:
        now = set(self.content)
        before, self._told = self._told, now
        return Changes(tuple(now - before), tuple(before - now))

    @property
    def blocks(self) -> int:
        return len(self.content)

    @property
    def used_bytes(self) -> int:
        return self.blocks * STRIDE

    @property
    def size_bytes(self) -> int:
        return self._size * STRIDE

    async def close(self) -> None:
        return
