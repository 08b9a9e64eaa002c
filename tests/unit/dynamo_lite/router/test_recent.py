"""What was placed on a worker that has not told of its blocks."""

from __future__ import annotations

from dynamo_lite.router.recent import LASTS_S, REMEMBERED, Recent


def test_a_prefix_that_was_placed_is_found_until_its_time_is_up() -> None:
    recent = Recent()
    recent.note([1, 2, 3], now=10.0)
    assert recent.match([1, 2, 9], now=11.0) == 2
    assert recent.match([9, 1, 2], now=11.0) == 0
    recent.note([1], now=60.0)
    assert recent.match([1, 2, 3], now=10.0 + LASTS_S + 1) == 1
    recent.clear()
    assert recent.match([1], now=61.0) == 0


def test_the_oldest_blocks_are_forgotten_first() -> None:
    recent = Recent()
    recent.note([1, 2], now=1.0)
    recent.note(range(10, 10 + REMEMBERED - 1), now=2.0)
    assert len(recent) == REMEMBERED
    assert recent.match([1, 2], now=3.0) == 0
    assert recent.match([2], now=3.0) == 1
