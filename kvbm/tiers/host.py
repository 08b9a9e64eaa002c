"""The host tier's memory: one memfd, cut into slots of one record each, shared with the engine's processes.

It belongs to the worker process, so it outlives an engine that is started again, and ends with its last user, also
after kill −9. Only this user's processes can open it.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import TypeVar

from kvbm.tiers.base import HostRecord
from kvbm.tiers.record import Records

S = TypeVar("S")
T = TypeVar("T")


class HostMemory:
    """`size` bytes, zeroed; the kernel provides them when they are first used."""

    def __init__(self, size: int) -> None:
        """Raises OSError."""
        self.size = size
        self._fd = os.memfd_create("dynamo-lite-host-tier", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._fd, size)
            self._map = mmap.mmap(self._fd, size)
        except OSError:
            os.close(self._fd)
            raise
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"

    def view(self, offset: int, size: int) -> memoryview:
        """Bytes `[offset, offset + size)`."""
        return memoryview(self._map)[offset : offset + size]

    def close(self) -> None:
        """Views stay valid; nobody can open it any more."""
        os.close(self._fd)


class HostRecords:
    """The records in a host tier's slots. Whatever reads them does so on threads: one alone is slower than a GPU."""

    def __init__(self, memory: HostMemory, records: Records, threads: Executor, share: int = 1) -> None:
        """`threads`: `share` of them may be used at a time for one call."""
        self._memory, self.layout, self._threads, self._share = memory, records, threads, share

    @property
    def slots(self) -> int:
        """How many fit."""
        return self._memory.size // self.layout.stride

    def view(self, slot: int) -> memoryview:
        """The slot's record, `[bytes]`."""
        return self._memory.view(slot * self.layout.stride, self.layout.bytes)

    async def seal(self, records: Sequence[HostRecord]) -> list[int]:
        """Write the trailers of blocks that have come from the device; returns the blocks' checksums."""
        return await self._each(records, lambda one: self.layout.seal(self.view(one.slot), one.hash))

    async def checksums(self, slots: Sequence[int]) -> list[int]:
        """Of the blocks in these slots, as they are now."""
        return await self._each(slots, lambda slot: self.layout.checksum(self.view(slot)))

    async def proven(self, records: Sequence[HostRecord]) -> list[int | None]:
        """The checksum of each that its slot really holds, whole; None of the others."""
        return await self._each(records, lambda one: self.layout.proven(self.view(one.slot), one.hash))

    async def _each(self, items: Sequence[S], work: Callable[[S], T]) -> list[T]:
        loop, each = asyncio.get_running_loop(), -(-len(items) // self._share)
        shares = [items[first : first + each] for first in range(0, len(items), each or 1)]
        works = [loop.run_in_executor(self._threads, lambda mine: [work(item) for item in mine], one) for one in shares]
        return [result for done in await asyncio.gather(*works) for result in done]
