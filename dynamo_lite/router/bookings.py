"""What routers have placed: this one's requests, and those that others tell of. No I/O here.

Others' bookings count like own ones. Each router says what changes, and every second all that is open, so whatever
message is lost, nothing is counted for longer; one that falls silent has nothing open any more.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from dynamo_lite.plane.route_wire import Booked, Bookings
from dynamo_lite.plane.wire import FrontendId, Incarnation
from dynamo_lite.router import metrics
from dynamo_lite.router.load import Booking
from dynamo_lite.router.roster import Roster

SILENCE_S = 5.0  # a router that says nothing for so long is gone


@dataclass(slots=True)
class Held:
    """One request, as load of its workers. A worker that is not known has none."""

    decoding: Booking | None
    computing: Booking | None

    def computed(self) -> None:
        """Its prompt is."""
        if self.computing is not None:
            self.computing.computed()
            if self.computing is not self.decoding:
                self.computing.end()

    def end(self) -> None:
        for booking in (self.computing, self.decoding):
            if booking is not None:
                booking.end()


@dataclass(slots=True)
class _Other:
    """Another router."""

    seq: int
    heard: float
    held: dict[int, Held] = field(default_factory=dict)


class BookingLedger:
    """All bookings that this router knows of."""

    def __init__(self, roster: Roster) -> None:
        self.id = FrontendId(uuid.uuid4().hex)
        self.changed: Callable[[], None] = lambda: None  # called when there is something to tell
        self._roster = roster
        self._seq = self._keys = 0
        self._own: dict[int, tuple[Booked, Held]] = {}
        self._others: dict[FrontendId, _Other] = {}
        self._booked: list[Booked] = []
        self._computed: list[int] = []
        self._ended: list[int] = []

    # ---- own ----

    @contextmanager
    def booked(
        self, decode: Incarnation, computes: Incarnation, tokens: int, blocks: int
    ) -> Iterator[Callable[[], None]]:
        """Count a request while the body runs, which calls what it is given once the prompt is computed."""
        self._keys += 1
        key, one = self._keys, Booked(self._keys, decode, computes, tokens, blocks)
        held = self._hold(one)
        self._own[key] = one, held
        if self._others:
            self._booked.append(one)
            self.changed()
        try:
            yield lambda: self._compute(key)
        finally:
            del self._own[key]
            held.end()
            metrics.BOOKINGS.labels("own").set(len(self._own))
            if self._others:
                self._ended.append(key)
                self.changed()

    def _compute(self, key: int) -> None:
        """Idempotent; harmless once the booking has ended."""
        found = self._own.get(key)
        if found is None or not found[0].tokens:
            return
        one, held = found
        held.computed()
        self._own[key] = Booked(key, one.decode, one.computes, 0, one.blocks), held
        if self._others:
            self._computed.append(key)
            self.changed()

    def changes(self) -> Bookings:
        """Since the last message of ours."""
        self._seq += 1
        told = Bookings(self.id, self._seq, tuple(self._booked), tuple(self._computed), tuple(self._ended))
        self._clear()
        return told

    def statement(self) -> Bookings:
        """All that is open."""
        self._seq += 1
        self._clear()
        metrics.BOOKINGS.labels("own").set(len(self._own))
        return Bookings(self.id, self._seq, tuple(one for one, _ in self._own.values()), whole=True)

    def _clear(self) -> None:
        self._booked, self._computed, self._ended = [], [], []

    # ---- others' ----

    def take(self, told: Bookings) -> None:
        """What another router says, or an echo of what this one has said. One that is late changes nothing."""
        if told.router == self.id:
            return
        other = self._others.get(told.router)
        if other is None:
            if not told.whole:
                return  # how it goes on is of no use without the beginning, which comes within a second
            other = self._others[told.router] = _Other(0, 0.0)
        if told.seq <= other.seq:
            return
        other.seq, other.heard = told.seq, self._roster.clock()
        if told.whole:
            self._replace(other, told)
        else:
            self._change(other, told)
        self._count()

    def _change(self, other: _Other, told: Bookings) -> None:
        for one in told.booked:
            if one.key not in other.held:
                other.held[one.key] = self._hold(one)
        for key in told.computed:
            if key in other.held:
                other.held[key].computed()
        for key in told.ended:
            if key in other.held:
                other.held.pop(key).end()

    def _replace(self, other: _Other, told: Bookings) -> None:
        open_now = {one.key: one for one in told.booked}
        for key in [key for key in other.held if key not in open_now]:
            other.held.pop(key).end()
        for key, one in open_now.items():
            if key not in other.held:
                other.held[key] = self._hold(one)
            elif not one.tokens:
                other.held[key].computed()

    def expire(self) -> None:
        """Forget routers that are silent."""
        now = self._roster.clock()
        for router in [router for router, other in self._others.items() if now - other.heard > SILENCE_S]:
            self._forget(router)

    def forget_all(self) -> None:
        """Nobody can be heard any more."""
        for router in list(self._others):
            self._forget(router)

    def _forget(self, router: FrontendId) -> None:
        for held in self._others.pop(router).held.values():
            held.end()
        self._count()

    @property
    def others(self) -> int:
        """Bookings of other routers."""
        return sum(len(other.held) for other in self._others.values())

    @property
    def routers(self) -> int:
        """Others that are heard."""
        return len(self._others)

    def _count(self) -> None:
        metrics.BOOKINGS.labels("others").set(self.others)
        metrics.ROUTERS.set(len(self._others))
        self._roster.tell()

    def _hold(self, one: Booked) -> Held:
        """Here a prompt that is computed elsewhere takes no place in that worker's batch once it is."""
        decode = self._roster.instance(one.decode)
        ms = decode.pace.prefill[1] if decode is not None else 0.0
        if one.computes == one.decode:
            both = decode.load.book(one.tokens, one.blocks, ms) if decode is not None else None
            return Held(both, both)
        computing = self._roster.instance(one.computes) if one.tokens else None
        return Held(
            decode.load.book(0, one.blocks, ms) if decode is not None else None,
            computing.load.book(one.tokens, one.tokens / computing.block_size, computing.pace.prefill[1])
            if computing is not None
            else None,
        )
