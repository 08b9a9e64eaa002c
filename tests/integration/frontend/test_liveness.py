"""How long a silence may be: a frozen worker is noticed soon, and a busy host gives no storm of alarms."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest

from dynamo_lite.config import NatsAddress
from dynamo_lite.errors import WorkerLost
from dynamo_lite.frontend.liveness import LONG_SILENCE_S, SILENCE_S, Liveness
from dynamo_lite.plane.bus import Bus, Message
from dynamo_lite.plane.wire import LoadReport, Pong, Subjects, encode
from dynamo_lite.router.roster import Roster
from dynamo_lite.tasks import scope
from tests.instances import record, roster

SUBJECTS = Subjects("test")
NAMES = ("a", "b", "c", "d")


class Workers:
    """Answer pings and report, each unless it is in `frozen`; engines in `silent` are frozen alone."""

    def __init__(self, bus: Bus, group: asyncio.TaskGroup) -> None:
        self.records = {name: record(name) for name in NAMES}
        self.frozen: set[str] = set()
        self.silent_since: dict[str, float] = {}
        self._bus, self._group = bus, group

    async def serve(self) -> None:
        for name, each in self.records.items():
            await self._bus.subscribe(SUBJECTS.ping(each.incarnation), partial(self._ping, name))
        self._group.create_task(self._report())

    def _ping(self, name: str, message: Message) -> None:
        if name not in self.frozen:
            since = self.silent_since.get(name)
            pong = Pong(self.records[name].incarnation, 0.0 if since is None else time.monotonic() - since)
            self._group.create_task(self._bus.publish(message.reply, encode(pong)))

    async def _report(self) -> None:
        while True:
            for name in set(NAMES) - self.frozen:
                me = self.records[name].incarnation
                await self._bus.publish(SUBJECTS.load(me), encode(LoadReport(me, 1, 0, 0, 0, 0)))
            await asyncio.sleep(0.1)


@asynccontextmanager
async def scene(nats: NatsAddress) -> AsyncIterator[tuple[Workers, Liveness, Roster]]:
    async with Bus.connect(nats, "frontend") as bus, Bus.connect(nats, "workers") as other, scope() as group:
        workers = Workers(other, group)
        await workers.serve()
        known = roster(*workers.records.values())
        async with Liveness.open(bus, SUBJECTS, known) as liveness:
            yield workers, liveness, known


async def noticed(workers: Workers, liveness: Liveness, *names: str) -> dict[str, tuple[WorkerLost, float]]:
    """Each of them, and after how long."""
    began = time.monotonic()

    async def one(name: str) -> tuple[WorkerLost, float]:
        return await liveness.lost(workers.records[name]), time.monotonic() - began

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        tasks = {name: group.create_task(one(name)) for name in names}
    return {name: task.result() for name, task in tasks.items()}


async def answering(workers: Workers, liveness: Liveness, name: str, seconds: float) -> None:
    """It is watched that long, and not lost."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(seconds):
            await liveness.lost(workers.records[name])


async def test_a_worker_that_answers_is_not_lost_and_one_that_freezes_is_after_a_second(nats: NatsAddress) -> None:
    async with scene(nats) as (workers, liveness, _):
        await answering(workers, liveness, "a", 1.5 * SILENCE_S)
        workers.frozen.add("a")
        lost, after_s = (await noticed(workers, liveness, "a"))["a"]
        assert lost.how == "silent"
        assert 0.3 < after_s < SILENCE_S + 0.5


async def test_an_engine_that_is_frozen_counts_though_its_worker_answers(nats: NatsAddress) -> None:
    async with scene(nats) as (workers, liveness, _):
        workers.silent_since["a"] = time.monotonic()
        lost, after_s = (await noticed(workers, liveness, "a"))["a"]
        assert lost.how == "silent"
        assert after_s < SILENCE_S + 0.5


async def test_tokens_are_signs_of_life(nats: NatsAddress) -> None:
    async with scene(nats) as (workers, liveness, _):
        workers.frozen.add("a")
        async with scope() as group:

            async def generate() -> None:
                while True:
                    liveness.heard(workers.records["a"].incarnation)
                    await asyncio.sleep(0.1)

            group.create_task(generate())
            await answering(workers, liveness, "a", 1.5 * SILENCE_S)


async def test_half_of_the_workers_are_given_up_soon_and_more_of_them_late(nats: NatsAddress) -> None:
    async with scene(nats) as (workers, liveness, _):
        await answering(workers, liveness, "a", 0.3)
        workers.frozen |= {"a", "b"}
        soon = await noticed(workers, liveness, "a", "b")
        assert max(after_s for _, after_s in soon.values()) < SILENCE_S + 0.6
    async with scene(nats) as (workers, liveness, _):
        await answering(workers, liveness, "a", 0.3)
        workers.frozen |= {"a", "b", "c"}
        late = await noticed(workers, liveness, "a", "b", "c")
        assert min(after_s for _, after_s in late.values()) > 2 * SILENCE_S
        assert max(after_s for _, after_s in late.values()) < LONG_SILENCE_S + 1


async def test_a_worker_that_came_back_is_given_more_time_the_next_time(nats: NatsAddress) -> None:
    async with scene(nats) as (workers, liveness, _):
        workers.frozen.add("a")
        await noticed(workers, liveness, "a")
        workers.frozen.clear()
        await answering(workers, liveness, "a", LONG_SILENCE_S)  # until the alarm is not of the same event any more
        workers.frozen.add("a")
        _, after_s = (await noticed(workers, liveness, "a"))["a"]
        assert after_s > SILENCE_S
