"""A sequence's first token where a prefill worker chooses it: the client has it before the KV has arrived here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TypeVar

from dynamo_lite.plane.wire import Sampling

T = TypeVar("T")


def may_be_chosen_elsewhere(sampling: Sampling) -> bool:
    """Whether the sequence can go on from a first token that another engine chose, with nothing changed.

    Not with a seed, whose random numbers one engine counts; with penalties on output tokens, among which this one
    would not be; with log-probabilities, which come with the token; or where there is no second token.
    """
    seeded = sampling.seed is not None and sampling.temperature > 0
    penalised = sampling.presence_penalty or sampling.frequency_penalty
    return not (seeded or penalised or sampling.logprobs is not None or sampling.max_tokens < 2)


async def results_after(
    results: AsyncGenerator[T, None], first_token: asyncio.Future[int] | None
) -> AsyncGenerator[T | int, None]:
    """The first token as soon as it is known, and the engine's results, which then begin with the second.

    Where the engine has a result before any such token, it has gone on by itself.
    """
    if first_token is not None:
        result = asyncio.ensure_future(anext(results))
        try:
            await asyncio.wait((result, first_token), return_when=asyncio.FIRST_COMPLETED)
            if first_token.done():
                yield first_token.result()
            try:
                yield await result
            except StopAsyncIteration:
                return
        finally:
            result.cancel()
            await asyncio.wait((result,))
            if not result.cancelled():
                result.exception()  # if any, nobody wants to know of it any more
    async for later in results:
        yield later
