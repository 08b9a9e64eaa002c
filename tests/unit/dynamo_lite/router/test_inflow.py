"""New KV goes where less was put lately, within bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_lite.router.inflow import Inflow, Inflows


def test_what_was_stored_lately_counts_by_how_much_of_the_device_it_fills_and_fades() -> None:
    large, small = Inflow(10_000), Inflow(1000)
    inflows = Inflows()
    inflows.store(large, 50, [large, small])
    inflows.store(small, 50, [large, small])
    assert inflows.crowding([large, small]) == pytest.approx([0.977, 1.023], abs=0.002)
    for _ in range(100):
        inflows.store(large, 500, [large, small])
        inflows.store(small, 50, [large, small])
    assert inflows.crowding([large, small]) == pytest.approx([1.0, 1.0], abs=0.03)


def test_a_device_with_room_for_more_is_as_good_as_another_one() -> None:
    one, other = Inflow(10_000), Inflow(10_000)
    inflows = Inflows()
    inflows.store(one, 10, [one, other])
    assert inflows.crowding([one, other]) == pytest.approx([1.0, 1.0], abs=0.001)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 10**6)), max_size=50))
def test_whatever_is_stored_nobody_is_far_from_the_others(stored: list[tuple[int, int]]) -> None:
    everyone = [Inflow(blocks) for blocks in (10, 1000, 0)]
    inflows = Inflows()
    for position, blocks in stored:
        inflows.store(everyone[position], blocks, everyone)
    assert all(0.9 <= part <= 1.1 for part in inflows.crowding(everyone))
