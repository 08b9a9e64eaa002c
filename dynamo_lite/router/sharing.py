"""Routers tell each other, over NATS, what they have booked."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import NoReturn

from dynamo_lite.errors import PlaneError, ProtocolMismatch
from dynamo_lite.plane.bus import Bus, Message
from dynamo_lite.plane.route_wire import Bookings
from dynamo_lite.plane.wire import Subjects, decode, encode
from dynamo_lite.router.bookings import BookingLedger
from dynamo_lite.tasks import background

STATEMENT_S = 1.0  # between two of them

log = logging.getLogger(__name__)


@asynccontextmanager
async def shared(bus: Bus, subjects: Subjects, ledger: BookingLedger) -> AsyncIterator[None]:
    """While the body runs. At its end others are told that nothing is open any more."""
    subject, changed = subjects.bookings(ledger.id), asyncio.Event()

    def take(message: Message) -> None:
        try:
            ledger.take(decode(message.data, Bookings))
        except ProtocolMismatch as error:
            log.warning("dropped another router's bookings: %s", error)

    async def tell(told: Bookings) -> None:
        with suppress(PlaneError):  # the next statement makes up for it
            await bus.publish(subject, encode(told))

    async def tell_changes() -> NoReturn:
        while True:
            await changed.wait()
            changed.clear()
            await tell(ledger.changes())

    async def state() -> NoReturn:
        while True:
            ledger.expire()
            await tell(ledger.statement())
            await asyncio.sleep(STATEMENT_S)

    subscription = await bus.subscribe(subjects.bookings(), take)
    ledger.changed = changed.set
    try:
        async with background(tell_changes(), state()):
            yield
    finally:
        ledger.changed = lambda: None
        await subscription.close()
        ledger.forget_all()
        await tell(ledger.statement())
