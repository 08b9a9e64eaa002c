"""A storage tier in use: what waits to be written there, whether it works, and what reading it takes.

Write-behind. Blocks come from host memory some time after they came there: after `flush_interval_s`, or at once when
many wait. What host memory has no room for until then is not written, and counted; nobody ever waits for a write.

Off and on. A tier that fails is off: nothing is written or looked for there, and routers are told that its blocks are
gone. It is tried again after pauses that double, and comes back, blocks included, when it works.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn

from kvbm.errors import TierFailed
from kvbm.events import BlocksRemoved, BlocksStored, KvEvent
from kvbm.hashing import FullHash, low64
from kvbm.manager import BlockManager
from kvbm.policy import OnboardCost
from kvbm.tiers.base import Changes, HostRecord, StorageTier
from kvbm.tiers.host import HostRecords
from kvbm.tiers.slots import Stored

_log = logging.getLogger(__name__)
_BATCH_BYTES = 32 * 2**20  # of one write
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0  # before a tier that is off is tried again
_PATIENCE = 10  # times `timeout_s` may pass in a read or a batch of a write, before the tier is off
_HEALTHY_S = 60.0  # after that long the pauses begin anew
_SEEN = 65536  # hashes remembered for a second use

Observe = Callable[[str, float], None]  # an operation's name, its seconds


@dataclass(frozen=True, slots=True)
class StoragePolicy:
    """When blocks are written to a tier, and which; how long a request waits for it."""

    flush_interval_s: float
    watermark: int  # blocks waiting: then they are written at once
    second_use: bool  # only those that a second request has
    timeout_s: float  # the longest that a request waits for its blocks


@dataclass(slots=True)
class StorageCounts:
    """Blocks, since the start."""

    hits: int = 0  # looked for here, and found
    misses: int = 0
    offloaded: int = 0  # stored
    onboarded: int = 0  # read back
    missed: int = 0  # host memory had no room for them until they could be written
    corrupt: int = 0
    failures: int = 0  # times that it was turned off


class Storage:
    """On one event loop: `open` once, then `loops` as tasks, `flush` while they still run, and `close`."""

    def __init__(
        self, tier: StorageTier, policy: StoragePolicy, manager: BlockManager, records: HostRecords,
        cost: OnboardCost, changed: Callable[[], None], observe: Observe = lambda _operation, _seconds: None,
        release: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """`changed`: called when `events` or the manager has something to tell. `release`: once the tier is closed."""
        self.tier, self.policy = tier, policy
        self._manager, self._records, self._cost = manager, records, cost
        self._changed, self._observe, self._release = changed, observe, release
        self.counts = StorageCounts()
        self.on = False
        self.queued = 0  # bytes being read
        self._waiting: OrderedDict[FullHash, float] = OrderedDict()  # to be written, and since when
        self._seen: OrderedDict[FullHash, bool] = OrderedDict()  # with second_use: whether a second request had it
        self._work = asyncio.Event()
        self._writing = asyncio.Lock()
        self._events: list[KvEvent] = []
        self._pause_s, self._on_since = _FIRST_PAUSE_S, 0.0

    # ---- life ----

    async def open(self, timeout_s: float) -> None:
        """Find what is there from before; a tier that does not work now is off. Raises TierRefused."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.tier.open()
        except TimeoutError:
            self._turn_off(TierFailed(self.tier.tier, "deadline", f"it was not open within {timeout_s:g} s"))
        except TierFailed as error:
            self._turn_off(error)
        else:
            self._turn_on()

    def loops(self) -> list[Coroutine[object, object, NoReturn]]:
        """To be run from `open` on."""
        return [self._run(), *self.tier.loops(self._changed)]

    async def _run(self) -> NoReturn:
        while True:
            if not self.on:
                await self._come_back()
            else:
                await self._due()
                await self._write()

    async def flush(self, timeout_s: float) -> None:
        """Write what waits; what is not written by then is left out."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._write()  # also waits for what is being written already
                while self.on and self._waiting:
                    await self._write()
        except TimeoutError:
            _log.warning("%s tier: %d blocks were not written within %g s", self.name, len(self._waiting), timeout_s)

    async def close(self) -> None:
        await self.tier.close()
        await asyncio.to_thread(self._release)

    @property
    def name(self) -> str:
        return self.tier.tier.value

    # ---- blocks ----

    def __contains__(self, block_hash: FullHash) -> bool:
        return self.on and block_hash in self.tier

    def offer(self, hashes: Sequence[FullHash]) -> None:
        """These have just come to host memory."""
        for block_hash in hashes:
            if not self.policy.second_use or self._seen.get(block_hash):
                self._queue(block_hash)

    def used(self, hashes: Sequence[FullHash]) -> None:
        """A request's prefix consists of these."""
        if self.on:
            self.tier.used(hashes)
        if not self.policy.second_use:
            return
        for block_hash in hashes:
            again = block_hash in self._seen
            self._seen[block_hash] = again
            self._seen.move_to_end(block_hash)
            if again and self._manager.find(block_hash) is not None:
                self._queue(block_hash)
        while len(self._seen) > _SEEN:
            self._seen.popitem(last=False)

    def _queue(self, block_hash: FullHash) -> None:
        if block_hash in self._waiting or block_hash in self.tier:
            return
        self._waiting[block_hash] = time.monotonic()
        if len(self._waiting) > 2 * self._manager.slots:  # of a tier that is off: the oldest have left host memory
            self._waiting.popitem(last=False)
            self.counts.missed += 1
        if len(self._waiting) in (1, self.policy.watermark):
            self._work.set()

    @property
    def waiting(self) -> int:
        """Blocks to be written."""
        return len(self._waiting)

    async def read(self, blocks: Sequence[Stored]) -> None:
        """Bring blocks that the manager expects: on return each has arrived, or failed. Never raises."""
        size, begun = len(blocks) * self._records.layout.bytes, time.monotonic()
        before, self.queued = self.queued, self.queued + size
        wanted = [HostRecord(block.hash, block.slot) for block in blocks]
        try:
            with self._watched():
                there = await self.tier.read(wanted)
        except TierFailed as error:
            self._turn_off(error)
            there = [False] * len(blocks)
        finally:
            self.queued -= size
        if all(there):
            seconds = time.monotonic() - begun
            self._cost.read(self.tier.tier, before + size, seconds)
            self._observe("read", seconds)
        for block, came, checksum in zip(blocks, there, await self._records.proven(wanted), strict=True):
            if not came:
                self._manager.failed(block)
            elif checksum is None:
                self._manager.failed(block)
                await self._corrupt(block.hash)
            else:
                self.counts.onboarded += 1
                self._manager.arrived(block, checksum)
        self._changed()

    async def verify(self, records: Sequence[HostRecord]) -> list[bool | None]:
        """Whether these blocks are what was stored; None: one is here no more. What is wrong is dropped and counted.

        Their slots are for reading into, and nobody else's until this returns or raises. Raises TierFailed.
        """
        if not self.on:
            raise TierFailed(self.tier.tier, "off", f"the {self.name} tier is off")
        size = len(records) * self._records.layout.bytes
        self.queued += size
        try:
            with self._watched():
                there = await self.tier.read(records, use=False)
        except TierFailed as error:
            self._turn_off(error)
            raise
        finally:
            self.queued -= size
        checksums = await self._records.proven(records)
        for record, came, checksum in zip(records, there, checksums, strict=True):
            if came and checksum is None:
                await self._corrupt(record.hash)
        self._changed()
        return [checksum is not None if came else None for came, checksum in zip(there, checksums, strict=True)]

    async def purge(self) -> int:
        """Remove every block, and what waits to be written here; returns how many were here. Raises TierFailed."""
        async with self._writing:
            self._waiting.clear()
            try:
                blocks = await self.tier.purge()
                await self.tier.sync()
            except TierFailed as error:
                self._turn_off(error)
                raise
            finally:
                self._changed()
            return blocks

    async def _corrupt(self, block_hash: FullHash) -> None:
        self.counts.corrupt += 1
        _log.error("a block of the %s tier is not what was stored: dropped, and computed again", self.name)
        await self.tier.forget(block_hash)

    # ---- writing ----

    async def _due(self) -> None:
        """Until there is something to write, and the time for it has come; or the tier is off."""
        while self.on:
            self._work.clear()
            if len(self._waiting) >= self.policy.watermark:
                return
            left_s = None
            if self._waiting:
                left_s = next(iter(self._waiting.values())) + self.policy.flush_interval_s - time.monotonic()
                if left_s <= 0:
                    return
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._work.wait()

    async def _write(self) -> None:
        """All that waits now, batch by batch."""
        most = max(1, _BATCH_BYTES // self._records.layout.stride)
        async with self._writing:
            left = len(self._waiting)
            while self.on and left > 0 and self._waiting:
                batch = [self._waiting.popitem(last=False)[0] for _ in range(min(most, left, len(self._waiting)))]
                left -= len(batch)
                try:
                    await self._write_batch(batch)
                    if not self._waiting or left <= 0:
                        await self.tier.sync()
                except TierFailed as error:
                    self._turn_off(error)
                    for block_hash in batch:  # again, should it be back while they are still in host memory
                        if self._manager.find(block_hash) is not None:
                            self._queue(block_hash)
                self._changed()

    async def _write_batch(self, hashes: Sequence[FullHash]) -> None:
        """Raises TierFailed."""
        found = [block for one in hashes if (block := self._manager.find(one)) is not None and block.here]
        self.counts.missed += len(hashes) - len(found)
        owner, begun = f"{self.name} write", time.monotonic()
        self._manager.pin(owner, found)
        stored = 0
        try:
            records = [HostRecord(block.hash, block.slot) for block in found]
            # What is not right in host memory any more must not go on to live for longer.
            proven = await self._records.proven(records)
            right = [one for one, checksum in zip(records, proven, strict=True) if checksum is not None]
            for block, checksum in zip(found, proven, strict=True):
                if checksum is None:
                    self._manager.corrupt(block)
            if right:
                with self._watched():
                    stored = await self.tier.write(right)
                self._observe("write", time.monotonic() - begun)
            self.counts.offloaded += stored
            self.counts.missed += len(found) - stored
        finally:
            self._manager.unpin(owner)

    # ---- off and on ----

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Off while the body hangs: what moves records cannot return as long as a dead volume may touch their slots."""
        patience_s = _PATIENCE * self.policy.timeout_s
        silent = TierFailed(self.tier.tier, "deadline", f"no answer within {patience_s:g} s")
        timer = asyncio.get_running_loop().call_later(patience_s, self._turn_off, silent)
        try:
            yield
        finally:
            timer.cancel()

    async def _come_back(self) -> None:
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        try:
            await self.tier.probe()
        except TierFailed as error:
            _log.debug("%s tier: still off: %s", self.name, error)
        else:
            _log.warning("%s tier: works again", self.name)
            self._turn_on()

    def _turn_on(self) -> None:
        self.on, self._on_since = True, time.monotonic()
        self.tier.changes()
        hashes = self.tier.hashes()
        if hashes:
            self._events.append(BlocksStored(tuple(map(low64, hashes)), tier=self.tier.tier))
        self._changed()

    def _turn_off(self, error: TierFailed) -> None:
        if not self.on and self.counts.failures:
            return
        _log.warning(
            "%s tier: %s (%s); it is off until it works again, requests go on without", self.name, error, error.cause
        )
        if self.on:
            self._tell(self.tier.changes())
            hashes = self.tier.hashes()
            if hashes:
                self._events.append(BlocksRemoved(tuple(map(low64, hashes)), self.tier.tier))
            if time.monotonic() - self._on_since > _HEALTHY_S:
                self._pause_s = _FIRST_PAUSE_S
        self.counts.failures += 1
        self.on = False
        self._work.set()
        self._changed()

    def _tell(self, changes: Changes) -> None:
        tier = self.tier.tier
        if changes.removed:
            self._events.append(BlocksRemoved(tuple(map(low64, changes.removed)), tier))
        if changes.stored:
            self._events.append(BlocksStored(tuple(map(low64, changes.stored)), tier=tier))

    def events(self) -> tuple[KvEvent, ...]:
        """What can be found here, or no longer, since the last call, in order."""
        changes = self.tier.changes()
        if self.on:
            self._tell(changes)
        events, self._events = tuple(self._events), []
        return events

    def hashes(self) -> tuple[FullHash, ...]:
        """What can be found here now."""
        return self.tier.hashes() if self.on else ()
