"""Keeps one child process running: hears its status, restarts it when it dies or hangs, ends it at last."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import msgspec

from dynamo_lite.errors import StartError
from dynamo_lite.processes import Child, describe_exit, running, tail
from dynamo_lite.status import Phase, parse_line

START_DEADLINE_S = 1800.0  # weights of a large model come from a slow disk
SILENCE_S = 15.0  # a process that is ready and says nothing for so long hangs
FIRST_DELAY_S, LAST_DELAY_S = 0.5, 30.0
HEALTHY_S = 60.0  # who was ready for so long starts with the first delay again

Spawn = Callable[[int], Child]  # given the writing end of the status pipe
Tell = Callable[[str, Phase, str], None]


@dataclass(slots=True)
class Backoff:
    """How long to wait before the next start."""

    delay_s: float = FIRST_DELAY_S

    def next(self, healthy_s: float) -> float:
        """`healthy_s` is how long the process was ready before it ended."""
        delay = FIRST_DELAY_S if healthy_s >= HEALTHY_S else self.delay_s
        self.delay_s = min(2 * delay, LAST_DELAY_S)
        return delay


class Keeper:
    """One supervised process. `run` is its task; cancelling it ends the process."""

    def __init__(self, name: str, spawn: Spawn, tell: Tell, grace_s: float, *, silence_s: float = SILENCE_S) -> None:
        self.name = name
        self.ready = asyncio.Event()  # now
        self.starts = 0
        self.drained = False
        self.child: Child | None = None
        self._spawn, self._tell, self._grace_s, self._silence_s = spawn, tell, grace_s, silence_s
        self._was_ready = False
        self._ready_since = 0.0
        self._heard = 0.0
        self._sentence = ""  # the last failure it told us
        self._patience: asyncio.Timeout | None = None

    async def run(self) -> NoReturn:
        """Raises StartError when the process ends before it was ever ready; afterwards restarts it, for ever.

        One that has said that it is drained stays away.
        """
        backoff = Backoff()
        while True:
            reason, log = await self._live()
            healthy_s = time.monotonic() - self._ready_since if self.ready.is_set() else 0.0
            self.ready.clear()
            if self.drained:
                self.child = None
                self._tell(self.name, "drained", "it left, and stays away until the next start")
                await asyncio.Event().wait()
            if not self._was_ready:
                self._tell(self.name, "failed", reason)
                raise StartError(self.name, reason, str(log))
            delay_s = backoff.next(healthy_s)
            self._tell(self.name, "failed", f"{reason}; starts again in {delay_s:g} s (log: {log})")
            await asyncio.sleep(delay_s)

    def kill(self) -> None:
        """End it at once."""
        if self.child is not None:
            self.child.kill()

    async def _live(self) -> tuple[str, Path]:
        """One life, from start to end; returns why it ended, and its log."""
        self._sentence = ""
        self._heard = time.monotonic()
        with self._listening() as (writing_end, read):
            try:
                self._tell(self.name, "starting", "")
                self.starts += 1
                self.child = child = self._spawn(writing_end)
            finally:
                os.close(writing_end)
            async with running(child, self._grace_s):
                hung = await self._watch(child, read)
                code = await child.wait()
            read()
        reason = hung or self._sentence or _reason(code, child.log)
        return reason, child.log

    async def _watch(self, child: Child, read: Callable[[], None]) -> str:
        """Until it ends by itself, or is ended for having hung; then says so."""
        while True:
            try:
                async with asyncio.timeout_at(self._deadline()) as self._patience:
                    await child.wait()
                return ""
            except TimeoutError:
                pass
            finally:
                self._patience = None
            read()  # we may be the one who slept
            if time.monotonic() >= self._deadline():
                child.kill()
                if self.ready.is_set():
                    return f"no sign of life for {self._silence_s:g} s"
                return f"not ready within {START_DEADLINE_S:g} s"

    def _deadline(self) -> float:
        """When to give up on it, by the monotonic clock (which asyncio's loop uses too)."""
        return self._heard + (self._silence_s if self.ready.is_set() else START_DEADLINE_S)

    @contextmanager
    def _listening(self) -> Iterator[tuple[int, Callable[[], None]]]:
        """The writing end of a new status pipe, and what reads all that is in it."""
        reading_end, writing_end = os.pipe()
        os.set_blocking(reading_end, False)
        loop = asyncio.get_running_loop()
        rest = b""

        def read() -> None:
            nonlocal rest
            while data := _read(reading_end):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._hear(line)
            if data is not None:
                loop.remove_reader(reading_end)  # closed: it would be readable for ever

        loop.add_reader(reading_end, read)
        try:
            yield writing_end, read
        finally:
            loop.remove_reader(reading_end)
            os.close(reading_end)

    def _hear(self, line: bytes) -> None:
        try:
            status = parse_line(line)
        except msgspec.MsgspecError:
            return  # a library printed into the pipe; what it says is not for us
        if not self.ready.is_set() and status.phase is None:
            return  # the start has a deadline as a whole
        self._heard = time.monotonic()
        if status.phase is None:
            return
        if status.phase == "ready" and not self.ready.is_set():
            self._ready_since, self._was_ready = self._heard, True
            self.ready.set()
            if self._patience is not None and not self._patience.expired():
                self._patience.reschedule(self._deadline())  # from here on silence counts
        if status.phase == "failed":
            self._sentence = status.detail
        elif status.phase == "drained":
            self.drained = True
        else:
            self._tell(self.name, status.phase, status.detail)


def _read(descriptor: int) -> bytes | None:
    """What is there; None when there is nothing now, empty when there will be no more."""
    try:
        return os.read(descriptor, 65536)
    except BlockingIOError:
        return None


def _reason(code: int, log: Path) -> str:
    last = tail(log)
    return describe_exit(code) + (f", last said: {last}" if last and code > 0 else "")
