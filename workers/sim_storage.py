"""The simulated disk and object tiers: what they hold, what waits to be written there, and how long that takes."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from dynamo_lite import config
from kvbm.events import BlocksRemoved, BlocksStored, KvEvent, Tier
from kvbm.hashing import FullHash, low64
from kvbm.manager import BlockManager
from kvbm.storage import StorageCounts, StoragePolicy
from kvbm.tiers.slots import SlotTable
from workers.engine import TierLoad

_SEEN = 65536  # hashes remembered for a second use


class Lane:
    """Something that moves blocks one after another."""

    def __init__(self, ms_per_block: float, latency_ms: float = 0.0) -> None:
        self._block_s, self._latency_s = ms_per_block / 1000, latency_ms / 1000
        self._free_at = 0.0

    def book(self, blocks: int) -> float:
        """When that many more will have come, in the event loop's time."""
        self._free_at = max(self._free_at, asyncio.get_running_loop().time()) + blocks * self._block_s
        return self._free_at + self._latency_s


class Shelf(Protocol):
    """Where a tier's blocks are."""

    def __contains__(self, block_hash: FullHash) -> bool: ...

    def __len__(self) -> int: ...

    def put(self, hashes: Sequence[FullHash]) -> list[FullHash]:
        """These are here now; returns what had to make room."""
        ...

    def used(self, hashes: Sequence[FullHash]) -> None:
        """These blocks of one prefix, in its order, were just of use."""
        ...

    def news(self) -> list[FullHash]:
        """What others have put here since the last call."""
        ...


class Places:
    """A volume of a worker's own."""

    def __init__(self, count: int, fifo: bool) -> None:
        self._table, self._fifo = SlotTable(count), fifo

    def __contains__(self, block_hash: FullHash) -> bool:
        return self._table.find(block_hash) is not None

    def __len__(self) -> int:
        return self._table.stored

    def put(self, hashes: Sequence[FullHash]) -> list[FullHash]:
        slots, evicted = self._table.grant(len(hashes))
        for slot, block_hash in zip(slots, hashes, strict=False):
            self._table.store(slot, block_hash, checksum=0)
        return evicted

    def used(self, hashes: Sequence[FullHash]) -> None:
        if not self._fifo:
            self._table.touch(hashes)

    def news(self) -> list[FullHash]:
        return []


class Bucket:
    """An object store, shared by every simulated engine that is given it. It forgets nothing."""

    def __init__(self) -> None:
        self.hashes: dict[FullHash, None] = {}  # in the order they came

    def view(self) -> BucketView:
        """As one worker knows it."""
        return BucketView(self)


