"""What a worker tells of its speed."""

from __future__ import annotations

import pytest

from kvbm.events import Tier
from kvbm.policy import OnboardCost, PullCost
from workers.rates import Answers, Queue, Speeds, Steps


def test_steps_of_several_sizes_tell_what_one_more_sequence_takes() -> None:
    steps = Steps()
    for _ in range(50):
        for batch in (1, 8, 32):
            steps.took(batch, 0.006 + batch * 0.0001)
    assert steps.fit == pytest.approx((0.006, 0.0001), rel=0.01)


def test_steps_of_one_size_say_nothing_of_how_the_size_matters() -> None:
    steps = Steps()
    for _ in range(10):
        steps.took(8, 0.01)
    assert steps.fit == pytest.approx((0.01, 0.0))


def test_larger_batches_that_happened_to_be_faster_are_noise() -> None:
    steps = Steps()
    for _ in range(20):
        steps.took(1, 0.02)
        steps.took(10, 0.01)
    fit = steps.fit
    assert fit is not None
    assert fit[1] == 0.0


def test_before_anything_was_measured_nothing_is_told() -> None:
    rates = Speeds(PullCost(), block_size=16, block_bytes=1600).rates()
    assert (rates.prefill, rates.step, rates.pull, rates.onboard, rates.answer_tokens) == (None, None, None, {}, None)


def test_rates_are_milliseconds_a_token() -> None:
    cost, onboarding, answers = PullCost(), OnboardCost(), Answers()
    speeds = Speeds(cost, 16, 1600, onboarding, answers=answers)
    for tokens in (100, 200, 400):
        cost.computed(tokens, 0.01 + tokens * 0.001)
        onboarding.onboarded(tokens * 100, tokens * 0.0001)
        onboarding.read(Tier.DISK, tokens * 100, tokens * 0.0002)
        answers.ended(50)
    cost.pulled(160_000, 0, 0.51, 0.4)  # the last 0.01 computing
    rates = speeds.rates()
    assert rates.prefill == pytest.approx((10.0, 1.0), rel=0.01)
    assert rates.onboard[Tier.HOST] == pytest.approx((0.0, 0.1), abs=1e-6)
    assert rates.onboard[Tier.DISK] == pytest.approx((0.0, 0.3), abs=1e-6)
    assert rates.pull == pytest.approx((100.0, 0.25), rel=0.01)
    assert rates.answer_tokens == pytest.approx(50)


def test_a_prompt_is_queued_until_it_is_done_and_ends_once() -> None:
    queue = Queue()
    queue.add("a", 100)
    queue.add("b", 50)
    assert queue.tokens == 150
    for _ in range(2):
        queue.done("a")
    assert queue.tokens == 50
