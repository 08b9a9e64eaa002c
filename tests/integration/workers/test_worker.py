from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from dynamo_lite.plane.wire import (
    PROTOCOL,
    Cancel,
    PrefillReply,
    PrefillRequest,
    PushTarget,
    RequestId,
    Role,
    Sampling,
    decode,
    encode,
)
from kvbm.hashing import block_hashes
from tests.integration.workers.conftest import GREEDY, PROMPT, Fleet, StartWorker, spans

LONG = Sampling(max_tokens=3000, temperature=0.0)


async def test_a_worker_registers_what_others_need_to_know(fleet: Fleet, start_process: StartWorker) -> None:
    record = await start_process("decode-0", kv_blocks=100)
    assert (record.role, record.kv_blocks, record.max_model_len) == (Role.DECODE, 100, 1600)
    assert record.fingerprint.engine == "sim"
    assert record.metrics_url.startswith("http://127.0.0.1:")
    await fleet.free(record)


async def test_a_request_is_streamed_to_its_end(fleet: Fleet, start: StartWorker) -> None:
    stream = await fleet.send(await start("both-0"), PROMPT)
    deltas = await stream.ended()
    assert len(stream.text()) == 8
    assert (deltas[0].cached_tokens, deltas[-1].finish) == (0, "length")
    assert {delta.cached_tokens for delta in deltas[1:]} == {None}
    await fleet.free(stream.record)


async def test_one_message_holds_the_deltas_of_all_requests_of_a_step(fleet: Fleet, start: StartWorker) -> None:
    record = await start("both-0", decode_step_ms=20)
    sampling = Sampling(max_tokens=20, temperature=0.0)
    streams = [await fleet.send(record, PROMPT[: 50 + i], sampling) for i in range(10)]
    for stream in streams:
        await stream.ended()
    deltas = sum(len(batch.deltas) for batch in fleet.batches)
    assert deltas == 200
    assert len(fleet.batches) <= 30
    assert [batch.seq for batch in fleet.batches] == list(range(1, len(fleet.batches) + 1))


async def test_a_remote_prefill_gives_the_output_of_a_local_one(
    fleet: Fleet, start_process: StartWorker, tmp_path: Path
) -> None:
    decode_0, prefill_0, both_0 = await asyncio.gather(
        start_process("decode-0"), start_process("prefill-0"), start_process("both-0")
    )
    for sampling in (GREEDY, Sampling(max_tokens=20, temperature=1.0, seed=5)):
        alone = await fleet.send(both_0, PROMPT, sampling)
        apart = await fleet.send(decode_0, PROMPT, sampling, (prefill_0,), cache_salt=str(sampling.seed))
        await alone.ended()
        await apart.ended()
        assert apart.text() == alone.text()
    counters = await fleet.metrics(decode_0)
    assert counters['dynamo_lite_worker_remote_prefills_total{outcome="ok"}'] == 2
    assert counters['dynamo_lite_worker_prompts_total{reason="remote"}'] == 2
    assert counters['vllm:prompt_tokens_by_source_total{source="external_kv_transfer"}'] == 2 * 999
    assert counters['nixl_transfer_seconds_count{direction="in",path="sim"}'] == 2
    await fleet.until(lambda: fleet.load(prefill_0).prefills == 2)
    await fleet.free(decode_0, prefill_0)
    tree = await exported(fleet, tmp_path, "decode-0", "prefill-0", "both-0")
    decodes = [span for span in tree if span["name"] == "decode" and span["process"] == "decode-0"]
    prefills = {span["parent_id"]: span for span in tree if span["name"] == "prefill"}
    transfers = {span["parent_id"]: span for span in tree if span["name"] == "kv.transfer"}
    for span in decodes:
        assert span["attributes"]["reason"] == "remote"
        transfer = transfers[prefills[span["span_id"]]["span_id"]]
        assert transfer["attributes"]["blocks"] == 63
        assert transfer["attributes"]["backend"] == "sim"


async def exported(fleet: Fleet, folder: Path, *names: str) -> list[dict[str, Any]]:
    """All spans: a worker's last are written when it ends."""
    for name in names:
        fleet.kill(name, signal.SIGTERM)
    for name in names:
        assert await fleet.children[name].wait() == 0
    return spans(folder)


