"""Streams whose workers die, freeze, leave or lose messages: each token once, from whoever can give the next."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import msgspec
import pytest

from dynamo_lite.config import NatsAddress
from dynamo_lite.embedded import EmbeddedServer
from dynamo_lite.errors import DynamoError, PlaneError, RequestError, WorkerError, WorkerLost
from dynamo_lite.frontend.moves import AT_ONCE
from dynamo_lite.plane.wire import Delta, Holder, LoadReport, Resumed, WireError, encode
from kvbm.events import KvSnapshot
from tests.instances import record
from tests.integration.frontend.test_generate import DEADLINE_S, PROMPT, SUBJECTS, Deltas, Puppet, Stage, catch, stage


@dataclass
class Got:
    """What a client has been told."""

    deltas: list[tuple[int, Delta]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Task[None] | None = None

    async def read(self, deltas: Deltas) -> None:
        async with asyncio.timeout(DEADLINE_S), aclosing(deltas):
            async for batch in deltas:
                self.deltas += batch
                self.changed.set()

    def tokens(self, index: int = 0, prompt: int = 0) -> list[int]:
        return [token for p, d in self.deltas if (p, d.index) == (prompt, index) for token in d.token_ids]

    def finish(self, index: int = 0) -> list[str]:
        return [delta.finish for _, delta in self.deltas if delta.index == index and delta.finish]

    async def until(self, *tokens: int, index: int = 0) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while self.tokens(index) != list(tokens):
                self.changed.clear()
                await self.changed.wait()


@asynccontextmanager
async def reading(scene: Stage, **work: int) -> AsyncIterator[Got]:
    """Its end waits for the stream's."""
    got = Got()
    async with asyncio.TaskGroup() as group:
        got.over = group.create_task(got.read(scene.deltas(**work)))
        yield got


def join(scene: Stage, puppet: Puppet) -> None:
    scene.roster.join(puppet.record)
    scene.roster.take_snapshot(KvSnapshot(puppet.record.incarnation, 0, {}))


def drain(scene: Stage, puppet: Puppet) -> None:
    scene.roster.take_report(LoadReport(puppet.record.incarnation, 1, 1, 0, 0, 1000, draining=True))


async def test_a_stream_goes_on_at_another_worker_when_its_own_dies(nats: NatsAddress) -> None:
    async with stage(nats, "a", "b") as scene, reading(scene) as got:
        first, request = await scene.placed()
        assert request.resumed == ()
        await first.send(request, 1, 2, cached_tokens=2)
        await got.until(1, 2)
        await first.die()
        second, again = await scene.placed()
        assert second is not first
        assert (again.token_ids, again.resumed) == (PROMPT, (Resumed(0, [1, 2]),))
        assert again.sampling == request.sampling
        await second.send(again, 3, cached_tokens=1)
        await second.send(again, 4, finish="stop")
    assert got.tokens() == [1, 2, 3, 4]
    assert got.finish() == ["stop"]
    assert [delta.cached_tokens for _, delta in got.deltas if delta.cached_tokens is not None] == [2]


async def test_a_frozen_worker_is_given_up_within_two_seconds_and_told_so_when_it_thaws(nats: NatsAddress) -> None:
    async with stage(nats, "a", "b") as scene, reading(scene) as got:
        first, request = await scene.placed()
        await first.send(request, 1)
        await got.until(1)
        first.frozen, since = True, time.monotonic()
        second, again = await scene.placed()
        assert time.monotonic() - since < 1.6
        assert again.resumed == (Resumed(0, [1]),)
        await second.send(again, 2)
        await got.until(1, 2)
        first.frozen = False
        async with asyncio.timeout(DEADLINE_S):
            while not first.cancels:  # it has not heard of the first, and generates
                await first.send(request, 90)
                await first.cancelled_within(0.05)
        assert first.cancels[-1].request_id == request.request_id
        await second.send(again, 3, finish="length")
    assert got.tokens() == [1, 2, 3]


