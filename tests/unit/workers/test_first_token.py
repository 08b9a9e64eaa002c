from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from dynamo_lite.plane.wire import Sampling
from workers.first_token import may_be_chosen_elsewhere, results_after

PLAIN = Sampling(max_tokens=8)


@pytest.mark.parametrize(
    "sampling",
    [
        PLAIN,
        Sampling(8, temperature=0, seed=4),  # nothing random is drawn
        Sampling(8, top_p=0.5, top_k=4, min_p=0.1, repetition_penalty=1.2, min_tokens=3, logit_bias={1: 4.0}),
    ],
)
def test_another_engine_may_choose_the_first_token_where_the_second_does_not_depend_on_who_did(
    sampling: Sampling,
) -> None:
    assert may_be_chosen_elsewhere(sampling)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(8, seed=4),
        Sampling(8, presence_penalty=0.1),
        Sampling(8, frequency_penalty=-0.1),
        Sampling(8, logprobs=0),
        Sampling(1),
    ],
)
def test_what_one_engine_has_to_count_from_the_start_it_chooses_itself(sampling: Sampling) -> None:
    assert not may_be_chosen_elsewhere(sampling)


class Results:
    """An engine's results, given by the test."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[str | None] = asyncio.Queue()
        self.closed = False

    async def stream(self) -> AsyncGenerator[str, None]:
        try:
            while (result := await self.queue.get()) is not None:
                yield result
        finally:
            self.closed = True

    def give(self, *results: str | None) -> None:
        for result in results:
            self.queue.put_nowait(result)


async def everything(results: AsyncGenerator[str | int, None]) -> list[str | int]:
    async with asyncio.timeout(5):
        return [result async for result in results]


async def test_the_first_token_does_not_wait_for_the_engine() -> None:
    engine, first = Results(), asyncio.get_running_loop().create_future()
    results = results_after(engine.stream(), first)
    first.set_result(7)
    assert await anext(results) == 7
    engine.give("second", "third", None)
    assert await everything(results) == ["second", "third"]


async def test_without_a_first_token_everything_is_the_engines() -> None:
    engine, first = Results(), asyncio.get_running_loop().create_future()
    engine.give("first", "second", None)
    assert await everything(results_after(engine.stream(), first)) == ["first", "second"]
    engine = Results()
    engine.give("first", None)
    assert await everything(results_after(engine.stream(), None)) == ["first"]


async def test_a_first_token_that_comes_together_with_the_engines_result_still_is_the_first() -> None:
    engine, first = Results(), asyncio.get_running_loop().create_future()
    engine.give("second", None)
    first.set_result(7)
    assert await everything(results_after(engine.stream(), first)) == [7, "second"]


async def test_an_engine_that_fails_is_heard_after_the_first_token() -> None:
    async def failing() -> AsyncGenerator[str, None]:
        raise ValueError("too long")
        yield ""

    first = asyncio.get_running_loop().create_future()
    with pytest.raises(ValueError, match="too long"):
        await everything(results_after(failing(), first))


@pytest.mark.parametrize("told", [True, False])
async def test_closing_early_ends_the_engines_stream(told: bool) -> None:
    engine, first = Results(), asyncio.get_running_loop().create_future()
    stream = engine.stream()
    results = results_after(stream, first)
    waiting = asyncio.ensure_future(anext(results))
    await asyncio.sleep(0)
    if told:
        first.set_result(7)
        assert await waiting == 7
    else:
        waiting.cancel()
        await asyncio.wait((waiting,))
    await results.aclose()
    await stream.aclose()
    assert engine.closed
