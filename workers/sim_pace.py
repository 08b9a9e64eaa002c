"""How long simulated work takes."""

from __future__ import annotations

import asyncio
import math

from dynamo_lite.config import Sim

_SHORTEST_S = 0.0005  # timers are no finer than about a millisecond; shorter steps are only accounted for
_CATCH_UP_S = 0.02


class Pace:
    """Sleeps through steps. What one sleep took too long, the next are shortened by, so the mean is right."""

    def __init__(self, sim: Sim) -> None:
        self._token_s = sim.prefill_ms_per_token / 1000
        self._decode_s = sim.decode_step_ms / 1000
        self._block_s = sim.transfer_ms_per_block / 1000
        self._until = 0.0  # when the last step should have ended

    async def step(self, prefill_tokens: int, decoding: bool) -> None:
        """One step of a batch; a prefill and decodes in one step add up."""
        now = asyncio.get_running_loop().time()
        self._until = max(self._until, now - _CATCH_UP_S) + self.seconds(prefill_tokens, decoding)
        delay = self._until - now
        await asyncio.sleep(delay if delay >= _SHORTEST_S else 0)

    async def steps(self, most: int, work: asyncio.Event) -> int:
        """Up to `most` decode steps, the one under way being the last once there is `work`; returns how many."""
        if not self._decode_s:
            await asyncio.sleep(0)
            return most
        loop = asyncio.get_running_loop()
        begin = max(self._until, loop.time() - _CATCH_UP_S)
        done = most
        try:
            async with asyncio.timeout_at(begin + most * self._decode_s):
                await work.wait()
            done = min(most, max(1, math.ceil((loop.time() - begin) / self._decode_s)))
        except TimeoutError:
            pass
        self._until = begin + done * self._decode_s
        await asyncio.sleep(max(0.0, self._until - loop.time()))
        return done

    def seconds(self, prefill_tokens: int, decoding: bool) -> float:
        """Of one step."""
        return prefill_tokens * self._token_s + (self._decode_s if decoding else 0.0)

    def idle(self) -> None:
        """There was nothing to do, so nothing to catch up with."""
        self._until = asyncio.get_running_loop().time()

    def transfer_s(self, blocks: int) -> float:
        return blocks * self._block_s
