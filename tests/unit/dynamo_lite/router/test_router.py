"""Placement: prefix and load, ties, fallbacks, bookings."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack

import pytest

from dynamo_lite.config import Router as Weights
from dynamo_lite.errors import NoInstance
from dynamo_lite.plane.wire import Holder, Rates, Role
from dynamo_lite.router import metrics
from dynamo_lite.router.router import Router
from kvbm.events import KvEventBatch, KvSnapshot, Tier
from kvbm.hashing import block_hashes
from tests.instances import instance, record, report, roster, store

D = [record(f"decode-{i}") for i in range(4)]
P = [record(f"prefill-{i}", Role.PREFILL) for i in range(3)]
PROMPT = list(range(1000, 1320))  # 20 blocks
RATES = Rates(prefill=(4.0, 1.0))


def test_a_request_goes_to_the_worker_that_holds_its_prefix_and_says_so() -> None:
    workers = roster(D[0], D[1], clock=lambda: 100.0)
    store(workers, D[0], block_hashes(PROMPT[16:208], 16))  # of no use
    store(workers, D[1], block_hashes(PROMPT[:192], 16))
    for each in D[:2]:
        workers.take_report(report(each, 1, queued_tokens=10, rates=RATES))
    placement = Router(workers, Weights()).place(PROMPT)
    assert placement.decode == D[1]
    assert (placement.overlap_blocks, placement.prompt_blocks) == (12, 20)
    assert placement.reason == (
        "prefix 12/20 blocks on decode-1; first token in 146 ms (queue 14, prefill 132); cost 3986, decode-0 9938"
    )
    assert placement.scores == pytest.approx({"decode-0": 9938, "decode-1": 3986}, rel=0.01)
    assert placement.parts == pytest.approx(
        {"queue": 14, "prefill": 132, "transfer": 0, "onboard": 0, "decode": 0, "work": 3840, "late": 0}, rel=0.05
    )


def test_a_prefix_everyone_shares_does_not_herd_requests_onto_one_worker() -> None:
    workers = roster(*D)
    store(workers, D[0], block_hashes(PROMPT[:64], 16))
    router = Router(workers, Weights())
    with ExitStack() as running:
        placed = Counter[str]()
        for i in range(40):
            placement = router.place([*PROMPT[:64], *([i] * 256)])
            running.enter_context(placement.booked())
            placed[placement.decode.name] += 1
            if not placement.overlap_blocks:
                store(workers, placement.decode, block_hashes(PROMPT[:64], 16))
    assert max(placed.values()) - min(placed.values()) <= 2
    assert all(instance(workers, each).load.sequences == 0 for each in D)


def test_equally_good_workers_take_turns() -> None:
    router = Router(roster(*D), Weights())
    assert Counter(router.place(PROMPT).decode.name for _ in range(40)) == {each.name: 10 for each in D}


def test_round_robin_and_least_loaded_ignore_prefixes() -> None:
    workers = roster(*D)
    store(workers, D[0], block_hashes(PROMPT, 16))
    turns = Router(workers, Weights(mode="round_robin"))
    assert [turns.place(PROMPT).decode.name for _ in range(5)] == [D[i % 4].name for i in range(5)]
    for i, each in enumerate(D):
        workers.take_report(report(each, 1, queued_tokens=4000 - 1000 * i))
    least = Router(workers, Weights(mode="least_loaded"))
    placement = least.place(PROMPT)
    assert placement.decode == D[3]
    assert placement.reason.startswith("least loaded: decode-3; ")
    assert placement.holder == Holder(D[0].incarnation, 304), "it may be pulled nevertheless"
    for each in D[1:]:
        workers.take_report(report(each, 2, running=1))
    assert least.place(PROMPT).decode == D[0], "the fewest requests come first"


def test_random_placement_repeats_with_its_seed_and_leaves_nobody_out() -> None:
    names = [
        [Router(roster(*D), Weights(mode="random"), seed=seed).place(PROMPT).decode.name for seed in range(20)]
        for _ in range(2)
    ]
    assert names[0] == names[1]
    assert set(names[0]) == {each.name for each in D}


def test_temperature_lets_a_dearer_worker_have_some_requests() -> None:
    workers = roster(D[0], D[1])
    store(workers, D[0], block_hashes(PROMPT[:64], 16))
    router = Router(workers, Weights(temperature=0.5), seed=1)
    counts = Counter(router.place(PROMPT).decode.name for _ in range(200))
    assert counts["decode-0"] > counts["decode-1"] > 20


def test_the_block_that_ends_a_prompt_is_no_hit_since_its_last_token_is_computed() -> None:
    workers = roster(D[0])
    store(workers, D[0], block_hashes(PROMPT, 16))
    router = Router(workers, Weights())
    assert router.place(PROMPT).overlap_blocks == 19
    assert router.place([*PROMPT, 5]).overlap_blocks == 20
    assert router.place(PROMPT, cache_salt="tenant").overlap_blocks == 0


def test_workers_of_other_block_sizes_are_matched_by_their_own_hashes() -> None:
    coarse = record("decode-9", block_size=32)
    workers = roster(D[0], coarse)
    store(workers, coarse, block_hashes(PROMPT[:160], 32))
    placement = Router(workers, Weights()).place(PROMPT)
    assert (placement.decode, placement.overlap_blocks, placement.prompt_blocks) == (coarse, 5, 10)


def test_excluded_and_lost_workers_are_passed_over_until_none_is_left() -> None:
    workers = roster(D[0], D[1], *P)
    router = Router(workers, Weights())
    assert router.place(PROMPT, exclude={D[0].incarnation}).decode == D[1]
    workers.lost(D[1].incarnation)
    with pytest.raises(NoInstance) as caught:
        router.place(PROMPT, exclude={D[0].incarnation})
    assert (caught.value.role, caught.value.tried) == ("decode", 1)


def test_an_aggregated_worker_decodes_without_prefill_workers() -> None:
    placement = Router(roster(record("both-0", Role.BOTH), *P), Weights()).place(PROMPT)
    assert (placement.decode.name, placement.prefill) == ("both-0", ())


def test_prefill_candidates_are_few_and_the_idle_ones_take_turns() -> None:
    router = Router(roster(D[0], *P), Weights(prefill_candidates=2))
    firsts = [router.place(PROMPT).prefill for _ in range(6)]
    assert all(len(candidates) == 2 for candidates in firsts)
    assert Counter(candidates[0].name for candidates in firsts) == {each.name: 2 for each in P}


def test_the_missing_tokens_are_the_prefill_workers_queue_until_the_first_token() -> None:
    prefill = record("prefill-0", Role.PREFILL, block_size=64)
    workers = roster(D[0], prefill)
    store(workers, prefill, block_hashes(PROMPT[:128], 64))
    store(workers, D[0], block_hashes(PROMPT[:64], 16))
    placement = Router(workers, Weights()).place(PROMPT)
    decode, computes = instance(workers, D[0]).load, instance(workers, prefill).load
    with placement.booked():
        assert (decode.queued_tokens(1e9), decode.sequences, decode.used_blocks) == (0, 1, 20)
        assert (round(computes.queued_tokens(1e9)), computes.sequences, computes.used_blocks) == (192, 1, 3)
        placement.observed(0)
        assert (decode.sequences, computes.sequences, computes.used_blocks) == (1, 0, 0)
    assert (decode.sequences, decode.used_blocks) == (0, 0)


def test_without_prefill_workers_the_decode_worker_computes_what_is_missing() -> None:
    workers = roster(D[0])
    store(workers, D[0], block_hashes(PROMPT[:64], 16))
    with Router(workers, Weights()).place(PROMPT).booked():
        assert round(instance(workers, D[0]).load.queued_tokens(1e9)) == 256


def test_the_prefill_worker_that_holds_the_prefix_goes_first_unless_its_queue_is_too_long() -> None:
    workers = roster(D[0], *P)
    store(workers, P[1], block_hashes(PROMPT[:192], 16))
    router = Router(workers, Weights())
    assert router.place(PROMPT).prefill[0] == P[1]
    workers.take_report(report(P[1], 1, queued_tokens=50_000))
    assert router.place(PROMPT).prefill[-1] == P[1]


def test_with_all_prefill_workers_behind_the_decode_worker_computes() -> None:
    workers = roster(D[0], *P)
    for each in P:
        workers.take_report(report(each, 1, queued_tokens=5000))
    placement = Router(workers, Weights()).place(PROMPT)
    assert placement.prefill == ()
    assert placement.computes == D[0].incarnation


def test_a_prefill_worker_that_cannot_push_to_the_decode_worker_is_no_candidate() -> None:
    other = record("prefill-9", Role.PREFILL, dtype="fp8_e4m3")
    placement = Router(roster(D[0], other, P[0]), Weights()).place(PROMPT)
    assert [each.name for each in placement.prefill] == ["prefill-0"]


def test_a_worker_that_is_slower_gets_what_it_does_not_hold_only_when_others_are_busy() -> None:
    slow = record("decode-9", tensor_parallel=2)
    workers = roster(D[0], slow)
    workers.take_report(report(D[0], 1, rates=Rates(prefill=(1.0, 0.1))))
    workers.take_report(report(slow, 1, rates=Rates(prefill=(1.0, 1.0))))
    router = Router(workers, Weights())
    assert router.place(PROMPT).decode == D[0]
    workers.take_report(report(D[0], 2, rates=Rates(prefill=(1.0, 0.1)), queued_tokens=100_000))
    assert router.place(PROMPT).decode == slow


def test_while_a_workers_blocks_are_unknown_its_own_decisions_tell_what_it_ought_to_hold() -> None:
    workers = roster(D[0], D[1])
    router = Router(workers, Weights())
    for each in D[:2]:
        workers.take_batch(KvEventBatch(each.incarnation, 5, ()))  # others before it were lost
    first = router.place(PROMPT)
    again = [router.place([*PROMPT, 1, 2]) for _ in range(4)]
    assert {one.decode for one in again} == {first.decode}
    assert again[0].overlap_blocks == 20
    workers.take_snapshot(KvSnapshot(first.decode.incarnation, 5, {}))
    assert router.place(PROMPT).overlap_blocks == 0, "the worker itself knows better"


def test_predicted_minus_actual_hits_are_measured() -> None:
    workers = roster(D[0])
    store(workers, D[0], block_hashes(PROMPT[:160], 16))
    placement = Router(workers, Weights()).place(PROMPT)
    placement.observed(cached_tokens=64)
    assert metrics.MISPREDICTED_BLOCKS._value.get() == 6


@pytest.mark.parametrize("length", [1, 2, 15, 16])
def test_a_prompt_shorter_than_a_block_is_placed(length: int) -> None:
    assert Router(roster(D[0]), Weights()).place(PROMPT[:length]).prompt_blocks == 1


def test_of_two_workers_with_the_prefix_the_one_that_has_it_on_its_device_is_chosen() -> None:
    workers = roster(D[0], D[1])
    hashes = block_hashes(PROMPT[:192], 16)
    store(workers, D[0], [*hashes[:4], *range(8)])
    store(workers, D[0], hashes, Tier.HOST)
    store(workers, D[1], hashes)
    placement = Router(workers, Weights()).place(PROMPT)
    assert placement.decode == D[1]
    assert placement.scores["decode-1"] < placement.scores["decode-0"] < 1.1 * placement.scores["decode-1"]
    alone = Router(workers, Weights()).place(PROMPT, exclude=[D[1].incarnation])
    assert alone.reason.startswith("prefix 12/20 blocks (8 in host memory) on decode-0")


@pytest.mark.parametrize("role", list(Role))
def test_a_request_placed_elsewhere_names_the_worker_of_any_role_that_holds_its_prefix(role: Role) -> None:
    holder = record("holder-0", role)
    workers = roster(D[0], D[1], holder)
    store(workers, holder, block_hashes(PROMPT[:192], 16))
    store(workers, D[1], block_hashes(PROMPT[:64], 16))
    placement = Router(workers, Weights()).place(PROMPT, exclude={D[1].incarnation})
    if role.decodes:
        assert (placement.decode, placement.holder) == (holder, None), "it is placed on the holder itself"
        workers.take_report(report(holder, 1, queued_tokens=100_000))
        placement = Router(workers, Weights()).place(PROMPT, exclude={D[1].incarnation})
    assert placement.decode == D[0]
    assert placement.holder == Holder(holder.incarnation, 192)


def test_what_a_holder_has_counts_in_tokens_whatever_its_block_size_and_its_tier() -> None:
    coarse = record("prefill-0", Role.PREFILL, block_size=64)
    workers = roster(D[0], coarse)
    hashes = block_hashes(PROMPT, 64)
    store(workers, D[0], block_hashes(PROMPT[:208], 16))
    store(workers, coarse, hashes[:1])
    store(workers, coarse, hashes[:3], Tier.HOST)
    router = Router(workers, Weights())
    assert router.place(PROMPT).holder is None, "192 tokens there, 208 here"
    store(workers, coarse, hashes[:4], Tier.HOST)
    assert router.place(PROMPT).holder == Holder(coarse.incarnation, 256)
    assert router.place([*PROMPT[:256]]).holder is None, "the block that ends a prompt is computed in any case"
    assert router.place(PROMPT, cache_salt="tenant").holder is None


def test_of_equal_holders_one_that_has_the_prefix_on_its_device_goes_first_and_then_one_that_is_idle() -> None:
    workers = roster(D[0], *P)
    hashes = block_hashes(PROMPT[:192], 16)
    for each in P:
        store(workers, each, hashes, Tier.HOST if each is P[0] else Tier.DEVICE)
    workers.take_report(report(P[1], 1, used=50, running=5))
    router = Router(workers, Weights())
    assert router.place(PROMPT).holder == Holder(P[2].incarnation, 192)
    assert router.place(PROMPT, exclude={P[2].incarnation}).holder == Holder(P[1].incarnation, 192)
    workers.take_report(report(P[2], 1, draining=True))
    workers.lost(P[1].incarnation)
    assert router.place(PROMPT).holder == Holder(P[0].incarnation, 192)


def test_a_worker_whose_kv_cannot_be_used_is_no_holder() -> None:
    other = record("prefill-0", Role.PREFILL, dtype="fp8_e4m3")
    workers = roster(D[0], other)
    store(workers, other, block_hashes(PROMPT, 16))
    assert Router(workers, Weights()).place(PROMPT).holder is None
