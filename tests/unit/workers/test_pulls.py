"""What is pulled of a prompt: whole blocks of the asking worker's, if there are enough of them, and it pays."""

from __future__ import annotations

from typing import Literal

import pytest

from kvbm.policy import PullCost
from workers.pulls import Pulls


def pulls(mode: Literal["auto", "always", "never"] = "auto", cost: PullCost | None = None) -> Pulls:
    return Pulls(mode, 64, 32, 1000, 2.0, cost or PullCost())


@pytest.mark.parametrize(
    ("held", "prompt", "here", "end"),
    [
        (640, 1000, 0, 640),
        (640, 641, 320, 640),
        (640, 640, 320, 608),  # one token is left to compute
        (624, 1000, 0, 608),  # the holder's blocks are of 16 tokens, ours of 32
        (640, 1000, 576, 640),
        (640, 1000, 608, None),  # less than is asked for at all
        (640, 1000, 640, None),
        (48, 1000, 0, None),
    ],
)
def test_whole_blocks_are_pulled_up_to_what_is_held(held: int, prompt: int, here: int, end: int | None) -> None:
    pull = pulls().weigh(held, prompt, here, remote=False)
    assert (pull.tokens if pull is not None else None) == end
    assert pulls("never").weigh(held, prompt, here, remote=False) is None


def test_the_prediction_is_of_the_bytes_that_are_missing_here() -> None:
    cost = PullCost()
    cost.pulled(20_000, 0, 1.0, 1.0)
    cost.computed(640, 64.0)
    pull = pulls(cost=cost).weigh(640, 1000, 320, remote=False)
    assert pull is not None
    assert pull.forecast.pull_s == pytest.approx(0.5 + 36.0)
    assert pull.forecast.compute_s == pytest.approx(68.0)


def test_a_holder_is_waited_for_as_long_as_the_other_way_takes() -> None:
    cost = PullCost()
    unknown = pulls(cost=cost).weigh(640, 1000, 0, remote=False)
    cost.computed(1000, 1.0)
    known = pulls(cost=cost).weigh(640, 1000, 0, remote=False)
    assert unknown is not None
    assert known is not None
    assert (unknown.patience_s, known.patience_s) == (2.0, 1.0)


def test_a_pull_that_is_predicted_to_be_slower_is_made_only_where_it_always_is() -> None:
    cost = PullCost()
    cost.pulled(20_000, 0, 5.0, 1.0)
    cost.computed(1000, 1.0)
    chosen = {}
    for mode in ("auto", "always"):
        pull = pulls(mode, cost).weigh(640, 1000, 0, remote=False)
        assert pull is not None
        chosen[mode] = pull.chosen
    assert chosen == {"auto": False, "always": True}


def test_what_a_leaving_worker_has_generated_is_pulled_even_if_computing_it_would_be_faster() -> None:
    cost = PullCost()
    cost.pulled(20_000, 0, 5.0, 1.0)
    cost.computed(1000, 1.0)
    pull = pulls("auto", cost).weigh(640, 700, 0, remote=False, leaving=True)
    assert pull is not None
    assert (pull.tokens, pull.chosen, pull.patience_s) == (640, True, None)
    assert pulls("never", cost).weigh(640, 700, 0, remote=False, leaving=True) is None
