"""A prefix that another worker holds is pulled from it, and gives the very tokens that computing it gives."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from dynamo_lite.config import NatsAddress
from dynamo_lite.plane.bus import Bus
from dynamo_lite.plane.wire import PrefillReply, PrefillRequest, PushTarget, RequestId, Subjects, decode, encode
from tests.integration.serving.conftest import GROUP
from tests.integration.serving.deployment import Deployment, scrape, serve, total, until
from tests.integration.serving.requests import BLOCK, MODEL, prompt, tokens
from tests.integration.serving.test_faults import FROZEN_S, RESTART_S, at_rest, running
from tests.integration.serving.test_prefix_hits import cached_tokens
from tests.integration.serving.test_tiers import counted, flush

pytestmark = pytest.mark.vllm

WORKERS = ("both-0", "both-1")
DECODERS = ("decode-0", "decode-1")


@pytest.fixture(scope="module")
def trio(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A prefill worker and two decode workers, which pull from each other rather than ask it."""
    config: dict[str, Any] = {
        "workers": {"prefill": GROUP, "decode": GROUP | {"count": 2}},
        "kv_transfer": {"verify": True, "pull": "always"},
        "router": {"mode": "least_loaded"},
    }
    with serve(tmp_path_factory.mktemp("trio"), base | config) as deployment:
        yield deployment


def other_than(name: str) -> str:
    return next(worker for pair in (WORKERS, DECODERS) for worker in pair if name in pair and worker != name)


def indexed(deployment: Deployment) -> float:
    return total(scrape(f"{deployment.url}/metrics"), "dynamo_lite_router_index_blocks")


