"""The index answers exactly, recovers from gaps, and forgets workers completely."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm import runs
from kvbm.events import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent, KvEventBatch, KvSnapshot, Tier
from kvbm.index import TIERS, Depths, PrefixIndex


def batch(worker: str, seq: int, *events: KvEvent) -> KvEventBatch:
    return KvEventBatch(worker, seq, events)


def stored(worker: str, seq: int, *hashes: int, tier: Tier = Tier.DEVICE) -> KvEventBatch:
    return batch(worker, seq, BlocksStored(hashes, tier=tier))


def anywhere(index: PrefixIndex, hashes: Sequence[int]) -> dict[str, int]:
    """Leading blocks by worker, in whatever tier."""
    return {worker: depths[-1] for worker, depths in index.match(hashes).items()}


def test_a_match_is_the_leading_run_of_every_worker() -> None:
    index = PrefixIndex()
    index.apply(stored("a", 1, 1, 2, 3, 4))
    index.apply(stored("b", 1, 1, 2))
    index.apply(stored("c", 1, 9))
    assert anywhere(index, [1, 2, 3, 5]) == {"a": 3, "b": 2}
    assert anywhere(index, [9]) == {"c": 1}
    assert anywhere(index, [7, 1]) == {}
    assert anywhere(index, []) == {}


def test_a_hole_left_by_an_evicted_early_block_ends_the_match() -> None:
    index = PrefixIndex()
    index.apply(stored("a", 1, 1, 2, 3, 4))
    index.apply(stored("b", 1, 1, 2, 3, 4))
    index.apply(batch("a", 2, BlocksRemoved((2,))))
    assert anywhere(index, [1, 2, 3, 4]) == {"a": 1, "b": 4}
    index.apply(batch("b", 2, BlocksRemoved((2,))))
    assert anywhere(index, [1, 2, 3, 4]) == {"a": 1, "b": 1}


def test_a_gap_is_refused_until_a_snapshot_replaces_the_worker() -> None:
    index = PrefixIndex()
    assert index.apply(stored("a", 1, 1))
    assert not index.apply(stored("a", 3, 3))
    assert index.stale("a")
    assert not index.apply(stored("a", 2, 2)), "what comes while waiting is refused, in order or not"
    assert anywhere(index, [1]) == {"a": 1}, "stale entries are still matched: the worker checks again"
    index.load(KvSnapshot("a", 4, {Tier.DEVICE: (5, 6)}))
    assert not index.stale("a")
    assert anywhere(index, [1]) == {}
    assert anywhere(index, [5, 6]) == {"a": 2}
    assert index.apply(stored("a", 4, 1)), "older than the snapshot: ignored"
    assert anywhere(index, [1]) == {}
    assert index.apply(stored("a", 5, 7))
    assert anywhere(index, [5, 6, 7]) == {"a": 3}


def test_a_first_batch_other_than_1_is_a_gap() -> None:
    index = PrefixIndex()
    assert not index.apply(stored("a", 2, 1))
    assert anywhere(index, [1]) == {}


def test_a_snapshot_older_than_what_is_known_changes_nothing() -> None:
    index = PrefixIndex()
    index.apply(stored("a", 1, 1))
    index.apply(stored("a", 2, 2))
    index.load(KvSnapshot("a", 1, {Tier.DEVICE: (1,)}))
    assert anywhere(index, [1, 2]) == {"a": 2}


def test_a_block_counts_in_every_tier_from_its_own_downwards() -> None:
    index = PrefixIndex()
    index.apply(stored("a", 1, 1, 2))
    assert index.match([1, 2, 3]) == {"a": (2, 2, 2, 2)}
    index.apply(stored("a", 2, 3, tier=Tier.HOST))
    index.apply(stored("b", 1, 1, 2, 3, tier=Tier.HOST))
    assert index.match([1, 2, 3]) == {"a": (2, 3, 3, 3), "b": (0, 3, 3, 3)}
    index.apply(stored("b", 2, 4, tier=Tier.OBJECT))
    assert index.match([1, 2, 3, 4]) == {"a": (2, 3, 3, 3), "b": (0, 3, 3, 4)}
    index.apply(batch("a", 3, BlocksRemoved((1,))))
    assert index.match([1, 2, 3]) == {"b": (0, 3, 3, 3)}


def test_workers_of_another_namespace_are_not_found() -> None:
    index = PrefixIndex()
    index.join("a", "small model")
    index.join("b", "large model")
    for worker in "abc":
        index.apply(stored(worker, 1, 1, 2))
    assert index.match([1, 2], "small model") == {"a": (2, 2, 2, 2)}
    assert index.match([1, 2], "large model") == {"b": (2, 2, 2, 2)}
    assert index.match([1, 2]) == {"c": (2, 2, 2, 2)}, "one that never joined"
    assert index.match([1, 2], "no model") == {}
    index.load(KvSnapshot("a", 2, {Tier.DEVICE: (1,)}))
    assert index.match([1, 2], "small model") == {"a": (1, 1, 1, 1)}, "a snapshot does not move it"
    index.remove_worker("a")
    assert index.match([1, 2], "small model") == {}


def test_cleared_empties_every_tier_of_one_worker() -> None:
    index = PrefixIndex()
    index.apply(stored("a", 1, 1))
    index.apply(stored("b", 1, 1))
    index.apply(stored("a", 2, 1, tier=Tier.HOST))
    index.apply(batch("a", 3, BlocksCleared(), BlocksStored((2,))))
    assert anywhere(index, [1]) == {"b": 1}
    assert anywhere(index, [2]) == {"a": 1}


def test_a_removed_worker_is_gone_at_once_and_its_entries_after_the_sweep() -> None:
    index = PrefixIndex()
    index.apply(stored("a", 1, *range(10_000)))
    index.apply(stored("b", 1, *range(100)))
    index.remove_worker("a")
    assert anywhere(index, [0, 1, 2]) == {"b": 3}
    assert index.seq("a") == 0
    for seq in range(2, 6):
        index.apply(batch("b", seq))
    assert index.blocks == 100, "batches of others sweep along the way"
    index.check()


def test_a_lane_is_not_given_to_a_new_worker_before_its_entries_are_swept() -> None:
    index = PrefixIndex()
    index.apply(stored("old", 1, *range(100)))
    index.remove_worker("old")
    index.apply(batch("new", 1))
    assert anywhere(index, [0]) == {}
    index.remove_worker("unknown")
    index.sweep()
    assert index.blocks == 0
    index.check()


@pytest.mark.parametrize("workers", [16, 100])
def test_many_workers_sharing_a_prefix_are_all_found(workers: int) -> None:
    index = PrefixIndex()
    for i in range(workers):
        index.apply(stored(f"w{i}", 1, *range(i + 1)))
    assert anywhere(index, list(range(workers))) == {f"w{i}": i + 1 for i in range(workers)}


def test_blocks_that_were_stored_in_no_order_are_found_and_put_side_by_side() -> None:
    rng = random.Random(3)
    index = PrefixIndex()
    prompt = [rng.getrandbits(64) for _ in range(500)]
    others = [rng.getrandbits(64) for _ in range(5000)]
    shuffled = prompt + others
    rng.shuffle(shuffled)
    index.load(KvSnapshot("a", 1, {Tier.DEVICE: tuple(shuffled)}))
    index.load(KvSnapshot("b", 1, {Tier.HOST: tuple(shuffled)}))
    before = index.bytes
    for _ in range(3):
        assert index.match(prompt) == {"a": (500, 500, 500, 500), "b": (0, 500, 500, 500)}
        index.check()
    assert index.blocks == 5500
    assert index.bytes < before + 10 * runs.RUN_BYTES
    index.apply(batch("a", 2, BlocksRemoved((prompt[250],))))
    assert index.match(prompt) == {"a": (250, 250, 250, 250), "b": (0, 500, 500, 500)}


def test_memory_is_bounded_by_forgetting_what_was_stored_first_and_not_asked_for() -> None:
    index = PrefixIndex(limit=1000 * runs.BLOCK_BYTES)
    wanted = tuple(range(1, 65))
    index.apply(stored("a", 1, *wanted))
    for i in range(1, 50):
        assert index.match(wanted) == {"a": (64, 64, 64, 64)}, "it is asked for all the time"
        first = i * 1000
        index.apply(stored("a", i + 1, *range(first, first + 64)))
        assert index.bytes <= 1000 * runs.BLOCK_BYTES
        index.check()
    assert index.match(range(1000, 1064)) == {}
    assert index.match(range(first, first + 64)) == {"a": (64, 64, 64, 64)}, "the newest is there"
    assert index.evicted == 50 * 64 - index.blocks > 0


def test_what_the_limit_made_it_forget_may_be_removed_and_comes_back_with_a_snapshot() -> None:
    index = PrefixIndex(limit=200 * runs.BLOCK_BYTES)
    index.apply(stored("a", 1, *range(100)))
    index.apply(stored("a", 2, *range(1000, 1150)))
    assert index.match(range(100)) == {}
    index.apply(batch("a", 3, BlocksRemoved(tuple(range(50, 100))), BlocksRemoved(tuple(range(1000, 1150)))))
    assert index.blocks == 0
    index.check()
    index.load(KvSnapshot("a", 4, {Tier.DEVICE: tuple(range(50))}))
    assert index.match(range(100)) == {"a": (50, 50, 50, 50)}


def test_a_snapshot_larger_than_the_limit_is_kept_in_part() -> None:
    index = PrefixIndex(limit=10_000 * runs.BLOCK_BYTES)
    index.load(KvSnapshot("a", 1, {Tier.DEVICE: tuple(range(50_000))}))
    assert 8000 < index.blocks <= 10_000
    index.check()


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

    def match(self, hashes: Sequence[int], namespace: str = "") -> dict[str, Depths]:
        found = {}
        for worker, tiers in self.held.items():
            mine: set[int] = set()
            depths = []
            for tier in TIERS:
                mine = mine | tiers[tier]
                depths.append(next((i for i, block in enumerate(hashes) if block not in mine), len(hashes)))
            if depths[-1] and namespace_of(worker) == namespace:
                found[worker] = (depths[0], depths[1], depths[2], depths[3])
        return found


def namespace_of(worker: str) -> str:
    return "other" if worker == "d" else ""


BLOCKS = 50


def prompt_to(block: int) -> list[int]:
    """The one prompt that ends with this block, as hashes are chained: 0 begins all, and every fifth block branches."""
    path = [block]
    while path[-1]:
        last = path[-1]
        path.append(last - 1 if last % 5 else last // 2)
    return path[::-1]


@st.composite
def chains(draw: st.DrawFn) -> BlocksStored:
    """Blocks of one prompt, one after the other, as devices tell of them."""
    prompt = prompt_to(draw(st.integers(0, BLOCKS)))
    start = draw(st.integers(0, len(prompt) - 1))
    return BlocksStored(tuple(prompt[start:]), prompt[start - 1] if start else None)


some = st.lists(st.integers(0, BLOCKS), max_size=8).map(tuple)
events = st.one_of(
    chains(),
    chains(),
    st.builds(BlocksStored, some, tier=st.sampled_from([Tier.HOST, Tier.DISK])),
    st.builds(BlocksRemoved, some, st.sampled_from([Tier.DEVICE, Tier.DEVICE, Tier.HOST, Tier.DISK])),
    st.just(BlocksCleared()),
)
steps = st.one_of(
    st.tuples(st.sampled_from("abcd"), st.lists(events, max_size=3).map(tuple)),
    st.tuples(st.sampled_from("abcd"), st.lists(events, max_size=3).map(tuple)),
    st.tuples(st.sampled_from("abcd"), st.sampled_from(["remove", "snapshot"])),
    st.tuples(st.just(""), st.integers(0, BLOCKS)),
)
History = list[tuple[str, str | int | tuple[KvEvent, ...]]]


def replay(history: History, index: PrefixIndex, rng: random.Random) -> Naive:
    """What has happened to the index after this, in which it was asked for a prompt now and then."""
    naive = Naive()
    for worker, step in history:
        if isinstance(step, int):
            index.match(prompt_to(step))
            index.check()
            continue
        index.join(worker, namespace_of(worker))
        if step == "remove":
            index.remove_worker(worker)
            naive.held.pop(worker, None)
        elif step == "snapshot":
            blocks = {tier: rng.sample(sorted(held), len(held)) for tier, held in naive.held[worker].items()}
            told = {tier: tuple(hashes) for tier, hashes in blocks.items()}
            index.load(KvSnapshot(worker, index.seq(worker) + 5, told))
        else:
            assert not isinstance(step, str)
            update = batch(worker, index.seq(worker) + 1, *step)
            assert index.apply(update)
            naive.apply(update)
        index.check()
    return naive


@pytest.fixture(scope="module", params=[(128, 16, 4), (4, 2, 1)], ids=["runs as they are", "short runs"])
def _run_lengths(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(("RUN", "FEW", "SCATTERED"), request.param, strict=True):
            patch.setattr(runs, name, value)
        yield


@pytest.mark.usefixtures("_run_lengths")
@settings(max_examples=300)
@given(st.lists(steps, max_size=30), st.randoms(use_true_random=False))
def test_any_history_gives_the_same_matches_as_one_set_a_worker(history: History, rng: random.Random) -> None:
    index = PrefixIndex()
    naive = replay(history, index, rng)
    for block in range(BLOCKS + 1):
        for query in (prompt_to(block), [*prompt_to(block), 999], [*prompt_to(block), 999, 0]):
            for namespace in ("", "other"):
                assert index.match(query, namespace) == naive.match(query, namespace)
    index.check()
    index.sweep()
    index.check()
    assert index.blocks == len({block for tiers in naive.held.values() for held in tiers.values() for block in held})


@pytest.mark.usefixtures("_run_lengths")
@settings(max_examples=200)
@given(st.lists(steps, max_size=40), st.randoms(use_true_random=False), st.integers(1, 20))
def test_with_too_little_memory_for_any_history_nothing_is_found_that_is_not_held(
    history: History, rng: random.Random, blocks: int
) -> None:
    index = PrefixIndex(limit=blocks * (runs.BLOCK_BYTES + runs.RUN_BYTES))
    naive = replay(history, index, rng)
    for block in range(BLOCKS + 1):
        held = naive.match(prompt_to(block))
        for worker, depths in index.match(prompt_to(block)).items():
            assert all(found <= real for found, real in zip(depths, held[worker], strict=True))
    index.check()


def test_long_prompts_over_many_workers_match_like_the_naive_index() -> None:
    rng = random.Random(7)
    index, naive = PrefixIndex(), Naive()
    for i in range(200):
        update = stored(f"w{i % 16}", i // 16 + 1, *range(rng.randrange(2000)))
        index.apply(update)
        naive.apply(update)
    for _ in range(20):
        query = range(rng.randrange(2500))
        assert index.match(query) == naive.match(query)
    for i in range(16):
        holes = batch(f"w{i}", index.seq(f"w{i}") + 1, BlocksRemoved(tuple(rng.sample(range(2000), i))))
        index.apply(holes)
        naive.apply(holes)
    assert index.match(range(2000)) == naive.match(range(2000))
    index.check()