async def test_a_frozen_worker_is_given_more_time_where_there_is_no_other(nats: NatsAddress) -> None:
    async with stage(nats, "a") as scene, reading(scene) as got:
        only, request = await scene.placed()
        await only.send(request, 1)
        await got.until(1)
        only.frozen = True
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2.0):
                await scene.requests.get()
        only.frozen = False
        await only.send(request, 2, finish="stop")
    assert got.tokens() == [1, 2]
    assert not only.cancels


async def test_a_worker_that_is_registered_no_more_but_lives_finishes_its_streams(nats: NatsAddress) -> None:
    async with stage(nats, "a", "b") as scene, reading(scene) as got:
        first, request = await scene.placed()
        await first.send(request, 1)
        await got.until(1)
        scene.roster.leave(first.record.incarnation)
        with pytest.raises(TimeoutError):  # longer than a silence
            async with asyncio.timeout(1.3):
                await scene.requests.get()
        await first.send(request, 2, finish="stop")
    assert got.tokens() == [1, 2]


async def test_a_worker_that_was_frozen_before_it_was_asked_is_found_so_sooner(nats: NatsAddress) -> None:
    async with stage(nats, "a", "b") as scene:
        first = scene.puppets["a"]
        first.frozen = True
        report = encode(LoadReport(first.record.incarnation, 1, 0, 0, 0, 1000))
        await first.bus.publish(SUBJECTS.load(first.record.incarnation), report)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.7):
                await scene.requests.get()
        since = time.monotonic()
        async with reading(scene), reading(scene):
            placed = [await scene.placed() for _ in range(3)]
            assert time.monotonic() - since < 0.9
            assert [puppet.record.name for puppet, _ in placed] in (["a", "b", "b"], ["b", "a", "b"])
            for puppet, request in placed:
                if puppet is not first:
                    await puppet.send(request, 1, finish="stop")


async def test_after_a_lost_message_the_stream_goes_on_from_what_came(nats: NatsAddress) -> None:
    async with stage(nats, "a") as scene, reading(scene) as got:
        only, request = await scene.placed()
        await only.send(request, 1)
        await only.send(request, 2, lose=True)
        await only.send(request, 3)
        again_at, again = await scene.placed()  # the worker itself is well, and has the KV
        assert again_at is only
        assert again.resumed == (Resumed(0, [1]),)
        await only.until_cancelled()
        assert only.cancels[0].request_id == request.request_id
        await only.send(request, 3)
        await only.send(again, 2, 3, finish="stop")
    assert got.tokens() == [1, 2, 3]


async def test_only_the_sequences_that_go_on_are_begun_again_each_with_its_own_tokens(nats: NatsAddress) -> None:
    async with stage(nats, "a", "b") as scene, reading(scene, n=3) as got:
        first, request = await scene.placed()
        await first.send(request, 1)
        await first.send(request, 11, finish="stop", index=1)
        await first.send(request, 21, 22, index=2)
        await got.until(21, 22, index=2)
        await first.die()
        second, again = await scene.placed()
        assert (again.n, again.resumed) == (3, (Resumed(0, [1]), Resumed(2, [21, 22])))
        await second.send(again, 23, finish="length", index=2)
        await second.send(again, 2, finish="stop")
    assert (got.tokens(0), got.tokens(1), got.tokens(2)) == ([1, 2], [11], [21, 22, 23])
    assert [got.finish(index) for index in range(3)] == [["stop"], ["stop"], ["length"]]


async def test_every_prompt_of_a_request_goes_on_when_all_were_at_one_worker(nats: NatsAddress) -> None:
    async with stage(nats, "a") as scene, reading(scene, prompts=3) as got:
        placed = [await scene.placed() for _ in range(3)]
        for number, (puppet, request) in enumerate(placed):
            await puppet.send(request, number)
        await got.until(0)
        other = Puppet(record("b"), placed[0][0].bus, scene.requests, placed[0][0].group)
        await other.serve()
        join(scene, other)
        await placed[0][0].die()
        for _ in range(3):
            puppet, again = await scene.placed()
            assert puppet is other
            await puppet.send(again, 10 + again.resumed[0].token_ids[0], finish="stop")  # in whatever order
    assert [got.tokens(prompt=number) for number in range(3)] == [[0, 10], [1, 11], [2, 12]]


