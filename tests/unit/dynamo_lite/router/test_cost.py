"""Scores, ties and sentences."""

from __future__ import annotations

from collections import Counter

import pytest

from dynamo_lite.config import Router, TierWeights
from dynamo_lite.router.cost import Candidate, cheapest, reason, score
from kvbm.events import Tier

A = Candidate("decode-0", 20, 12, 3.0)
B = Candidate("decode-1", 20, 0, 5.0)


def test_kv_weighs_missing_blocks_and_load() -> None:
    assert score(A, Router()) == 8 + 3
    assert score(A, Router(overlap_weight=2.0, load_weight=0.5)) == 16 + 1.5


def test_a_block_in_a_tier_costs_a_part_of_a_missing_one() -> None:
    tiered = Candidate("decode-0", 20, 12, 3.0, ((Tier.HOST, 4), (Tier.OBJECT, 4)))
    weights = TierWeights(host=0.25, object=0.5)
    assert score(tiered, Router(tier_weights=weights)) == 8 + 1 + 2 + 3
    assert score(tiered, Router(tier_weights=weights, overlap_weight=2.0)) == 22 + 3


def test_a_nearer_tier_is_preferred_to_a_farther_one_and_both_to_computing() -> None:
    places = [(), ((Tier.HOST, 12),), ((Tier.DISK, 12),), ((Tier.OBJECT, 12),)]
    scores = [score(Candidate("d", 20, 12, 0.0, place), Router()) for place in places]
    assert scores == sorted(scores)
    assert scores[-2] < score(Candidate("d", 20, 0, 0.0), Router())
    assert scores[-1] == score(Candidate("d", 20, 0, 0.0), Router()), "every worker has it alike"


def test_least_loaded_ignores_prefixes_and_round_robin_everything() -> None:
    assert score(A, Router(mode="least_loaded")) == 3.0
    assert score(A, Router(mode="round_robin")) == score(B, Router(mode="round_robin"))


def test_ties_take_turns() -> None:
    assert Counter(cheapest([1.0, 0.5, 0.5, 2.0], turn) for turn in range(10)) == {1: 5, 2: 5}


@pytest.mark.parametrize(
    ("candidates", "chosen", "mode", "sentence"),
    [
        ([A, B], 0, "kv", "prefix 12/20 blocks on decode-0; load 3.0 vs 5.0"),
        ([A, B], 1, "kv", "no prefix of 20 blocks on decode-1, though decode-0 has 12 at load 3.0; load 5.0 vs 3.0"),
        ([A], 0, "kv", "prefix 12/20 blocks on decode-0; load 3.0"),
        (
            [Candidate("d", 9, 7, 1.0, ((Tier.HOST, 2), (Tier.DISK, 1)))],
            0,
            "kv",
            "prefix 7/9 blocks (2 in host memory, 1 on disk) on d; load 1.0",
        ),
        ([A, B], 0, "least_loaded", "least loaded: decode-0; load 3.0 vs 5.0"),
        ([A, B], 1, "round_robin", "round robin over 2: decode-1"),
    ],
)
def test_the_reason_is_a_sentence(candidates: list[Candidate], chosen: int, mode: str, sentence: str) -> None:
    assert reason(candidates, chosen, Router.model_validate({"mode": mode})) == sentence
