"""A clock that jumps."""

from __future__ import annotations

import asyncio
import time

import pytest

from workers.simulate.clock import VirtualTimeLoop


def test_an_hour_passes_at_once_and_timers_come_in_order() -> None:
    async def main() -> list[tuple[str, float]]:
        clock, seen = asyncio.get_running_loop().time, list[tuple[str, float]]()

        async def wait(name: str, seconds: float) -> None:
            await asyncio.sleep(seconds)
            seen.append((name, clock()))

        async with asyncio.TaskGroup() as group:
            for name, seconds in (("hour", 3600.0), ("now", 0.0), ("minute", 60.0)):
                group.create_task(wait(name, seconds))
        return seen

    began = time.monotonic()
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        assert runner.run(main()) == [("now", 0.0), ("minute", 60.0), ("hour", 3600.0)]
    assert time.monotonic() - began < 60


def test_a_deadline_passes_in_virtual_time() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        assert runner.run(main()) == 30


def test_waiting_for_what_can_never_come_is_an_error() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    loop = VirtualTimeLoop()
    task = loop.create_task(main())
    with pytest.raises(RuntimeError, match="could ever happen"):
        loop.run_until_complete(task)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(task)
    loop.close()
