"""An object tier as tests use it: with host memory before it, and blocks that are known by number."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvbm.hashing import FullHash
from kvbm.tiers.base import HostRecord
from kvbm.tiers.host import HostMemory
from kvbm.tiers.object import Blobs, ObjectTier
from kvbm.tiers.record import Records

DESCRIPTION = b'{"model": "tests"}'
SMALL = Records(100, 7)
SLOTS = 16
BlobsOf = Callable[[HostMemory, Records], Blobs]


def block_hash(number: int) -> FullHash:
    """Two blocks beside each other share their first byte."""
    return FullHash(bytes([number // 2 * 50 % 256]) + number.to_bytes(31, "big"))


def key(namespace: bytes, number: int) -> str:
    name = block_hash(number).hex()
    return f"{namespace.hex()}/{name[:2]}/{name}"


class Worker:
    """At most SLOTS blocks are written or read at a time; block `n` is made of bytes `n % 256`."""

    def __init__(
        self, blobs: BlobsOf, namespace: bytes, records: Records = SMALL, entries: int = 4000, refresh_s: float = 60
    ) -> None:
        self.records = records
        self.memory = HostMemory(SLOTS * records.stride)
        self.tier = ObjectTier(blobs(self.memory, records), records, namespace, DESCRIPTION, refresh_s, entries)

    def record(self, slot: int) -> memoryview:
        return self.memory.view(slot * self.records.stride, self.records.bytes)

    async def write(self, numbers: Sequence[int]) -> int:
        for slot, number in enumerate(numbers):
            self.record(slot)[: self.records.block_bytes] = bytes([number % 256]) * self.records.block_bytes
            self.records.seal(self.record(slot), block_hash(number))
        return await self.tier.write([HostRecord(block_hash(number), slot) for slot, number in enumerate(numbers)])

    async def read(self, numbers: Sequence[int]) -> list[int | None]:
        """For each what its block is made of; None: not there; -1: there, but not proven."""
        for slot in range(len(numbers)):
            self.record(slot)[:] = bytes(self.records.bytes)
        here = await self.tier.read([HostRecord(block_hash(number), slot) for slot, number in enumerate(numbers)])
        found: list[int | None] = []
        for slot, (number, there) in enumerate(zip(numbers, here, strict=True)):
            proven = self.records.proven(self.record(slot), block_hash(number)) is not None
            found.append((self.record(slot)[0] if proven else -1) if there else None)
        return found

    async def close(self) -> None:
        await self.tier.close()
        self.memory.close()
