"""The tiers beneath the device, simulated: which blocks are where, and how long moving them takes, without contents.

What is kept, what gives way and what is worth reading is decided by the classes that decide it for real tiers; only the
moving is a timer. As with these, every block goes through host memory, and is written behind requests.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile

from dynamo_lite.config import Config
from dynamo_lite.plane.layout import KvLayout
from kvbm.events import KvEvent, Tier
from kvbm.hashing import FullHash
from kvbm.manager import BlockManager
from kvbm.policy import OnboardCost, Part
from kvbm.tiers.record import stride_bytes
from kvbm.tiers.slots import Stored
from workers.engine import TierLoad
from workers.sim_storage import Bucket, Lane, SimStorage, storages_of

_SEEN = 65536  # hashes remembered for a second use


@dataclass(slots=True)
class _Reading:
    """What one request reads."""

    blocks: list[Stored]
    begun: float
    here: bool  # every block was in host memory
    arrived: Callable[[int], None]
    owner: str


class SimTiers:
    """Beneath one engine; on its event loop from `open` to `close`."""

    def __init__(
        self, config: Config, layout: KvLayout, bucket: Bucket, tell: Callable[[tuple[KvEvent, ...]], None]
    ) -> None:
        """`bucket`: what the object tier is kept in. `tell`: given every event.

        Raises ValueError when the host tier is too small for two blocks.
        """
        host, sim = config.kv_tiers.host, config.sim
        assert host is not None, "every other tier is behind host memory"
        stride = stride_bytes(layout.block_bytes)
        if host.size < 2 * stride:
            raise ValueError(f"kv_tiers.host.size: {host.size} bytes do not hold two blocks of this model")
        self._stride, self._block_size, self._size, self._tell = stride, layout.block_size, host.size, tell
        self._second_use = host.admission == "second_use"
        self.manager = BlockManager(host.size // stride, ranks=1)
        self.cost = OnboardCost()
        self._offloads, self._onboards = Lane(sim.host_ms_per_block), Lane(sim.host_ms_per_block)
        self.storages = storages_of(config, stride, self.manager, bucket, self._changed)
        self._due: dict[FullHash, float] = {}  # blocks on their way from a storage tier: when they will be here
        self._filling: set[FullHash] = set()  # on their way from the device
        self._seen: OrderedDict[FullHash, None] = OrderedDict()
        self._hits = self._misses = 0
        self._owners = 0

    def open(self) -> None:
        for storage in self.storages:
            storage.open()

    def close(self) -> None:
        """Nothing is told any more."""
        self._tell = lambda _: None
        for storage in self.storages:
            storage.close()

    # ---- offload ----

    def completed(self, hashes: Sequence[FullHash]) -> None:
        """Blocks of one prompt are on the device, whole."""
        fresh = [one for one in hashes if one not in self._filling and self.manager.find(one) is None]
        fresh = [one for one in fresh if self._admitted(one)]
        slots = self.manager.grant(len(fresh))
        self.manager.counts.missed += len(fresh) - len(slots)
        filled = list(zip(slots, fresh, strict=False))
        if filled:
            self._filling.update(block_hash for _, block_hash in filled)
            at = self._offloads.book(len(filled))
            asyncio.get_running_loop().call_at(at, self._offloaded, filled)
        self._changed()

    def _admitted(self, block_hash: FullHash) -> bool:
        if not self._second_use or block_hash in self._seen:
            return True
        self._seen[block_hash] = None
        if len(self._seen) > _SEEN:
            self._seen.popitem(last=False)
        return False

    def _offloaded(self, filled: Sequence[tuple[int, FullHash]]) -> None:
        for slot, block_hash in filled:
            self._filling.discard(block_hash)
            self.manager.filled(slot, block_hash, rank=0, well=True)
            self.manager.store(slot, checksum=0)
        for storage in self.storages:
            storage.offer([block_hash for _, block_hash in filled])
        self._changed()

    # ---- onboard ----

    def used(self, hashes: Sequence[FullHash]) -> None:
        """A request's prefix consists of these."""
        self.manager.used(hashes)
        for storage in self.storages:
            storage.used(hashes)

    def worth(self, hashes: Sequence[FullHash]) -> int:
        """How many of these, which come next in a prompt, are in the tiers and faster read than computed."""
        found = self._find(hashes)
        parts = [Part(tier, len(list(run)), self._queued(tier)) for tier, run in groupby(found)]
        return self.cost.forecast(parts, self._stride, self._block_size).blocks if parts else 0

    def read(self, hashes: Sequence[FullHash], arrived: Callable[[int], None]) -> None:
        """Bring these to the device; `arrived` is called later, with how many of them, from the first on, came.

        What `worth` saw may have had to make room since.
        """
        loop = asyncio.get_running_loop()
        self._owners += 1
        reading = _Reading([], loop.time(), True, arrived, str(self._owners))
        at = self._pin(reading, hashes)
        self._changed()
        if reading.here:
            self._copy(reading)
        else:
            loop.call_at(at, self._copy, reading)

    def _pin(self, reading: _Reading, hashes: Sequence[FullHash]) -> float:
        """Pin what is in host memory, let come what is not, as far as there is room; returns when it will be there."""
        near = {one: block for one in hashes if (block := self.manager.find(one)) is not None}
        self.manager.pin(reading.owner, list(near.values()))  # first, or what comes might take their place
        there = takewhile(lambda one: one in near or any(one in storage for storage in self.storages), hashes)
        far = [one for one in there if one not in near]
        coming = dict(zip(far, self.manager.expect(far) if far else [], strict=False))
        self.manager.pin(reading.owner, list(coming.values()))
        left = dict(coming)
        for storage in self.storages:
            mine = [left.pop(one) for one in far if one in left and one in storage]
            if mine:
                at = storage.book(len(mine))
                self._due.update((block.hash, at) for block in mine)
                asyncio.get_running_loop().call_at(at, self._arrived, storage, mine, reading.begun, storage.queued)
        for one in hashes:
            block = near.get(one) or coming.get(one)
            if block is None:
                break
            reading.blocks.append(block)
        waits = [self._due[block.hash] for block in reading.blocks if not block.here]
        reading.here = not waits
        return max(waits, default=reading.begun)

    def _arrived(self, storage: SimStorage, blocks: Sequence[Stored], begun: float, queued: int) -> None:
        """`queued`: bytes that the tier had to move until these were here, themselves included."""
        storage.arrived(len(blocks))
        self.cost.read(storage.tier, queued, asyncio.get_running_loop().time() - begun)
        for block in blocks:
            del self._due[block.hash]
            self.manager.arrived(block, checksum=0)
        self._changed()

    def _copy(self, reading: _Reading) -> None:
        """All of it is in host memory."""
        at = self._onboards.book(len(reading.blocks))
        asyncio.get_running_loop().call_at(at, self._onboarded, reading)

    def _onboarded(self, reading: _Reading) -> None:
        self.manager.unpin(reading.owner)
        count = len(reading.blocks)
        self.manager.counts.onboarded += count
        if reading.here:
            self.cost.onboarded(count * self._stride, asyncio.get_running_loop().time() - reading.begun)
        reading.arrived(count)

    def _find(self, hashes: Sequence[FullHash]) -> list[Tier]:
        """Where the blocks of the longest prefix are that the tiers hold together."""
        found: list[Tier] = []
        for block_hash in hashes:
            if self.manager.find(block_hash) is not None:
                self._hits += 1
                found.append(Tier.HOST)
                continue
            self._misses += 1
            tier = next((storage.tier for storage in self.storages if storage.look(block_hash)), None)
            if tier is None:
                break
            found.append(tier)
        return found

    def _queued(self, tier: Tier) -> int:
        return next((storage.queued for storage in self.storages if storage.tier is tier), 0)

    # ---- state ----

    def _changed(self) -> None:
        events = self.manager.events() + tuple(event for storage in self.storages for event in storage.events())
        self.manager.lost()  # this and the next are for an engine in other processes
        self.manager.gained()
        if events:
            self._tell(events)

    def load(self) -> tuple[TierLoad, ...]:
        counts = self.manager.counts
        host = TierLoad(
            Tier.HOST, self.manager.stored * self._stride, self._size, self._hits, self._misses, counts.offloaded,
            counts.onboarded, counts.evicted, counts.missed, counts.corrupt,
        )  # fmt: skip
        return (host, *(storage.load() for storage in self.storages))
