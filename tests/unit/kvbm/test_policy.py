"""Reading a prefix is chosen unless computing it is known to be faster."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbm.events import Tier
from kvbm.policy import Forecast, Line, OnboardCost, Part, PullCost

BYTES, TOKENS = 10**6, 100  # of a block


def forecast(cost: OnboardCost, *parts: Part) -> Forecast:
    return cost.forecast(parts, BYTES, TOKENS)


def host(blocks: int) -> Part:
    return Part(Tier.HOST, blocks)


def disk(blocks: int, queued: int = 0) -> Part:
    return Part(Tier.DISK, blocks, queued)


def measured(host_s: float, disk_s: float, compute_s: float) -> OnboardCost:
    """Seconds of a block each."""
    cost = OnboardCost()
    cost.onboarded(10 * BYTES, 10 * host_s)
    cost.read(Tier.DISK, 10 * BYTES, 10 * disk_s)
    cost.computed(10 * TOKENS, 10 * compute_s)
    return cost


def test_before_anything_is_known_a_prefix_is_read() -> None:
    cost = OnboardCost()
    assert forecast(cost, host(1)).blocks == 1
    cost.computed(1000, 1.0)
    assert forecast(cost, host(1)).blocks == 1, "it is not known how long reading takes"
    cost.onboarded(BYTES, 0.001)
    assert forecast(cost, host(1), disk(2)).blocks == 3, "nor how long the disk takes"


def test_the_faster_way_is_chosen_and_both_are_predicted() -> None:
    near = forecast(measured(0.1, 9.0, 0.2), host(2))
    assert near.blocks == 2
    assert near.onboard_s == pytest.approx(0.2)
    assert near.compute_s == pytest.approx(0.4)
    assert not forecast(measured(0.3, 9.0, 0.2), host(2)).onboard


def test_of_a_prefix_over_several_tiers_only_the_part_that_pays_is_read() -> None:
    cost = measured(0.1, 0.5, 0.2)
    partly = forecast(cost, host(4), disk(4))
    assert partly.blocks == 4
    assert partly.onboard_s == pytest.approx(0.4 + 0.8)
    assert forecast(measured(0.01, 0.1, 0.2), host(4), disk(4)).blocks == 8


def test_a_tier_that_is_busy_is_predicted_to_take_longer() -> None:
    cost = measured(0.01, 0.1, 0.2)
    assert forecast(cost, disk(4)).onboard_s == pytest.approx(0.44)
    assert not forecast(cost, disk(4, queued=8 * BYTES)).onboard


def test_a_long_queue_is_no_reason_to_read_as_if_nothing_was_known() -> None:
    cost = measured(0.01, 0.1, 0.2)
    assert not forecast(cost, disk(4, queued=1000 * BYTES)).onboard
    assert forecast(cost, host(4), disk(4, queued=1000 * BYTES)).blocks == 4


def test_of_a_tier_of_which_nothing_is_known_a_part_is_read_and_more_each_time() -> None:
    cost = OnboardCost()
    cost.computed(1000 * TOKENS, 1.0)
    cost.onboarded(1000 * BYTES, 0.001)
    assert forecast(cost, host(5), disk(500)).blocks == 5 + 64
    cost.read(Tier.DISK, 64 * BYTES, 0.001)
    assert forecast(cost, host(5), disk(500)).blocks == 5 + 256
    cost.read(Tier.DISK, 256 * BYTES, 0.002)
    assert forecast(cost, disk(500)).blocks == 500


def test_a_tier_that_is_slow_already_for_less_than_it_would_have_to_read_is_not_tried_with_more() -> None:
    cost = OnboardCost()
    cost.computed(100 * TOKENS, 1.0)
    cost.onboarded(100 * BYTES, 0.001)
    cost.read(Tier.OBJECT, BYTES, 1.0)
    assert not forecast(cost, Part(Tier.OBJECT, 100)).onboard
    assert forecast(cost, host(50), Part(Tier.OBJECT, 50)).blocks == 50


def test_tiers_are_read_side_by_side() -> None:
    cost = measured(0.01, 0.1, 1.0)
    cost.read(Tier.OBJECT, 10 * BYTES, 2.0)
    both = forecast(cost, disk(4), Part(Tier.OBJECT, 4))
    assert both.onboard_s == pytest.approx(0.08 + 0.8)


def test_short_prompts_say_nothing_of_the_speed_of_computing() -> None:
    cost = OnboardCost()
    cost.computed(10, 5.0)
    assert forecast(cost, host(1)).compute_s is None


def test_reading_that_was_slow_is_tried_again_after_a_while_with_a_few_blocks() -> None:
    cost = measured(10.0, 10.0, 0.1)
    chosen = [forecast(cost, host(8)).blocks for _ in range(200)]
    assert [number for number, blocks in enumerate(chosen) if blocks] == [32, 97], "ever more rarely"
    assert set(chosen) == {0, 4}


def test_a_tier_that_is_fast_again_is_read_again() -> None:
    cost = measured(10.0, 10.0, 0.1)
    assert not forecast(cost, host(10)).onboard
    cost.onboarded(4 * BYTES, 0.004)
    assert forecast(cost, host(10)).blocks == 10


def test_a_latency_is_told_from_a_rate_once_both_small_and_large_amounts_were_measured() -> None:
    line = Line()
    for amount in (1, 10, 100, 5, 50):
        line.add(amount, 2.0 + 0.1 * amount)
    assert line.seconds_for(400) == pytest.approx(42.0)
    assert line.seconds_for(1) == pytest.approx(2.1)


def test_what_a_small_prefix_took_says_nothing_of_a_large_one() -> None:
    cost = OnboardCost()
    cost.computed(100 * TOKENS, 1.0)
    cost.onboarded(BYTES, 0.1)
    assert not forecast(cost, host(2)).onboard
    assert forecast(cost, host(50)).blocks == 50, "most of that tenth of a second may be latency"
    cost.onboarded(50 * BYTES, 0.15)
    assert forecast(cost, host(50)).onboard_s == pytest.approx(0.15, rel=0.01)


def test_amounts_of_one_size_are_taken_in_proportion() -> None:
    line = Line()
    for _ in range(5):
        line.add(100, 2.0)
    assert line.seconds_for(50) == pytest.approx(1.0)


@given(st.lists(st.tuples(st.floats(1, 1e9), st.floats(0, 100)), min_size=1, max_size=20), st.floats(1, 1e9))
def test_no_measurements_make_a_prediction_below_nothing(measured: list[tuple[float, float]], amount: float) -> None:
    line = Line()
    for one in measured:
        line.add(*one)
    seconds = line.seconds_for(amount)
    assert seconds is None or seconds >= 0


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
