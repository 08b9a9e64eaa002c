"""What is believed of a worker's speed: its own word, others of its kind, or a guess that keeps the order right."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_lite.plane.wire import Line, Rates
from dynamo_lite.router.cost import Pace, line
from dynamo_lite.router.paces import ANSWER_TOKENS, pace
from kvbm.events import Tier

lines = st.none() | st.tuples(st.floats(0, 100), st.floats(0, 100))
onboarding = st.dictionaries(
    st.sampled_from((Tier.HOST, Tier.DISK, Tier.OBJECT)), st.tuples(st.floats(0, 9), st.floats(0, 9))
)
rates = st.builds(
    Rates, prefill=lines, step=lines, pull=lines, answer_tokens=st.none() | st.floats(1, 1000), onboard=onboarding
)


def test_before_anything_is_measured_computing_is_dearest_and_farther_tiers_are_dearer_than_nearer_ones() -> None:
    guess = pace(Rates(), ())
    onboard = [line(guess.onboard[tier], 1000) for tier in (Tier.HOST, Tier.DISK, Tier.OBJECT)]
    assert onboard == sorted(onboard)
    assert onboard[1] < line(guess.prefill, 1000)
    assert guess.pull is None
    assert guess.answer_tokens == ANSWER_TOKENS


def test_what_is_not_measured_of_tiers_follows_what_is_of_computing() -> None:
    slow = Rates(prefill=(1.0, 10.0))
    assert pace(slow, [slow]).onboard[Tier.HOST][1] == pytest.approx(0.5)


def test_a_worker_that_has_measured_nothing_is_like_others_of_its_kind() -> None:
    known = [Rates(prefill=(1.0, each)) for each in (0.1, 0.2, 0.4)]
    assert pace(Rates(), [*known, Rates()]).prefill == (1.0, 0.2)


def test_small_differences_between_workers_of_one_kind_are_noise_and_large_ones_are_not() -> None:
    kin = [Rates(prefill=(0.0, each)) for each in (0.10, 0.11, 0.12, 0.5)]
    believed = [pace(each, kin).prefill[1] for each in kin]
    assert believed == pytest.approx([0.115, 0.115, 0.115, 0.5])


@given(rates, st.lists(rates, max_size=4))
def test_whatever_is_reported_there_is_a_pace(own: Rates, others: list[Rates]) -> None:
    found = pace(own, [own, *others])
    assert isinstance(found, Pace)
    known: list[Line] = [found.prefill, found.step, found.transfer, *found.onboard.values()]
    assert all(value >= 0 for each in known for value in each)
    assert set(found.onboard) == {Tier.HOST, Tier.DISK, Tier.OBJECT}
    assert found.answer_tokens >= 1
