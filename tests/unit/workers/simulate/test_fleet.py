"""Whole simulations, so small that what comes out can be worked out by hand, or must hold whatever goes in."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from dynamo_lite.config import Config
from dynamo_lite.errors import ConfigError
from dynamo_lite.plane.wire import Incarnation, RequestId, Role, Sampling
from kvbm.tiers.record import stride_bytes
from tests.sim_engines import sim_spec, write_model
from tests.simulations import BLOCK, KV_BYTES, PACES, SLO, config, request, run
from workers.engine import Job
from workers.sim_engine import SimEngine
from workers.simulate.clock import VirtualTimeLoop
from workers.simulate.figures import Answer
from workers.simulate.fleet import Fleet, Load, simulate
from workers.simulate.settings import POLICIES, Split, variant
from workers.simulate.trace import Request
from workers.simulate.worker import STEPS_AT_ONCE


def answers(settings: Config, requests: list[Request]) -> list[Answer]:
    """In the order in which they came."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        fleet = Fleet(settings, KV_BYTES, Load(requests, BLOCK, SLO), lambda _: None, runner.get_loop().time)
        runner.run(fleet.replay())
    return sorted(fleet.answers, key=lambda answer: (answer.at_s, answer.prompt_tokens))


def test_two_workers_answer_three_requests_as_worked_out_by_hand() -> None:
    requests = [request(0, [1, 2]), request(1, [1, 2, 3]), request(2, [9, 8])]
    figures = run(config({"both": 2}), requests)
    # 8 tokens to compute, then 4 as 8 are there, then 8: 10 ms each. Two more tokens of each answer: 5 ms each.
    first, second, third = answers(config({"both": 2}), requests)
    assert [one.ttft_s for one in (first, second, third)] == pytest.approx([0.08, 0.04, 0.08])
    assert [one.found_tokens for one in (first, second, third)] == [0, 8, 0]
    assert [one.gap_s for one in (first, second, third)] == pytest.approx([0.005] * 3)
    assert figures.hit_rate == pytest.approx(2 / 7)  # blocks
    assert figures.ttft_p50_s == pytest.approx(0.08)
    assert figures.itl_p99_s == pytest.approx(0.005, rel=0.002)
    assert figures.duration_s == pytest.approx(2.09)
    assert (figures.requests, figures.met, figures.refused) == (3, 3, 0)
    assert figures.goodput == pytest.approx(3 / 2.09 / 2)
    assert figures.busy == pytest.approx((0.09 + 0.05 + 0.09) / 2.09 / 2)


def test_requests_that_come_together_are_computed_in_one_batch_and_wait_for_each_other() -> None:
    requests = [request(0, [1, 2], answer=9), request(0.099, [5, 6, 7], answer=2)]
    first, second = answers(config({"both": 1}), requests)
    # Tokens of the first come at 80, 85 … 100 ms; the step after that has the prompt of the second too: 125 ms.
    assert second.ttft_s == pytest.approx(0.126)
    assert first.ended_s == pytest.approx(0.08 + 8 * 0.005 + 0.12)
    assert second.ended_s == pytest.approx(0.1 + 0.125 + 0.005)


def test_one_that_comes_in_the_midst_of_a_step_waits_for_its_end() -> None:
    requests = [request(0, [1, 2], answer=9), request(0.0975, [5], answer=1)]
    _, second = answers(config({"both": 1}), requests)
    assert second.ttft_s == pytest.approx(0.0025 + 0.045)


def test_apart_the_first_token_comes_from_the_prefill_worker_and_the_second_after_the_transfer() -> None:
    (answer,) = answers(config({"prefill": 1, "decode": 1}), [request(0, [1, 2])])
    assert answer.ttft_s == pytest.approx(0.08)
    assert answer.ended_s == pytest.approx(0.08 + 2 * 0.002 + 2 * 0.005)  # two blocks, two tokens


def test_an_answer_of_one_token_ends_when_its_prompt_has_been_moved() -> None:
    (answer,) = answers(config({"prefill": 1, "decode": 1}), [request(0, [1, 2], answer=1)])
    assert (answer.ttft_s, answer.ended_s) == pytest.approx((0.08, 0.084))
    assert answer.gap_s == 0


