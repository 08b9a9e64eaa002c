"""The keeper with real, tiny children."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from dynamo_lite.errors import StartError
from dynamo_lite.keeper import Keeper
from dynamo_lite.processes import Child
from dynamo_lite.status import STATUS_FD

PRELUDE = """
import os, signal, sys, time
from dynamo_lite.status import Status
status = Status()
"""
SERVES = "status.phase('loading', 'weights')\nstatus.phase('ready')\nsignal.pause()\n"
DEADLINE_S = 20.0


class Told:
    """What a keeper tells, to be awaited."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, str]] = []
        self._changed = asyncio.Event()

    def __call__(self, name: str, phase: str, detail: str) -> None:
        self.phases.append((phase, detail))
        self._changed.set()

    async def until(self, phase: str, times: int = 1) -> str:
        """The detail of the last one, once `phase` was told so many times."""
        async with asyncio.timeout(DEADLINE_S):
            while len(details := [detail for told, detail in self.phases if told == phase]) < times:
                self._changed.clear()
                await self._changed.wait()
        return details[-1]


def keeper(tmp_path: Path, told: Told, code: str, *, silence_s: float = 15.0, grace_s: float = 5.0) -> Keeper:
    def spawn(writing_end: int) -> Child:
        environment = os.environ | {STATUS_FD: str(writing_end)}
        argv = [sys.executable, "-c", PRELUDE + code]
        return Child.start("part", argv, tmp_path / "part.log", env=environment, pass_fds=[writing_end])

    return Keeper("part", spawn, told, grace_s, silence_s=silence_s)


@asynccontextmanager
async def kept(part: Keeper) -> AsyncIterator[asyncio.Task[object]]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(part.run())
        try:
            yield task
        finally:
            task.cancel()


def pid_of(part: Keeper) -> int:
    assert part.child is not None
    return part.child.pid


async def test_a_part_goes_through_its_phases_to_ready(tmp_path: Path) -> None:
    told = Told()
    part = keeper(tmp_path, told, SERVES)
    async with kept(part):
        await told.until("ready")
        assert part.ready.is_set()
        assert told.phases == [("starting", ""), ("loading", "weights"), ("ready", "")]


async def test_a_part_that_was_killed_is_started_again_and_told_why(tmp_path: Path) -> None:
    told = Told()
    part = keeper(tmp_path, told, SERVES)
    async with kept(part):
        await told.until("ready")
        first = pid_of(part)
        os.kill(first, signal.SIGKILL)
        detail = await told.until("failed")
        assert detail == f"killed by SIGKILL; starts again in 0.5 s (log: {tmp_path / 'part.log'})"
        await told.until("ready", times=2)
        assert pid_of(part) != first
        assert part.starts == 2


async def test_a_part_that_hangs_is_ended_and_started_again(tmp_path: Path) -> None:
    told = Told()
    part = keeper(tmp_path, told, SERVES, silence_s=0.3)
    async with kept(part):
        assert "no sign of life for 0.3 s" in await told.until("failed")
        await told.until("ready", times=2)


async def test_heartbeats_keep_a_part_alive(tmp_path: Path) -> None:
    told = Told()
    beats = "status.phase('ready')\nfor _ in range(12):\n time.sleep(0.1)\n os.write(status._fd, b'{}\\n')\n"
    part = keeper(tmp_path, told, beats + "status.phase('failed', 'enough')\nsys.exit(1)\n", silence_s=0.9)
    async with kept(part):
        assert (await told.until("failed")).startswith("enough;")


async def test_a_part_that_never_gets_ready_fails_the_start_with_its_own_sentence(tmp_path: Path) -> None:
    part = keeper(tmp_path, Told(), "status.phase('failed', 'no such GPU')\nsys.exit(1)\n")
    with pytest.raises(StartError) as caught:
        await part.run()
    assert str(caught.value) == f"part: no such GPU (log: {tmp_path / 'part.log'})"


async def test_a_part_that_ends_without_a_word_is_explained_by_its_log(tmp_path: Path) -> None:
    part = keeper(tmp_path, Told(), "print('out of cheese', flush=True)\nsys.exit(3)\n")
    with pytest.raises(StartError, match="part: exited with 3, last said: out of cheese"):
        await part.run()


async def test_what_is_no_status_on_the_pipe_is_ignored(tmp_path: Path) -> None:
    told = Told()
    part = keeper(tmp_path, told, "os.write(status._fd, b'hello\\n{\"phase\": 5}\\n')\n" + SERVES)
    async with kept(part):
        await told.until("ready")


async def test_ending_a_part_lets_it_finish_within_its_grace(tmp_path: Path) -> None:
    told = Told()
    code = "signal.signal(signal.SIGTERM, lambda *_: (print('finished', flush=True), sys.exit(0)))\n" + SERVES
    part = keeper(tmp_path, told, code)
    async with kept(part):
        await told.until("ready")
    assert part.child is not None
    assert part.child.exit_code == 0
    assert (tmp_path / "part.log").read_text() == "finished\n"


async def test_a_part_that_does_not_finish_is_killed_after_its_grace(tmp_path: Path) -> None:
    told = Told()
    part = keeper(tmp_path, told, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SERVES, grace_s=0.2)
    async with kept(part):
        await told.until("ready")
    assert part.child is not None
    assert part.child.exit_code == -signal.SIGKILL


async def test_killing_skips_the_grace(tmp_path: Path) -> None:
    told = Told()
    part = keeper(tmp_path, told, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SERVES, grace_s=60.0)
    async with kept(part) as task:
        await told.until("ready")
        task.cancel()
        part.kill()
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.wait([task])
    assert part.child is not None
    assert part.child.exit_code == -signal.SIGKILL


async def test_a_closed_status_pipe_does_not_end_a_part(tmp_path: Path) -> None:
    told = Told()
    part = keeper(tmp_path, told, "status.phase('ready')\nos.close(status._fd)\nsignal.pause()\n", silence_s=0.5)
    async with kept(part):
        assert "no sign of life" in await told.until("failed")


async def test_a_part_that_says_it_is_drained_is_not_started_again(tmp_path: Path) -> None:
    told = Told()
    part = keeper(tmp_path, told, "status.phase('ready')\nstatus.phase('draining')\nstatus.phase('drained')\n")
    async with kept(part):
        await told.until("drained")
        assert part.starts == 1
        assert part.child is None
        assert not part.ready.is_set()
