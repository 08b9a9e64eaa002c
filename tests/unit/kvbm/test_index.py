"""The index answers exactly, recovers from gaps, and forgets workers completely."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm.events import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent, KvEventBatch, KvSnapshot, Tier
from kvbm.index import TIERS, PrefixIndex


def batch(worker: str, seq: int, *events: KvEvent) -> KvEventBatch:
    return KvEventBatch(worker, seq, events)


def stored(worker: str, seq: int, *hashes: int, tier: Tier = Tier.DEVICE) -> KvEventBatch:
    return batch(worker, seq, BlocksStored(hashes, tier=tier))


def test_a_match_is_the_leading_run_of_every_worker() -> None:
    index = PrefixIndex()
    index.apply(stored("a", 1, 1, 2, 3, 4))
    index.apply(stored("b", 1, 1, 2))
    index.apply(stored("c", 1, 9))
    assert index.match([1, 2, 3, 5]) == {"a": 3, "b": 2}
    assert index.match([9]) == {"c": 1}
    assert index.match([7, 1]) == {}
    assert index.match([]) == {}


def test_a_hole_left_by_an_evicted_early_block_ends_the_match() -> None:
    index = PrefixIndex()
    index.apply(stored("a", 1, 1, 2, 3, 4))
    index.apply(stored("b", 1, 1, 2, 3, 4))
    index.apply(batch("a", 2, BlocksRemoved((2,))))
    assert index.match([1, 2, 3, 4]) == {"a": 1, "b": 4}
    index.apply(batch("b", 2, BlocksRemoved((2,))))
    assert index.match([1, 2, 3, 4]) == {"a": 1, "b": 1}


def test_a_gap_is_refused_until_a_snapshot_replaces_the_worker() -> None:
    index = PrefixIndex()
    assert index.apply(stored("a", 1, 1))
    assert not index.apply(stored("a", 3, 3))
    assert index.stale("a")
    assert not index.apply(stored("a", 2, 2)), "what comes while waiting is refused, in order or not"
    assert index.match([1]) == {"a": 1}, "stale entries are still matched: the worker checks again"
    index.load(KvSnapshot("a", 4, {Tier.DEVICE: (5, 6)}))
    assert not index.stale("a")
    assert index.match([1]) == {}
    assert index.match([5, 6]) == {"a": 2}
    assert index.apply(stored("a", 4, 1)), "older than the snapshot: ignored"
    assert index.match([1]) == {}
    assert index.apply(stored("a", 5, 7))
    assert index.match([5, 6, 7]) == {"a": 3}


def test_a_first_batch_other_than_1_is_a_gap() -> None:
    index = PrefixIndex()
    assert not index.apply(stored("a", 2, 1))
    assert index.match([1]) == {}


def test_a_snapshot_older_than_what_is_known_changes_nothing() -> None:
    index = PrefixIndex()
    index.apply(stored("a", 1, 1))
    index.apply(stored("a", 2, 2))
    index.load(KvSnapshot("a", 1, {Tier.DEVICE: (1,)}))
    assert index.match([1, 2]) == {"a": 2}


def test_a_block_counts_in_any_tier_down_to_the_one_asked_for() -> None:
    index = PrefixIndex()
    index.apply(stored("a", 1, 1, 2))
    index.apply(stored("a", 2, 3, tier=Tier.HOST))
    index.apply(stored("b", 1, 1, 2, 3, tier=Tier.HOST))
    assert index.match([1, 2, 3]) == {"a": 3, "b": 3}
    assert index.match([1, 2, 3], Tier.DEVICE) == {"a": 2}
    assert index.match([1, 2, 3], Tier.HOST) == {"a": 3, "b": 3}
    index.apply(stored("b", 2, 4, tier=Tier.OBJECT))
    assert index.match([1, 2, 3, 4], Tier.DISK) == {"a": 3, "b": 3}
    assert index.match([1, 2, 3, 4], Tier.OBJECT) == {"a": 3, "b": 4}
    assert index.beneath == (Tier.HOST, Tier.OBJECT)
    index.apply(batch("a", 3, BlocksRemoved((1,))))
    assert index.match([1, 2, 3]) == {"b": 3}


def test_cleared_empties_every_tier_of_one_worker() -> None:
    index = PrefixIndex()
    index.apply(stored("a", 1, 1))
    index.apply(stored("b", 1, 1))
    index.apply(stored("a", 2, 1, tier=Tier.HOST))
    index.apply(batch("a", 3, BlocksCleared(), BlocksStored((2,))))
    assert index.match([1]) == {"b": 1}
    assert index.match([2]) == {"a": 1}


def test_a_removed_worker_is_gone_at_once_and_its_entries_after_the_sweep() -> None:
    index = PrefixIndex()
    index.apply(stored("a", 1, *range(10_000)))
    index.apply(stored("b", 1, *range(100)))
    index.remove_worker("a")
    assert index.match([0, 1, 2]) == {"b": 3}
    assert index.seq("a") == 0
    for seq in range(2, 10):
        index.apply(batch("b", seq))
    assert index.blocks == 100, "batches of others sweep along the way"
    index.check()


def test_a_lane_is_not_given_to_a_new_worker_before_its_entries_are_swept() -> None:
    index = PrefixIndex()
    index.apply(stored("old", 1, *range(100)))
    index.remove_worker("old")
    index.apply(batch("new", 1))
    assert index.match([0]) == {}
    index.remove_worker("unknown")
    index.sweep()
    assert index.blocks == 0
    index.check()


@pytest.mark.parametrize("workers", [16, 100])
def test_many_workers_sharing_a_prefix_are_all_found(workers: int) -> None:
    index = PrefixIndex()
    for i in range(workers):
        index.apply(stored(f"w{i}", 1, *range(i + 1)))
    assert index.match(list(range(workers))) == {f"w{i}": i + 1 for i in range(workers)}


class Naive:
    """The index as one set a worker and tier."""

    def __init__(self) -> None:
        self.held: dict[str, dict[Tier, set[int]]] = defaultdict(lambda: defaultdict(set))

    def apply(self, update: KvEventBatch) -> None:
        tiers = self.held[update.worker]
        for event in update.events:
            if isinstance(event, BlocksStored):
                tiers[event.tier] |= set(event.hashes)
            elif isinstance(event, BlocksRemoved):
                tiers[event.tier] -= set(event.hashes)
            else:
                tiers.clear()

    def match(self, hashes: list[int], down_to: Tier) -> dict[str, int]:
        depths = {}
        for worker, tiers in self.held.items():
            mine = set().union(*(tiers[tier] for tier in TIERS[: TIERS.index(down_to) + 1]))
            depth = next((i for i, block in enumerate(hashes) if block not in mine), len(hashes))
            if depth:
                depths[worker] = depth
        return depths


events = st.one_of(
    st.builds(
        BlocksStored,
        st.lists(st.integers(0, 30), max_size=8).map(tuple),
        tier=st.sampled_from([Tier.DEVICE, Tier.DEVICE, Tier.HOST, Tier.DISK]),
    ),
    st.builds(
        BlocksRemoved,
        st.lists(st.integers(0, 30), max_size=4).map(tuple),
        st.sampled_from([Tier.DEVICE, Tier.DEVICE, Tier.HOST, Tier.DISK]),
    ),
    st.just(BlocksCleared()),
)
steps = st.one_of(
    st.tuples(st.sampled_from("abcd"), st.lists(events, max_size=3).map(tuple)),
    st.tuples(st.sampled_from("abcd"), st.sampled_from(["remove", "snapshot"])),
)


@settings(max_examples=300)
@given(st.lists(steps, max_size=30), st.lists(st.lists(st.integers(0, 30), max_size=12), max_size=5))
def test_any_history_gives_the_same_matches_as_one_set_a_worker(
    history: list[tuple[str, str | tuple[KvEvent, ...]]], queries: list[list[int]]
) -> None:
    index, naive = PrefixIndex(), Naive()
    for worker, step in history:
        if step == "remove":
            index.remove_worker(worker)
            naive.held.pop(worker, None)
        elif step == "snapshot":
            blocks = {tier: tuple(held) for tier, held in naive.held[worker].items()}
            index.load(KvSnapshot(worker, index.seq(worker) + 5, blocks))
        else:
            assert not isinstance(step, str)
            update = batch(worker, index.seq(worker) + 1, *step)
            assert index.apply(update)
            naive.apply(update)
        index.check()
    for query in [*queries, list(range(31))]:
        for tier in TIERS:
            assert index.match(query, tier) == naive.match(query, tier)
    index.sweep()
    index.check()
    held = [block for tiers in naive.held.values() for mine in tiers.values() for block in mine]
    assert index.blocks == len(set(held))


def test_long_prompts_over_many_workers_match_like_the_naive_index() -> None:
    rng = random.Random(7)
    index, naive = PrefixIndex(), Naive()
    for i in range(200):
        update = stored(f"w{i % 16}", i // 16 + 1, *range(rng.randrange(2000)))
        index.apply(update)
        naive.apply(update)
    for _ in range(20):
        query = list(range(rng.randrange(2500)))
        assert index.match(query) == naive.match(query, TIERS[-1])
