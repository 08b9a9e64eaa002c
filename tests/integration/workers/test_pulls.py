"""A worker takes the prefix of a prompt from another one that holds it, whatever the roles of the two."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from dynamo_lite.plane.wire import (
    Holder,
    InstanceRecord,
    PrefillReply,
    PrefillRequest,
    PushTarget,
    RequestId,
    decode,
    encode,
)
from tests.integration.workers.conftest import PROMPT, Fleet, StartWorker, spans

SLOW = {"prefill_ms_per_token": 0.2}  # a second for five thousand tokens: pulling is faster by far
HELD = 640  # tokens: 40 blocks


def pulls(direction: str, outcome: str) -> str:
    return f'dynamo_lite_worker_pulls_total{{direction="{direction}",outcome="{outcome}"}}'


def prompts(reason: str) -> str:
    return f'dynamo_lite_worker_prompts_total{{reason="{reason}"}}'


def holder(record: InstanceRecord, tokens: int = HELD) -> Holder:
    return Holder(record.incarnation, tokens)


@pytest.mark.parametrize(("role", "other"), [("decode", "decode"), ("both", "both"), ("decode", "prefill")])
async def test_a_prefix_is_pulled_from_a_worker_of_any_role_and_the_rest_computed(
    role: str, other: str, fleet: Fleet, start: StartWorker
) -> None:
    here, there, alone = await asyncio.gather(start(f"{role}-0", **SLOW), start(f"{other}-1", **SLOW), start("both-9"))
    expected = await fleet.send(alone, PROMPT)
    await expected.ended()
    if other == "prefill":
        warmer = await start("decode-2")
        await (await fleet.send(warmer, PROMPT[: HELD + 1], prefill=(there,))).ended()
    else:
        await (await fleet.send(there, PROMPT[: HELD + 1])).ended()
    pulled = await fleet.send(here, PROMPT, holder=holder(there))
    deltas = await pulled.ended()
    assert pulled.text() == expected.text()
    assert deltas[0].cached_tokens == 0
    mine, theirs = await fleet.metrics(here), await fleet.metrics(there)
    assert mine[prompts("pulled")] == mine[pulls("in", "ok")] == theirs[pulls("out", "ok")] == 1
    assert mine['vllm:prompt_tokens_by_source_total{source="external_kv_transfer"}'] == HELD
    assert mine['vllm:prompt_tokens_by_source_total{source="local_compute"}'] == len(PROMPT) - HELD
    blocks = mine['nixl_transfer_bytes_total{direction="in",path="sim"}'] / here.fingerprint.block_bytes
    assert blocks == HELD // here.fingerprint.block_size
    await fleet.free(here, there)


async def test_a_worker_that_has_lost_what_it_is_asked_for_declines_and_the_prompt_is_computed(
    fleet: Fleet, start: StartWorker
) -> None:
    here, there = await asyncio.gather(start("decode-0"), start("decode-1"))
    await (await fleet.send(here, PROMPT, holder=holder(there))).ended()
    mine, theirs = await fleet.metrics(here), await fleet.metrics(there)
    assert mine[prompts("pull failed")] == mine[pulls("in", "not held")] == theirs[pulls("out", "error")] == 1
    assert theirs['vllm:prompt_tokens_by_source_total{source="local_compute"}'] == 0
    assert 'nixl_transfer_failures_total{cause="not held",direction="in"}' not in mine
    await fleet.free(here, there)


async def test_a_prompt_whose_holder_fails_is_asked_of_the_next_prefill_candidate_up_to_the_same_token(
    fleet: Fleet, start: StartWorker
) -> None:
    here, there, prefill, alone = await asyncio.gather(
        start("decode-0"), start("decode-1"), start("prefill-0"), start("both-9")
    )
    expected = await fleet.send(alone, PROMPT)
    await expected.ended()
    stream = await fleet.send(here, PROMPT, prefill=(prefill,), holder=holder(there))
    await stream.ended()
    assert stream.text() == expected.text()
    mine = await fleet.metrics(here)
    assert mine[prompts("remote")] == mine[pulls("in", "not held")] == 1
    assert mine['dynamo_lite_worker_remote_prefills_total{outcome="ok"}'] == 1
    assert mine['vllm:prompt_tokens_by_source_total{source="external_kv_transfer"}'] == HELD


async def test_a_short_lead_and_a_salted_prompt_are_not_pulled(fleet: Fleet, start: StartWorker) -> None:
    here, there = await asyncio.gather(start("decode-0"), start("decode-1"))
    await (await fleet.send(there, PROMPT)).ended()
    await (await fleet.send(here, PROMPT, holder=holder(there, 48))).ended()
    await (await fleet.send(here, PROMPT, holder=holder(there), cache_salt="tenant")).ended()
    mine = await fleet.metrics(here)
    assert mine[prompts("no candidates")] == 1
    assert mine[pulls("in", "not held")] == 1, "what is there is another tenant's"
    assert pulls("in", "ok") not in mine


async def test_pulling_stops_where_it_has_turned_out_slower_than_computing_and_the_trace_says_why(
    fleet: Fleet, start_process: StartWorker, tmp_path: Path
) -> None:
    here, there = await asyncio.gather(
        start_process("decode-0", transfer_ms_per_block=5), start_process("decode-1", transfer_ms_per_block=5)
    )
    for number in range(3):
        prompt = [20 + number, *PROMPT]
        await (await fleet.send(there, prompt)).ended()
        await (await fleet.send(here, prompt, holder=holder(there))).ended()
    mine = await fleet.metrics(here)
    assert (mine[prompts("pulled")], mine[prompts("faster here")]) == (1, 2)
    for name in ("decode-0", "decode-1"):
        fleet.kill(name, signal.SIGTERM)
        assert await fleet.children[name].wait() == 0
    told = [span for span in spans(tmp_path) if span["name"] == "decode" and span["process"] == "decode-0"]
    first, second, _ = (span["attributes"] for span in told)
    assert (first["reason"], "predicted_pull_s" in first) == ("pulled", False)
    assert second["reason"] == "faster here"
    assert second["predicted_pull_s"] > second["predicted_compute_s"] > 0
    (served,) = (span for span in spans(tmp_path) if span["name"] == "prefill")
    assert (served["process"], served["attributes"]["pull"]) == ("decode-1", True)


async def test_a_busy_holder_declines_instead_of_letting_others_wait(fleet: Fleet, start: StartWorker) -> None:
    there = await start("decode-0", max_num_batched_tokens=16, prefill_ms_per_token=1)
    await (await fleet.send(there, PROMPT[:100])).ended()
    first = await fleet.send(there, PROMPT[:900])
    second = await fleet.send(there, PROMPT[1:900])
    await fleet.until(lambda: fleet.load(there).waiting > 0)
    request = PrefillRequest(
        RequestId("pull"), PROMPT[:97], PushTarget(7, there.incarnation, there.fingerprint.layout, 0, 96, ()),
        only_held=True,
    )  # fmt: skip
    reply = decode(
        await fleet.bus.request(fleet.subjects.prefill(there.incarnation), encode(request), 5.0), PrefillReply
    )
    assert reply.error is not None
    assert reply.error.fields["cause"] == "busy"
    await fleet.cancel(first)
    await fleet.cancel(second)
    await fleet.free(there)


async def test_a_holder_that_dies_or_drains_costs_no_request(fleet: Fleet, start_process: StartWorker) -> None:
    here, there, gone = await asyncio.gather(
        start_process("decode-0", prefill_ms_per_token=2),  # so slow that a pull is waited for
        start_process("decode-1", transfer_ms_per_block=50),
        start_process("decode-2"),
    )
    await (await fleet.send(there, PROMPT)).ended()
    fleet.kill("decode-2", signal.SIGTERM)
    assert await fleet.children["decode-2"].wait() == 0
    after = await fleet.send(here, PROMPT[5:], holder=holder(gone))
    assert len(await after.ended()) == 8
    stream = await fleet.send(here, PROMPT, holder=holder(there))
    await fleet.until(lambda: fleet.load(there).held_blocks > 0)
    fleet.kill("decode-1")
    assert len(await stream.ended()) == 8
    mine = await fleet.metrics(here)
    assert mine[prompts("pull failed")] == mine[pulls("in", "gone")] == 2
    await fleet.free(here)
