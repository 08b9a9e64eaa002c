"""The ledger hides copies of a block from the index."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from kvbm.events import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent, Tier
from kvbm.ledger import BlockLedger


def test_an_evicted_copy_is_not_told_while_another_remains() -> None:
    ledger = BlockLedger()
    assert ledger.fold([BlocksStored((1, 2)), BlocksStored((1, 2, 3))]) == (
        BlocksStored((1, 2)),
        BlocksStored((3,), 2),
    )
    assert ledger.fold([BlocksRemoved((2,)), BlocksRemoved((3,))]) == (BlocksRemoved((3,)),)
    assert ledger.snapshot() == {Tier.DEVICE: (1, 2)}
    assert ledger.fold([BlocksRemoved((2,)), BlocksRemoved((99,))]) == (BlocksRemoved((2,)),)


def test_cleared_forgets_all_copies_of_all_tiers() -> None:
    ledger = BlockLedger()
    ledger.fold([BlocksStored((1,)), BlocksStored((1,)), BlocksStored((2,), tier=Tier.HOST)])
    assert ledger.fold([BlocksCleared()]) == (BlocksCleared(),)
    assert ledger.snapshot() == {}


def test_a_prefix_ends_with_the_first_block_that_is_not_there() -> None:
    ledger = BlockLedger()
    ledger.fold([BlocksStored((1, 2, 4)), BlocksStored((3,), tier=Tier.HOST)])
    assert ledger.prefix([1, 2, 3, 4]) == 2
    assert ledger.prefix([3], Tier.HOST) == 1
    assert ledger.prefix([9, 1]) == 0
    assert ledger.prefix([]) == 0


blocks = st.lists(st.integers(0, 6), max_size=4, unique=True).map(tuple)
tiers = st.sampled_from([Tier.DEVICE, Tier.HOST])


@given(st.lists(st.one_of(st.builds(BlocksStored, blocks, tier=tiers), st.builds(BlocksRemoved, blocks, tiers))))
def test_a_set_fed_by_the_told_events_holds_what_has_a_copy(events: list[KvEvent]) -> None:
    ledger, told = BlockLedger(), set[tuple[Tier, int]]()
    copies = Counter[tuple[Tier, int]]()
    for event in events:
        assert not isinstance(event, BlocksCleared)
        for block in event.hashes:
            key = (event.tier, block)
            copies[key] = max(0, copies[key] + (1 if isinstance(event, BlocksStored) else -1))
        for change in ledger.fold([event]):
            assert not isinstance(change, BlocksCleared)
            keys = {(change.tier, block) for block in change.hashes}
            told = told | keys if isinstance(change, BlocksStored) else told - keys
    assert told == {key for key, count in copies.items() if count}
    assert told == {(tier, block) for tier, held in ledger.snapshot().items() for block in held}
