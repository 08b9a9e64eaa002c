"""The block manager: two phases on the way in, pins with owners on the way out, and every change told."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvbm.events import BlocksRemoved, BlocksStored, Tier
from kvbm.hashing import FullHash, low64
from kvbm.manager import BlockManager
from kvbm.tiers.slots import Stored


def named(number: int) -> FullHash:
    return FullHash(bytes([number]) * 32)


def offload(manager: BlockManager, *numbers: int) -> None:
    for number in numbers:
        (slot,) = manager.grant(1)
        assert manager.filled(slot, named(number), 0, True)
        manager.store(slot, number)


def test_a_block_is_stored_only_when_every_rank_has_filled_its_share() -> None:
    manager = BlockManager(2, ranks=2)
    (slot,) = manager.grant(1)
    assert not manager.filled(slot, named(1), 1, True)
    assert manager.filled(slot, named(1), 0, True)
    assert manager.match([named(1)]) == []
    assert manager.store(slot, 5)
    assert [block.checksum for block in manager.match([named(1)])] == [5]
    assert manager.events() == (BlocksStored((low64(named(1)),), tier=Tier.HOST),)


@pytest.mark.parametrize("first", [True, False])
def test_a_slot_that_one_rank_could_not_fill_is_free_again_once_all_have_ended(first: bool) -> None:
    manager = BlockManager(1, ranks=2)
    (slot,) = manager.grant(1)
    assert not manager.filled(slot, named(1), 0, first)
    assert manager.grant(1) == []
    assert not manager.filled(slot, named(1), 1, not first)
    assert manager.lost() == [named(1)]
    assert manager.counts.missed == 1
    assert manager.grant(1) == [slot]


def test_a_match_ends_with_the_first_block_that_is_missing() -> None:
    manager = BlockManager(4, ranks=1)
    offload(manager, 1, 2, 4)
    assert [block.hash for block in manager.match([named(1), named(2), named(3), named(4)])] == [named(1), named(2)]


def test_what_gives_way_to_others_is_told() -> None:
    manager = BlockManager(2, ranks=1)
    offload(manager, 1, 2)
    manager.events()
    manager.grant(1)
    assert manager.events() == (BlocksRemoved((low64(named(1)),), Tier.HOST),)
    assert manager.lost() == [named(1)]
    assert manager.counts.evicted == 1


def test_a_block_that_is_in_use_on_the_device_is_kept_longer_than_one_that_is_not() -> None:
    manager = BlockManager(3, ranks=1)
    offload(manager, 1, 2, 3)
    manager.used([named(1), named(2), named(9)])
    offload(manager, 4)
    assert [manager.find(named(number)) is None for number in (1, 2, 3)] == [False, False, True]
    offload(manager, 5)
    assert manager.find(named(1)) is not None, "of one prefix the tail goes first"


def test_a_corrupt_block_is_dropped_counted_and_told_once_though_it_is_pinned() -> None:
    manager = BlockManager(1, ranks=1)
    offload(manager, 1)
    blocks = manager.match([named(1)])
    manager.pin("r", blocks)
    manager.corrupt(blocks[0])
    manager.corrupt(blocks[0])
    assert manager.counts.corrupt == 1
    assert manager.lost() == [named(1)]
    assert manager.grant(1) == []
    manager.unpin("r")
    manager.unpin("r")
    assert len(manager.grant(1)) == 1


def test_a_block_from_a_tier_beneath_is_told_once_it_has_arrived() -> None:
    manager = BlockManager(2, ranks=1)
    (block, other) = manager.expect([named(1), named(2), named(3)])
    assert manager.find(named(1)) is block
    assert manager.match([named(1)]) == []
    manager.arrived(block, 7)
    manager.failed(other)
    assert manager.match([named(1)]) == [block]
    assert manager.gained() == [named(1)]
    assert manager.find(named(2)) is None
    assert manager.events() == (BlocksStored((low64(named(1)),), tier=Tier.HOST),)
    manager.check()


def test_a_block_that_comes_is_not_evicted_while_it_comes() -> None:
    manager = BlockManager(1, ranks=1)
    (block,) = manager.expect([named(1)])
    assert manager.grant(1) == []
    manager.arrived(block, 7)
    assert manager.grant(1) == [block.slot]


def test_slots_that_were_lent_are_nobodys_until_they_are_given_back() -> None:
    manager = BlockManager(3, ranks=1)
    offload(manager, 1, 2)
    lent = manager.lend(2)
    assert len(lent) == 2
    assert manager.granted == 0, "the engine has none of them"
    assert manager.lost() == [named(1)]
    assert manager.hashes() == (named(2),)
    manager.check()
    manager.give_back(lent)
    manager.check()
    assert set(manager.grant(2)) == set(lent), "without evicting anything else"
    assert manager.lost() == []
    assert manager.counts.missed == 0


class Managers(RuleBasedStateMachine):
    """What the events and `lost` say is what can be matched."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(4, ranks=1)
        self.granted: list[int] = []
        self.told: set[int] = set()
        self.owners = 0
        self.expected: list[Stored] = []
        self.lent: list[int] = []

    @rule(count=st.integers(0, 5))
    def grant(self, count: int) -> None:
        self.granted += self.manager.grant(count)

    @rule(count=st.integers(0, 3))
    def lend(self, count: int) -> None:
        self.lent += self.manager.lend(count)

    @rule()
    def give_back(self) -> None:
        self.manager.give_back(self.lent)
        self.lent = []

    @precondition(lambda self: self.granted)
    @rule(number=st.integers(0, 6), well=st.booleans())
    def fill(self, number: int, well: bool) -> None:
        slot = self.granted.pop()
        if self.manager.filled(slot, named(number), 0, well):
            self.manager.store(slot, number)

    @rule(numbers=st.lists(st.integers(0, 6), max_size=3, unique=True))
    def expect(self, numbers: list[int]) -> None:
        self.expected += self.manager.expect([one for one in map(named, numbers) if self.manager.find(one) is None])

    @precondition(lambda self: self.expected)
    @rule(comes=st.booleans())
    def bring(self, comes: bool) -> None:
        block = self.expected.pop(0)
        if comes:
            self.manager.arrived(block, 1)
        else:
            self.manager.failed(block)

    @rule(numbers=st.lists(st.integers(0, 6), max_size=3, unique=True))
    def pin(self, numbers: list[int]) -> None:
        self.owners += 1
        found = (self.manager.find(named(number)) for number in numbers)
        self.manager.pin(str(self.owners), [block for block in found if block is not None])

    @rule(owner=st.integers(1, 30))
    def unpin(self, owner: int) -> None:
        self.manager.unpin(str(owner))

    @rule(number=st.integers(0, 6))
    def corrupt(self, number: int) -> None:
        for block in self.manager.match([named(number)]):
            self.manager.corrupt(block)

    @rule()
    def purge(self) -> None:
        stored = self.manager.stored
        assert self.manager.purge() == stored

    @invariant()
    def agrees(self) -> None:
        self.manager.check()
        for event in self.manager.events():
            if isinstance(event, BlocksStored):
                assert self.told.isdisjoint(event.hashes)
                self.told.update(event.hashes)
            else:
                assert isinstance(event, BlocksRemoved)
                assert self.told.issuperset(event.hashes)
                self.told.difference_update(event.hashes)
        assert self.told == set(self.manager.snapshot()[Tier.HOST])


TestManagers = Managers.TestCase
TestManagers.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