def test_prompts_move_one_after_another_over_a_link() -> None:
    settings = config({"prefill": 1, "decode": 2}, {"transfer_ms_per_block": 100.0, "prefill_ms_per_token": 0.0})
    first, second = answers(settings, [request(0, [1]), request(0, [2, 3])])
    assert first.ended_s == pytest.approx(0.1 + 0.01)
    assert second.ended_s == pytest.approx(0.1 + 0.2 + 0.01)


def test_only_what_the_decode_worker_lacks_is_moved_and_short_rests_it_computes_itself() -> None:
    settings = config({"prefill": 1, "decode": 1}, kv_transfer={"min_remote_tokens": 5})
    first, second = answers(settings, [request(0, [1, 2]), request(1, [1, 2, 3])])
    assert first.ended_s == pytest.approx(0.094)
    assert second.found_tokens == 8
    assert second.ttft_s == pytest.approx(0.04)
    figures = run(settings, [request(0, [1, 2]), request(1, [1, 2, 3])])
    assert {worker.name: worker.computed_tokens for worker in figures.workers} == {"prefill-0": 8, "decode-0": 4}


def test_what_the_prefill_worker_has_counts_as_found() -> None:
    settings = config({"prefill": 1, "decode": 2}, router={"mode": "round_robin"})
    first, second = answers(settings, [request(0, [1, 2]), request(1, [1, 2, 3])])
    assert (first.found_tokens, second.found_tokens) == (0, 8)
    assert second.ended_s - second.at_s == pytest.approx(0.04 + 3 * 0.002 + 2 * 0.005)  # all three blocks move


def test_a_request_that_no_worker_has_room_for_is_refused() -> None:
    figures = run(config({"both": 1}, {"kv_blocks": 8}), [request(0, range(8)), request(1, [1])])
    assert (figures.requests, figures.refused) == (1, 1)


def test_a_host_tier_too_small_for_two_blocks_is_an_error_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match="two blocks"):
        run(config({"both": 1}, kv_tiers={"host": {"size": 1}}), [request(0, [1])])


def test_what_the_device_gave_up_comes_back_from_the_host_tier() -> None:
    tiers = {"host": {"size": 64 * stride_bytes(BLOCK * KV_BYTES)}}
    requests = [request(0, range(10)), request(1, range(10, 20)), request(2, range(10))]
    found = {
        bool(kv_tiers): answers(config({"both": 1}, {"kv_blocks": 14}, kv_tiers=kv_tiers), requests)[2].found_tokens
        for kv_tiers in ({}, tiers)
    }
    assert found[True] == 9 * BLOCK > found[False]


def test_at_twice_the_speed_requests_come_in_half_the_time() -> None:
    requests = [request(5, [1, 2]), request(9, [3, 4])]
    assert run(config({"both": 1}), requests).duration_s == pytest.approx(4.09)
    assert run(config({"both": 1}), requests, speed=2.0).duration_s == pytest.approx(2.09)


def some_traffic(seed: int, count: int = 60) -> list[Request]:
    """Prompts that share prefixes, more of them at a time than a worker has room for."""
    chance = random.Random(seed)
    requests = []
    for number in range(count):
        shared = [0, *range(100 * (group := chance.randrange(1, 4)), 100 * group + chance.randrange(1, 6))]
        own = range(1000 + 10 * number, 1000 + 10 * number + chance.randrange(1, 5))
        requests.append(request(chance.random() * 3, [*shared, *own], chance.randrange(1, 30), chance.randrange(4)))
    return sorted(requests, key=lambda one: one.at_s)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("split", ["3", "1:2", "2:1"])
@pytest.mark.parametrize("tiered", [False, True])
def test_every_prompt_is_found_or_computed_and_every_answer_complete(policy: str, split: str, tiered: bool) -> None:
    tiers = {"host": {"size": 40 * stride_bytes(BLOCK * KV_BYTES)}} if tiered else {}
    settings = variant(config({"both": 1}, {"kv_blocks": 48}, kv_tiers=tiers), policy, Split.parse(split))
    requests = some_traffic(1)
    figures, seen = run(settings, requests), answers(settings, requests)
    assert figures.requests == len(requests)
    assert sum(one.answer_tokens for one in seen) == sum(one.answer_tokens for one in requests)
    missing = sum(one.prompt_tokens - one.found_tokens for one in seen)
    computed = sum(worker.computed_tokens for worker in figures.workers)
    preempted = sum(worker.preempted for worker in figures.workers)
    assert computed == missing if not preempted else computed > missing
    assert all(0 < one.ttft_s <= one.ended_s - one.at_s for one in seen)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_load_gives_the_same_figures(policy: str) -> None:
    settings = variant(config({"both": 1}), policy, Split.parse("1:3"))
    load = Load(some_traffic(2), BLOCK, SLO, seed=7)
    assert simulate(settings, KV_BYTES, load) == simulate(settings, KV_BYTES, load)


