"""What is told of a simulation."""

from __future__ import annotations

import random

import pytest

from workers.simulate.figures import Answer, Gaps, Slo, WorkerFigures, figures, percentile, spread


def answer(ttft_s: float, gap_s: float = 0.01, found: int = 0, at_s: float = 0.0) -> Answer:
    return Answer(at_s, 10, found, 5, ttft_s, gap_s, at_s + ttft_s + 4 * gap_s)


def worker(name: str, placed: int, computed: int) -> WorkerFigures:
    return WorkerFigures(name, 1, placed, computed, 5, 2.0, 0, ())


def test_percentiles_lie_between_values_in_a_straight_line() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([1.0, 2.0], 99) == pytest.approx(1.99)
    assert (percentile([7.0], 1), percentile([], 50)) == (7.0, 0.0)


def test_the_percentiles_of_gaps_are_right_to_an_eighth_of_a_percent() -> None:
    chance, gaps, each = random.Random(1), Gaps(), list[float]()
    for _ in range(2000):
        seconds, count = chance.lognormvariate(-5, 1), chance.randrange(1, 5)
        gaps.add(seconds, count)
        each += [seconds] * count
    assert gaps.count == len(each)
    for percent in (1, 50, 99, 100):
        assert gaps.percentile(percent) == pytest.approx(percentile(each, percent), rel=0.003)


def test_gaps_of_no_length_and_no_gaps_at_all_are_known() -> None:
    gaps = Gaps()
    assert gaps.percentile(50) == 0
    gaps.add(0.0, 3)
    gaps.add(0.5, 1)
    assert gaps.percentile(50) == 0
    assert gaps.percentile(100) == pytest.approx(0.5, rel=0.002)


def test_the_spread_is_the_largest_over_the_mean() -> None:
    assert spread([1, 2, 3]) == 1.5
    assert spread([0, 0]) == 1.0


def test_goodput_counts_requests_within_both_objectives_by_second_and_gpu() -> None:
    seen = [answer(0.1), answer(0.3), answer(0.1, gap_s=0.3), answer(0.1, at_s=9.86)]
    found = figures(seen, 0, Gaps(), [worker("both-0", 40, 40)], Slo(0.2, 0.05), block=4, gpus=2)
    assert found.met == 2
    assert found.duration_s == pytest.approx(10.0)
    assert found.goodput == pytest.approx(2 / 10 / 2)


def test_hits_are_blocks_of_all_those_cut_off_included() -> None:
    found = figures(
        [answer(0.1, found=8), answer(0.1)], 0, Gaps(), [worker("both-0", 20, 12)], Slo(1, 1), block=4, gpus=1
    )
    assert found.hit_rate == pytest.approx(2 / 6)


def test_prefill_workers_count_for_what_is_computed_and_the_others_for_what_is_sent() -> None:
    workers = [
        worker("prefill-0", 100, 90),
        worker("prefill-1", 20, 10),
        worker("decode-0", 70, 1),
        worker("decode-1", 50, 0),
    ]
    found = figures([answer(0.1)], 0, Gaps(), workers, Slo(1, 1), block=4, gpus=4)
    assert found.computed_spread == pytest.approx(1.8)
    assert found.sent_spread == pytest.approx(70 / 60)


def test_a_load_of_which_nothing_was_answered_has_figures() -> None:
    found = figures([], 3, Gaps(), [worker("both-0", 0, 0)], Slo(1, 1), block=4, gpus=1)
    assert (found.requests, found.refused, found.hit_rate, found.goodput) == (0, 3, 0, 0)
