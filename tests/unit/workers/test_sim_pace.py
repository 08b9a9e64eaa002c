"""How long steps take, and how many fit into a time."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_lite.config import Sim
from dynamo_lite.config_file import load_config
from workers.sim_pace import Pace, StepTimes, Work
from workers.simulate.clock import VirtualTimeLoop

H100 = StepTimes(load_config(Path(__file__).parents[3] / "configs" / "simulate.yaml").sim)


def prompt(tokens: int) -> Work:
    return Work(tokens, tokens * (tokens - 1) // 2)


@pytest.mark.parametrize(("tokens", "ms"), [(512, 16.0), (2048, 53.0), (4096, 102.4)])
def test_prompts_take_what_was_measured_on_an_h100(tokens: int, ms: float) -> None:
    assert H100.once(prompt(tokens)) * 1e3 == pytest.approx(ms, rel=0.02)


@pytest.mark.parametrize(("batch", "tokens_s"), [(1, 153), (32, 4318), (128, 12_636)])
def test_batches_decode_as_fast_as_was_measured_on_an_h100(batch: int, tokens_s: float) -> None:
    assert batch / H100.once(Work(decodes=batch)) == pytest.approx(tokens_s, rel=0.01)


def test_prompts_and_decodes_in_one_step_add_up() -> None:
    both = Work(100, 4950, 3, 900)
    assert H100.once(both) == pytest.approx(H100.once(Work(100, 4950)) + H100.once(Work(0, 0, 3, 900)))
    assert H100.once(Work()) == 0


def test_a_step_that_has_more_context_takes_longer_and_so_do_steps_after_it() -> None:
    work = Work(decodes=4, context=1000)
    later = [Work(decodes=4, context=1000 + 4 * number) for number in range(50)]
    assert H100.times(work, 50) == pytest.approx(sum(map(H100.once, later)))


@given(
    st.floats(0, 20), st.floats(0, 1), st.floats(0, 50), st.integers(1, 64), st.integers(0, 10**6), st.integers(1, 400),
    st.floats(0.01, 0.99),
)  # fmt: skip
def test_in_the_midst_of_a_step_it_and_those_before_have_begun(
    step: float, each: float, context: float, decodes: int, tokens: int, count: int, part: float
) -> None:
    times = StepTimes(Sim(decode_step_ms=0.01 + step, decode_ms_per_sequence=each, decode_context_ms=context))
    work = Work(decodes=decodes, context=tokens)
    before, after = times.times(work, count - 1), times.times(work, count)
    assert times.begun(work, before + part * (after - before), 1000) == count
    assert times.begun(work, before + part * (after - before), 5) == min(count, 5)


def test_before_anything_has_passed_the_first_has_begun_and_steps_that_take_no_time_all_have() -> None:
    assert H100.begun(Work(decodes=1), 0.0, 9) == 1
    assert StepTimes(Sim(decode_step_ms=0)).begun(Work(decodes=1), 0.0, 9) == 9


def test_steps_at_once_end_with_the_one_in_which_a_request_comes() -> None:
    async def main() -> tuple[int, float]:
        pace, arrival, loop = Pace(Sim(decode_step_ms=10)), asyncio.Event(), asyncio.get_running_loop()
        pace.idle()
        loop.call_later(0.025, arrival.set)
        return await pace.steps(Work(decodes=1), 100, arrival), loop.time()

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        count, at = runner.run(main())
    assert count == 3
    assert at == pytest.approx(0.03)
