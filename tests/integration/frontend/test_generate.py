"""The request path against workers that misbehave to order, on a real NATS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from dynamo_lite.config import NatsAddress
from dynamo_lite.config import Router as Weights
from dynamo_lite.errors import DynamoError, NoInstance, PlaneError, WorkerError
from dynamo_lite.frontend.generate import Backend
from dynamo_lite.frontend.work import Task, Work
from dynamo_lite.plane.bus import Bus, Message, Subscription
from dynamo_lite.plane.wire import (
    Cancel,
    Delta,
    DeltaBatch,
    GenerateRequest,
    InstanceRecord,
    Pong,
    Role,
    Sampling,
    Subjects,
    WireError,
    decode,
    encode,
)
from dynamo_lite.router.roster import Roster
from dynamo_lite.router.router import Router
from dynamo_lite.tasks import scope
from tests.instances import record, roster

SUBJECTS = Subjects("test")
DEADLINE_S = 20.0
PROMPT = [5, 6, 7]
Deltas = AsyncGenerator[list[tuple[int, Delta]], None]


@dataclass
class Puppet:
    """A worker on strings."""

    record: InstanceRecord
    bus: Bus
    requests: asyncio.Queue[tuple[Puppet, GenerateRequest]]  # of all puppets
    group: asyncio.TaskGroup
    cancels: list[Cancel] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    frozen: bool = False
    seq: int = 0
    subscriptions: list[Subscription] = field(default_factory=list)

    async def serve(self) -> None:
        me = self.record.incarnation
        handlers = {SUBJECTS.generate(me): self._generate, SUBJECTS.cancel(me): self._cancel}
        for subject, handler in (handlers | {SUBJECTS.ping(me): self._ping}).items():
            self.subscriptions.append(await self.bus.subscribe(subject, handler))

    async def die(self) -> None:
        for subscription in self.subscriptions:
            await subscription.close()

    def _generate(self, message: Message) -> None:
        self.requests.put_nowait((self, decode(message.data, GenerateRequest)))

    def _cancel(self, message: Message) -> None:
        if not self.frozen:
            self.cancels.append(decode(message.data, Cancel))
            self.cancelled.set()

    def _ping(self, message: Message) -> None:
        if not self.frozen:
            self.group.create_task(self.bus.publish(message.reply, encode(Pong(self.record.incarnation))))

    async def until_cancelled(self, times: int = 1) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while len(self.cancels) < times:
                self.cancelled.clear()
                await self.cancelled.wait()

    async def cancelled_within(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self.cancelled.wait()
        except TimeoutError:
            pass

    async def send(
        self, request: GenerateRequest, *tokens: int, index: int = 0, lose: bool = False, **more: Any
    ) -> None:
        """One batch; `lose` it on the way."""
        self.seq += 1
        delta = Delta(request.request_id, index, token_ids=list(tokens), **more)
        if not lose:
            batch = encode(DeltaBatch(self.record.incarnation, self.seq, [delta]))
            await self.bus.publish(SUBJECTS.deltas(request.frontend), batch)


@dataclass
class Stage:
    """A backend, and the requests its puppets got."""

    backend: Backend
    roster: Roster
    requests: asyncio.Queue[tuple[Puppet, GenerateRequest]]
    puppets: dict[str, Puppet]

    def deltas(self, *, n: int = 1, prompts: int = 1, max_tokens: int = 100) -> Deltas:
        task = Task(PROMPT, Sampling(max_tokens=max_tokens))
        work = Work(
            chat=False,
            tasks=(task,) * prompts,
            n=n,
            stops=(),
            logprobs=None,
            stream=True,
            include_usage=False,
            echo=False,
            cache_salt=None,
        )
        return self.backend.call(work, "", DEADLINE_S).deltas()

    async def placed(self) -> tuple[Puppet, GenerateRequest]:
        """The next request, and the puppet that got it."""
        async with asyncio.timeout(DEADLINE_S):
            return await self.requests.get()


@asynccontextmanager
async def stage(nats: NatsAddress, *names: str, dead: tuple[str, ...] = ()) -> AsyncIterator[Stage]:
    records = [record(name) for name in names]
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(Bus.connect(nats, "frontend"))
        other = await stack.enter_async_context(Bus.connect(nats, "workers"))
        group = await stack.enter_async_context(scope())
        requests: asyncio.Queue[tuple[Puppet, GenerateRequest]] = asyncio.Queue()
        puppets = {each.name: Puppet(each, other, requests, group) for each in records if each.name not in dead}
        for puppet in puppets.values():
            await puppet.serve()
        workers = roster(*records)
        router = Router(workers, Weights(mode="round_robin"))
        backend = await stack.enter_async_context(Backend.open(bus, SUBJECTS, workers, router))
        yield Stage(backend, workers, requests, puppets)


async def collect(deltas: Deltas, into: list[int], first: asyncio.Event | None = None) -> None:
    async with asyncio.timeout(DEADLINE_S), aclosing(deltas):
        async for batch in deltas:
            into.extend(token for _, delta in batch for token in delta.token_ids)
            if first is not None:
                first.set()


async def catch(deltas: Deltas, into: list[int], first: asyncio.Event | None = None) -> DynamoError:
    with pytest.raises(DynamoError) as caught:
        await collect(deltas, into, first)
    return caught.value


async def test_tokens_come_in_order_and_the_stream_ends(nats: NatsAddress) -> None:
    got: list[int] = []
    async with stage(nats, "a") as scene, asyncio.TaskGroup() as group:
        reader = group.create_task(collect(scene.deltas(), got))
        puppet, request = await scene.placed()
        await puppet.send(request, 1, 2, cached_tokens=0)
        await puppet.send(request, 3, finish="stop")
        await reader
    assert got == [1, 2, 3]
    assert puppet.cancels == []


async def test_what_an_abandoned_attempt_still_sends_is_ignored(nats: NatsAddress) -> None:
    got: list[int] = []
    async with stage(nats, "a", "b") as scene, asyncio.TaskGroup() as group:
        reader = group.create_task(collect(scene.deltas(), got))
        first, lost = await scene.placed()
        await first.send(lost, 1, lose=True)
        await first.send(lost, 2)  # shows the gap; nothing was emitted, so another worker is asked
        second, request = await scene.placed()
        assert second is not first
        await first.send(lost, 3, finish="stop")
        await second.send(request, 7, finish="stop")
        await reader
    assert got == [7]
    assert [cancel.request_id for cancel in first.cancels] == [lost.request_id]


async def test_a_dead_worker_is_replaced_at_once_and_avoided(nats: NatsAddress) -> None:
    got: list[int] = []
    async with stage(nats, "a", "b", dead=("a",)) as scene, asyncio.TaskGroup() as group:
        for _ in range(2):
            reader = group.create_task(collect(scene.deltas(), got))
            puppet, request = await scene.placed()
            assert puppet.record.name == "b"
            await puppet.send(request, 1, finish="stop")
            await reader
        assert [each.record.name for each in scene.roster.usable([Role.DECODE])] == ["b"]
    assert got == [1, 1]


async def test_nobody_left_is_said_so(nats: NatsAddress) -> None:
    async with stage(nats, "a", "b", dead=("a", "b")) as scene:
        assert isinstance(await catch(scene.deltas(), []), NoInstance)


async def test_an_engines_failure_is_the_answer_and_not_tried_again(nats: NatsAddress) -> None:
    async with stage(nats, "a", "b") as scene, asyncio.TaskGroup() as group:
        reader = group.create_task(catch(scene.deltas(), []))
        puppet, request = await scene.placed()
        await puppet.send(request, error=WireError.of(WorkerError("out of luck")))
        error = await reader
    assert isinstance(error, WorkerError)
    assert "out of luck" in str(error)
    assert scene.requests.empty()


async def test_a_worker_that_takes_nothing_now_is_passed_over(nats: NatsAddress) -> None:
    got: list[int] = []
    async with stage(nats, "a", "b") as scene, asyncio.TaskGroup() as group:
        reader = group.create_task(collect(scene.deltas(), got))
        first, refused = await scene.placed()
        await first.send(refused, error=WireError.of(PlaneError("draining")))
        second, request = await scene.placed()
        assert second is not first
        await second.send(request, 1, finish="stop")
        await reader
    assert got == [1]


async def test_the_end_of_the_server_ends_every_request(nats: NatsAddress) -> None:
    async with stage(nats, "a", "b") as scene, asyncio.TaskGroup() as group:
        readers = [group.create_task(catch(scene.deltas(), [])) for _ in range(3)]
        for _ in readers:
            await scene.placed()
        scene.backend.fail_all(PlaneError("the server is stopping"))
        errors = [str(await reader) for reader in readers]
    assert errors == ["the server is stopping"] * 3
