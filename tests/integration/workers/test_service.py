"""A worker's service at its ends: dead engines, drains, frontends that vanish."""

from __future__ import annotations

import asyncio

import pytest

from dynamo_lite.config import NatsAddress
from dynamo_lite.errors import WorkerError
from dynamo_lite.plane.bus import Bus
from dynamo_lite.plane.wire import Holder, Resumed, Sampling
from tests.integration.workers.conftest import PROMPT, Fleet, StartWorker
from workers import leaving

LONG = Sampling(max_tokens=3000, temperature=0.0)


async def test_a_dead_engine_ends_every_stream_with_an_error_and_leaves_discovery(
    fleet: Fleet, start: StartWorker
) -> None:
    record = await start("both-0")
    streams = [await fleet.send(record, PROMPT, LONG) for _ in range(3)]
    for stream in streams:
        await stream.first()
    fleet.local["both-0"].engine.fail("the engine fell over")
    for stream in streams:
        error = (await stream.ended())[-1].error
        assert error is not None
        assert (error.kind, error.fields["how"]) == ("worker_lost", "died")
        assert "the engine fell over" in error.message
    with pytest.raises(WorkerError, match="the engine fell over"):
        await fleet.local["both-0"].task
    while fleet.membership.instances:
        await fleet.membership.changed()


async def test_what_outlasts_the_drain_is_aborted_with_an_error(
    fleet: Fleet, start: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaving, "SIGTERM_DEADLINE_S", 0.1)
    record = await start("both-0", decode_step_ms=50)
    stream = await fleet.send(record, PROMPT, LONG)
    await stream.first()
    fleet.local["both-0"].stop.set()
    error = (await stream.ended())[-1].error
    assert error is not None
    assert (error.kind, error.status) == ("worker_lost", 503)
    await fleet.local["both-0"].task
    assert fleet.local["both-0"].phases == ["ready", "draining"]
    assert fleet.local["both-0"].engine.load().kv_used_blocks == 0


async def test_a_draining_worker_waits_until_what_went_on_elsewhere_has_its_kv(
    fleet: Fleet, start: StartWorker
) -> None:
    here, there = await asyncio.gather(start("decode-0", decode_step_ms=5), start("decode-1", decode_step_ms=5))
    whole = Sampling(max_tokens=100, temperature=0.0)
    expected = await fleet.send(there, PROMPT[::-1], whole)
    await expected.ended()
    stream = await fleet.send(here, PROMPT[::-1], whole)
    await stream.until(lambda: len(stream.text()) >= 30)
    fleet.local["decode-0"].stop.set()
    await fleet.until(lambda: fleet.load(here).draining)
    await fleet.leave(stream)
    await stream.ended()
    history = stream.text()
    held = (len(PROMPT) + len(history) - 1) // 16 * 16
    there_again = await start("decode-2", prefill_ms_per_token=1)
    rest = await fleet.send(
        there_again, PROMPT[::-1], whole, resumed=(Resumed(0, history),), holder=Holder(here.incarnation, held, True)
    )
    deltas = await rest.ended()
    assert history + rest.text() == expected.text()
    assert deltas[-1].finish == "length"
    counters = await fleet.metrics(there_again)
    assert counters['vllm:prompt_tokens_by_source_total{source="external_kv_transfer"}'] == held
    assert not fleet.local["decode-0"].task.done()
    await fleet.cancel(stream)  # it has its first token: nothing is waited for any more
    async with asyncio.timeout(5):
        await fleet.local["decode-0"].task
    assert (await fleet.metrics(here))['dynamo_lite_worker_requests_total{outcome="moved",role="decode"}'] == 1


async def test_sequences_that_go_on_keep_their_indexes_and_limits(fleet: Fleet, start: StartWorker) -> None:
    record = await start("both-0")
    sampling = Sampling(max_tokens=30, temperature=1.0, seed=4, logprobs=1)
    whole = await fleet.send(record, PROMPT, sampling, n=3)
    await whole.ended(3)
    resumed = (Resumed(2, whole.text(2)[:11]), Resumed(1, whole.text(1)[:29]))
    rest = await fleet.send(record, PROMPT, sampling, n=3, resumed=resumed)
    deltas = await rest.ended(2)
    assert {delta.index for delta in deltas} == {1, 2}
    assert (rest.text(1), rest.text(2)) == (whole.text(1)[29:], whole.text(2)[11:])
    assert all(delta.logprobs for delta in deltas)
    await fleet.free(record)


@pytest.mark.parametrize("resumed", [(Resumed(3, []),), (Resumed(1, []), Resumed(1, [])), (Resumed(0, [5] * 8),)])
async def test_what_cannot_go_on_is_refused(resumed: tuple[Resumed, ...], fleet: Fleet, start: StartWorker) -> None:
    record = await start("both-0")
    stream = await fleet.send(record, PROMPT, n=3, resumed=resumed)
    error = (await stream.ended())[-1].error
    assert error is not None
    assert error.status == 400
    await fleet.free(record)


async def test_the_requests_of_a_frontend_that_is_gone_end_and_those_of_others_go_on(
    fleet: Fleet, start: StartWorker, nats: NatsAddress
) -> None:
    record = await start("both-0")
    async with Bus.connect(nats, "another frontend") as bus:
        other = Fleet(bus, fleet.membership, fleet.subjects)
        await other.follow()
        orphan = await other.send(record, PROMPT, LONG)
        mine = await fleet.send(record, PROMPT[::-1], Sampling(max_tokens=600, temperature=0.0))
        await orphan.first()
        await mine.first()
    await fleet.until(lambda: fleet.load(record).running == 1)
    await mine.ended()
    assert len(mine.text()) == 600
    await fleet.free(record)


async def test_outcomes_are_counted(fleet: Fleet, start: StartWorker) -> None:
    record = await start("both-0")
    await (await fleet.send(record, PROMPT)).ended()
    await (await fleet.send(record, PROMPT, LONG, timeout_ms=50)).ended()
    await (await fleet.send(record, [])).ended()
    cancelled = await fleet.send(record, PROMPT, LONG)
    await cancelled.first()
    await fleet.cancel(cancelled)
    await cancelled.ended()
    await fleet.free(record)

    counters = await fleet.metrics(record)
    requests = 'dynamo_lite_worker_requests_total{outcome="%s",role="both"}'
    assert [counters[requests % outcome] for outcome in ("ok", "timeout", "error", "cancelled")] == [1, 1, 1, 1]
    assert counters['dynamo_lite_worker_failures_total{cause="timeout"}'] == 1
    assert counters["vllm:kv_cache_usage_perc"] == 0
