"""Which blocks of a request are offloaded, when, and to which slot."""

from __future__ import annotations

import pytest

from tests.unit.workers.connector.prompt import Engine
from workers.connector.offload_plan import OffloadPlans
from workers.connector.protocol import GrantSlots, Offloaded, SlotsWanted, TierChanged

SIZE = 16


def engine(prompt_tokens: int, slots: int, *, second_use: bool = False) -> Engine:
    offloads = OffloadPlans(SIZE, second_use)
    offloads.granted(GrantSlots(tuple(range(slots))))
    made = Engine(SIZE, prompt_tokens, offloads=offloads)
    made.side.arrived(made.request)
    return made


def copied(made: Engine, tokens: int) -> list[tuple[int, int]]:
    """(block id, slot) of what the next step offloads."""
    return [pair for one in made.planned(tokens).offloads for pair in zip(one.block_ids, one.slots, strict=True)]


def test_blocks_are_offloaded_as_soon_as_a_step_completes_them_each_once() -> None:
    made = engine(100, 10)
    assert copied(made, 40) == [(100, 0), (101, 1)]
    assert copied(made, 7) == []
    assert copied(made, 53) == [(102, 2), (103, 3), (104, 4), (105, 5)]
    assert made.side.finished(made.request), "its blocks stay until they are copied"


def test_blocks_without_a_slot_get_one_at_a_later_step_or_are_counted_as_missed() -> None:
    made = engine(100, 1)
    assert copied(made, 64) == [(100, 0)]
    assert made.offloads is not None
    made.offloads.granted(GrantSlots((7,)))
    assert copied(made, 1) == [(101, 7)]
    made.side.finished(made.request)
    assert made.reports == [SlotsWanted(5), Offloaded(-1, missed=2)]


def test_slots_for_a_long_prompt_are_asked_for_once_when_it_comes() -> None:
    made = engine(100, 2)
    assert made.reports == [SlotsWanted(4)]
    made.side.arrived(made.request)
    assert made.reports == [SlotsWanted(4)]


def test_what_is_in_the_tier_is_not_offloaded_until_it_is_there_no_more() -> None:
    made = engine(32, 10)
    assert made.offloads is not None
    made.offloads.changed(TierChanged(stored=(bytes(32), bytes(31) + b"\x01")))
    made.offloads.changed(TierChanged(removed=(bytes(31) + b"\x01",)))
    assert copied(made, 32) == [(101, 0)]


@pytest.mark.parametrize("blocks", [1, 3])
def test_with_second_use_only_what_a_second_request_has_is_offloaded(blocks: int) -> None:
    made = engine(blocks * SIZE, 10, second_use=True)
    assert copied(made, blocks * SIZE) == []
    assert not made.side.finished(made.request), "nothing of it is read"
    made.side.arrived(made.request)
    made.given = made.computed = 0
    assert len(copied(made, blocks * SIZE)) == blocks


def test_a_preempted_request_of_which_blocks_were_handed_over_is_named_to_the_mover() -> None:
    made = engine(64, 10)
    assert made.planned(32).preempted_offloads == []
    assert made.planned(16, preempted=frozenset({"e", "other"})).preempted_offloads == ["e"]
