"""The pool reuses prefixes, evicts only when it must, and tells every change."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvbm.errors import OutOfBlocks
from kvbm.events import BlocksRemoved, BlocksStored
from kvbm.pool import BlockPool


def fill(pool: BlockPool, hashes: list[int]) -> list[int]:
    """Run one sequence's prompt: its blocks stay pinned."""
    blocks = pool.match(hashes)
    pool.pin(blocks)
    new = pool.allocate(len(hashes) - len(blocks))
    pool.commit(new, hashes[len(blocks) :], hashes[len(blocks) - 1] if blocks else None)
    return blocks + new


def test_a_second_prompt_matches_the_shared_prefix_and_stores_only_the_rest() -> None:
    pool = BlockPool(8)
    first = fill(pool, [1, 2, 3])
    assert pool.events() == (BlocksStored((1, 2, 3)),)
    second = fill(pool, [1, 2, 9])
    assert second[:2] == first[:2]
    assert pool.events() == (BlocksStored((9,), 2),)
    assert pool.pinned == 4
    pool.check()


def test_released_blocks_stay_matchable_until_their_place_is_needed() -> None:
    pool = BlockPool(4)
    pool.release(fill(pool, [1, 2, 3]))
    assert pool.free == 4
    assert len(pool.match([1, 2, 3])) == 3
    pool.events()
    assert len(pool.allocate(1)) == 1
    assert pool.events() == (), "the empty block is taken first"
    pool.allocate(1)
    assert pool.events() == (BlocksRemoved((3,)),), "then the tail of the prompt"
    assert len(pool.match([1, 2, 3])) == 2


def test_eviction_takes_the_least_recently_used_prompt_first() -> None:
    pool = BlockPool(4)
    pool.release(fill(pool, [1, 2]))
    pool.release(fill(pool, [3, 4]))
    pool.release(fill(pool, [1, 2]))
    pool.events()
    pool.allocate(3)
    assert pool.events() == (BlocksRemoved((4,)), BlocksRemoved((3,)), BlocksRemoved((2,)))


def test_pinned_blocks_are_never_evicted() -> None:
    pool = BlockPool(3)
    held = fill(pool, [1, 2])
    with pytest.raises(OutOfBlocks) as caught:
        pool.allocate(2)
    assert (caught.value.wanted, caught.value.free) == (2, 1)
    assert pool.free == 1, "nothing was taken"
    pool.pin(held[:1])
    pool.release(held)
    pool.allocate(2)
    assert pool.match([1, 2]) == held[:1]
    pool.check()


def test_two_copies_of_a_block_are_one_for_the_index() -> None:
    pool = BlockPool(6)
    one, two = pool.allocate(3), pool.allocate(3)
    pool.commit(one, [1, 2, 3])
    pool.commit(two[:2], [1, 2])
    pool.commit(two[2:], [7], 2)
    assert pool.events() == (BlocksStored((1, 2, 3)), BlocksStored((7,), 2))
    pool.release(one)
    pool.allocate(3)
    assert pool.events() == (BlocksRemoved((3,)),), "the other copies of 1 and 2 are still there"
    assert pool.match([1, 2, 7]) == two
    assert set(pool.snapshot()) == {1, 2, 7}
    pool.check()


def test_a_copy_in_the_middle_splits_the_event_so_that_parents_are_right() -> None:
    pool = BlockPool(8)
    pool.commit(pool.allocate(2), [1, 2])
    pool.events()
    pool.commit(pool.allocate(1), [0])
    pool.commit(pool.allocate(3), [5, 2, 6], 0)
    assert pool.events() == (BlocksStored((0,)), BlocksStored((5,), 0), BlocksStored((6,), 2))


def test_releasing_more_often_than_pinned_is_a_bug() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="once too often"):
        pool.release(blocks)


PROMPTS = [[1, 2, 3], [1, 2, 4, 5], [1, 9], [6, 7, 8, 10, 11], [6, 7, 12]]


class PoolMachine(RuleBasedStateMachine):
    """Sequences come and go; a set fed by the events must equal what can be matched."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(9)
        self.running: list[list[int]] = []
        self.told: set[int] = set()

    @rule(prompt=st.sampled_from(PROMPTS), length=st.integers(1, 5))
    def start(self, prompt: list[int], length: int) -> None:
        hashes = prompt[:length]
        blocks = self.pool.match(hashes)
        self.pool.pin(blocks)
        try:
            new = self.pool.allocate(len(hashes) - len(blocks))
        except OutOfBlocks:
            self.pool.release(blocks)
            return
        self.pool.commit(new, hashes[len(blocks) :], hashes[len(blocks) - 1] if blocks else None)
        assert len(self.pool.match(hashes)) == len(hashes)
        self.running.append(blocks + new)

    @rule(prompt=st.sampled_from(PROMPTS))
    def start_without_looking(self, prompt: list[int]) -> None:
        """Two sequences that compute the same prompt at once."""
        if self.pool.free >= len(prompt) + 1:
            blocks = self.pool.allocate(len(prompt) + 1)  # the last is only partly filled
            self.pool.commit(blocks[:-1], prompt)
            self.running.append(blocks)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        which = data.draw(st.integers(0, len(self.running) - 1))
        self.pool.release(self.running.pop(which))

    @invariant()
    def counts_add_up(self) -> None:
        self.pool.check()
        in_use = {block for blocks in self.running for block in blocks}
        assert self.pool.pinned == len(in_use)
        assert self.pool.free + self.pool.pinned == self.pool.size

    @invariant()
    def events_tell_what_can_be_matched(self) -> None:
        for event in self.pool.events():
            if isinstance(event, BlocksStored):
                assert event.parent is None or event.parent in self.told
                assert not self.told & set(event.hashes)
                self.told |= set(event.hashes)
            elif isinstance(event, BlocksRemoved):
                assert set(event.hashes) <= self.told
                self.told -= set(event.hashes)
        assert self.told == set(self.pool.snapshot())


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40)