async def test_a_sequence_whose_last_token_came_without_its_end_is_over(nats: NatsAddress) -> None:
    async with stage(nats, "a", "b") as scene, reading(scene, max_tokens=2) as got:
        first, request = await scene.placed()
        await first.send(request, 1, 2)
        await got.until(1, 2)
        await first.die()
    assert got.finish() == ["length"]
    assert scene.requests.empty()


async def test_a_request_that_two_workers_died_of_at_one_token_is_not_given_to_a_third(nats: NatsAddress) -> None:
    got: list[int] = []
    async with stage(nats, "a", "b", "c") as scene, asyncio.TaskGroup() as group:
        first_token = asyncio.Event()
        reader = group.create_task(catch(scene.deltas(), got, first_token))
        first, request = await scene.placed()
        await first.send(request, 1)
        await first_token.wait()
        await first.die()
        second, _ = await scene.placed()
        await second.die()
        assert isinstance(await reader, WorkerLost)
    assert scene.requests.empty()
    assert got == [1]


async def test_a_stream_outlives_any_number_of_workers_that_each_gave_a_token(nats: NatsAddress) -> None:
    async with stage(nats, "a", "b", "c", "d") as scene, reading(scene) as got:
        for number in range(3):
            puppet, request = await scene.placed()
            await puppet.send(request, number)
            await got.until(*range(number + 1))
            await puppet.die()
        puppet, request = await scene.placed()
        await puppet.send(request, 3, finish="stop")
    assert got.tokens() == [0, 1, 2, 3]


async def test_an_engine_that_died_is_no_fault_of_the_request(nats: NatsAddress) -> None:
    async with stage(nats, "a", "b") as scene, reading(scene) as got:
        first, request = await scene.placed()
        await first.send(request, 1)
        await first.send(request, error=WireError.of(WorkerLost("a", "its engine died")))
        second, again = await scene.placed()
        assert second is not first
        await second.send(again, 2, finish="stop")
    assert got.tokens() == [1, 2]


@pytest.mark.parametrize("error", [WorkerError("out of luck"), RequestError("too long")])
async def test_an_error_of_the_request_itself_ends_it(error: DynamoError, nats: NatsAddress) -> None:
    got: list[int] = []
    async with stage(nats, "a", "b") as scene, asyncio.TaskGroup() as group:
        reader = group.create_task(catch(scene.deltas(), got))
        puppet, request = await scene.placed()
        await puppet.send(request, 1)
        await puppet.send(request, error=WireError.of(error))
        assert str(await reader) == str(error)
    assert got == [1]
    assert scene.requests.empty()


async def test_a_stream_that_nobody_can_go_on_with_waits_for_a_worker(nats: NatsAddress) -> None:
    async with stage(nats, "a") as scene, reading(scene) as got:
        first, request = await scene.placed()
        await first.send(request, 1)
        await got.until(1)
        await first.die()
        other = Puppet(record("a-again"), first.bus, scene.requests, first.group)
        await other.serve()
        join(scene, other)
        puppet, again = await scene.placed()
        assert puppet is other
        await puppet.send(again, 2, finish="stop")
    assert got.tokens() == [1, 2]


async def test_a_stream_that_waits_for_a_worker_ends_with_the_server(nats: NatsAddress) -> None:
    got: list[int] = []
    async with stage(nats, "a") as scene, asyncio.TaskGroup() as group:
        begun = asyncio.Event()
        reader = group.create_task(catch(scene.deltas(), got, begun))
        first, request = await scene.placed()
        await first.send(request, 1)
        await begun.wait()
        await first.die()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await asyncio.shield(reader)
        scene.backend.fail_all(PlaneError("the server is stopping"))
        assert isinstance(await reader, WorkerLost)


async def test_a_stream_whose_end_was_lost_with_nats_is_given_it_again(
    nats_server: EmbeddedServer[NatsAddress],
) -> None:
    async with stage(nats_server.address, "a") as scene, reading(scene) as got:
        puppet, request = await scene.placed()
        await puppet.send(request, 1)
        await got.until(1)
        await puppet.send(request, 2, finish="stop", lose=True)
        nats_server.kill()
        await nats_server.restart()
        _, again = await scene.placed()
        assert again.resumed == (Resumed(0, [1]),)
        await puppet.send(again, 2, finish="stop")
    assert got.tokens() == [1, 2]