@contextmanager
def held(deployment: Deployment, token_ids: list[int], workers: Sequence[str] = WORKERS, **more: Any) -> Iterator[str]:
    """One worker is busy with a request of this prompt, and the router knows its blocks; others go elsewhere."""
    for name in workers:
        until(lambda name=name: at_rest(deployment, name), f"{name} is idle")  # type: ignore[misc]
    before = indexed(deployment)
    body = {"model": MODEL, "prompt": token_ids, "max_tokens": 3900 - len(token_ids), "stream": True}
    body |= {"ignore_eos": True} | more
    with httpx.stream("POST", f"{deployment.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        until(lambda: any(running(deployment, name) for name in workers), "it runs")
        (holder,) = (name for name in workers if running(deployment, name))
        new = len(token_ids) // BLOCK
        until(lambda: indexed(deployment) >= before + new, "the router knows its blocks")
        yield holder


@contextmanager
def kept_busy(deployment: Deployment, name: str, seed: int, workers: Sequence[str] = WORKERS) -> Iterator[None]:
    """Requests go to the other worker."""
    for number in range(4):  # workers that are equally idle take turns
        with held(deployment, prompt(2000, seed + number), workers) as busy:  # more than any of the others
            if busy == name:
                yield
                return
    raise AssertionError(f"nothing was placed on {name}")


def moved(deployment: Deployment, name: str) -> float:
    """Blocks that came here from another worker."""
    samples = total(deployment.metrics(name), "nixl_transfer_bytes_total", 'direction="in"')
    return samples / deployment.instances()[name].fingerprint.block_bytes


def prompts(deployment: Deployment, name: str, reason: str) -> float:
    return total(deployment.metrics(name), "dynamo_lite_worker_prompts_total", f'reason="{reason}"')


def pulls(deployment: Deployment, name: str, outcome: str) -> float:
    return total(deployment.metrics(name), "dynamo_lite_worker_pulls_total", f'outcome="{outcome}"')


@pytest.mark.parametrize(("shared", "more"), [(64, 1), (320, 0), (640, 200), (1000, 31), (2048, 1000)])
def test_tokens_are_identical_when_a_prefix_is_pulled_and_only_its_blocks_are_moved(
    shared: int, more: int, pair: Deployment, together: Deployment
) -> None:
    prefix = prompt(shared, 300)
    whole = prefix + prompt(more, 301)
    expected = tokens(together, whole, temperature=0)
    with held(pair, prefix) as holder:
        mine = other_than(holder)
        before, pulled = moved(pair, mine), prompts(pair, mine, "pulled")
        assert tokens(pair, whole, temperature=0) == expected
        until(lambda: prompts(pair, mine, "pulled") == pulled + 1, "it was pulled")
        blocks = min(shared, len(whole) - 1) // BLOCK
        until(lambda: moved(pair, mine) == before + blocks, "so many blocks, and no more")
    # Both may be idle by now, and the holder asked: then it has what it lacked the next time.
    until(lambda: cached_tokens(pair, whole) == (len(whole) - 1) // BLOCK * BLOCK, "it can be matched")


def test_seeded_sampling_is_identical_when_a_prefix_is_pulled(pair: Deployment, together: Deployment) -> None:
    prefix, sampling = prompt(640, 305), {"temperature": 1.0, "seed": 11, "top_p": 0.95}
    whole = prefix + prompt(100, 306)
    expected = tokens(together, whole, **sampling)
    with held(pair, prefix) as holder:
        pulled = prompts(pair, other_than(holder), "pulled")
        assert tokens(pair, whole, **sampling) == expected
        until(lambda: prompts(pair, other_than(holder), "pulled") == pulled + 1, "it was pulled")


def test_many_prompts_at_once_pull_the_prefix_that_they_share(pair: Deployment, together: Deployment) -> None:
    prefix = prompt(640, 310)
    wholes = [prefix + prompt(40 + 20 * number, 311) for number in range(8)]
    with held(pair, prefix), ThreadPoolExecutor(8) as pool:
        mine = list(pool.map(lambda one: tokens(pair, one, temperature=0), wholes))
    with ThreadPoolExecutor(8) as pool:
        assert mine == list(pool.map(lambda one: tokens(together, one, temperature=0), wholes))
    for name in WORKERS:
        until(lambda name=name: at_rest(pair, name), "nothing stays held")  # type: ignore[misc]


def test_a_prefix_that_the_holder_has_in_its_host_tier_only_is_pulled_too(
    pair: Deployment, together: Deployment
) -> None:
    prefix = prompt(960, 320)
    whole = prefix + prompt(50, 321)
    expected = tokens(together, whole, temperature=0)
    with held(pair, prefix) as holder:
        mine = other_than(holder)
    with kept_busy(pair, mine, 900):
        for number in range(11):  # all to the holder: more than its device has room for
            cached_tokens(pair, prompt(1000, 330 + number))
    onboarded = counted(pair, holder, "onboarded")
    with kept_busy(pair, holder, 910):
        before = moved(pair, mine)
        assert tokens(pair, whole, temperature=0) == expected
        until(lambda: moved(pair, mine) == before + 960 // BLOCK, "it was pulled")
    until(lambda: counted(pair, holder, "onboarded") > onboarded, "the holder had to onboard it")


def test_tenants_share_nothing_and_those_of_one_salt_do(pair: Deployment) -> None:
    token_ids = prompt(640, 340)
    with held(pair, token_ids, cache_salt="one") as holder:
        mine = other_than(holder)
        before = moved(pair, mine)
        cached_tokens(pair, token_ids, cache_salt="two")
        cached_tokens(pair, token_ids)
        assert moved(pair, mine) == before
        cached_tokens(pair, token_ids, cache_salt="one")
        until(lambda: moved(pair, mine) == before + 608 // BLOCK, "it was pulled")


def test_the_trace_tells_that_and_from_whom_it_was_pulled(pair: Deployment) -> None:
    prefix, trace = prompt(640, 350), "3bf92f3577b34da6a3ce929d0e0e4736"
    with held(pair, prefix) as holder:
        body = {"model": MODEL, "prompt": prefix + prompt(10, 351), "max_tokens": 4, "temperature": 0}
        headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
        assert httpx.post(f"{pair.url}/v1/completions", json=body, headers=headers, timeout=60).status_code == 200

    def spans() -> dict[str, dict[str, Any]]:
        return {span["name"]: span for span in pair.spans() if span["trace_id"] == trace}

    names = {"POST /v1/completions", "route", "decode", "prefill", "kv.transfer"}
    until(lambda: spans().keys() == names, f"the spans {names}")
    route, decoding, prefill, transfer = (spans()[name] for name in ("route", "decode", "prefill", "kv.transfer"))
    assert route["attributes"]["dynamo.route.holder"] == pair.instances()[holder].incarnation
    assert route["attributes"]["dynamo.route.holder_tokens"] == 640
    assert (decoding["process"], decoding["attributes"]["reason"]) == (other_than(holder), "pulled")
    assert (prefill["process"], prefill["attributes"]["pull"]) == (holder, True)
    assert prefill["attributes"]["cached_tokens"] == 640, "one token was computed"
    assert transfer["attributes"]["blocks"] == 640 // BLOCK
    assert transfer["parent_id"] == prefill["span_id"]
    assert prefill["parent_id"] == decoding["span_id"]


def declined(deployment: Deployment, name: str, token_ids: list[int]) -> str:
    """Why that worker gives nothing of this prompt to another one."""
    record = deployment.instances()[name]
    target = PushTarget(7, record.incarnation, record.fingerprint.layout, 0, len(token_ids), ())
    request = PrefillRequest(RequestId("pull"), token_ids, target, only_held=True)

    async def ask() -> PrefillReply:
        async with Bus.connect(NatsAddress.model_validate(deployment.run["nats"]), "test") as bus:
            data = await bus.request(Subjects("test").prefill(record.incarnation), encode(request), 10.0)
            return decode(data, PrefillReply)

    reply = asyncio.run(ask())
    assert reply.error is not None
    return str(reply.error.fields["cause"])


def test_a_holder_that_has_not_what_it_is_asked_for_declines_and_computes_nothing(pair: Deployment) -> None:
    before = total(pair.metrics("both-0"), "vllm:prompt_tokens_total")
    assert declined(pair, "both-0", prompt(2048, 360)) == "not held"
    assert total(pair.metrics("both-0"), "vllm:prompt_tokens_total") == before


def test_a_holder_with_a_queue_declines_and_reads_nothing_from_its_tiers(tiered: Deployment) -> None:
    name, token_ids = "both-0", prompt(1000, 365)
    cached_tokens(tiered, token_ids)
    flush(tiered, 366)
    with held(tiered, prompt(64, 367), (name,), n=70):  # more than a batch has room for
        until(lambda: total(tiered.metrics(name), "vllm:num_requests_waiting") > 0, "some wait")
        before = counted(tiered, name, "onboarded")
        assert declined(tiered, name, token_ids) == "busy"
        assert counted(tiered, name, "onboarded") == before
    assert cached_tokens(tiered, token_ids) == 992, "it was in the tier"


@pytest.mark.parametrize("whole", [False, True])
def test_a_holder_that_is_frozen_costs_no_request_and_serves_again_when_it_thaws(
    whole: bool, pair: Deployment, together: Deployment
) -> None:
    prefix = prompt(2000, 370 + whole)
    asked = [prefix + prompt(100 + number, 372) for number in range(2)]
    expected = [tokens(together, one, temperature=0) for one in asked]
    with held(pair, prefix) as holder:
        mine, core = other_than(holder), pair.engine_pid(holder)
        failed = prompts(pair, mine, "pull failed")
        with pair.frozen(core, *([pair.pid(holder)] if whole else [])), ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(tokens, pair, one, temperature=0) for one in asked]
            got = [answer.result(FROZEN_S) for answer in answers]
        until(lambda: prompts(pair, mine, "pull failed") > failed, "the freeze hit a pull")
    assert got == expected
    for name in WORKERS:
        until(lambda name=name: at_rest(pair, name), f"{name} holds nothing", 60)  # type: ignore[misc]
    until(lambda: httpx.get(f"{pair.url}/health/ready").status_code == 200, "the frontend finds it again")
    again, done = prompt(640, 375 + whole), {name: pulls(pair, name, "ok") for name in WORKERS}
    with held(pair, again) as now:
        tokens(pair, [*again, 5], temperature=0)
        until(lambda: pulls(pair, now, "ok") > done[now], "it is pulled from, whoever of the two has it")


def test_killing_the_holder_while_others_pull_from_it_costs_no_request(pair: Deployment, together: Deployment) -> None:
    prefix = prompt(2000, 380)
    asked = [prefix + prompt(50 + number, 381) for number in range(6)]
    expected = [tokens(together, one, temperature=0) for one in asked]
    with held(pair, prefix) as holder, ThreadPoolExecutor(6) as pool:
        mine, starts = other_than(holder), int(pair.process_of(holder)["starts"])
        answers = [pool.submit(tokens, pair, one, temperature=0) for one in asked[:3]]
        pair.kill(holder)
        answers += [pool.submit(tokens, pair, one, temperature=0) for one in asked[3:]]
        assert [answer.result() for answer in answers] == expected
    until(lambda: at_rest(pair, mine), "nothing stays held")
    until(lambda: pair.restarted(holder, starts + 1), "the holder is back", RESTART_S)
    until(lambda: at_rest(pair, holder), "and holds nothing")


def on_one_decode_worker(deployment: Deployment, prefix: list[int]) -> None:
    """Have decode-1 alone hold a prefix: what is missing of each of these prompts is too short to be asked for."""
    before = indexed(deployment)
    with kept_busy(deployment, "decode-0", prefix[0], DECODERS):
        for end in range(BLOCK, len(prefix) + 1, BLOCK):
            cached_tokens(deployment, prefix[:end])
        until(lambda: indexed(deployment) >= before + len(prefix) // BLOCK, "the router knows its blocks")


def test_a_decode_worker_pulls_from_another_and_leaves_the_prefill_worker_alone(
    trio: Deployment, together: Deployment
) -> None:
    prefix = prompt(10 * BLOCK, 400)
    whole = prefix + prompt(500, 401)
    expected = tokens(together, whole, temperature=0)
    on_one_decode_worker(trio, prefix)
    with kept_busy(trio, "decode-1", 920, DECODERS):
        until(lambda: at_rest(trio, "prefill-0"), "the prefill worker has nothing to do")
        before, computed = moved(trio, "decode-0"), total(trio.metrics("prefill-0"), "vllm:prompt_tokens_total")
        assert tokens(trio, whole, temperature=0) == expected
        until(lambda: prompts(trio, "decode-0", "pulled") == 1, "it was pulled")
        assert moved(trio, "decode-0") == before + 10
        assert total(trio.metrics("prefill-0"), "vllm:prompt_tokens_total") == computed


def test_the_prefill_worker_is_asked_for_what_a_frozen_holder_did_not_give(
    trio: Deployment, together: Deployment
) -> None:
    prefix = prompt(10 * BLOCK, 410)
    whole = prefix + prompt(500, 411)
    expected = tokens(together, whole, temperature=0)
    on_one_decode_worker(trio, prefix)
    with kept_busy(trio, "decode-1", 930, DECODERS):
        before, remote = moved(trio, "decode-0"), prompts(trio, "decode-0", "remote")
        with trio.frozen(trio.engine_pid("decode-1")), ThreadPoolExecutor(1) as pool:
            assert pool.submit(tokens, trio, whole, temperature=0).result(FROZEN_S) == expected
        until(lambda: prompts(trio, "decode-0", "remote") > remote, "the prefill worker gave it")
        # The stream that kept decode-1 busy goes on here, too, with all of its 2,000 tokens.
        blocks = moved(trio, "decode-0") - before
        assert blocks == 10 or blocks >= 10 + 2000 // BLOCK, "the rest was computed here"
    for name in (*DECODERS, "prefill-0"):
        until(lambda name=name: at_rest(trio, name), f"{name} holds nothing", 60)  # type: ignore[misc]
