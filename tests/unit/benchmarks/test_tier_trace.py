"""A trace on simulated workers: what it is turned into, and what is said of the runs."""

from __future__ import annotations

import math
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from benchmarks import tier_trace
from benchmarks.tier_plot import Panel, draw
from benchmarks.tier_trace import Run, pooled, replay, saved
from workers.simulate.trace import Request, attainable

RUN = Run("none", 1000, 0.2, 0.2, 2.0, 0.3, 1.0, 1.0, [], 0.0)


def conversations() -> list[Request]:
    """20 that share their first block, each of three turns, a minute apart."""
    turns = []
    for number in range(20):
        ids = [0, *range(100 * (number + 1), 100 * (number + 1) + 12)]
        for turn in range(3):
            length = 5 + 4 * turn
            turns.append(Request(number + 60.0 * turn, length * 512 - 100, 20, tuple(ids[:length])))
    return sorted(turns, key=lambda request: request.at_s)


def test_a_replay_is_the_same_every_time_and_tiers_make_up_for_a_small_device() -> None:
    requests = conversations()
    plain = [replay(requests, "none", blocks, 1.0) for blocks in (16, 16, 300)]
    tiered = replay(requests, "host 1,500", 16, 1.0)
    assert replace(plain[0], cpu_s=0) == replace(plain[1], cpu_s=0)
    assert plain[0].hit_rate < 0.5 * plain[2].hit_rate
    assert tiered.hit_rate == pytest.approx(plain[2].hit_rate, rel=0.1)
    assert plain[2].ttft_mean_s <= tiered.ttft_mean_s < plain[0].ttft_mean_s
    assert sum(int(str(worker["requests"])) for worker in tiered.workers) == 60


def test_one_cache_for_all_forgets_what_was_not_used_for_longest() -> None:
    requests = [Request(0, 1024, 1, ids) for ids in ((1, 2), (3, 4), (1, 2), (3, 4))]
    assert pooled(requests, None) == pooled(requests, 4) == 0.5
    assert pooled(requests, 3) == 0.25  # of a prompt the tail goes before the head
    assert attainable(requests, 512) == 0.25  # the last block ends the prompt, so it is computed


def test_the_device_memory_that_is_as_good_is_found_between_the_sizes_that_were_tried() -> None:
    curve = [
        replace(RUN, tiers="t", device_blocks=500, hit_rate=0.1),
        replace(RUN, tiers="t", device_blocks=700, hit_rate=0.3),
    ]
    found = saved([RUN, *curve], "t", RUN)
    assert (found.with_blocks, round(found.percent, 6), found.at_least) == (600, 40, False)


def test_more_device_memory_than_without_tiers_is_no_saving() -> None:
    curve = [
        replace(RUN, tiers="t", device_blocks=500, hit_rate=0.1),
        replace(RUN, tiers="t", device_blocks=2000, hit_rate=0.21),
    ]
    found = saved([RUN, *curve], "t", RUN)
    assert (found.with_blocks, found.percent) == (None, 0.0)


@pytest.mark.parametrize("slower", ["ttft_p50_s", "ttft_p99_s", "ttft_mean_s"])
def test_a_size_at_which_requests_wait_longer_is_not_as_good(slower: str) -> None:
    run = replace(RUN, tiers="t", device_blocks=500, **{slower: 1.02 * getattr(RUN, slower)})
    assert saved([RUN, run], "t", RUN).with_blocks is None
    good = saved([RUN, replace(RUN, tiers="t", device_blocks=500)], "t", RUN)
    assert (good.with_blocks, good.at_least) == (500, True)


def test_every_size_of_the_sweep_holds_the_longest_prompt() -> None:
    for tiers, blocks in tier_trace.SWEEP:
        assert tier_trace.config_of(tiers, blocks).sim.kv_blocks >= math.ceil(128_195 / 512)


def test_the_plot_is_a_picture_with_a_line_for_each_choice() -> None:
    panel = Panel("hit rate, %", {"none": [(300, 5.0), (6000, 30.0)], "host < 6": [(300, 27.0), (6000, 27.5)]})
    picture = ElementTree.fromstring(draw([panel, panel], "blocks"))
    kinds = [element.tag.rpartition("}")[2] for element in picture.iter()]
    assert kinds.count("polyline") == 4
    assert kinds.count("circle") == 8
    assert "host < 6" in {element.text for element in picture.iter()}
