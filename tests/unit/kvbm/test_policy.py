"""Reading or pulling a prefix is chosen unless another way is known to be faster."""

from __future__ import annotations

import pytest

from kvbm.policy import OnboardCost, PullCost


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


MB = 10**6


def test_before_anything_is_known_a_prefix_is_pulled() -> None:
    cost = PullCost()
    assert cost.forecast(MB, 1000, 10, remote=True).pull
    cost.computed(1000, 1.0)
    assert cost.forecast(MB, 1000, 10, remote=False).pull, "it is not known how long pulling takes"


def test_a_pull_is_predicted_as_its_latency_its_bytes_and_the_rest_that_is_computed() -> None:
    cost = PullCost()
    cost.pulled(10 * MB, 0, 0.3, 0.2)
    cost.computed(1000, 1.0)
    cost.prefilled(1000, 2.0)
    forecast = cost.forecast(5 * MB, 500, 100, remote=True)
    assert forecast.pull_s == pytest.approx(0.1 + 0.1 + 0.1)
    assert forecast.compute_s == pytest.approx(0.6)
    assert forecast.remote_s == pytest.approx(1.2)
    assert forecast.otherwise_s == forecast.compute_s
    assert forecast.pull
    assert cost.forecast(5 * MB, 500, 100, remote=False).remote_s is None


def test_a_short_lead_does_not_pay_for_the_latency_of_a_pull() -> None:
    cost = PullCost()
    cost.pulled(10 * MB, 0, 0.3, 0.2)
    cost.computed(1000, 1.0)
    assert not cost.forecast(MB // 2, 50, 1000, remote=False).pull


def test_an_unmeasured_pull_is_not_tried_where_the_rest_alone_takes_longer_than_a_prefill_worker() -> None:
    cost = PullCost()
    cost.computed(1000, 10.0)
    cost.prefilled(1000, 1.0)
    assert not cost.forecast(MB, 100, 900, remote=True).pull
    assert cost.forecast(MB, 950, 50, remote=True).pull


def test_until_computing_here_was_measured_the_rest_is_taken_to_be_as_fast_as_at_a_prefill_worker() -> None:
    cost = PullCost()
    cost.prefilled(1000, 1.0)
    cost.pulled(MB, 0, 0.2, 0.1)
    forecast = cost.forecast(MB, 500, 500, remote=True)
    assert forecast.compute_s is None
    assert forecast.rest_s == pytest.approx(0.5)
    assert forecast.pull_s == pytest.approx(0.7)
    assert forecast.remote_s == pytest.approx(1.0)


def test_a_pull_that_was_waited_for_in_vain_counts_against_the_next_one() -> None:
    cost = PullCost()
    cost.computed(1000, 0.1)
    cost.pulled(MB, 0, 0.01, 0.005)
    assert cost.forecast(MB, 1000, 0, remote=False).pull
    cost.pull_failed(2.0)
    refused = [cost.forecast(MB, 1000, 0, remote=False).pull for _ in range(40)]
    assert not any(refused[:32])
    assert refused[32], "it is tried again after a while"


def test_short_prompts_say_nothing_of_the_speed_of_computing_anywhere() -> None:
    cost = PullCost()
    cost.computed(10, 5.0)
    cost.prefilled(10, 5.0)
    assert cost.forecast(MB, 100, 0, remote=True).otherwise_s is None


def test_the_rest_that_followed_a_pull_is_not_counted_as_its_latency() -> None:
    cost = PullCost()
    cost.computed(1000, 1.0)
    cost.pulled(MB, 500, 0.8, 0.2)
    assert cost.forecast(MB, 500, 0, remote=False).pull_s == pytest.approx(0.1 + 0.2)
    assert cost.forecast(MB, 500, 500, remote=False).pull_s == pytest.approx(0.8)


def test_a_pull_followed_by_a_long_rest_says_nothing_before_it_is_known_how_long_computing_takes() -> None:
    cost = PullCost()
    cost.pulled(MB, 500, 0.8, 0.2)
    assert cost.forecast(MB, 500, 0, remote=False).pull_s is None
    cost.pulled(MB, 10, 0.3, 0.2)
    assert cost.forecast(MB, 500, 0, remote=False).pull_s == pytest.approx(0.3)
