"""How busy a worker is: what it reports, corrected by what routers have sent there since.

A booking is a context manager, so it ends with the request however that ends. It belongs to one incarnation:
when that is gone its counts are gone too, and nothing is left to leak into its successor.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dynamo_lite.plane.wire import LoadReport

UNSEEN_S = 0.05  # a request booked so shortly before a report came may be missing in it


@dataclass(slots=True, eq=False)
class Booking:
    """What one request makes one worker busy with."""

    load: WorkerLoad
    tokens: float  # of its prompt, yet to be computed there
    blocks: float  # of the worker's, while it runs
    at: float  # seconds
    open: bool = True

    def computed(self) -> None:
        """The prompt is; what it still takes is a place in the batch."""
        if self.tokens:
            self.load.computed(self)

    def end(self) -> None:
        """Idempotent."""
        if self.open:
            self.open = False
            self.load.close(self)


class WorkerLoad:
    """The load of one worker incarnation.

    Each report is the truth as of its time. What is booked later comes on top of it, and the queue shrinks as fast as
    the worker computes, until the next report says how it really is.
    """

    __slots__ = (
        "_as_of",
        "_blocks",
        "_booked_blocks",
        "_booked_tokens",
        "_clock",
        "_ms_per_token",
        "_queued",
        "_recent",
        "_sequences",
        "bookings",
        "report",
    )

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock  # seconds
        self.report: LoadReport | None = None
        self.bookings = 0  # open ones
        self._booked_blocks = 0.0  # of these
        self._booked_tokens = 0.0  # likewise, yet to be computed as far as is known
        self._queued = 0.0  # tokens, at `_as_of`
        self._as_of = 0.0
        self._ms_per_token = 0.0  # as was said last
        self._sequences = 0.0  # as reported, and since
        self._blocks = 0.0  # likewise
        self._recent: deque[Booking] = deque()  # of the last moments

    def take(self, report: LoadReport) -> None:
        """A newer report from the worker. Late ones are ignored."""
        if self.report is not None and report.seq <= self.report.seq:
            return
        self.report, now = report, self._clock()
        self._forget(now)
        # What was booked that lately may be in the report or not: whichever is more.
        self._queued = max(float(report.queued_tokens), sum(each.tokens for each in self._recent if each.open))
        self._as_of = now
        self._sequences = float(report.running + report.waiting)
        self._blocks = float(report.kv_used_blocks)

    def queued_tokens(self, ms_per_token: float) -> float:
        """Of prompts, that the worker computes before one that comes now. `ms_per_token`: how fast it is."""
        if not self._queued:
            return 0.0
        done = (self._clock() - self._as_of) * 1000 / ms_per_token if ms_per_token > 0 else self._queued
        return max(0.0, self._queued - done)

    @property
    def sequences(self) -> float:
        """That run there or wait; never fewer than are booked."""
        return max(float(self.bookings), self._sequences)

    @property
    def used_blocks(self) -> float:
        """Of its KV, by running requests; never fewer than are booked."""
        return max(self._booked_blocks, self._blocks)

    @property
    def draining(self) -> bool:
        return self.report is not None and self.report.draining

    def book(self, tokens: float, blocks: float, ms_per_token: float) -> Booking:
        """Count a request until `Booking.end`. `ms_per_token`: as for `queued_tokens`."""
        self._ms_per_token = ms_per_token
        self._settle(self._left + tokens)
        self._sequences += 1
        self._blocks += blocks
        self._booked_blocks += blocks
        self._booked_tokens += tokens
        self.bookings += 1
        booking = Booking(self, tokens, blocks, self._as_of)
        self._forget(self._as_of)
        self._recent.append(booking)
        return booking

    @property
    def _left(self) -> float:
        return self.queued_tokens(self._ms_per_token)

    def _settle(self, queued: float) -> None:
        self._queued, self._as_of = queued, self._clock()

    def _forget(self, now: float) -> None:
        while self._recent and self._recent[0].at < now - UNSEEN_S:
            self._recent.popleft()

    def computed(self, booking: Booking) -> None:
        """Called by the booking. What is left to compute is what others have booked, at most."""
        self._booked_tokens -= booking.tokens
        booking.tokens = 0.0
        self._settle(min(self._left, max(0.0, self._booked_tokens)))

    def close(self, booking: Booking) -> None:
        """Called by the booking."""
        self._booked_tokens -= booking.tokens
        self._settle(max(0.0, self._left - booking.tokens))  # was given up before it was computed
        self._sequences = max(0.0, self._sequences - 1)
        self._blocks = max(0.0, self._blocks - booking.blocks)
        self._booked_blocks -= booking.blocks
        self.bookings -= 1

    @contextmanager
    def booked(self, tokens: float, blocks: float, ms_per_token: float) -> Iterator[Booking]:
        """Count a request while the body runs."""
        booking = self.book(tokens, blocks, ms_per_token)
        try:
            yield booking
        finally:
            booking.end()
