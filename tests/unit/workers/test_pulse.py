from __future__ import annotations

import asyncio
import time

import pytest

from dynamo_lite.errors import PrefillFailed
from dynamo_lite.tasks import background
from workers.pulse import Pulse

SILENCE_S = 0.2
WAIT_S = 5.0


class Connectors:
    """Two of them, which answer every probe unless they are frozen."""

    def __init__(self) -> None:
        self.frozen: set[int] = set()
        self.pulse = Pulse((-1, 0), self._probe, SILENCE_S)

    def _probe(self) -> None:
        for rank in {-1, 0} - self.frozen:
            self.pulse.alive(rank)


async def test_nothing_ends_while_all_connectors_answer() -> None:
    connectors = Connectors()
    async with background(connectors.pulse.watch()), connectors.pulse.required():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3 * SILENCE_S):
                await asyncio.Event().wait()
        async with asyncio.timeout(WAIT_S):
            await connectors.pulse.answering()


@pytest.mark.parametrize("rank", [-1, 0])
async def test_what_needs_the_engine_ends_when_one_connector_falls_silent(rank: int) -> None:
    connectors = Connectors()
    async with background(connectors.pulse.watch()):
        started = time.monotonic()
        connectors.frozen.add(rank)
        with pytest.raises(PrefillFailed) as failed:
            async with asyncio.timeout(WAIT_S), connectors.pulse.required():
                await asyncio.Event().wait()
        assert failed.value.cause == "engine_silent"
        assert time.monotonic() - started >= SILENCE_S
        with pytest.raises(PrefillFailed):  # nor does anything begin
            async with connectors.pulse.required():
                raise AssertionError("the engine is silent")
        connectors.frozen.clear()
        async with asyncio.timeout(WAIT_S):
            await connectors.pulse.answering()
        async with connectors.pulse.required():
            pass


async def test_a_deadline_of_ones_own_is_told_from_silence() -> None:
    connectors = Connectors()
    async with background(connectors.pulse.watch()):
        with pytest.raises(TimeoutError):
            async with connectors.pulse.required(), asyncio.timeout(0.01):
                await asyncio.Event().wait()


async def test_the_time_this_process_stood_still_is_not_the_engine_s_silence() -> None:
    connectors = Connectors()
    async with background(connectors.pulse.watch()), connectors.pulse.required():
        await asyncio.sleep(0)
        time.sleep(3 * SILENCE_S)  # noqa: ASYNC251  # as if frozen: no probe, hence no answer
        async with asyncio.timeout(WAIT_S):
            await connectors.pulse.answering()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SILENCE_S / 2):
                await asyncio.Event().wait()