async def test_what_a_draining_worker_generates_goes_on_elsewhere_with_its_kv(nats: NatsAddress) -> None:
    async with stage(nats, "a", "b") as scene, reading(scene) as got:
        first, request = await scene.placed()
        await first.send(request, *range(40))
        await got.until(*range(40))
        drain(scene, first)
        second, again = await scene.placed()
        assert again.resumed == (Resumed(0, list(range(40))),)
        assert again.holder == Holder(first.record.incarnation, 32, leaving=True)  # 42 tokens with KV: 2 whole blocks
        await first.until_cancelled()
        assert (first.cancels[0].request_id, first.cancels[0].moved) == (request.request_id, True)
        await first.send(request, 40)  # too late: the other one gives it
        await second.send(again, 40)
        await first.until_cancelled(2)
        assert (first.cancels[1].request_id, first.cancels[1].moved) == (request.request_id, False)
        await second.send(again, 41, finish="stop")
    assert got.tokens() == [*range(42)]


async def test_the_last_worker_finishes_what_it_has_though_it_drains(nats: NatsAddress) -> None:
    async with stage(nats, "a") as scene, reading(scene) as got:
        only, request = await scene.placed()
        await only.send(request, 1)
        await got.until(1)
        drain(scene, only)
        scene.backend.moves.review()
        await only.send(request, 2)
        await got.until(1, 2)
        other = Puppet(record("b"), only.bus, scene.requests, only.group)
        await other.serve()
        join(scene, other)  # now there is somewhere to go
        puppet, again = await scene.placed()
        assert (puppet, again.resumed) == (other, (Resumed(0, [1, 2]),))
        await puppet.send(again, 3, finish="stop")
    assert got.tokens() == [1, 2, 3]


async def test_a_sequence_that_ends_within_a_moment_stays_and_one_without_a_token_too(nats: NatsAddress) -> None:
    async with stage(nats, "a", "b") as scene, reading(scene, max_tokens=10) as got:
        first, request = await scene.placed()
        drain(scene, first)
        scene.backend.moves.review()
        await first.send(request, 1)
        await got.until(1)
        scene.backend.moves.review()
        await first.send(request, 2, finish="stop")
    assert scene.requests.empty()
    assert not first.cancels


async def test_a_few_are_moved_at_a_time_and_the_next_when_one_has_arrived(nats: NatsAddress) -> None:
    async with stage(nats, "a") as scene, reading(scene, prompts=6) as got:
        placed = [await scene.placed() for _ in range(6)]
        first = placed[0][0]
        for _, request in placed:
            await first.send(request, 1)
        await got.until(1)
        other = Puppet(record("b"), first.bus, scene.requests, first.group)
        await other.serve()
        join(scene, other)
        drain(scene, first)
        moved = [await scene.placed() for _ in range(AT_ONCE)]
        scene.backend.moves.review()
        assert scene.requests.empty()
        for left in reversed(range(6)):
            puppet, request = moved.pop(0)
            await puppet.send(request, 2, finish="stop")
            if left >= AT_ONCE:
                moved.append(await scene.placed())
    assert all(got.tokens(prompt=number) == [1, 2] for number in range(6))


async def test_a_worker_that_takes_too_few_tokens_is_not_asked_to_go_on(nats: NatsAddress) -> None:
    async with stage(nats, "a", "b") as scene, reading(scene, max_tokens=5000) as got:
        first, request = await scene.placed()
        other = scene.puppets["b" if first.record.name == "a" else "a"]
        await first.send(request, *range(4093))
        await got.until(*range(4093))
        long = Puppet(
            msgspec.structs.replace(record("long"), max_model_len=10_000), first.bus, scene.requests, first.group
        )
        await long.serve()
        await first.die()
        scene.roster.lost(first.record.incarnation)
        assert other.record.max_model_len == 4096
        join(scene, long)
        puppet, again = await scene.placed()
        assert puppet is long
        await puppet.send(again, 1, finish="stop")
    assert len(got.tokens()) == 4094
