"""Two frontends' routers, over a real NATS: each counts what the other has placed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass

import pytest

from dynamo_lite.config import NatsAddress
from dynamo_lite.config import Router as Weights
from dynamo_lite.embedded import EmbeddedServer
from dynamo_lite.plane.bus import Bus
from dynamo_lite.plane.route_wire import Bookings
from dynamo_lite.plane.wire import encode
from dynamo_lite.router import sharing
from dynamo_lite.router.bookings import SILENCE_S
from dynamo_lite.router.roster import Roster
from dynamo_lite.router.router import Router
from tests.instances import instance, record, roster

from .conftest import SUBJECTS

DEADLINE_S = 20.0
D = [record("decode-0"), record("decode-1")]
PROMPT = list(range(1000, 1320))  # 20 blocks


@dataclass
class Frontend:
    """As far as it places requests."""

    roster: Roster
    router: Router

    def sequences(self) -> list[float]:
        return [instance(self.roster, each).load.sequences for each in D]


@asynccontextmanager
async def frontend(nats: NatsAddress) -> AsyncIterator[Frontend]:
    workers = roster(*D)
    router = Router(workers, Weights())
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(Bus.connect(nats, "frontend"))
        await stack.enter_async_context(sharing.shared(bus, SUBJECTS, router.bookings))
        yield Frontend(workers, router)


async def until(frontend: Frontend, holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        await frontend.roster.until(holds)


async def met(*frontends: Frontend) -> None:
    """Each has heard of another one."""
    for each in frontends:
        await until(each, lambda each=each: each.router.bookings.routers == 1)  # type: ignore[misc]


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "STATEMENT_S", 0.1)


async def test_a_request_that_one_places_is_load_for_the_other_within_milliseconds(nats: NatsAddress) -> None:
    async with frontend(nats) as here, frontend(nats) as there:
        await met(here, there)
        with ExitStack() as requests:
            took = []
            for count in range(1, 11):
                begun = time.perf_counter()
                requests.enter_context(here.router.place(PROMPT).booked())
                await until(there, lambda count=count: sum(there.sequences()) == count)  # type: ignore[misc]
                took.append(time.perf_counter() - begun)
            assert sorted(took)[5] < 0.05, took
            assert there.sequences() == here.sequences() == [5, 5]
            one_more = here.router.place(PROMPT)
            requests.enter_context(one_more.booked())
            await until(there, lambda: sum(there.sequences()) == 11)
            assert there.router.place(PROMPT).decode != one_more.decode
        await until(there, lambda: there.sequences() == [0, 0])


async def test_a_frontend_that_comes_later_hears_of_what_is_open(nats: NatsAddress, brisk: None) -> None:
    async with frontend(nats) as here:
        with here.router.place(PROMPT).booked():
            async with frontend(nats) as there:
                await until(there, lambda: sum(there.sequences()) == 1)
            await until(here, lambda: sum(here.sequences()) == 1 and here.router.bookings.others == 0)


async def test_the_bookings_of_a_frontend_that_ends_or_dies_end_with_it(nats: NatsAddress, brisk: None) -> None:
    async with frontend(nats) as here:
        now = 100.0
        here.roster.clock = lambda: now
        async with frontend(nats) as there:
            with there.router.place(PROMPT).booked():
                await until(here, lambda: sum(here.sequences()) == 1)
            told = there.router.bookings.statement()
        await until(here, lambda: sum(here.sequences()) == 0)
        async with Bus.connect(nats, "one that dies") as bus:
            one = there.router.place(PROMPT)
            with one.booked():
                told = there.router.bookings.statement()
            await bus.publish(SUBJECTS.bookings("dead"), encode(told))
        await until(here, lambda: sum(here.sequences()) == 1)
        now += SILENCE_S + 0.1
        await until(here, lambda: sum(here.sequences()) == 0)


async def test_after_nats_was_away_both_count_the_same_again(
    nats: NatsAddress, nats_server: EmbeddedServer[NatsAddress], brisk: None
) -> None:
    async with frontend(nats) as here, frontend(nats) as there:
        await met(here, there)
        with ExitStack() as requests:
            requests.enter_context(here.router.place(PROMPT).booked())
            await until(there, lambda: sum(there.sequences()) == 1)
            await nats_server.stop()
            requests.enter_context(here.router.place(PROMPT).booked())
            await nats_server.restart()
            await until(there, lambda: there.sequences() == here.sequences() == [1, 1])
        await until(there, lambda: there.sequences() == [0, 0])


async def test_a_message_nobody_can_read_is_dropped(nats: NatsAddress, brisk: None) -> None:
    async with frontend(nats) as here, frontend(nats) as there, Bus.connect(nats, "stranger") as bus:
        await bus.publish(SUBJECTS.bookings("stranger"), b"\x63 from another version")
        await bus.publish(SUBJECTS.bookings("another"), encode(Bookings(there.router.bookings.id, 0)))
        with there.router.place(PROMPT).booked():
            await until(here, lambda: sum(here.sequences()) == 1)
