"""The bus when peers vanish or fall silent and when the server dies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from dynamo_lite.config import NatsAddress
from dynamo_lite.embedded import EmbeddedServer
from dynamo_lite.errors import DeadlineExceeded, NoResponders, PlaneError, ProtocolMismatch
from dynamo_lite.plane.bus import Bus, Message
from dynamo_lite.plane.wire import Incarnation, Pong, encode

DEADLINE_S = 10.0
PONG = encode(Pong(Incarnation("w")))


async def pong(data: bytes) -> bytes:
    return PONG


class Peer:
    """Serves `work`, which answers when the test says so, and `ping`."""

    def __init__(self) -> None:
        self.asked, self.answer = asyncio.Event(), asyncio.Event()

    async def work(self, data: bytes) -> bytes:
        self.asked.set()
        await self.answer.wait()
        return b"done"

    @asynccontextmanager
    async def serving(self, nats: NatsAddress) -> AsyncIterator[Bus]:
        async with Bus.connect(nats, "peer") as bus:
            try:
                async with asyncio.TaskGroup() as group:
                    await bus.serve("work", self.work, group)
                    await bus.serve("ping", pong, group)
                    yield bus
                    raise asyncio.CancelledError  # the process dies: nothing is finished, nothing answered
            except asyncio.CancelledError:
                pass


def ask(bus: Bus, silence_s: float) -> Coroutine[Any, Any, bytes]:
    return bus.call("work", b"", timeout_s=DEADLINE_S, probe="ping", silence_s=silence_s, interval_s=0.05)


async def test_a_call_outlives_the_silence_limit_while_the_peer_answers_pings(nats: NatsAddress) -> None:
    peer, pings, enough = Peer(), 0, asyncio.Event()

    def count(message: Message) -> None:
        nonlocal pings
        pings += 1
        if pings == 12:
            enough.set()

    async with Bus.connect(nats, "caller") as bus, peer.serving(nats), asyncio.TaskGroup() as group:
        await bus.subscribe("ping", count)  # sees the same pings
        answer = group.create_task(ask(bus, silence_s=0.4))
        await enough.wait()  # three times the silence limit
        assert not answer.done()
        peer.answer.set()
        assert await answer == b"done"


async def test_a_call_notices_at_once_that_the_peer_vanished(nats: NatsAddress) -> None:
    peer = Peer()
    async with Bus.connect(nats, "caller") as bus, asyncio.TaskGroup() as group:
        async with peer.serving(nats):
            answer = group.create_task(failure(ask(bus, silence_s=DEADLINE_S)))
            await peer.asked.wait()
        started = time.monotonic()
        assert isinstance(await answer, NoResponders)
        assert time.monotonic() - started < DEADLINE_S / 2


async def test_a_call_to_a_peer_that_is_not_there_fails_at_once(nats: NatsAddress) -> None:
    async with Bus.connect(nats, "caller") as bus:
        with pytest.raises(NoResponders, match="work"):
            await ask(bus, silence_s=DEADLINE_S)


async def test_a_call_notices_a_peer_that_falls_silent(nats: NatsAddress) -> None:
    async with Bus.connect(nats, "caller") as bus, Bus.connect(nats, "frozen") as frozen:
        for subject in ("work", "ping"):
            await frozen.subscribe(subject, lambda message: None)
        with pytest.raises(DeadlineExceeded, match="ping"):
            await ask(bus, silence_s=0.2)


async def test_a_watch_ends_only_with_the_peer(nats: NatsAddress) -> None:
    peer = Peer()
    async with Bus.connect(nats, "caller") as bus, asyncio.TaskGroup() as group:
        async with peer.serving(nats):
            heard = asyncio.Event()
            alive = bus.watch_alive("ping", pong=lambda _: heard.set(), check=lambda _: None, interval_s=0.02)
            watch = group.create_task(failure(alive))
            async with asyncio.timeout(DEADLINE_S):
                await heard.wait()
            assert not watch.done()
        assert isinstance(await watch, NoResponders)


async def test_a_stall_of_our_own_loop_is_not_taken_for_the_silence_of_the_peer(nats: NatsAddress) -> None:
    peer = Peer()
    async with Bus.connect(nats, "caller") as bus, peer.serving(nats), asyncio.TaskGroup() as group:
        answer = group.create_task(ask(bus, silence_s=0.2))
        await peer.asked.wait()
        time.sleep(0.5)  # noqa: ASYNC251  # the stall under test
        peer.answer.set()
        assert await answer == b"done"


async def test_everything_works_again_after_the_server_was_killed_and_restarted(
    nats_server: EmbeddedServer[NatsAddress],
) -> None:
    peer = Peer()
    peer.answer.set()
    async with Bus.connect(nats_server.address, "caller") as bus, peer.serving(nats_server.address) as other:
        await kill_and_restart(nats_server)
        assert await bus.request("work", b"", DEADLINE_S) == b"done"
        await until_reconnected(bus, other)  # the answer may come before the client tells that it reconnected
        assert (bus.reconnects, other.reconnects) == (1, 1)


async def test_a_call_in_flight_survives_a_restart_of_the_server(nats_server: EmbeddedServer[NatsAddress]) -> None:
    peer = Peer()
    async with (
        Bus.connect(nats_server.address, "caller") as bus,
        peer.serving(nats_server.address) as other,
        asyncio.TaskGroup() as group,
    ):
        answer = group.create_task(ask(bus, silence_s=DEADLINE_S / 2))
        await peer.asked.wait()
        await kill_and_restart(nats_server)
        await until_reconnected(bus, other)
        peer.answer.set()
        assert await answer == b"done"


async def test_a_call_whose_answer_was_lost_in_a_restart_does_not_wait_for_ever(
    nats_server: EmbeddedServer[NatsAddress],
) -> None:
    async with Bus.connect(nats_server.address, "caller") as bus, Bus.connect(nats_server.address, "p") as peer:
        asked = asyncio.Event()
        await peer.subscribe("work", lambda message: asked.set())  # the answer never arrives
        async with asyncio.TaskGroup() as group:
            await peer.serve("ping", pong, group)
            answer = group.create_task(failure(ask(bus, silence_s=0.4)))
            await asked.wait()
            await kill_and_restart(nats_server)
            error = await answer
    assert isinstance(error, DeadlineExceeded)
    assert error.seconds == 0.4


async def test_messages_published_during_an_outage_arrive_after_it_up_to_a_limit(
    nats_server: EmbeddedServer[NatsAddress],
) -> None:
    arrived = asyncio.Event()
    async with Bus.connect(nats_server.address, "bus") as bus:
        await bus.subscribe("later", lambda message: arrived.set())
        async with disconnected(nats_server, bus):
            await bus.publish("later", b"patience")
            await bus.publish("nobody", bytes(2**20))
            with pytest.raises(PlaneError, match="cannot publish"):
                await bus.publish("nobody", bytes(2**20))
        async with asyncio.timeout(DEADLINE_S):
            await arrived.wait()


async def test_a_connection_that_the_client_library_gave_up_is_opened_anew(nats: NatsAddress) -> None:
    arrived = asyncio.Event()
    async with Bus.connect(nats, "bus") as bus:
        await bus.subscribe("subject", lambda message: arrived.set())
        bus._client._transport.write(b"NONSENSE\r\n")  # a protocol error ends nats-py's client for good
        await until_reconnected(bus)
        await bus.publish("subject", b"")
        async with asyncio.timeout(DEADLINE_S):
            await arrived.wait()


async def test_a_given_up_connection_is_tried_until_the_server_is_back(
    nats_server: EmbeddedServer[NatsAddress], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo_lite.plane.bus.CONNECT_DEADLINE_S", 0.3)
    async with Bus.connect(nats_server.address, "bus") as bus:
        bus._client._transport.write(b"NONSENSE\r\n")
        nats_server.kill()
        await eventually(lambda: not bus.connected)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):  # longer than one attempt
                await until_reconnected(bus)
        monkeypatch.undo()
        await nats_server.restart()
        await until_reconnected(bus)


async def test_a_server_that_is_not_there_is_reported(
    nats_server: EmbeddedServer[NatsAddress], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo_lite.plane.bus.CONNECT_DEADLINE_S", 0.3)
    await nats_server.stop()
    with pytest.raises(PlaneError, match="does not answer"):
        async with Bus.connect(nats_server.address, "bus"):
            pass


async def test_a_reply_with_a_missing_part_is_an_error_not_a_short_reply(nats: NatsAddress) -> None:
    async with Bus.connect(nats, "caller") as bus, Bus.connect(nats, "peer") as peer, asyncio.TaskGroup() as group:

        def answer_badly(message: Message) -> None:
            for part in ("0/3", "2/3"):
                group.create_task(peer._publish_marked(message.reply, b"x", {"Dl-Part": part}))

        await peer.subscribe("snapshot", answer_badly)
        with pytest.raises(PlaneError, match="part 1 of the answer of snapshot was lost"):
            await bus.request("snapshot", b"", DEADLINE_S)


async def test_an_error_in_another_protocol_version_is_named(nats: NatsAddress) -> None:
    async with Bus.connect(nats, "caller") as bus, Bus.connect(nats, "peer") as peer, asyncio.TaskGroup() as group:

        def answer(message: Message) -> None:
            group.create_task(peer._publish_marked(message.reply, b"\x63", {"Dl-Error": "1"}))

        await peer.subscribe("work", answer)
        with pytest.raises(ProtocolMismatch, match="protocol 99"):
            await bus.request("work", b"", DEADLINE_S)


async def test_a_request_that_arrives_while_the_peer_ends_is_not_answered(nats: NatsAddress) -> None:
    async with Bus.connect(nats, "caller") as bus, Bus.connect(nats, "peer") as peer:
        async with asyncio.TaskGroup() as group:
            await peer.serve("ping", pong, group)
        with pytest.raises(DeadlineExceeded):
            await bus.request("ping", b"", 0.1)
        await bus.publish("ping", b"no reply subject")
        with pytest.raises(DeadlineExceeded):
            await bus.request("ping", b"", 0.1)


async def failure(coroutine: Coroutine[Any, Any, object]) -> BaseException | None:
    try:
        await coroutine
    except PlaneError as error:
        return error
    return None


async def kill_and_restart(server: EmbeddedServer[NatsAddress]) -> None:
    server.kill()
    assert await server.died() == "killed by SIGKILL"
    await server.restart()


@asynccontextmanager
async def disconnected(server: EmbeddedServer[NatsAddress], bus: Bus) -> AsyncIterator[None]:
    server.kill()
    await eventually(lambda: not bus.connected)
    yield
    await server.restart()


async def until_reconnected(*buses: Bus) -> None:
    await eventually(lambda: all(bus.reconnects and bus.connected for bus in buses))


async def eventually(condition: Any) -> None:
    """The bus has no event for its connection's state, as nothing but tests would wait for one."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
