"""That a worker is to leave: why, by when, and whether it is to come back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from dynamo_lite.plane.drain_wire import Drain, Draining
from dynamo_lite.plane.wire import decode, encode

SIGTERM_DEADLINE_S = 30.0  # what runs longer than this after SIGTERM is begun again elsewhere

log = logging.getLogger(__name__)


class Leaving:
    """Of one worker process."""

    def __init__(self) -> None:
        self._wanted = asyncio.Event()
        self._clock = asyncio.get_running_loop().time
        self.deadline = float("inf")  # on the event loop's clock
        self.limit: asyncio.Timeout | None = None  # of what goes on until then, once it does
        self.for_good = False  # it is not to be started again
        self.told: Callable[[Draining], Draining] = lambda so_far: so_far  # fills in what is known of its requests

    @property
    def wanted(self) -> bool:
        return self._wanted.is_set()

    def ask(self, cause: str, deadline_s: float, *, for_good: bool) -> None:
        """Asked again, the earlier deadline counts, and that it is to stay away."""
        if not self.wanted:
            log.info("leaving within %.3g s: %s", deadline_s, cause)
        self.deadline = min(self.deadline, self._clock() + deadline_s)
        self.for_good = self.for_good or for_good
        if self.limit is not None and not self.limit.expired():
            self.limit.reschedule(self.deadline)
        self._wanted.set()

    async def until(self, stop: asyncio.Event) -> None:
        """Returns once it is to leave; `stop` is SIGTERM's, after which the supervisor decides what follows."""
        async with asyncio.TaskGroup() as group:
            waiting = {group.create_task(stop.wait()), group.create_task(self._wanted.wait())}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in waiting:
                task.cancel()
        if not self.wanted:
            self.ask("SIGTERM", SIGTERM_DEADLINE_S, for_good=False)

    async def answer(self, data: bytes) -> bytes:
        """Handler of the drain subject."""
        asked = decode(data, Drain)
        if asked.deadline_s is not None:
            self.ask(asked.cause, asked.deadline_s, for_good=not asked.restart)
        left_s = max(0.0, self.deadline - self._clock()) if self.wanted else 0.0
        return encode(self.told(Draining(self.wanted, left_s=left_s)))
