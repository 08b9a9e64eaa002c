"""The tiers of one worker, seen from its process: what the block manager decides, carried out beside the engine.

The engine's processes copy blocks between the device and the host tier's memory; this process knows which slot holds
what, takes checksums, and pins what a request is about to onboard. One task does all of that, in order.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NoReturn

import xxhash

from dynamo_lite.config import HostTier
from dynamo_lite.telemetry import AttributeValue, record_span
from kvbm.events import BlocksCleared, BlocksStored, KvEvent, Tier
from kvbm.hashing import FullHash, full_block_hashes
from kvbm.manager import BlockManager
from kvbm.policy import Forecast, OnboardCost
from kvbm.tiers.host import HostMemory, slot_bytes
from kvbm.tiers.slots import Stored
from workers.connector.protocol import (
    ONBOARD,
    REQUEST_ID,
    Command,
    GrantSlots,
    Offloaded,
    OnboardChecked,
    Onboarded,
    OnboardOver,
    TierChanged,
)
from workers.engine import TierLoad

_log = logging.getLogger(__name__)
_CHECKED = 32 * 2**20  # bytes whose checksums are taken at once; the engine is told of them together
_READERS = 4  # threads that take checksums, at most on half of the cores
_GRANTED = 1024  # slots kept ready for the engine, at most an eighth of all: a long prompt completes many at once


@dataclass(slots=True)
class Onboarding:
    """What one request is to read from the tiers."""

    request_id: str
    first: int  # index in the prompt of the first block
    blocks: list[Stored]
    forecast: Forecast
    traceparent: str
    check_s: float = 0.0  # what the checksums took without which no copy can begin
    ends: dict[int, Onboarded] = field(default_factory=dict)  # by rank
    over: bool = False  # the ranks were told that nobody wants it

    @property
    def end(self) -> int:
        """Index in the prompt of the block after the last."""
        return self.first + len(self.blocks)

    @property
    def slots(self) -> list[int]:
        return [block.slot for block in self.blocks]

    @property
    def params(self) -> dict[str, Any]:
        """What the engine's connectors are to know of it."""
        return {REQUEST_ID: self.request_id, ONBOARD: (self.first, self.slots)}