def test_how_far_it_has_come_is_told() -> None:
    told: list[int] = []
    simulate(config({"both": 2}), KV_BYTES, Load(some_traffic(3, 150), BLOCK, SLO), told.append)
    assert told == [64, 128, 150]


@pytest.mark.parametrize("split", ["3", "1:2"])
def test_no_request_leaves_a_circle_of_objects_behind(split: str) -> None:
    settings = variant(config({"both": 1}), "kv", Split.parse(split))
    found = []
    for count in (40, 240):
        load = Load(some_traffic(4, count), BLOCK, SLO)
        gc.collect()
        assert gc.isenabled()
        simulate(settings, KV_BYTES, load)
        found.append(gc.collect())
    assert found[1] - found[0] < 1.5 * 200  # one for each is what was seen of it, which the fleet keeps


# ---- against the engine that serves ----


async def served(engine: SimEngine, requests: list[Request]) -> list[tuple[float, float, int]]:
    """Of each request, when its first token came and its last, after itself, and what was found of its prompt."""
    loop = asyncio.get_running_loop()
    seen: dict[int, tuple[float, float, int]] = {}

    async def one(number: int, wanted: Request) -> None:
        await asyncio.sleep(wanted.at_s)
        arrived, times, found = loop.time(), list[float](), 0
        tokens = [10 + number for number in wanted.hash_ids for _ in range(BLOCK)][: wanted.prompt_tokens]
        job = Job(RequestId(str(number)), tokens, Sampling(max_tokens=wanted.answer_tokens, temperature=0.0))
        async for output in engine.generate(job):
            times.append(loop.time() - arrived)
            found += output.cached_tokens or 0
        seen[number] = (times[0], times[-1], found)

    async with asyncio.TaskGroup() as group:
        for number, wanted in enumerate(requests):
            group.create_task(one(number, wanted))
    return [seen[number] for number in range(len(requests))]


@pytest.mark.parametrize("kv_tiers", [{}, {"host": {"size": 30 * stride_bytes(BLOCK * KV_BYTES)}}])
def test_a_worker_takes_as_long_as_the_simulated_engine_does(tmp_path: Path, kv_tiers: Mapping[str, object]) -> None:
    paces = {**PACES, "prefill_step_ms": 3.0, "prefill_context_ms": 400.0, "decode_ms_per_sequence": 1.0}
    paces |= {"decode_context_ms": 20.0, "max_num_batched_tokens": 24, "kv_blocks": 40, "block_size": BLOCK}
    paces |= {"steps_at_once": STEPS_AT_ONCE}
    chance = random.Random(5)
    requests = [
        request(0.2 * number + 0.01 * chance.random(), [0, *range(8 * kind, 8 * kind + 4), 99 + number], length)
        for number, (kind, length) in enumerate((chance.randrange(1, 9), chance.randrange(1, 25)) for _ in range(40))
    ]  # no two alike, which would have the same answer, and then share its blocks too

    async def main() -> list[tuple[float, float, int]]:
        spec = sim_spec(write_model(tmp_path), "both-0", Role.BOTH, paces, kv_tiers)
        engine = SimEngine(spec, Role.BOTH, Incarnation("one"), CollectorRegistry())
        await engine.start()
        try:
            return await served(engine, requests)
        finally:
            await engine.close()

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        expected = runner.run(main())
    seen = answers(config({"both": 1}, paces, kv_tiers=kv_tiers), requests)
    assert sum(found for *_, found in expected) > 0
    assert [one.found_tokens for one in seen] == [found for *_, found in expected]
    assert [one.ttft_s for one in seen] == pytest.approx([first for first, *_ in expected], abs=1e-6)
    assert [one.ended_s - one.at_s for one in seen] == pytest.approx([last for _, last, _ in expected], abs=1e-6)
