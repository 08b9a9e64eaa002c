"""Every decision in a sentence, and in full."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dynamo_lite.config import RouterMode
from dynamo_lite.router.cost import Pace, Prompt, Usual, Worker, predict, prefill
from dynamo_lite.router.explain import Considered
from kvbm.events import Tier

TIERS = {Tier.HOST: (0.0, 0.01), Tier.DISK: (0.0, 0.02), Tier.OBJECT: (0.0, 0.1)}
PACE = Pace((0.0, 0.1), (10.0, 0.0), (3.0, 0.0), (1.0, 0.001), TIERS, 100.0)
A, B, P = (Worker(name, PACE) for name in ("decode-0", "decode-1", "prefill-0"))
USUAL = Usual(0.0, 0.0)  # so that work weighs nothing
LONG, SHORT, NONE = Prompt(320, 16, 192), Prompt(320, 16, 64), Prompt(320, 16)


def considered(*pairs: tuple[Worker, Prompt], chosen: int = 0, mode: RouterMode = "kv", pulled: int = 0) -> Considered:
    workers, prompts = zip(*pairs, strict=True)
    predictions = [predict(worker, prompt, USUAL, None, pulled) for worker, prompt in pairs]
    return Considered(mode, workers, prompts, predictions, chosen)


BEHIND = replace(B, queued_tokens=5.0)
TIERED = Prompt(140, 16, 112, ((Tier.HOST, 32), (Tier.DISK, 16)))


@pytest.mark.parametrize(
    ("one", "placed", "predicted"),
    [
        (
            considered((A, LONG), (B, NONE)),
            "prefix 12/20 blocks on decode-0",
            "first token in 13 ms (prefill 13); cost 13, decode-1 32",
        ),
        (
            considered((A, LONG)),
            "prefix 12/20 blocks on decode-0",
            "first token in 13 ms (prefill 13); cost 13",
        ),
        (
            considered((A, LONG), (BEHIND, NONE), chosen=1),
            "no prefix of 20 blocks on decode-1, though decode-0 has 12",
            "first token in 32 ms (queue 0.5, prefill 32); cost 32, decode-0 13",
        ),
        (
            considered((A, TIERED)),
            "prefix 7/9 blocks (2 in host memory, 1 on disk) on decode-0",
            "first token in 3.4 ms (prefill 2.8, onboard 0.6); cost 3.4",
        ),
        (
            considered((A, NONE), pulled=304),
            "no prefix of 20 blocks on decode-0, the rest pulled",
            "first token in 2.9 ms (prefill 1.6, transfer 1.3); cost 2.9",
        ),
        (
            considered((A, NONE), (B, NONE), mode="least_loaded"),
            "least loaded: decode-0",
            "first token in 32 ms (prefill 32); cost 32, decode-1 32",
        ),
    ],
)
def test_the_reason_is_a_sentence(one: Considered, placed: str, predicted: str) -> None:
    assert one.reason() == f"{placed}; {predicted}"


def test_a_choice_without_a_cost_says_so() -> None:
    assert considered((A, LONG), (B, NONE), chosen=1, mode="round_robin").reason() == "round robin over 2: decode-1"
    assert considered((A, LONG), (B, NONE), mode="random").reason() == "random over 2: decode-0"


def test_a_prefill_worker_is_named() -> None:
    remote = prefill(P, NONE, USUAL)
    predictions = [predict(A, NONE, USUAL, remote)]
    placed, predicted, _ = Considered("kv", [A], [NONE], predictions, 0).reason().split("; ")
    assert placed == "no prefix of 20 blocks on decode-0, computed by prefill-0"
    assert predicted == "first token in 35 ms (prefill 32, transfer 3.0)"


def test_candidates_are_told_with_their_parts_the_cheapest_first() -> None:
    told = considered((A, NONE), (replace(B, queued_tokens=20, sequences=3), SHORT), chosen=1).candidates()
    assert [each.name for each in told] == ["decode-1", "decode-0"]
    assert (told[0].held_tokens, told[0].queued_tokens, told[0].sequences) == (64, 20, 3)
    assert sum(told[0].parts_ms.values()) == pytest.approx(told[0].cost_ms)
