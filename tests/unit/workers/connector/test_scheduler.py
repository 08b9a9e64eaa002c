"""What the scheduler's half hands over and asks for, in tokens, whatever the two workers' block sizes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_lite.plane.layout import KvLayout
from dynamo_lite.plane.wire import Incarnation, PushTarget
from tests.unit.workers.connector.prompt import IDLE, Engine
from workers.connector.protocol import ONBOARD, PREPARED, PULL, PushStep, Skipped
from workers.connector.scheduler import SchedulerSide

SIZES = st.sampled_from([1, 2, 3, 4, 16, 32, 64, 128])


def layout(block_size: int) -> KvLayout:
    return KvLayout(1, block_size, 1, 1, 4, 4, "float32", "NHKD", "NHKD")


def target(block_size: int, first_token: int, prompt_tokens: int) -> PushTarget:
    return PushTarget(7, Incarnation("d"), layout(block_size), first_token, prompt_tokens - first_token, ())


def tokens_of(step: PushStep) -> list[tuple[int, int]]:
    """Of its span: the block id and the place in it, token by token."""
    span = step.span
    places = range(span.skipped, span.skipped + span.tokens)
    return [(int(span.block_ids[place // span.block_size]), place % span.block_size) for place in places]


@given(st.data(), SIZES, SIZES, st.integers(1, 400))
def test_every_wanted_token_is_handed_over_once_and_in_whole_blocks_of_the_receiver(
    data: st.DataObject, own: int, theirs: int, prompt_tokens: int
) -> None:
    first_token = data.draw(st.integers(0, (prompt_tokens - 1) // theirs)) * theirs
    engine = Engine(own, prompt_tokens, target(theirs, first_token, prompt_tokens))
    cached = data.draw(st.integers(0, (prompt_tokens - 1) // own)) * own
    engine.computed, left = cached, prompt_tokens - cached
    engine.side.arrived(engine.request)
    steps: list[PushStep] = []
    while left:
        count = data.draw(st.integers(1, left))
        steps += engine.step(count)
        left -= count
        assert sum(step.span.tokens for step in steps) <= max(0, engine.computed - first_token), "not computed yet"
    handed_over = [token for step in steps for token in tokens_of(step)]
    wanted = [(engine.blocks[token // own], token % own) for token in range(first_token, prompt_tokens)]
    assert handed_over == wanted
    done = 0
    for step in steps:
        assert step.first * theirs == done, "a step begins where a block of the receiver's does"
        done += step.span.tokens
    assert all(step.span.tokens % theirs == 0 for step in steps[:-1])


def test_half_of_a_large_block_goes_as_soon_as_it_fills_a_small_one() -> None:
    engine = Engine(64, 100, target(32, 0, 100))
    engine.side.arrived(engine.request)
    assert [(step.first, step.span.skipped, step.span.tokens) for step in engine.step(40)] == [(0, 0, 32)]
    assert [(step.first, step.span.skipped, step.span.tokens) for step in engine.step(30)] == [(1, 32, 32)]
    (last,) = engine.step(30)
    assert (last.first, last.span.skipped, last.span.tokens) == (2, 0, 36)
    assert last.span.block_ids.tolist() == [101]


def test_the_token_beyond_what_is_pulled_is_not_handed_over() -> None:
    engine = Engine(64, 97, target(32, 32, 96))
    engine.side.arrived(engine.request)
    engine.computed = 64
    (step,) = engine.step(33)
    assert (step.first, step.span.skipped, step.span.tokens) == (0, 32, 64)
    assert engine.side.finished(engine.request)
    assert engine.side.plan(IDLE).cancelled_pushes == []


@pytest.mark.parametrize(("computed", "cancelled"), [(40, ["e"]), (100, [])])
def test_a_prompt_that_ends_before_all_of_it_was_handed_over_is_cancelled(computed: int, cancelled: list[str]) -> None:
    engine = Engine(16, 100, target(32, 0, 100))
    engine.side.arrived(engine.request)
    engine.step(computed)
    assert engine.side.finished(engine.request), "its blocks are still read"
    assert engine.side.plan(IDLE).cancelled_pushes == cancelled


def test_a_prompt_of_which_nothing_was_handed_over_frees_its_blocks_at_once() -> None:
    engine = Engine(16, 100, target(64, 0, 100))
    engine.side.arrived(engine.request)
    assert engine.step(48) == []
    assert not engine.side.finished(engine.request)


@pytest.mark.parametrize(("computed", "first", "tokens", "blocks"), [(0, 0, 100, 7), (32, 2, 68, 5), (96, 6, 4, 1)])
def test_a_receive_asks_for_the_tokens_after_those_that_are_here(
    computed: int, first: int, tokens: int, blocks: int
) -> None:
    engine = Engine(16, 100)
    external = engine.side.external_tokens(engine.request, computed)
    assert external == tokens
    engine.side.allocated(engine.request, cast(Any, SimpleNamespace(get_block_ids=lambda: (engine.blocks,))), external)
    (receive,) = engine.side.plan(IDLE).receives
    assert (receive.first_block, receive.tokens, len(receive.block_ids)) == (first, tokens, blocks)
    assert receive.block_ids == engine.blocks[first:]


def test_a_prompt_that_is_here_already_is_not_asked_for() -> None:
    engine = Engine(16, 17)
    engine.side = SchedulerSide(16, 8, engine.reports.append)
    assert engine.side.external_tokens(engine.request, 16) == 0
    engine.side.allocated(engine.request, cast(Any, None), 0)
    assert engine.reports == [Skipped("r", "prefix hit")]


def test_a_prompt_that_was_prepared_is_received_under_the_id_it_was_asked_for_under() -> None:
    engine = Engine(16, 100)
    engine.request.kv_transfer_params[PREPARED] = (512, 2)
    assert engine.side.external_tokens(engine.request, 32) == 68
    engine.side.allocated(engine.request, cast(Any, SimpleNamespace(get_block_ids=lambda: (engine.blocks,))), 68)
    (receive,) = engine.side.plan(IDLE).receives
    assert (receive.transfer_id, receive.first_block) == (512, 2)


@pytest.mark.parametrize("computed", [0, 16, 48])
def test_a_prompt_that_was_prepared_for_other_tokens_is_computed_here(computed: int) -> None:
    engine = Engine(16, 100)
    engine.request.kv_transfer_params[PREPARED] = (512, 2)
    assert engine.side.external_tokens(engine.request, computed) == 0
    engine.side.allocated(engine.request, cast(Any, None), 0)
    assert engine.reports == [Skipped("r", "prefix changed")]
    assert engine.side.plan(IDLE).receives == []


@pytest.mark.parametrize(("computed", "first", "tokens"), [(0, 0, 64), (32, 2, 32)])
def test_of_a_pulled_prompt_only_the_pulled_blocks_are_received_and_the_rest_is_computed(
    computed: int, first: int, tokens: int
) -> None:
    engine = Engine(16, 100)
    engine.request.kv_transfer_params[PULL] = 64
    external = engine.side.external_tokens(engine.request, computed)
    assert external == tokens
    engine.side.allocated(engine.request, cast(Any, SimpleNamespace(get_block_ids=lambda: (engine.blocks,))), external)
    (receive,) = engine.side.plan(IDLE).receives
    assert (receive.first_block, receive.tokens) == (first, tokens)
    assert receive.block_ids == engine.blocks[first:4]


def test_a_pull_covers_what_lies_beyond_the_own_tiers() -> None:
    engine = Engine(16, 100)
    engine.request.kv_transfer_params |= {PULL: 80, ONBOARD: (1, [7, 8])}
    assert engine.side.external_tokens(engine.request, 16) == 64
    engine.side.allocated(engine.request, cast(Any, SimpleNamespace(get_block_ids=lambda: (engine.blocks,))), 64)
    plan = engine.side.plan(IDLE)
    (onboard,), (receive,) = plan.onboards, plan.receives
    assert (onboard.block_ids, onboard.slots) == (engine.blocks[1:3], [7, 8])
    assert (receive.first_block, receive.tokens, receive.block_ids) == (3, 32, engine.blocks[3:5])


@pytest.mark.parametrize("computed", [64, 96])
def test_nothing_is_pulled_that_came_here_meanwhile(computed: int) -> None:
    engine = Engine(16, 100)
    engine.request.kv_transfer_params[PULL] = 64
    assert engine.side.external_tokens(engine.request, computed) == 0
    engine.side.allocated(engine.request, cast(Any, None), 0)
    assert engine.reports == [Skipped("r", "prefix hit")]