class Tiers:
    """On the event loop, but for the constructor, which must precede the engine's processes."""

    def __init__(self, settings: HostTier) -> None:
        """Raises OSError."""
        self.memory = HostMemory(settings.size)
        self.cost = OnboardCost()
        self._onboardings: dict[str, Onboarding] = {}  # by request id
        self._events: asyncio.Queue[tuple[KvEvent, ...]] = asyncio.Queue()
        self._readers = max(1, min(_READERS, len(os.sched_getaffinity(0)) // 2))
        self._threads = ThreadPoolExecutor(self._readers, "tier-checksums")
        self._group: asyncio.TaskGroup | None = None
        self._ranks = 1

    def start(
        self, block_bytes: int, ranks: int, block_size: int, command: Callable[[Command], None],
        group: asyncio.TaskGroup,
    ) -> None:  # fmt: skip
        """`block_bytes`: of one rank's share. `block_size`: tokens.

        Raises ValueError when the memory is too small for this model.
        """
        self._slot_bytes = slot_bytes(block_bytes, ranks)
        self._block_bytes, self._ranks, self._block_size = block_bytes * ranks, ranks, block_size
        slots = self.memory.size // self._slot_bytes
        if slots < 2:
            raise ValueError(f"kv_tiers.host.size: {self.memory.size} bytes do not hold two blocks of this model")
        self.manager = BlockManager(slots, ranks)
        self._command, self._group = command, group
        self._grant()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.memory.close()

    # ---- offload ----

    def handle(self, report: Offloaded | Onboarded) -> None:
        """A connector's report."""
        if isinstance(report, Offloaded):
            self.manager.counts.missed += report.missed
            self._offloaded(report)
        else:
            self._onboarded(report)

    def _offloaded(self, report: Offloaded) -> None:
        """Blocks have come, or will not. They can be found once their checksums are known."""
        here = [slot for slot, block_hash, well in report.blocks if self._filled(slot, block_hash, report.rank, well)]
        if here:
            self._task(self._store(here))
        else:
            self._grant()

    def _filled(self, slot: int, block_hash: bytes, rank: int, well: bool) -> bool:
        return self.manager.filled(slot, FullHash(block_hash), rank, well)

    async def _store(self, slots: list[int]) -> None:
        for slot, checksum in zip(slots, await self._checksums(slots), strict=True):
            self.manager.store(slot, checksum)
        self._grant()

    def _grant(self) -> None:
        """Let the engine have slots ahead, so that it need not ask; tell what gave way to them."""
        wanted = min(_GRANTED, max(1, self.manager.slots // 8)) - self.manager.granted
        slots = self.manager.grant(wanted) if wanted > 0 else []
        self._tell()
        if slots:
            self._command(GrantSlots(tuple(sorted(slots))))  # neighbours are copied at once

    def _tell(self) -> None:
        lost = self.manager.lost()
        if lost:
            self._command(TierChanged(removed=tuple(lost)))
        events = self.manager.events()
        if events:
            self._events.put_nowait(events)

    # ---- onboard ----

    def onboard(
        self, request_id: str, token_ids: Sequence[int], cache_salt: str | None, local: int, traceparent: str = ""
    ) -> Onboarding | None:
        """Pin what of the prompt's prefix is in the tiers beyond `local` blocks, when reading it is worth while.

        Returns None when there is nothing, or computing it is predicted to be faster. `release` must follow.
        """
        most = (len(token_ids) - 1) // self._block_size  # the engine computes one token at least
        if not self.manager.stored or most <= local:
            return None
        hashes = full_block_hashes(token_ids[: most * self._block_size], self._block_size, cache_salt)
        blocks = self.manager.match(hashes[local:])
        if not blocks:
            return None
        forecast = self.cost.forecast(len(blocks) * self._block_bytes, len(blocks) * self._block_size)
        if not forecast.onboard:
            return None
        onboarding = self._onboardings[request_id] = Onboarding(request_id, local, blocks, forecast, traceparent)
        self.manager.pin(request_id, blocks)
        self._task(self._check(onboarding))
        return onboarding

    async def _check(self, onboarding: Onboarding) -> None:
        """Tell the engine how many of the blocks are what was stored; forget the first that is not.

        It is told after some blocks each, and copies them while the rest is checked.
        """
        begun, right = time.monotonic(), 0
        at_once = max(1, _CHECKED // self._slot_bytes)
        for first in range(0, len(onboarding.blocks), at_once):
            blocks = onboarding.blocks[first : first + at_once]
            checksums = await self._checksums([block.slot for block in blocks])
            for block, checksum in zip(blocks, checksums, strict=True):
                if checksum != block.checksum:
                    _log.error("a block of the host tier is not what was stored: dropped, and computed again")
                    self.manager.corrupt(block)
                    self._tell()
                    break
                right += 1
            if not first:
                onboarding.check_s = time.monotonic() - begun
            more = right == first + len(blocks) < len(onboarding.blocks)
            self._command(OnboardChecked(onboarding.request_id, right, more))
            if not more:
                return

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
        ends = list(onboarding.ends.values())
        blocks = min(end.blocks for end in ends)
        if blocks:
            self.manager.counts.onboarded += blocks
            started, ended = min(end.started_ns for end in ends), max(end.ended_ns for end in ends)
            size, seconds = sum(end.bytes for end in ends), onboarding.check_s + (ended - started) / 1e9
            self.cost.onboarded(size, seconds)
            if onboarding.traceparent:
                attributes = self._attributes(onboarding, ends, blocks) | {"bytes": size, "seconds": seconds}
                record_span("kv.onboard", onboarding.traceparent, started, ended, attributes)

    @staticmethod
    def _attributes(onboarding: Onboarding, ends: list[Onboarded], blocks: int) -> dict[str, AttributeValue]:
        attributes: dict[str, AttributeValue] = {
            "tier": Tier.HOST.value,
            "blocks": blocks,
            "cause": next((end.cause for end in ends if end.cause), ""),
        }
        if onboarding.forecast.onboard_s is not None:
            attributes["predicted_onboard_s"] = onboarding.forecast.onboard_s
        if onboarding.forecast.compute_s is not None:
            attributes["predicted_compute_s"] = onboarding.forecast.compute_s
        return attributes

    def release(self, request_id: str) -> None:
        """The request has its first token, or has ended: what it has not begun to read by now it never will."""
        onboarding = self._onboardings.get(request_id)
        if onboarding is not None and not onboarding.over:
            onboarding.over = True
            self._command(OnboardOver(request_id))

    # ---- state ----

    def snapshot(self) -> dict[Tier, tuple[int, ...]]:
        return self.manager.snapshot()

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
        used = self.manager.stored * self._slot_bytes
        return (
            TierLoad(
                Tier.HOST, used, self.memory.size, counts.offloaded, counts.onboarded, counts.evicted,
                counts.missed, counts.corrupt,
            ),
        )  # fmt: skip

    # ---- work ----

    async def _checksums(self, slots: Sequence[int]) -> list[int]:
        """xxh3 over each slot's block, on several threads: one does not read memory as fast as a GPU does."""
        views = [self.memory.view(slot * self._slot_bytes, self._block_bytes) for slot in slots]
        share = -(-len(views) // self._readers)
        loop = asyncio.get_running_loop()
        parts = [
            loop.run_in_executor(self._threads, _checksums, views[first : first + share])
            for first in range(0, len(views), share)
        ]
        return [checksum for part in parts for checksum in await part]

    def _task(self, work: Coroutine[object, object, None]) -> None:
        assert self._group is not None, "not started"
        self._group.create_task(work)


def _checksums(views: Sequence[memoryview]) -> list[int]:
    """The interpreter is not needed for it."""
    return [xxhash.xxh3_64_intdigest(view) for view in views]
