"""Deltas on their way over a real nats-server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from prometheus_client import CollectorRegistry

from dynamo_lite.config import NatsAddress
from dynamo_lite.plane.bus import Bus, Message
from dynamo_lite.plane.wire import Delta, DeltaBatch, FrontendId, Incarnation, RequestId, Role, Subjects, decode
from dynamo_lite.tasks import background
from workers import deltas
from workers.deltas import DeltaSender
from workers.metrics import WorkerMetrics

DEADLINE_S = 10.0
FRONTEND = FrontendId("f")
STEPS = 100


@asynccontextmanager
async def sending(nats: NatsAddress) -> AsyncIterator[tuple[DeltaSender, list[DeltaBatch]]]:
    """A sender, and the messages that come of it."""
    batches: list[DeltaBatch] = []

    def receive(message: Message) -> None:
        batches.append(decode(message.data, DeltaBatch))

    async with asyncio.timeout(DEADLINE_S), Bus.connect(nats, "test") as bus:
        subjects = Subjects("test")
        await bus.subscribe(subjects.deltas(FRONTEND), receive)
        sender = DeltaSender(bus, subjects, Incarnation("w"), WorkerMetrics(Role.BOTH, CollectorRegistry()))
        async with background(sender.run()):
            yield sender, batches
            await sender.flushed()
            answered = asyncio.Event()
            await bus.subscribe("end", lambda _: answered.set())
            await bus.publish("end", b"")
            await answered.wait()


async def test_steps_that_take_no_time_share_messages_and_keep_their_order(
    nats: NatsAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deltas, "GATHER_S", 0.2)
    async with sending(nats) as (sender, batches):
        for step in range(STEPS):
            sender.send(FRONTEND, Delta(RequestId("a"), 0, [step]))
            await asyncio.sleep(0)
    assert [batch.seq for batch in batches] == list(range(1, len(batches) + 1))
    assert [token for batch in batches for delta in batch.deltas for token in delta.token_ids] == list(range(STEPS))
    assert batches[0].deltas == [Delta(RequestId("a"), 0, [0])]  # at once
    assert len(batches) < STEPS / 10


async def test_the_last_token_of_all_that_go_on_does_not_wait(
    nats: NatsAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deltas, "GATHER_S", 2 * DEADLINE_S)
    async with sending(nats) as (sender, batches):
        sender.send(FRONTEND, Delta(RequestId("a"), 0, [1]))
        await sender.flushed()
        for index in (0, 1):
            sender.send(FRONTEND, Delta(RequestId("a"), index, [2]))
        for index in (0, 1):
            sender.send(FRONTEND, Delta(RequestId("a"), index, [3], finish="length"))
    assert [len(batch.deltas) for batch in batches] == [1, 4]
