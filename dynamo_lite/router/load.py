"""How busy a worker is: what it reports, and what this router has sent there since.

A booking is a context manager, so it ends with the request however that ends. It belongs to one incarnation:
when that is gone its counts are gone too, and nothing is left to leak into its successor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dynamo_lite.plane.wire import LoadReport


@dataclass(slots=True)
class Booking:
    """Blocks one request makes a worker busy with."""

    load: WorkerLoad
    blocks: float

    def reduce(self, blocks: float) -> None:
        """Part of the work is done."""
        done = min(blocks, self.blocks)
        self.blocks -= done
        self.load.booked_blocks -= done


class WorkerLoad:
    """The load of one worker incarnation, in blocks."""

    __slots__ = ("_booked_then", "booked_blocks", "bookings", "report")

    def __init__(self) -> None:
        self.report: LoadReport | None = None
        self.booked_blocks = 0.0
        self.bookings = 0
        self._booked_then = 0.0  # when the report came

    def take(self, report: LoadReport) -> None:
        """A newer report from the worker. Late ones are ignored."""
        if self.report is None or report.seq > self.report.seq:
            self.report = report
            self._booked_then = self.booked_blocks

    @property
    def busy_blocks(self) -> float:
        """Blocks the worker is busy with: its last report, corrected by what was booked and ended since.

        Never less than this router's own bookings, since a request may be on its way while the report is.
        """
        report = self.report
        if report is None:
            return self.booked_blocks
        queued = report.waiting * max(1.0, report.kv_used_blocks / max(1, report.running))
        reported = report.kv_used_blocks + queued
        return max(self.booked_blocks, reported + self.booked_blocks - self._booked_then)

    @property
    def draining(self) -> bool:
        return self.report is not None and self.report.draining

    @contextmanager
    def booked(self, blocks: float) -> Iterator[Booking]:
        """Count `blocks` more while the body runs."""
        booking = Booking(self, blocks)
        self.booked_blocks += blocks
        self.bookings += 1
        try:
            yield booking
        finally:
            self.bookings -= 1
            booking.reduce(booking.blocks)
