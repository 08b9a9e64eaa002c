"""The worker process's side of pushes: when every rank has ended its part of one, and how."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from dynamo_lite.errors import PrefillFailed
from workers.connector.protocol import IN_FLIGHT, Command, PushEnded, StopPush, failure
from workers.engine import TransferReport
from workers.pulse import Pulse


@dataclass(slots=True)
class Push:
    """A prompt being computed for a decode worker: which ranks have ended, and how."""

    request_id: str
    ends: dict[int, PushEnded] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def report(self, blocks: int) -> TransferReport:
        """Of all ranks that had something to send, once all have ended. Raises PrefillFailed if one has failed."""
        cause = failure(self.ends.values())
        if cause:
            raise PrefillFailed(cause)
        ends = [end for end in self.ends.values() if end.pieces]
        return TransferReport(
            bytes=sum(end.bytes for end in ends),
            blocks=blocks,
            pieces=sum(end.pieces for end in ends),
            path=ends[0].path,
            started_ns=min(end.started_ns for end in ends),
            ended_ns=max(end.ended_ns for end in ends),
            late_pieces=sum(end.late_pieces for end in ends),
        )


class Pushes:
    """All pushes of one engine. Runs on the event loop."""

    def __init__(self, ranks: int, command: Callable[[Command], None], pulse: Pulse, timeout_s: float) -> None:
        self._ranks, self._command, self._pulse, self._timeout_s = ranks, command, pulse, timeout_s
        self._pushes: dict[str, Push] = {}

    @contextmanager
    def expected(self, request_id: str) -> Iterator[Push]:
        """A prompt that the engine is about to compute; what is reported of its push is noted during the body."""
        push = self._pushes[request_id] = Push(request_id)
        try:
            yield push
        finally:
            del self._pushes[request_id]

    def handle(self, report: PushEnded) -> None:
        """A connector's report. Those of a request that is forgotten are of no use to anybody."""
        push = self._pushes.get(report.request_id)
        if push is not None:
            push.ends[report.rank] = report
            push.changed.set()

    async def ended(self, push: Push) -> None:
        """Until every rank has."""
        while len(push.ends) < self._ranks:
            await push.changed.wait()
            push.changed.clear()

    async def stop(self, push: Push) -> None:
        """End it early, if it has not ended, and return once no rank writes any more: the caller may then say so.

        Raises PrefillFailed when that is not certain.
        """
        if len(push.ends) == self._ranks:
            return
        self._command(StopPush(push.request_id))
        try:
            async with asyncio.timeout(self._timeout_s), self._pulse.required():
                await self.ended(push)
        except TimeoutError:
            raise PrefillFailed("silent", "the transfer engine does not answer") from None
        if failure(push.ends.values()) == IN_FLIGHT:
            raise PrefillFailed(IN_FLIGHT)
