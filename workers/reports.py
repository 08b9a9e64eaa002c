"""What a worker says of itself: KV events, snapshots of them, its load."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from dynamo_lite.errors import PlaneError
from dynamo_lite.plane.bus import Bus
from dynamo_lite.plane.wire import Incarnation, LoadReport, Subjects, encode
from kvbm.events import KvEventBatch, KvSnapshot
from workers.engine import Engine
from workers.metrics import WorkerMetrics

log = logging.getLogger(__name__)

INTERVAL_S = 0.25
LEAST_S = 0.01  # between two reports, where short requests would make one of every beginning and end


class Reports:
    """Publishes for routers. A report that cannot leave is dropped: the next one, or a snapshot, makes up for it."""

    def __init__(
        self, bus: Bus, subjects: Subjects, incarnation: Incarnation, engine: Engine, metrics: WorkerMetrics
    ) -> None:
        self._bus, self._subjects, self._incarnation = bus, subjects, incarnation
        self._engine, self._metrics = engine, metrics
        self._kv_seq = 0
        self._load_seq = 0
        self._changed = asyncio.Event()
        self.draining = False
        self.prefills: Callable[[], int] = lambda: 0  # served since start

    def changed(self) -> None:
        """Report the load now."""
        self._changed.set()

    async def snapshot(self, _: bytes) -> bytes:
        """Handler of the snapshot subject; consistent with the last batch, as nothing is awaited."""
        return encode(KvSnapshot(self._incarnation, self._kv_seq, self._engine.snapshot()))

    async def publish_events(self) -> NoReturn:
        async for events in self._engine.kv_events():
            # No await between the engine's handing the events out and this, or a snapshot could fall in between.
            self._kv_seq += 1
            batch = KvEventBatch(self._incarnation, self._kv_seq, events)
            await self._publish(self._subjects.kv_events(self._incarnation), encode(batch))
        raise AssertionError("an engine's KV events never end")

    async def publish_load(self) -> NoReturn:
        while True:
            await self._engine.answering()  # a router that has lost a frozen worker is not to find it again
            self._changed.clear()
            await self._publish(self._subjects.load(self._incarnation), encode(self._load()))
            await asyncio.sleep(LEAST_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(INTERVAL_S):
                    await self._changed.wait()

    def _load(self) -> LoadReport:
        load = self._engine.load()
        self._metrics.loaded(load)
        self._load_seq += 1
        return LoadReport(
            self._incarnation,
            self._load_seq,
            load.running,
            load.waiting,
            load.kv_used_blocks,
            load.kv_total_blocks,
            sum(load.held_blocks.values()),
            self._kv_seq,
            self.prefills(),
            self.draining,
            load.queued_tokens,
            load.rates,
        )

    async def _publish(self, subject: str, data: bytes) -> None:
        try:
            await self._bus.publish(subject, data)
        except PlaneError as error:
            log.debug("dropped: %s", error)
