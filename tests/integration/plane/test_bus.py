"""The bus on a real nats-server."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvloop

from dynamo_lite.config import NatsAddress
from dynamo_lite.embedded import EmbeddedServer
from dynamo_lite.errors import DeadlineExceeded, DynamoError, NoResponders, PlaneError, PrefillFailed, WorkerLost
from dynamo_lite.plane.bus import PART_BYTES, Bus, Message

DEADLINE_S = 10.0


@asynccontextmanager
async def two(nats: NatsAddress) -> AsyncIterator[tuple[Bus, Bus]]:
    async with Bus.connect(nats, "first") as first, Bus.connect(nats, "second") as second:
        yield first, second


async def echo(data: bytes) -> bytes:
    return data


class Inbox:
    """A handler that remembers, and lets a test wait for a number of messages."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._arrival = asyncio.Event()

    def __call__(self, message: Message) -> None:
        self.messages.append(message)
        self._arrival.set()

    async def wait_for(self, count: int) -> list[bytes]:
        async with asyncio.timeout(DEADLINE_S):
            while len(self.messages) < count:
                self._arrival.clear()
                await self._arrival.wait()
        return [message.data for message in self.messages]


async def test_messages_arrive_in_the_order_they_were_published(nats: NatsAddress) -> None:
    inbox = Inbox()
    async with two(nats) as (first, second):
        await second.subscribe("numbers.*", inbox)
        for number in range(1000):
            await first.publish(f"numbers.{number % 3}", str(number).encode())
        assert await inbox.wait_for(1000) == [str(number).encode() for number in range(1000)]
    assert inbox.messages[4].subject == "numbers.1"


async def test_a_subscription_is_known_to_the_server_when_subscribe_returns(nats: NatsAddress) -> None:
    async with two(nats) as (first, second), asyncio.TaskGroup() as group:
        for number in range(50):  # a race would show as NoResponders in one of them
            await second.serve(f"new.{number}", echo, group)
            assert await first.request(f"new.{number}", b"x", 1.0) == b"x"


async def test_a_closed_subscription_gets_nothing_more(nats: NatsAddress) -> None:
    inbox, other = Inbox(), Inbox()
    async with two(nats) as (first, second):
        subscription = await second.subscribe("news", inbox)
        await second.subscribe("news", other)
        await first.publish("news", b"1")
        await inbox.wait_for(1)
        await subscription.close()
        await subscription.close()
        await first.publish("news", b"2")
        await other.wait_for(2)
    assert [message.data for message in inbox.messages] == [b"1"]


async def test_a_failing_handler_is_reported_and_the_next_message_still_handled(nats: NatsAddress) -> None:
    reported: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
    inbox = Inbox()

    def fragile(message: Message) -> None:
        if message.data == b"bad":
            raise ValueError("a bug")
        inbox(message)

    async with two(nats) as (first, second):
        await second.subscribe("subject", fragile)
        await first.publish("subject", b"bad")
        await first.publish("subject", b"good")
        assert await inbox.wait_for(1) == [b"good"]
    assert [str(error) for error in reported] == ["a bug"]


async def test_requests_to_one_subject_are_served_concurrently(nats: NatsAddress) -> None:
    both_here = asyncio.Barrier(2)

    async def meet(data: bytes) -> bytes:
        await both_here.wait()
        return data

    async with two(nats) as (first, second), asyncio.TaskGroup() as group:
        await second.serve("meet", meet, group)
        answers = await asyncio.gather(*(first.request("meet", data, DEADLINE_S) for data in (b"a", b"b")))
    assert answers == [b"a", b"b"]


async def test_nobody_listening_is_known_at_once(nats: NatsAddress) -> None:
    async with Bus.connect(nats, "lonely") as bus:
        started = time.monotonic()
        with pytest.raises(NoResponders) as raised:
            await bus.request("nobody.here", b"", DEADLINE_S)
        assert raised.value.subject == "nobody.here"
        assert time.monotonic() - started < DEADLINE_S / 2