class BucketView:
    """What one worker has listed or written."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket, self._known, self._listed = bucket, set[FullHash](), 0

    def __contains__(self, block_hash: FullHash) -> bool:
        return block_hash in self._known

    def __len__(self) -> int:
        return len(self._known)

    def put(self, hashes: Sequence[FullHash]) -> list[FullHash]:
        self._bucket.hashes.update(dict.fromkeys(hashes))
        self._known.update(hashes)
        return []

    def used(self, hashes: Sequence[FullHash]) -> None:
        """Nothing has to make room."""

    def news(self) -> list[FullHash]:
        listed = list(self._bucket.hashes)[self._listed :]
        self._listed += len(listed)
        fresh = [block_hash for block_hash in listed if block_hash not in self._known]
        self._known.update(fresh)
        return fresh


@dataclass(frozen=True, slots=True)
class Kind:
    """What one tier is."""

    tier: Tier
    shelf: Shelf
    policy: StoragePolicy
    reads: Lane
    writes: Lane
    size: int = 0  # bytes; 0: without limit
    refresh_s: float = 0.0  # how often it is listed for what others have stored; 0: nobody else uses it


class SimStorage:
    """A tier beneath host memory, in use."""

    def __init__(self, kind: Kind, manager: BlockManager, stride: int, changed: Callable[[], None]) -> None:
        """`stride`: bytes of a block. `changed`: called when `events` has something to tell."""
        self.tier, self._shelf, self._policy = kind.tier, kind.shelf, kind.policy
        self._kind, self._manager, self._stride, self._changed = kind, manager, stride, changed
        self.counts, self._evicted = StorageCounts(), 0
        self.queued = 0  # bytes being read
        self._waiting: OrderedDict[FullHash, None] = OrderedDict()  # to be written
        self._flush: asyncio.TimerHandle | None = None
        self._refresh: asyncio.TimerHandle | None = None
        self._seen: OrderedDict[FullHash, bool] = OrderedDict()  # with second_use: whether a second request had it
        self._events: list[KvEvent] = []

    def open(self) -> None:
        """And again whenever it is to be listed."""
        if self._kind.refresh_s:
            self._stored(self._shelf.news())
            self._refresh = asyncio.get_running_loop().call_later(self._kind.refresh_s, self.open)
            self._changed()

    def close(self) -> None:
        for timer in (self._flush, self._refresh):
            if timer is not None:
                timer.cancel()

    def __contains__(self, block_hash: FullHash) -> bool:
        return block_hash in self._shelf

    def look(self, block_hash: FullHash) -> bool:
        """Whether it is here; the search is counted."""
        here = block_hash in self._shelf
        if here:
            self.counts.hits += 1
        else:
            self.counts.misses += 1
        return here

    # ---- reading ----

    def book(self, blocks: int) -> float:
        """When that many blocks will be in host memory; `arrived` is to be called then."""
        self.queued += blocks * self._stride
        return self._kind.reads.book(blocks)

    def arrived(self, blocks: int) -> None:
        self.queued -= blocks * self._stride
        self.counts.onboarded += blocks

    # ---- writing ----

    def offer(self, hashes: Sequence[FullHash]) -> None:
        """These have just come to host memory."""
        self._queue([one for one in hashes if not self._policy.second_use or self._seen.get(one)])

    def used(self, hashes: Sequence[FullHash]) -> None:
        """A request's prefix consists of these."""
        self._shelf.used(hashes)
        if not self._policy.second_use:
            return
        again = [block_hash for block_hash in hashes if block_hash in self._seen]
        self._seen.update(dict.fromkeys(hashes, False) | dict.fromkeys(again, True))
        for block_hash in hashes:
            self._seen.move_to_end(block_hash)
        while len(self._seen) > _SEEN:
            self._seen.popitem(last=False)
        self._queue([block_hash for block_hash in again if self._manager.find(block_hash) is not None])

    def _queue(self, hashes: Sequence[FullHash]) -> None:
        self._waiting.update((one, None) for one in hashes if one not in self._shelf)
        if not self._waiting:
            return
        if len(self._waiting) >= self._policy.watermark:
            self._write()
        elif self._flush is None:
            self._flush = asyncio.get_running_loop().call_later(self._policy.flush_interval_s, self._write)

    def _write(self) -> None:
        """All that waits, as far as host memory has it still."""
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        found = [one for one in self._waiting if self._manager.find(one) is not None]
        self.counts.missed += len(self._waiting) - len(found)
        self._waiting.clear()
        if found:
            asyncio.get_running_loop().call_at(self._kind.writes.book(len(found)), self._written, found)

    def _written(self, hashes: Sequence[FullHash]) -> None:
        fresh = [block_hash for block_hash in hashes if block_hash not in self._shelf]
        gone = self._shelf.put(fresh)
        self.counts.offloaded += len(fresh)
        self._evicted += len(gone)
        if gone:
            self._events.append(BlocksRemoved(tuple(map(low64, gone)), self.tier))
        self._stored([block_hash for block_hash in fresh if block_hash in self._shelf])
        self._changed()

    def _stored(self, hashes: Sequence[FullHash]) -> None:
        if hashes:
            self._events.append(BlocksStored(tuple(map(low64, hashes)), tier=self.tier))

    # ---- state ----

    def events(self) -> tuple[KvEvent, ...]:
        """What can be found here, or no longer, since the last call, in order."""
        events, self._events = tuple(self._events), []
        return events

    def load(self) -> TierLoad:
        counts = self.counts
        return TierLoad(
            self.tier, len(self._shelf) * self._stride, self._kind.size, counts.hits, counts.misses, counts.offloaded,
            counts.onboarded, self._evicted, counts.missed, counts.corrupt, len(self._waiting),
        )  # fmt: skip


def storages_of(
    settings: config.Config, stride: int, manager: BlockManager, bucket: Bucket, changed: Callable[[], None]
) -> list[SimStorage]:
    """The tiers beneath host memory that the configuration has, nearest first. `bucket`: the object tier's."""
    return [SimStorage(kind, manager, stride, changed) for kind in _kinds(settings, stride, manager.slots, bucket)]


def _kinds(settings: config.Config, stride: int, slots: int, bucket: Bucket) -> Iterator[Kind]:
    disk, store, sim = settings.kv_tiers.disk, settings.kv_tiers.object, settings.sim
    if disk is not None:
        places = Places(disk.size // stride, disk.eviction == "fifo")
        reads, writes = Lane(sim.disk_ms_per_block), Lane(sim.disk_ms_per_block)
        yield Kind(Tier.DISK, places, _policy(disk, slots), reads, writes, disk.size)
    if store is not None:
        reads, writes = (Lane(sim.object_ms_per_block, sim.object_latency_ms) for _ in range(2))
        yield Kind(Tier.OBJECT, bucket.view(), _policy(store, slots), reads, writes, refresh_s=store.refresh_s)


def _policy(settings: config.StorageTier, slots: int) -> StoragePolicy:
    """`slots`: of host memory."""
    return StoragePolicy(
        flush_interval_s=settings.flush_interval_ms / 1000,
        watermark=max(1, int(settings.watermark * slots)),
        second_use=settings.admission == "second_use",
        timeout_s=settings.timeout_ms / 1000,
    )
