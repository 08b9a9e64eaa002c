"""What operators may ask of a worker's blocks: how many there are, which, whether they are right; and to drop them.

Serving goes first. Nothing here changes which blocks are of use, or takes more of host memory than a few slots.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import msgspec

from dynamo_lite.errors import RequestError, WorkerError
from dynamo_lite.plane.kv_wire import (
    KvAsk,
    KvBlock,
    KvList,
    KvListed,
    KvPurge,
    KvPurged,
    KvStats,
    KvTier,
    KvTiers,
    KvTold,
    KvVerified,
    KvVerify,
)
from kvbm.errors import TierFailed
from kvbm.events import Tier
from kvbm.hashing import FullHash, low64
from kvbm.tiers.base import HostRecord
from workers.engine import EngineLoad
from workers.tiers.walks import Walk, Walks

if TYPE_CHECKING:  # an engine without tiers does without their libraries
    from kvbm.storage import Storage
    from workers.tiers.tiers import Tiers

_log = logging.getLogger(__name__)
_LISTED = 2000  # blocks of an answer at most: some 70 KB
_SEEN = 20_000  # looked at for one answer: many may have to be told elsewhere
_PROVEN = 32 * 2**20  # bytes of host memory that one answer is about
_READ = 8 * 2**20  # bytes that are read from a tier beneath for one answer, into slots that are lent for it
_SLOTS = 16  # of these at most


class KvAdmin:
    """On the event loop, which it holds for a few thousand blocks at a time."""

    def __init__(
        self, load: Callable[[], EngineLoad], device: Callable[[], dict[Tier, tuple[int, ...]]],
        tiers: Tiers | None = None,
    ) -> None:  # fmt: skip
        """`device`: the hashes, by their low 64 bits, that can be matched there."""
        self._load, self._device, self._tiers = load, device, tiers
        self._walks = Walks()
        self._verifying = asyncio.Lock()

    async def answer(self, ask: KvAsk) -> KvTold:
        """Raises RequestError for a tier that is not here, WorkerError for one that fails."""
        match ask:
            case KvStats():
                return self._stats()
            case KvList():
                return self._list(ask)
            case KvVerify():
                async with self._verifying:
                    return await self._verify(ask)
            case KvPurge():
                return KvPurged(await self._purge(ask.tier))

    # ---- look ----

    def _stats(self) -> KvTiers:
        load = self._load()
        tiers = tuple(msgspec.convert(tier, KvTier, from_attributes=True) for tier in load.tiers)
        return KvTiers(load.kv_used_blocks, len(self._on_device()), load.kv_total_blocks, tiers)

    def _on_device(self) -> tuple[int, ...]:
        return self._device().get(Tier.DEVICE, ())

    def _list(self, ask: KvList) -> KvListed:
        walk, cursor = self._walks.resume(ask.cursor, lambda: self._begin(ask.tiers))
        blocks: list[KvBlock] = []
        taken, limit = 0, max(1, min(ask.limit, _LISTED))
        for tier, one in walk.items(cursor.at, cursor.at + _SEEN):
            taken += 1
            block = self._told(walk, tier, one)
            if block is not None:
                blocks.append(block)
            if len(blocks) == limit:
                break
        return KvListed(tuple(blocks), self._walks.next(walk, cursor, taken))

    def _begin(self, tiers: Sequence[Tier]) -> Walk:
        device = self._on_device()
        beneath = [(tier, self._hashes(tier)) for tier in tiers if tier is not Tier.DEVICE and self._has(tier)]
        return Walk(beneath, frozenset(device), device if Tier.DEVICE in tiers else ())

    def _told(self, walk: Walk, tier: Tier, one: FullHash | int) -> KvBlock | None:
        """None for what is gone by now, or is told with another tier."""
        if isinstance(one, int):
            return None if one in walk.seen else KvBlock(one.to_bytes(8, "big"), (Tier.DEVICE,))
        beneath = tuple(other for other in self._beneath() if self._holds(other, one))
        walked = {other for other, _ in walk.beneath}
        if next((other for other in beneath if other in walked), None) is not tier:
            return None
        if low64(one) not in walk.device:
            return KvBlock(one, beneath)
        walk.seen.add(low64(one))
        return KvBlock(one, (Tier.DEVICE, *beneath))

    def _beneath(self) -> tuple[Tier, ...]:
        """Nearest first."""
        return () if self._tiers is None else (Tier.HOST, *(storage.tier.tier for storage in self._tiers.storages))

    def _has(self, tier: Tier) -> bool:
        return tier in self._beneath()

    def _holds(self, tier: Tier, block_hash: FullHash) -> bool:
        if tier is Tier.HOST:
            block = self._present.manager.find(block_hash)
            return block is not None and block.here
        return block_hash in self._storage(tier)

    def _hashes(self, tier: Tier) -> Sequence[FullHash]:
        return self._present.manager.hashes() if tier is Tier.HOST else self._storage(tier).hashes()

    @property
    def _present(self) -> Tiers:
        assert self._tiers is not None, "only then is there anything beneath the device"
        return self._tiers

    def _storage(self, tier: Tier) -> Storage:
        return next(storage for storage in self._present.storages if storage.tier.tier is tier)

    # ---- act ----

    def _require(self, tier: Tier) -> None:
        if not self._has(tier):
            raise RequestError(f"there is no {tier} tier whose blocks could be verified or dropped", "tier")

    async def _verify(self, ask: KvVerify) -> KvVerified:
        self._require(ask.tier)
        walk, cursor = self._walks.resume(ask.cursor, lambda: Walk([(ask.tier, self._hashes(ask.tier))]))
        stride = self._present.records.layout.stride
        most = max(1, (_PROVEN if ask.tier is Tier.HOST else min(_READ, _SLOTS * stride)) // stride)
        hashes = [FullHash(one) for _, one in walk.items(cursor.at, cursor.at + most) if isinstance(one, bytes)]
        if ask.tier is Tier.HOST:
            found = await self._prove(hashes)
        else:
            found = await self._read(self._storage(ask.tier), hashes)
        right, corrupt, gone = found.count(True), found.count(False), found.count(None)
        return KvVerified(right, corrupt, gone, self._walks.next(walk, cursor, len(found)))

    async def _prove(self, hashes: Sequence[FullHash]) -> list[bool | None]:
        """Whether these blocks of host memory are right; None: gone."""
        tiers = self._present
        blocks = [block for one in hashes if (block := tiers.manager.find(one)) is not None and block.here]
        proven = await tiers.records.proven([HostRecord(block.hash, block.slot) for block in blocks])
        found: list[bool | None] = [None] * (len(hashes) - len(blocks))
        for block, checksum in zip(blocks, proven, strict=True):
            # They are not pinned, as that would tell that they are of use. One that is still itself has kept its slot.
            if tiers.manager.find(block.hash) is not block:
                found.append(None)
                continue
            found.append(checksum is not None and checksum == block.checksum)
            if not found[-1]:
                _log.error("a block of the host tier is not what was stored: dropped")
                tiers.manager.corrupt(block)
        tiers.tell()
        return found

    async def _read(self, storage: Storage, hashes: Sequence[FullHash]) -> list[bool | None]:
        """Whether these blocks of a tier beneath, or the first of them, are right; None: gone."""
        if not hashes:
            return []
        async with self._lent(len(hashes)) as slots:
            records = [HostRecord(one, slot) for one, slot in zip(hashes, slots, strict=False)]
            try:
                return await storage.verify(records)
            except TierFailed as error:
                raise WorkerError(f"{error.tier} tier: {error}") from error

    @asynccontextmanager
    async def _lent(self, count: int) -> AsyncIterator[list[int]]:
        """Slots of host memory, one at least. What is evicted for them is not so again for the next ones."""
        tiers = self._present
        slots = tiers.manager.lend(min(count, max(1, tiers.manager.slots // 8)))
        try:
            tiers.tell()
            if not slots:
                raise WorkerError("all of host memory is in use by requests: there is no room to read blocks into")
            yield slots
        finally:
            tiers.manager.give_back(slots)

    async def _purge(self, tier: Tier) -> int:
        self._require(tier)
        tiers = self._present
        if tier is Tier.HOST:
            blocks = tiers.manager.purge()
            tiers.tell()
        else:
            try:
                blocks = await self._storage(tier).purge()
            except TierFailed as error:
                more = "; what was dropped may be found again after a restart: purge it once the tier works"
                raise WorkerError(f"{tier} tier: {error}{more}") from error
        _log.warning("%s tier: %d blocks were dropped, as an operator wished", tier, blocks)
        return blocks