async def test_a_repeated_prompt_skips_the_prefill_worker(fleet: Fleet, start: StartWorker) -> None:
    decode_0, prefill_0 = await asyncio.gather(start("decode-0"), start("prefill-0"))
    first = await fleet.send(decode_0, PROMPT, prefill=(prefill_0,))
    await first.ended()
    again = await fleet.send(decode_0, PROMPT, prefill=(prefill_0,))
    deltas = await again.ended()
    assert deltas[0].cached_tokens == 992
    assert again.text() == first.text()
    counters = await fleet.metrics(decode_0)
    assert counters['dynamo_lite_worker_prompts_total{reason="prefix hit"}'] == 1
    assert counters["dynamo_lite_worker_hit_blocks_total"] == 62
    assert fleet.load(prefill_0).prefills <= 1


async def test_a_short_prompt_is_computed_by_the_decode_worker(fleet: Fleet, start: StartWorker) -> None:
    decode_0, prefill_0 = await asyncio.gather(start("decode-0"), start("prefill-0"))
    await (await fleet.send(decode_0, PROMPT[:63], prefill=(prefill_0,))).ended()
    counters = await fleet.metrics(decode_0)
    assert counters['dynamo_lite_worker_prompts_total{reason="short"}'] == 1


async def test_sequences_share_the_prompt_and_differ_by_seed(fleet: Fleet, start: StartWorker) -> None:
    record = await start("both-0")
    sampling = Sampling(max_tokens=12, temperature=1.0, seed=40)
    stream = await fleet.send(record, PROMPT, sampling, n=3)
    await stream.ended(3)
    texts = [stream.text(index) for index in range(3)]
    assert all(len(text) == 12 for text in texts)
    assert len({tuple(text) for text in texts}) == 3
    counters = await fleet.metrics(record)
    assert counters["dynamo_lite_worker_hit_blocks_total"] == 2 * 62
    for index in range(3):
        single = await fleet.send(record, PROMPT, Sampling(max_tokens=12, temperature=1.0, seed=40 + index))
        await single.ended()
        assert single.text() == texts[index]


async def test_one_sequence_can_be_cancelled_alone(fleet: Fleet, start: StartWorker) -> None:
    record = await start("both-0")
    sampling = Sampling(max_tokens=200, temperature=1.0, seed=1)
    stream = await fleet.send(record, PROMPT, sampling, n=2)
    await stream.until(lambda: bool(stream.text(1)))
    await fleet.cancel(stream, 1)
    deltas = await stream.ended(2)
    assert {(delta.index, delta.finish) for delta in deltas if delta.finish} == {(0, "length"), (1, "abort")}
    assert len(stream.text(0)) == 200
    assert len(stream.text(1)) < 200


async def test_a_cancel_frees_a_running_sequence(fleet: Fleet, start: StartWorker) -> None:
    record = await start("both-0")
    stream = await fleet.send(record, PROMPT, LONG)
    await stream.first()
    await fleet.cancel(stream)
    assert (await stream.ended())[-1].finish == "abort"
    await fleet.free(record)


async def test_a_cancel_frees_a_queued_sequence(fleet: Fleet, start: StartWorker) -> None:
    record = await start("both-0", kv_blocks=256, decode_step_ms=5)
    running = await fleet.send(record, PROMPT * 3, LONG)
    await running.first()
    queued = await fleet.send(record, [*PROMPT[::-1], *PROMPT], LONG)
    await fleet.until(lambda: fleet.load(record).waiting == 1)
    await fleet.cancel(queued)
    assert (await queued.ended())[-1].finish == "abort"
    assert queued.text() == []
    await fleet.cancel(running)
    await fleet.free(record)


async def test_a_cancel_during_the_remote_prefill_frees_both_workers(fleet: Fleet, start: StartWorker) -> None:
    decode_0, prefill_0 = await asyncio.gather(start("decode-0"), start("prefill-0", prefill_ms_per_token=1000))
    stream = await fleet.send(decode_0, PROMPT, prefill=(prefill_0,))
    await fleet.until(lambda: fleet.load(prefill_0).running == 1 and fleet.load(decode_0).held_blocks == 63)
    await fleet.cancel(stream)
    assert (await stream.ended())[-1].finish == "abort"
    await fleet.free(decode_0, prefill_0)


async def test_a_cancel_during_the_push_frees_both_workers(fleet: Fleet, start: StartWorker) -> None:
    slow = {"transfer_ms_per_block": 1000}
    decode_0, prefill_0 = await asyncio.gather(start("decode-0"), start("prefill-0", **slow))
    stream = await fleet.send(decode_0, PROMPT, prefill=(prefill_0,))
    await fleet.until(lambda: fleet.load(prefill_0).held_blocks == 63)
    await fleet.cancel(stream)
    await stream.ended()
    await fleet.free(decode_0, prefill_0)