async def test_an_undelivered_publish_comes_back_on_its_reply_subject(nats: NatsAddress) -> None:
    inbox = Inbox()
    async with Bus.connect(nats, "frontend") as bus:
        await bus.subscribe("f.1.undelivered.*", inbox)
        await bus.publish("w.gone.generate", b"request", reply="f.1.undelivered.r7")
        await inbox.wait_for(1)
    assert inbox.messages[0].no_responders
    assert inbox.messages[0].subject == "f.1.undelivered.r7"


async def test_a_silent_server_of_a_request_costs_the_deadline_and_no_more(nats: NatsAddress) -> None:
    async with two(nats) as (first, second):
        await second.subscribe("silent", lambda message: None)
        with pytest.raises(DeadlineExceeded, match="silent"):
            await first.request("silent", b"", 0.05)


async def test_an_error_is_raised_at_the_caller_as_the_class_it_was_with_its_fields(nats: NatsAddress) -> None:
    async def fail(data: bytes) -> bytes:
        raise PrefillFailed("deadline", "64 blocks") if data == b"prefill" else WorkerLost("decode-0", "SIGKILL")

    async with two(nats) as (first, second), asyncio.TaskGroup() as group:
        await second.serve("fail", fail, group)
        with pytest.raises(WorkerLost) as lost:
            await first.request("fail", b"", DEADLINE_S)
        with pytest.raises(PrefillFailed, match=r"prefill failed \(deadline\): 64 blocks") as failed:
            await first.request("fail", b"prefill", DEADLINE_S)
    assert (lost.value.name, lost.value.cause, lost.value.status) == ("decode-0", "SIGKILL", 503)
    assert failed.value.cause == "deadline"


async def test_a_bug_in_a_handler_reaches_the_caller_and_the_group(nats: NatsAddress) -> None:
    async def bug(data: bytes) -> bytes:
        raise KeyError("missing")

    with pytest.raises(ExceptionGroup) as raised:  # noqa: PT012
        async with two(nats) as (first, second), asyncio.TaskGroup() as group:
            await second.serve("bug", bug, group)
            with pytest.raises(DynamoError, match="KeyError"):
                await first.request("bug", b"", DEADLINE_S)
            await asyncio.Event().wait()  # until the group cancels this body
    assert raised.group_contains(KeyError)


@pytest.mark.parametrize("size", [PART_BYTES, PART_BYTES + 1, 20 * 2**20])
async def test_a_long_reply_is_split_and_joined(nats: NatsAddress, size: int) -> None:
    reply = os.urandom(size)

    async def snapshot(data: bytes) -> bytes:
        return reply

    async with two(nats) as (first, second), asyncio.TaskGroup() as group:
        await second.serve("snapshot", snapshot, group)
        assert await first.request("snapshot", b"", DEADLINE_S) == reply


async def test_a_message_over_the_payload_limit_is_refused_by_name(nats: NatsAddress) -> None:
    async with Bus.connect(nats, "sender") as bus:
        with pytest.raises(PlaneError, match=r"big\.subject"):
            await bus.publish("big.subject", bytes(9 * 2**20))
        assert bus.connected


@pytest.mark.parametrize("password", ["wrong", None])
async def test_without_the_right_credentials_nobody_connects(nats: NatsAddress, password: str | None) -> None:
    user = nats.user if password else None
    with pytest.raises(PlaneError, match="refuses the credentials"):
        async with Bus.connect(nats.model_copy(update={"user": user, "password": password}), "intruder"):
            pass


async def test_the_bus_works_on_uvloop(nats_server: EmbeddedServer[NatsAddress]) -> None:
    async def converse() -> bytes:
        async with two(nats_server.address) as (first, second), asyncio.TaskGroup() as group:
            await second.serve("echo", echo, group)
            return await first.request("echo", b"hello", DEADLINE_S)

    assert await asyncio.to_thread(uvloop.run, converse()) == b"hello"
