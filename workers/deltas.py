"""Deltas on their way to frontends: what an engine's step produces for a frontend is one message.

A message costs its sender, NATS and its receiver 50 µs together, whatever it holds. So where an engine makes steps of
less than `GATHER_S`, as a simulated one may, those of that time are one message. The first after a pause does not wait,
nor does what ends all sequences that have something to send.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import NoReturn

from dynamo_lite.errors import PlaneError
from dynamo_lite.plane.bus import Bus
from dynamo_lite.plane.wire import Delta, DeltaBatch, FrontendId, Incarnation, RequestId, Subjects, encode
from workers.metrics import WorkerMetrics

log = logging.getLogger(__name__)

PAYLOAD_LIMIT = 1_000_000  # bytes; NATS refuses messages above 1 MiB
GATHER_S = 0.001
_RETRY_S = 0.1


def batches(worker: Incarnation, first_seq: int, deltas: list[Delta]) -> Iterator[bytes]:
    """`deltas` as encoded batches, each under the payload limit: nearly always one."""
    seq = first_seq
    parts = [deltas]
    while parts:
        part = parts.pop(0)
        data = encode(DeltaBatch(worker, seq, part))
        if len(data) <= PAYLOAD_LIMIT:
            seq += 1
            yield data
        elif len(part) > 1:
            parts[:0] = [part[: len(part) // 2], part[len(part) // 2 :]]
        else:
            parts[:0] = [[half] for half in _halves(part[0])]


def _halves(delta: Delta) -> tuple[Delta, Delta]:
    """One delta as two; what is true only of the first or the last token stays with it."""
    middle = len(delta.token_ids) // 2
    if middle == 0:
        raise PlaneError(f"a delta of one token is over {PAYLOAD_LIMIT} bytes")
    probs = delta.logprobs
    first = Delta(
        delta.request_id,
        delta.index,
        delta.token_ids[:middle],
        None if probs is None else probs[:middle],
        cached_tokens=delta.cached_tokens,
    )
    last = Delta(
        delta.request_id,
        delta.index,
        delta.token_ids[middle:],
        None if probs is None else probs[middle:],
        finish=delta.finish,
        stop_token=delta.stop_token,
        error=delta.error,
    )
    return first, last


class DeltaSender:
    """Collects deltas per frontend; its one loop publishes what has gathered each time it wakes.

    While NATS is away deltas gather in order and nothing is lost: `seq` moves on only after a publish.
    """

    def __init__(self, bus: Bus, subjects: Subjects, worker: Incarnation, metrics: WorkerMetrics) -> None:
        self._bus, self._subjects, self._worker, self._metrics = bus, subjects, worker, metrics
        self._waiting: dict[FrontendId, list[Delta]] = {}
        self._sent: dict[FrontendId, int] = {}  # last seq
        self._left_at = float("-inf")  # when the last messages did, on the event loop's clock
        self._open: set[tuple[RequestId, int]] = set()  # sequences that have something to send and go on
        self._due = asyncio.Event()  # gathering is over
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def send(self, frontend: FrontendId, delta: Delta) -> None:
        """Leaves with everything else of this wake-up."""
        sequence = (delta.request_id, delta.index)
        if delta.finish is None and delta.error is None:
            self._open.add(sequence)
        else:
            self._open.discard(sequence)
            if not self._open:
                self._due.set()
        waiting = self._waiting.get(frontend)
        if waiting is not None:
            waiting.append(delta)
            return
        self._waiting[frontend] = [delta]
        self._idle.clear()
        self._wake.set()

    async def flushed(self) -> None:
        """Returns once everything given to `send` has been published."""
        await self._idle.wait()

    async def run(self) -> NoReturn:
        # Setting the event schedules this loop for the next turn, after every generator that is ready in this one.
        clock = asyncio.get_running_loop().time
        while True:
            await self._wake.wait()
            if self._left_at + GATHER_S > clock():
                await self._gather()
            self._wake.clear()
            self._due.clear()
            self._open.clear()
            self._left_at = clock()
            for frontend in list(self._waiting):
                await self._publish(frontend)
            if self._waiting:
                self._wake.set()
            else:
                self._idle.set()

    async def _gather(self) -> None:
        timer = asyncio.get_running_loop().call_at(self._left_at + GATHER_S, self._due.set)
        try:
            await self._due.wait()
        finally:
            timer.cancel()

    async def _publish(self, frontend: FrontendId) -> None:
        deltas = self._waiting.pop(frontend)
        subject, bounced = self._subjects.deltas(frontend), self._subjects.bounced(self._worker, frontend)
        for data in batches(self._worker, self._sent.get(frontend, 0) + 1, deltas):
            await self._deliver(subject, data, bounced)
            self._sent[frontend] = self._sent.get(frontend, 0) + 1
            self._metrics.delta_batches.inc()

    async def _deliver(self, subject: str, data: bytes, reply: str) -> None:
        """Publish, however long that takes: a delta that is skipped would end its stream."""
        while True:
            try:
                return await self._bus.publish(subject, data, reply)
            except PlaneError as error:
                log.warning("deltas wait for NATS: %s", error)
            await asyncio.sleep(_RETRY_S)