async def test_a_cancel_that_comes_before_its_request_counts(fleet: Fleet, start: StartWorker) -> None:
    record = await start("both-0")
    cancel = encode(Cancel(RequestId("early")))
    await fleet.bus.publish(fleet.subjects.cancel(record.incarnation), cancel)
    early = await fleet.send(record, PROMPT, LONG, request_id="early")
    later = await fleet.send(record, PROMPT)
    await later.ended()
    await fleet.free(record)
    assert early.deltas == []


async def test_a_request_has_a_deadline(fleet: Fleet, start: StartWorker) -> None:
    record = await start("both-0")
    stream = await fleet.send(record, PROMPT, LONG, timeout_ms=100)
    error = (await stream.ended())[-1].error
    assert error is not None
    assert (error.kind, error.status) == ("timeout", 504)
    await fleet.free(record)


async def test_an_impossible_request_fails_alone(fleet: Fleet, start: StartWorker) -> None:
    record = await start("both-0")
    good = await fleet.send(record, PROMPT)
    empty = await fleet.send(record, [])
    large = await fleet.send(record, PROMPT * 5)
    none = await fleet.send(record, PROMPT, n=0)
    for stream in (empty, large, none):
        error = (await stream.ended())[-1].error
        assert error is not None
        assert error.status == 400
    assert (await good.ended())[-1].finish == "length"


async def test_a_request_that_cannot_be_read_is_answered_to_its_sender(fleet: Fleet, start: StartWorker) -> None:
    record = await start("both-0")
    stream = await fleet.send(record, PROMPT, request_id="garbled")
    await stream.ended()
    stream.deltas.clear()
    reply = fleet.subjects.undelivered(fleet.frontend, "garbled")
    await fleet.bus.publish(fleet.subjects.generate(record.incarnation), bytes([PROTOCOL, 0xC1]), reply)
    error = (await stream.ended())[0].error
    assert error is not None
    assert error.kind == "protocol_mismatch"
    await fleet.bus.publish(fleet.subjects.generate(record.incarnation), b"\x07")
    assert (await (await fleet.send(record, PROMPT)).ended())[-1].finish == "length"


async def test_a_request_id_in_flight_is_refused_a_second_time(fleet: Fleet, start: StartWorker) -> None:
    record = await start("both-0")
    first = await fleet.send(record, PROMPT, LONG, request_id="twice")
    await first.first()
    second = await fleet.send(record, PROMPT, request_id="twice")
    await second.until(lambda: any(delta.error for delta in second.deltas))
    (error,) = [delta.error for delta in second.deltas if delta.error]
    assert "in flight already" in error.message
    fleet.streams["twice"] = first
    await fleet.cancel(first)
    assert (await first.ended())[-1].finish == "abort"


async def test_prompt_and_snapshot_agree_on_the_blocks(fleet: Fleet, start: StartWorker) -> None:
    record = await start("both-0")
    stream = await fleet.send(record, PROMPT, Sampling(max_tokens=1, temperature=0.0))
    await stream.ended()
    hashes = set(block_hashes(PROMPT, 16))
    await fleet.until(lambda: {h for b in fleet.events for e in b.events for h in getattr(e, "hashes", ())} >= hashes)
    snapshot = await fleet.snapshot(record)
    assert {block for blocks in snapshot.blocks.values() for block in blocks} == hashes
    assert snapshot.seq == fleet.events[-1].seq
    await fleet.until(lambda: fleet.load(record).kv_seq == snapshot.seq)


async def test_a_duplicate_prefill_is_refused_and_the_first_goes_on(fleet: Fleet, start: StartWorker) -> None:
    record = await start("prefill-0", prefill_ms_per_token=0.5)
    target = PushTarget(1, record.incarnation, record.fingerprint.layout, 0, len(PROMPT), ())
    data = encode(PrefillRequest(RequestId("p"), PROMPT, target))
    subject = fleet.subjects.prefill(record.incarnation)
    first = asyncio.get_running_loop().create_task(fleet.bus.request(subject, data, 10))
    await fleet.until(lambda: fleet.load(record).running == 1)
    with pytest.raises(Exception, match="in flight already"):
        await fleet.bus.request(subject, data, 10)
    assert decode(await first, PrefillReply).error is None
