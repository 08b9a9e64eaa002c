"""Whether an engine's processes still run, by probes that their connectors answer on threads of their own.

An EngineCore may compute one step for as long as it likes: the mover answers meanwhile. Its silence therefore means
that the process is frozen, and nothing else tells: the worker process goes on answering pings, and vLLM waits for ever.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import NoReturn

from dynamo_lite.errors import PrefillFailed

ENGINE_SILENT = "engine_silent"  # cause of a prefill whose engine does not answer: it may go on when it wakes up
_INTERVAL_S = 0.2
_PROBES = 10  # within the longest silence, at least


class Pulse:
    """Of the connectors of `ranks`. Runs on the event loop."""

    def __init__(self, ranks: Iterable[int], probe: Callable[[], None], silence_s: float) -> None:
        """`probe` asks all of them to answer; a silence of `silence_s` is one too long."""
        self._heard = dict.fromkeys(ranks, time.monotonic())
        self._probe, self._longest_s = probe, silence_s
        self._answering = asyncio.Event()
        self._answering.set()
        self._limits: set[asyncio.Timeout] = set()  # of what cannot go on in silence

    def alive(self, rank: int) -> None:
        """That connector has answered."""
        self._heard[rank] = time.monotonic()

    @property
    def silence_s(self) -> float:
        """How long the quietest of them has been silent."""
        return time.monotonic() - min(self._heard.values())

    async def answering(self) -> None:
        """Returns at once while all of them answer, otherwise once they do again."""
        await self._answering.wait()

    @asynccontextmanager
    async def required(self) -> AsyncIterator[None]:
        """Ends the body with PrefillFailed when one of them falls silent."""
        if not self._answering.is_set():
            raise self._silent()
        try:
            async with asyncio.timeout(None) as limit:
                self._limits.add(limit)
                try:
                    yield
                finally:
                    self._limits.discard(limit)
        except TimeoutError:
            if not limit.expired():
                raise
            raise self._silent() from None

    def _silent(self) -> PrefillFailed:
        return PrefillFailed(ENGINE_SILENT, f"no sign of life for {self.silence_s:.1f} s")

    async def watch(self) -> NoReturn:
        self._heard = dict.fromkeys(self._heard, time.monotonic())
        interval_s = min(_INTERVAL_S, self._longest_s / _PROBES)
        while True:
            self._probe()
            due = time.monotonic() + interval_s
            await asyncio.sleep(interval_s)
            late_s = max(0.0, time.monotonic() - due)  # the time this process stood still is not their silence
            self._heard = {rank: heard + late_s for rank, heard in self._heard.items()}
            if self.silence_s <= self._longest_s:
                self._answering.set()
            elif self._answering.is_set():
                self._answering.clear()
                for limit in self._limits:
                    if not limit.expired():
                        limit.reschedule(asyncio.get_running_loop().time())
