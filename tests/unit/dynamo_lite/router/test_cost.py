"""Predicted milliseconds: what makes a worker dearer, and what never may."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_lite.router.cost import (
    HERE,
    INTERRUPTED,
    PULL,
    RELUCTANCE,
    WORK,
    Pace,
    Policy,
    Prefill,
    Prompt,
    Usual,
    Worker,
    cheapest,
    predict,
    prefill,
    softmax,
)
from kvbm.events import Tier

ONBOARD = {Tier.HOST: (1.0, 0.005), Tier.DISK: (2.0, 0.02), Tier.OBJECT: (30.0, 0.1)}
PACE = Pace((5.0, 0.1), (10.0, 0.05), (3.0, 0.005), None, ONBOARD, 100.0)
USUAL = Usual(shortest=0.0, token_ms=0.1)
IDLE = Worker("decode-0", PACE, max_sequences=64, capacity=100_000)

amounts = st.integers(1, 2000)
lines = st.tuples(st.floats(0, 50), st.floats(0.001, 5))
paces = st.builds(
    Pace,
    prefill=lines, step=lines, transfer=lines, pull=st.none() | lines,
    onboard=st.fixed_dictionaries(dict.fromkeys(ONBOARD, lines)), answer_tokens=st.floats(1, 1000),
)  # fmt: skip
workers = st.builds(
    Worker,
    name=st.just("decode-0"), pace=paces, queued_tokens=st.floats(0, 1e6), sequences=st.floats(0, 300),
    max_sequences=st.integers(1, 256), used=st.floats(0, 1e6), capacity=st.floats(100, 1e6),
)  # fmt: skip
prompts = st.builds(lambda blocks, held: Prompt(16 * blocks, 16, 16 * min(held, blocks - 1)), amounts, amounts)
remotes = st.none() | st.builds(
    Prefill, st.just("prefill-0"),
    queue=st.floats(0, 1e5), prefill=st.floats(0, 1e5), onboard=st.floats(0, 1e3), work=st.floats(0, 1e5),
    late=st.floats(0, 1e5),
)  # fmt: skip


def cost(worker: Worker, prompt: Prompt, remote: Prefill | None = None, pulled: int = 0) -> float:
    return predict(worker, prompt, USUAL, remote, pulled).total


def test_the_parts_of_a_prompt_computed_on_a_worker_that_is_busy() -> None:
    worker = replace(IDLE, queued_tokens=200, sequences=4)
    found = predict(worker, Prompt(320, 16, 192, ((Tier.HOST, 32),)), USUAL)
    computing = 5 + 128 * 0.1
    assert found.way == HERE
    assert found.parts._asdict() == pytest.approx(
        {
            "queue": 5 + 200 * 0.1,
            "prefill": computing,
            "transfer": 0,
            "onboard": 1 + 32 * 0.005,
            "decode": 100 * 0.05 * 4 * (1 + INTERRUPTED) + INTERRUPTED * 4 * computing,
            "work": WORK * 0.1 * 128,
            "late": 0,
        }
    )
    assert found.total == pytest.approx(sum(found.parts))


@given(workers, prompts, remotes, amounts)
def test_a_worker_is_never_cheaper_for_being_busier(
    worker: Worker, prompt: Prompt, remote: Prefill | None, more: int
) -> None:
    before = cost(worker, prompt)
    busier = [
        replace(worker, queued_tokens=worker.queued_tokens + more),
        replace(worker, sequences=worker.sequences + more),
        replace(worker, used=worker.used + more),
    ]
    assert all(cost(each, prompt) >= before * (1 - 1e-9) for each in busier)
    if remote is not None:
        worse = remote._replace(queue=remote.queue + more)
        always = Policy(reluctance=1.0)  # with less a dearer prefill worker may hand the prompt to a cheaper place
        assert predict(worker, prompt, USUAL, worse, 0, always).total >= (
            predict(worker, prompt, USUAL, remote, 0, always).total * (1 - 1e-9)
        )


@given(workers, prompts, amounts)
def test_a_worker_is_never_dearer_for_holding_more_on_its_device(worker: Worker, prompt: Prompt, more: int) -> None:
    held = min(prompt.tokens - 1, prompt.held + more)
    assert cost(worker, replace(prompt, held=held)) <= cost(worker, prompt) * (1 + 1e-9)


@given(workers, prompts, remotes, st.integers(0, 32_000))
def test_a_way_more_never_makes_a_cost_higher_than_reluctance_explains_and_no_part_is_negative(
    worker: Worker, prompt: Prompt, remote: Prefill | None, pulled: int
) -> None:
    found = predict(worker, prompt, USUAL, remote, min(pulled, prompt.tokens - 1))
    assert min(found.parts) >= 0
    assert found.total == pytest.approx(sum(found.parts))
    assert found.total <= predict(worker, prompt, USUAL).total / RELUCTANCE * (1 + 1e-9)


def test_a_nearer_tier_is_preferred_to_a_farther_one_and_both_to_computing() -> None:
    places = [(), ((Tier.HOST, 192),), ((Tier.DISK, 192),)]
    costs = [cost(IDLE, Prompt(320, 16, 192, place)) for place in places]
    assert costs == sorted(costs)
    assert costs[-1] < cost(IDLE, Prompt(320, 16))


def test_what_everybody_holds_is_no_reason_to_go_anywhere() -> None:
    alike = [Prompt(320, 16, held) for held in (0, 64)]
    idle, busy = IDLE, replace(IDLE, queued_tokens=100)
    differences = [cost(busy, prompt) - cost(idle, prompt) for prompt in alike]
    assert differences[0] == pytest.approx(differences[1])


def test_a_prefix_is_waited_for_longer_than_computing_it_takes_but_not_beyond_all_patience() -> None:
    holder, stranger = Prompt(3200, 16, 3184), Prompt(3200, 16)  # 320 ms of computing
    assert cost(replace(IDLE, queued_tokens=20_000), holder) < cost(IDLE, stranger), "2 s"
    assert cost(replace(IDLE, queued_tokens=60_000), holder) > cost(IDLE, stranger), "6 s"
    hasty = Policy(patience_ms=0.0)

    def hastily(worker: Worker, prompt: Prompt) -> float:
        return predict(worker, prompt, USUAL, None, 0, hasty).total

    assert hastily(replace(IDLE, queued_tokens=2000), holder) < hastily(IDLE, stranger)
    assert hastily(replace(IDLE, queued_tokens=4000), holder) > hastily(IDLE, stranger), "waiting takes longer"


@given(workers, prompts, st.floats(0, 1e6), st.floats(0, 1e5))
def test_who_holds_nothing_and_is_idle_is_preferred_once_a_holders_queue_is_beyond_patience_and_computing(
    worker: Worker, prompt: Prompt, tokens: float, patience: float
) -> None:
    stranger = replace(worker, queued_tokens=0.0, sequences=0.0, used=0.0, capacity=1e9)
    holder = replace(stranger, queued_tokens=tokens)
    usual, policy = Usual(0.0, worker.pace.prefill[1]), Policy(patience_ms=patience)
    waits = predict(holder, prompt, usual, None, 0, policy)
    computes = predict(stranger, Prompt(prompt.tokens, 16), usual, None, 0, policy)
    if waits.parts.queue > patience + computes.parts.prefill:
        assert computes.total < waits.total * (1 + 1e-9)


def test_a_full_batch_and_full_kv_are_waited_for() -> None:
    prompt = Prompt(320, 16)
    room, full = replace(IDLE, sequences=63), replace(IDLE, sequences=64)
    assert predict(full, prompt, USUAL).parts.queue > predict(room, prompt, USUAL).parts.queue == 0
    assert predict(replace(IDLE, used=99_900), prompt, USUAL).parts.queue > 0


def test_work_weighs_the_same_on_a_slow_worker_so_that_it_is_used_before_a_fast_one_is_overrun() -> None:
    slow, prompt = replace(IDLE, pace=replace(PACE, prefill=(5.0, 0.2))), Prompt(3200, 16)
    assert cost(slow, prompt) > cost(IDLE, prompt)
    assert cost(slow, prompt) < cost(replace(IDLE, queued_tokens=4000), prompt)


def test_a_prompt_is_computed_by_a_prefill_worker_unless_decoding_is_clearly_the_better_place_for_it() -> None:
    prompt = Prompt(1600, 16)
    ahead = replace(IDLE, name="prefill-0")
    remote = prefill(ahead, prompt, USUAL)
    assert predict(IDLE, prompt, USUAL, remote).way == "prefill-0", "as good as here, and nobody is interrupted"
    assert predict(replace(IDLE, sequences=20), prompt, USUAL, remote).way == "prefill-0"
    behind = prefill(replace(ahead, queued_tokens=3200), prompt, USUAL)
    assert predict(IDLE, prompt, USUAL, behind).way == HERE
    assert predict(IDLE, prompt, USUAL, behind, 0, Policy(reluctance=0.0)).way == "prefill-0"
    assert predict(replace(IDLE, sequences=80), prompt, USUAL, behind).way == "prefill-0", "it would interrupt eighty"
    assert predict(IDLE, Prompt(1600, 16, 1584), USUAL, remote).way == HERE, "it lacks the prefix"


def test_what_another_worker_holds_is_pulled_where_that_is_known_to_be_faster() -> None:
    prompt = Prompt(1600, 16)
    assert predict(IDLE, prompt, USUAL, None, 1584).way == HERE, "of how long it takes nothing is known"
    fast = replace(IDLE, pace=replace(PACE, pull=(4.0, 0.001)))
    slow = replace(IDLE, pace=replace(PACE, pull=(4.0, 5.0)))
    found = predict(fast, prompt, USUAL, None, 1584)
    assert found.way == PULL
    assert found.parts.transfer == pytest.approx(4 + 1584 * 0.001)
    assert found.parts.work == pytest.approx(WORK * 0.1 * 16)
    assert predict(slow, prompt, USUAL, None, 1584).way == HERE


def test_ties_take_turns() -> None:
    assert Counter(cheapest([1.0, 0.5, 0.5, 2.0], turn) for turn in range(10)) == {1: 5, 2: 5}


def test_temperature_spreads_by_how_much_dearer_a_worker_is_and_a_seed_repeats_it() -> None:
    costs = [10.0, 11.0, 30.0]
    drawn = [[softmax(costs, 0.1, rng) for _ in range(2000)] for rng in (random.Random(1), random.Random(1))]
    assert drawn[0] == drawn[1]
    counts = Counter(drawn[0])
    assert counts[0] > counts[1] > 0 == counts[2]
    assert Counter(softmax([0.0, 0.0], 0.1, random.Random(seed)) for seed in range(20)).keys() == {0, 1}
    assert softmax([0.0, 1e300], 0.01, random.Random(1)) == 0, "no overflow"
