"""Reading a prefix is chosen unless computing it is known to be faster."""

from __future__ import annotations

import pytest

from kvbm.policy import OnboardCost


def test_before_anything_is_known_a_prefix_is_read() -> None:
    cost = OnboardCost()
    assert cost.forecast(1000, 100).onboard
    cost.computed(1000, 1.0)
    assert cost.forecast(1000, 100).onboard, "it is not known how long reading takes"


def test_the_faster_way_is_chosen_and_both_are_predicted() -> None:
    cost = OnboardCost()
    cost.onboarded(10**6, 0.1)
    cost.computed(1000, 1.0)
    near = cost.forecast(10**6, 200)
    assert near.onboard_s == pytest.approx(0.1)
    assert near.compute_s == pytest.approx(0.2)
    assert near.onboard
    assert not cost.forecast(10**6, 50).onboard


def test_large_prefixes_count_for_more_than_small_ones_whose_time_is_mostly_overhead() -> None:
    cost = OnboardCost()
    cost.onboarded(10**8, 1.0)
    cost.onboarded(10**3, 0.01)
    assert cost.forecast(10**8, 1).onboard_s == pytest.approx(1.0, rel=0.05)


def test_short_prompts_say_nothing_of_the_speed_of_computing() -> None:
    cost = OnboardCost()
    cost.computed(10, 5.0)
    assert cost.forecast(1, 1).compute_s is None


def test_reading_that_was_slow_once_is_tried_again_after_a_while() -> None:
    cost = OnboardCost()
    cost.onboarded(10**6, 10.0)
    cost.computed(1000, 0.1)
    refused = [cost.forecast(10**6, 100).onboard for _ in range(40)]
    assert not any(refused[:32])
    assert refused[32]
