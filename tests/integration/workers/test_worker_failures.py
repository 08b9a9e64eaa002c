from __future__ import annotations

import asyncio
import signal

from dynamo_lite.config import NatsAddress
from dynamo_lite.embedded import EmbeddedServer
from dynamo_lite.plane.wire import Sampling
from tests.integration.workers.conftest import GREEDY, PROMPT, Fleet, StartWorker

LONG = Sampling(max_tokens=3000, temperature=0.0)
SLOW = {"prefill_ms_per_token": 1000}


async def expected(fleet: Fleet, start: StartWorker) -> list[int]:
    stream = await fleet.send(await start("both-0"), PROMPT)
    await stream.ended()
    return stream.text()


async def test_a_prefill_worker_killed_in_the_middle_costs_no_request(fleet: Fleet, start_process: StartWorker) -> None:
    decode_0, prefill_0 = await asyncio.gather(start_process("decode-0"), start_process("prefill-0", **SLOW))
    stream = await fleet.send(decode_0, PROMPT, prefill=(prefill_0,))
    await fleet.until(lambda: fleet.load(prefill_0).running == 1)
    fleet.kill("prefill-0")
    assert (await stream.ended())[-1].finish == "length"
    assert stream.text() == await expected(fleet, start_process)
    counters = await fleet.metrics(decode_0)
    assert counters['dynamo_lite_worker_remote_prefills_total{outcome="gone"}'] == 1
    assert counters['dynamo_lite_worker_prompts_total{reason="prefill failed"}'] == 1
    await fleet.free(decode_0)


async def test_the_next_candidate_takes_over_from_a_killed_one(fleet: Fleet, start_process: StartWorker) -> None:
    decode_0, slow, fast = await asyncio.gather(
        start_process("decode-0"), start_process("prefill-0", **SLOW), start_process("prefill-1")
    )
    stream = await fleet.send(decode_0, PROMPT, prefill=(slow, fast))
    await fleet.until(lambda: fleet.load(slow).running == 1)
    fleet.kill("prefill-0")
    await stream.ended()
    counters = await fleet.metrics(decode_0)
    assert counters['dynamo_lite_worker_remote_prefills_total{outcome="ok"}'] == 1
    assert counters['dynamo_lite_worker_prompts_total{reason="remote"}'] == 1
    await fleet.free(decode_0, fast)


async def test_a_candidate_that_is_gone_already_costs_next_to_nothing(fleet: Fleet, start_process: StartWorker) -> None:
    decode_0, prefill_0 = await asyncio.gather(start_process("decode-0"), start_process("prefill-0"))
    fleet.kill("prefill-0")
    await fleet.children["prefill-0"].wait()
    stream = await fleet.send(decode_0, PROMPT, prefill=(prefill_0,))
    await stream.ended()
    assert stream.text() == await expected(fleet, start_process)


async def test_a_frozen_prefill_worker_is_given_up_and_drops_its_work_when_it_wakes(
    fleet: Fleet, start_process: StartWorker
) -> None:
    decode_0, prefill_0 = await asyncio.gather(start_process("decode-0"), start_process("prefill-0", **SLOW))
    stream = await fleet.send(decode_0, PROMPT, prefill=(prefill_0,))
    await fleet.until(lambda: fleet.load(prefill_0).running == 1)
    fleet.kill("prefill-0", signal.SIGSTOP)
    assert (await stream.ended())[-1].finish == "length"
    counters = await fleet.metrics(decode_0)
    assert counters['dynamo_lite_worker_remote_prefills_total{outcome="silent"}'] == 1
    fleet.kill("prefill-0", signal.SIGCONT)
    await fleet.free(decode_0, prefill_0)


async def test_a_killed_worker_answers_no_responders(fleet: Fleet, start_process: StartWorker) -> None:
    record = await start_process("both-0")
    fleet.kill("both-0")
    await fleet.children["both-0"].wait()
    stream = await fleet.send(record, PROMPT)
    await fleet.until(lambda: fleet.bounced == [stream.request_id])


async def test_a_drained_worker_finishes_what_it_has_and_takes_nothing_new(
    fleet: Fleet, start_process: StartWorker
) -> None:
    record = await start_process("both-0", decode_step_ms=5)
    sampling = Sampling(max_tokens=200, temperature=0.0)
    stream = await fleet.send(record, PROMPT, sampling)
    await stream.first()
    fleet.kill("both-0", signal.SIGTERM)
    await fleet.until(lambda: fleet.load(record).draining)
    assert record.incarnation in fleet.membership.instances, "others may take KV from it"
    await stream.ended()
    assert len(stream.text()) == 200
    assert await fleet.children["both-0"].wait() == 0
    late = await fleet.send(record, PROMPT)
    await fleet.until(lambda: late.request_id in fleet.bounced)


async def test_a_prefill_worker_drains_its_pushes(fleet: Fleet, start_process: StartWorker) -> None:
    decode_0, prefill_0 = await asyncio.gather(
        start_process("decode-0"), start_process("prefill-0", prefill_ms_per_token=0.5)
    )
    stream = await fleet.send(decode_0, PROMPT, prefill=(prefill_0,))
    await fleet.until(lambda: fleet.load(prefill_0).running == 1)
    fleet.kill("prefill-0", signal.SIGTERM)
    await stream.ended()
    assert await fleet.children["prefill-0"].wait() == 0
    counters = await fleet.metrics(decode_0)
    assert counters['dynamo_lite_worker_prompts_total{reason="remote"}'] == 1


async def test_requests_survive_a_restart_of_nats(
    fleet: Fleet, start: StartWorker, nats_server: EmbeddedServer[NatsAddress]
) -> None:
    record = await start("both-0")
    before = await fleet.send(record, PROMPT)
    await before.ended()
    nats_server.kill()
    await nats_server.restart()
    seen = fleet.load(record).seq
    await fleet.until(lambda: fleet.load(record).seq > seen)  # both are back
    again = await fleet.send(record, PROMPT, GREEDY)
    await again.ended()
    assert again.text() == before.text()
