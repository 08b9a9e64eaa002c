"""How long simulated work takes."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass

from dynamo_lite.config import Sim

_SHORTEST_S = 0.0005  # timers are no finer than about a millisecond; shorter steps are only accounted for
_CATCH_UP_S = 0.02


@dataclass(frozen=True, slots=True)
class Work:
    """One step of a batch."""

    tokens: int = 0  # of prompts
    before: int = 0  # tokens before each of them in its prompt, added up
    decodes: int = 0  # sequences that get their next token
    context: int = 0  # tokens of these sequences, added up


class StepTimes:
    """Seconds of steps. Prompts and decodes in one step add up."""

    def __init__(self, sim: Sim) -> None:
        self._prompts_s = sim.prefill_step_ms / 1000
        self._token_s = sim.prefill_ms_per_token / 1000
        self._before_s = sim.prefill_context_ms / 1e6
        self._decode_s = sim.decode_step_ms / 1000
        self._sequence_s = sim.decode_ms_per_sequence / 1000
        self._context_s = sim.decode_context_ms / 1e6

    def once(self, work: Work) -> float:
        seconds = 0.0
        if work.tokens:
            seconds += self._prompts_s + work.tokens * self._token_s + work.before * self._before_s
        if work.decodes:
            seconds += self._decode_s + work.decodes * self._sequence_s + work.context * self._context_s
        return seconds

    def times(self, work: Work, count: int) -> float:
        """So many steps, each with one token more of every sequence than the one before."""
        return count * self.once(work) + count * (count - 1) / 2 * work.decodes * self._context_s

    def begun(self, work: Work, seconds: float, most: int) -> int:
        """How many of up to `most` such steps have begun after that time, the one under way included; 1 at least."""
        once, more = self.once(work), work.decodes * self._context_s
        if once <= 0:
            return most
        first = once - more / 2  # `times` is first × count + more / 2 × count²
        count = 2 * seconds / (first + math.sqrt(first * first + 2 * more * seconds))
        return min(most, max(1, math.ceil(count)))


class Pace:
    """Sleeps through steps. What one sleep took too long, the next are shortened by, so the mean is right."""

    def __init__(self, sim: Sim) -> None:
        self.times = StepTimes(sim)
        self._block_s = sim.transfer_ms_per_block / 1000
        self._until = 0.0  # when the last step should have ended

    async def step(self, seconds: float) -> None:
        """One step of a batch."""
        now = asyncio.get_running_loop().time()
        self._until = max(self._until, now - _CATCH_UP_S) + seconds
        delay = self._until - now
        await asyncio.sleep(delay if delay >= _SHORTEST_S else 0)

    async def steps(self, work: Work, most: int, arrival: asyncio.Event) -> int:
        """Up to `most` decode steps, the one under way being the last once there is an `arrival`; returns how many."""
        if not self.times.once(work):
            await asyncio.sleep(0)
            return most
        loop = asyncio.get_running_loop()
        begin = max(self._until, loop.time() - _CATCH_UP_S)
        done = most
        try:
            async with asyncio.timeout_at(begin + self.times.times(work, most)):
                await arrival.wait()
            done = self.times.begun(work, loop.time() - begin, most)
        except TimeoutError:
            pass
        self._until = begin + self.times.times(work, done)
        await asyncio.sleep(max(0.0, self._until - loop.time()))
        return done

    def idle(self) -> None:
        """There was nothing to do, so nothing to catch up with."""
        self._until = asyncio.get_running_loop().time()

    def transfer_s(self, blocks: int) -> float:
        return blocks * self._block_s
