"""A disk tier in a real folder, and the host memory that its records come from and go to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kvbm.hashing import FullHash
from kvbm.tiers.base import HostRecord, StorageTier
from kvbm.tiers.disk import DiskSettings, DiskTier
from kvbm.tiers.host import HostMemory
from kvbm.tiers.record import Records
from kvbm.tiers.slots import Eviction
from workers.tiers.files import TierFiles

RECORDS = Records(5000, 7)  # two pages each


def named(number: int) -> FullHash:
    return FullHash(bytes([number]) * 32)


def content_of(number: int, version: int = 0) -> bytes:
    """What a block holds."""
    return np.random.default_rng((number, version)).bytes(RECORDS.block_bytes)


@dataclass
class Host:
    """Slots of host memory, and the engine that moves them."""

    slots: int = 16
    timeout_s: float = 5.0
    memory: HostMemory = field(init=False)
    files: TierFiles = field(init=False)

    def __post_init__(self) -> None:
        self.memory = HostMemory(self.slots * RECORDS.stride)
        self.files = TierFiles(self.memory, RECORDS.stride, self.timeout_s)

    def tier(
        self, folder: Path, places: int, eviction: Eviction = "lru", namespace: bytes = b"model"
    ) -> DiskTier:  # fmt: skip
        settings = DiskSettings(folder, places * RECORDS.stride, RECORDS.stride, namespace, eviction, self.timeout_s)
        return DiskTier(settings, self.files.open)

    def record(self, slot: int) -> memoryview:
        return self.memory.view(slot * RECORDS.stride, RECORDS.bytes)

    def filled(self, numbers: Sequence[int], version: int = 0) -> list[HostRecord]:
        """Put sealed records of these blocks into slots 0, 1, …"""
        for slot, number in enumerate(numbers):
            self.record(slot)[: RECORDS.block_bytes] = content_of(number, version)
            RECORDS.seal(self.record(slot), named(number))
        return wanted(numbers)

    def holds(self, slot: int, number: int, version: int = 0) -> bool:
        """Whether a slot has that block, proven and byte for byte."""
        record = self.record(slot)
        proven = RECORDS.proven(record, named(number)) is not None
        return proven and bytes(record[: RECORDS.block_bytes]) == content_of(number, version)

    def wipe(self) -> None:
        self.memory.view(0, self.memory.size)[:] = bytes(self.memory.size)

    def close(self) -> None:
        self.files.close()
        self.memory.close()


def wanted(numbers: Sequence[int]) -> list[HostRecord]:
    return [HostRecord(named(number), slot) for slot, number in enumerate(numbers)]


@asynccontextmanager
async def opened(
    host: Host, folder: Path, places: int = 4, eviction: Eviction = "lru", namespace: bytes = b"model"
) -> AsyncIterator[DiskTier]:
    tier = host.tier(folder, places, eviction, namespace)
    await tier.open()
    try:
        yield tier
    finally:
        await tier.close()
        tier.check()


async def found(host: Host, tier: StorageTier, numbers: Sequence[int]) -> list[int]:
    """Which of these blocks are read back, proven and byte for byte."""
    host.wipe()
    there = await tier.read(wanted(numbers))
    return [number for slot, number in enumerate(numbers) if there[slot] and host.holds(slot, number)]
