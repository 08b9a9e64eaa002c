"""Slots of a tier: granted ahead, found once stored, evicted least recently used first, never while pinned."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvbm.hashing import FullHash
from kvbm.tiers.slots import SlotTable, Stored


def named(number: int) -> FullHash:
    return FullHash(bytes([number]) * 32)


def filled(table: SlotTable, *numbers: int) -> list[Stored]:
    for number in numbers:
        (slot,), _ = table.grant(1)
        assert table.store(slot, named(number), number)
    found = [table.find(named(number)) for number in numbers]
    return [block for block in found if block is not None]


def test_a_granted_slot_is_found_only_once_it_is_stored() -> None:
    table = SlotTable(2)
    (slot,), evicted = table.grant(1)
    assert evicted == []
    assert table.find(named(1)) is None
    assert table.store(slot, named(1), 11)
    block = table.find(named(1))
    assert block is not None
    assert (block.slot, block.checksum) == (slot, 11)


def test_the_least_recently_used_block_goes_first_and_the_tail_of_a_prefix_before_its_head() -> None:
    table = SlotTable(3)
    filled(table, 1, 2, 3)
    table.touch((named(1), named(2)))
    assert table.grant(2)[1] == [named(3), named(2)]


def test_pinned_blocks_are_not_evicted_and_come_back_as_the_latest() -> None:
    table = SlotTable(3)
    blocks = filled(table, 1, 2, 3)
    table.pin(blocks[:2])
    assert table.grant(3) == ([blocks[2].slot], [named(3)])
    table.unpin(blocks[:2])
    table.check()
    assert table.grant(1)[1] == [named(2)]


def test_a_second_copy_of_a_block_gives_its_slot_back() -> None:
    table = SlotTable(2)
    filled(table, 1)
    (slot,), _ = table.grant(1)
    assert not table.store(slot, named(1), 1)
    assert table.grant(1) == ([slot], [])


def test_the_slot_of_a_dropped_block_is_not_granted_while_somebody_reads_it() -> None:
    table = SlotTable(1)
    (block,) = filled(table, 1)
    table.pin([block])
    table.drop(block)
    assert table.find(named(1)) is None
    assert table.grant(1) == ([], [])
    table.unpin([block])
    assert table.grant(1) == ([block.slot], [])


class Tables(RuleBasedStateMachine):
    """Against a plain dict and list."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(5)
        self.model: dict[FullHash, int] = {}
        self.granted: list[int] = []
        self.pinned: list[list[Stored]] = []

    @rule(count=st.integers(0, 6))
    def grant(self, count: int) -> None:
        slots, evicted = self.table.grant(count)
        # One that was dropped is held, too, but may have been stored anew, and that copy is nobody's.
        held = {block.hash for blocks in self.pinned for block in blocks if not block.dropped}
        assert held.isdisjoint(evicted)
        for block_hash in evicted:
            del self.model[block_hash]
        assert set(slots).isdisjoint(self.granted)
        assert set(slots).isdisjoint(self.model.values())
        self.granted += slots

    @precondition(lambda self: self.granted)
    @rule(number=st.integers(0, 8))
    def store(self, number: int) -> None:
        slot = self.granted.pop()
        assert self.table.store(slot, named(number), number) == (named(number) not in self.model)
        self.model.setdefault(named(number), slot)

    @precondition(lambda self: self.granted)
    @rule()
    def give_back(self) -> None:
        self.table.give_back(self.granted.pop(0))

    @rule(numbers=st.lists(st.integers(0, 8), unique=True))
    def pin(self, numbers: list[int]) -> None:
        blocks = [block for number in numbers if (block := self.table.find(named(number))) is not None]
        self.table.pin(blocks)
        self.pinned.append(blocks)

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin(self) -> None:
        self.table.unpin(self.pinned.pop(0))

    @rule(number=st.integers(0, 8))
    def drop(self, number: int) -> None:
        block = self.table.find(named(number))
        if block is not None:
            self.table.drop(block)
            del self.model[named(number)]

    @invariant()
    def agrees(self) -> None:
        self.table.check()
        assert {name: block.slot for name in self.model if (block := self.table.find(name))} == self.model
        assert self.table.stored == len(self.model)


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
