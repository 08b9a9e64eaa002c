"""The tiers of one worker, seen from its process: what the block manager decides, carried out beside the engine.

The engine's processes copy blocks between the device and the host tier's memory; this process knows which slot holds
what, takes checksums, moves blocks to and from the tiers beneath, and pins what a request is about to onboard.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import NoReturn

from dynamo_lite.config import KvTiers
from dynamo_lite.plane.wire import Fingerprint
from dynamo_lite.telemetry import record_span
from kvbm.events import BlocksCleared, BlocksStored, KvEvent, Tier
from kvbm.hashing import FullHash, full_block_hashes, low64
from kvbm.manager import BlockManager
from kvbm.policy import OnboardCost, Part
from kvbm.storage import Storage
from kvbm.tiers.base import HostRecord
from kvbm.tiers.host import HostMemory, HostRecords
from kvbm.tiers.record import Records
from kvbm.tiers.slots import Stored
from workers.connector.protocol import (
    Command,
    GrantSlots,
    Offloaded,
    OnboardChecked,
    Onboarded,
    OnboardOver,
    SlotsWanted,
    TierChanged,
)
from workers.engine import TierLoad
from workers.tiers import metrics
from workers.tiers.loads import Load, Loads
from workers.tiers.onboarding import SPAN, Onboarding, attributes_of
from workers.tiers.place import Place
from workers.tiers.storages import storages_of

_log = logging.getLogger(__name__)
_READERS = 4  # threads that take checksums, at most on half of the cores
_CHECKED = 32 * 2**20  # bytes in host memory that are checked at once; the engine is told of them together
_GRANTED = 1024  # slots kept ready for the engine at most
_OPEN_S = 10.0  # for a tier to find what is there from before
_FLUSH_S = 5.0  # at the end, for what has not been written yet
_SNAPSHOT = 250_000  # blocks of each tier that a snapshot tells of at most: it has to fit a message


class Tiers:
    """On the event loop, but for the constructor, which must precede the engine's processes."""

    def __init__(self, settings: KvTiers) -> None:
        """Raises OSError."""
        assert settings.host is not None, "every other tier is behind host memory"
        self._settings, self._host = settings, settings.host
        self.memory = HostMemory(settings.host.size)
        self.cost = OnboardCost()
        self.storages: list[Storage] = []
        self._onboardings: dict[str, Onboarding] = {}  # by request id
        self._events: asyncio.Queue[tuple[KvEvent, ...]] = asyncio.Queue()
        self._readers = max(1, min(_READERS, len(os.sched_getaffinity(0)) // 2))
        self._threads = ThreadPoolExecutor(self._readers, "tier-checksums")
        self._hits = self._misses = 0  # of the host tier

    async def start(
        self, fingerprint: Fingerprint, place: Place, command: Callable[[Command], None], group: asyncio.TaskGroup
    ) -> None:
        """`place`: where this worker's blocks belong. `loops` are to be run from then on.

        Raises ValueError when the memory is too small for this model, TierRefused.
        """
        layout = fingerprint.layout
        self._block_size, self._ranks = layout.block_size, layout.tensor_parallel
        records = Records(layout.block_bytes * self._ranks, place.short)
        self.records = HostRecords(self.memory, records, self._threads, self._readers)
        if self.records.slots < 2:
            raise ValueError(f"kv_tiers.host.size: {self.memory.size} bytes do not hold two blocks of this model")
        self.manager = BlockManager(self.records.slots, self._ranks, self._host.eviction)
        self._command, self._group = command, group
        self._loads = Loads(records.stride, group)
        self.storages = storages_of(
            self._settings, place, self.memory, self.records, self.manager, self.cost, self.tell
        )
        for storage in self.storages:
            await storage.open(_OPEN_S)
        self._grant()

    def loops(self) -> list[Coroutine[object, object, NoReturn]]:
        """What goes on as long as the worker does."""
        return [loop for storage in self.storages for loop in storage.loops()]

    async def flush(self) -> None:
        """Write what has not been written yet. Once the engine copies nothing any more, while the loops still run."""
        for storage in self.storages:
            await storage.flush(_FLUSH_S)

    async def close(self) -> None:
        for storage in self.storages:
            await storage.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.memory.close()

    # ---- offload ----

    def handle(self, report: Offloaded | SlotsWanted | Onboarded) -> None:
        """A connector's report."""
        match report:
            case Offloaded():
                self.manager.counts.missed += report.missed
                self._offloaded(report)
            case SlotsWanted():
                self._grant(report.count)
            case Onboarded():
                self._onboarded(report)

    def _offloaded(self, report: Offloaded) -> None:
        """Blocks have come, or will not. They can be found once their checksums are known."""
        here = [
            HostRecord(FullHash(block_hash), slot)
            for slot, block_hash, well in report.blocks
            if self.manager.filled(slot, FullHash(block_hash), report.rank, well)
        ]
        if here:
            self._task(self._store(here))
        else:
            self._grant()

    async def _store(self, records: list[HostRecord]) -> None:
        for record, checksum in zip(records, await self.records.seal(records), strict=True):
            self.manager.store(record.slot, checksum)
        for storage in self.storages:
            storage.offer([record.hash for record in records])
        self._grant()

    def _grant(self, more: int = 0) -> None:
        """Let the engine have slots ahead, so that it need not ask, and `more` for a prompt that has come.

        What is granted caches nothing, so that is an eighth of all at most, and half of them for prompts.
        """
        slots, granted = self.manager.slots, self.manager.granted
        ahead = min(_GRANTED, max(1, slots // 8)) - granted
        wanted = max(ahead, min(more, slots // 2 - granted))
        given = self.manager.grant(wanted) if wanted > 0 else []
        self.tell()
        if given:
            self._command(GrantSlots(tuple(sorted(given))))  # neighbours are copied at once

    def tell(self) -> None:
        """The engine and the routers, of what has changed."""
        gained, lost = self.manager.gained(), self.manager.lost()
        if gained or lost:
            self._command(TierChanged(stored=tuple(gained), removed=tuple(lost)))
        events = self.manager.events() + tuple(event for storage in self.storages for event in storage.events())
        if events:
            self._events.put_nowait(events)

    # ---- onboard ----

    def onboard(
        self, request_id: str, token_ids: Sequence[int], cache_salt: str | None, local: int, traceparent: str = ""
    ) -> Onboarding | None:
        """Pin what of the prompt's prefix is in the tiers beyond `local` blocks, as far as reading it is worth while.

        Returns None when there is nothing, or computing it is predicted to be faster. `release` must follow.
        """
        most = (len(token_ids) - 1) // self._block_size  # the engine computes one token at least
        if most <= 0 or not (self.storages or self.manager.stored):
            return None
        hashes = full_block_hashes(token_ids[: most * self._block_size], self._block_size, cache_salt)
        self.manager.used(hashes)
        for storage in self.storages:
            storage.used(hashes)
        found = self._find(hashes[local:])
        parts = [Part(tier, len(list(blocks)), self._queued(tier)) for tier, blocks in groupby(found)]
        if not parts:
            return None
        forecast = self.cost.forecast(parts, self.records.layout.block_bytes, self._block_size)
        blocks = self._pinned(request_id, hashes[local : local + forecast.blocks], found)
        if not blocks:
            if traceparent and not forecast.onboard:
                now = time.time_ns()
                attributes = attributes_of(Counter(found), forecast) | {"blocks": 0, "cause": "computing is faster"}
                record_span(SPAN, traceparent, now, now, attributes)
            return None
        tiers = Counter(found[: len(blocks)])
        onboarding = Onboarding(request_id, local, blocks, tiers, forecast, traceparent)
        self._onboardings[request_id] = onboarding
        self._task(self._check(onboarding))
        return onboarding

    def _find(self, hashes: Sequence[FullHash]) -> list[Tier]:
        """Where the blocks of the longest prefix are that the tiers hold together."""
        found: list[Tier] = []
        for block_hash in hashes:
            block = self.manager.find(block_hash)
            if block is not None and self._loads.hang(block):
                break
            if block is not None:
                self._hits += 1
                found.append(Tier.HOST)
                continue
            self._misses += 1
            tier = self._find_beneath(block_hash)
            if tier is None:
                break
            found.append(tier)
        return found

    def _find_beneath(self, block_hash: FullHash) -> Tier | None:
        for storage in self.storages:
            if block_hash in storage:
                storage.counts.hits += 1
                return storage.tier.tier
            storage.counts.misses += 1
        return None

    def _queued(self, tier: Tier) -> int:
        return next((storage.queued for storage in self.storages if storage.tier.tier is tier), 0)

    def _pinned(self, request_id: str, hashes: Sequence[FullHash], found: Sequence[Tier]) -> list[Stored]:
        """These blocks, pinned, as far as host memory has room for those that are to come; these are on their way."""
        near = {block_hash: block for block_hash in hashes if (block := self.manager.find(block_hash)) is not None}
        self.manager.pin(request_id, list(near.values()))  # first, or what comes might take their place
        fresh = [block_hash for block_hash in hashes if block_hash not in near]
        far = dict(zip(fresh, self.manager.expect(fresh), strict=False)) if fresh else {}
        self.manager.pin(request_id, list(far.values()))
        for storage in self.storages:
            mine = [
                far[block_hash]
                for block_hash, tier in zip(hashes, found, strict=False)
                if block_hash in far and tier is storage.tier.tier
            ]
            if mine:
                self._loads.bring(storage, mine)
        self.tell()
        blocks: list[Stored] = []
        for block_hash in hashes:
            block = near.get(block_hash) or far.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        if not blocks:
            self.manager.unpin(request_id)
        return blocks

    async def _check(self, onboarding: Onboarding) -> None:
        """Tell the engine how many of the blocks are in host memory and right; forget the first that is not.

        It is told after some blocks each, and copies them while the rest is checked, or still on its way.
        """
        begun, right = time.monotonic(), 0
        until = begun + max((storage.policy.timeout_s for storage in self.storages), default=0.0)
        for load, blocks in self._portions(onboarding.blocks):
            onboarding.waited |= load is not None
            good = await self._here(onboarding, load, blocks, until)
            if not self._reading(onboarding):
                return
            right += good
            if right == good:
                onboarding.check_s = time.monotonic() - begun
            more = good == len(blocks) and right < len(onboarding.blocks)
            self._command(OnboardChecked(onboarding.request_id, right, more))
            if not more:
                return

    def _portions(self, blocks: Sequence[Stored]) -> Iterator[tuple[Load | None, list[Stored]]]:
        """What is looked at together: blocks that come together, or some of those that are here."""
        most = max(1, _CHECKED // self.records.layout.stride)
        for load, run in groupby(blocks, self._loads.load_of):
            mine = list(run)
            for first in range(0, len(mine), most if load is None else len(mine)):
                yield load, mine[first : first + most] if load is None else mine

    def _reading(self, onboarding: Onboarding) -> bool:
        """Whether a rank may still read its slots: they are pinned as long."""
        return self._onboardings.get(onboarding.request_id) is onboarding

    async def _here(self, onboarding: Onboarding, load: Load | None, blocks: Sequence[Stored], until: float) -> int:
        """How many of these, from the first on, are in host memory and right; of no meaning once nobody reads them."""
        if load is not None:
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    await load.over.wait()
            except TimeoutError:
                return 0
            return next((number for number, block in enumerate(blocks) if not block.here), len(blocks))
        checksums = await self.records.checksums([block.slot for block in blocks])
        if not self._reading(onboarding):  # something else may be in the slots by now
            return 0
        for number, (block, checksum) in enumerate(zip(blocks, checksums, strict=True)):
            if not block.here:  # it did not come
                return number
            if checksum != block.checksum:
                _log.error("a block of the host tier is not what was stored: dropped, and computed again")
                self.manager.corrupt(block)
                self.tell()
                return number
        return len(blocks)

    def _onboarded(self, report: Onboarded) -> None:
        """One rank reads no slot of it any more."""
        onboarding = self._onboardings.get(report.request_id)
        if onboarding is None:
            return
        onboarding.ends.setdefault(report.rank, report)
        if len(onboarding.ends) < self._ranks:
            return
        del self._onboardings[report.request_id]
        self.manager.unpin(report.request_id)
        blocks, size, seconds = onboarding.record()
        if blocks:
            self.manager.counts.onboarded += blocks
            if not onboarding.waited:
                self.cost.onboarded(size, seconds)
                metrics.observe(Tier.HOST, "read", seconds)

    def release(self, request_id: str) -> None:
        """The request has its first token, or has ended: what it has not begun to read by now it never will."""
        onboarding = self._onboardings.get(request_id)
        if onboarding is not None and not onboarding.over:
            onboarding.over = True
            self._command(OnboardOver(request_id))

    # ---- state ----

    def snapshot(self) -> dict[Tier, tuple[int, ...]]:
        told = {storage.tier.tier: storage.hashes() for storage in self.storages}
        beneath = {tier: tuple(map(low64, hashes[-_SNAPSHOT:])) for tier, hashes in told.items()}
        return self.manager.snapshot() | beneath

    async def forward(self, device: AsyncIterator[tuple[KvEvent, ...]]) -> NoReturn:
        """Put the device's events among our own."""
        async for events in device:
            cleared = any(isinstance(event, BlocksCleared) for event in events)
            left = self.snapshot().items() if cleared else ()  # that is about the device; our blocks are still there
            self._events.put_nowait(events + tuple(BlocksStored(hashes, tier=tier) for tier, hashes in left))
        raise AssertionError("an engine's KV events never end")

    async def events(self) -> AsyncIterator[tuple[KvEvent, ...]]:
        """What can be matched on this worker, or no longer, in any tier; for a single consumer."""
        while True:
            yield await self._events.get()

    def load(self) -> tuple[TierLoad, ...]:
        counts = self.manager.counts
        used = self.manager.stored * self.records.layout.stride
        host = TierLoad(
            Tier.HOST, used, self.memory.size, self._hits, self._misses, counts.offloaded, counts.onboarded,
            counts.evicted, counts.missed, counts.corrupt, blocks=self.manager.stored,
        )  # fmt: skip
        return (host, *(_load_of(storage) for storage in self.storages))

    def _task(self, work: Coroutine[object, object, None]) -> None:
        self._group.create_task(work)


def _load_of(storage: Storage) -> TierLoad:
    tier, counts = storage.tier, storage.counts
    return TierLoad(
        tier.tier, tier.used_bytes, tier.size_bytes, counts.hits, counts.misses, counts.offloaded, counts.onboarded,
        tier.evicted, counts.missed, counts.corrupt, storage.waiting, storage.on, tier.blocks,
    )  # fmt: skip
