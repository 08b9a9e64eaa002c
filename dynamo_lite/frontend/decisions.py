"""The last placements of a frontend, for who asks why a request went where it went."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import orjson

from dynamo_lite.errors import PlaneError, ProtocolMismatch
from dynamo_lite.plane.bus import Bus, Message
from dynamo_lite.plane.route_wire import Explain, Explained, RouteDecision
from dynamo_lite.plane.wire import RequestId, Subjects, decode, encode
from dynamo_lite.router.placement import Placement
from dynamo_lite.tasks import scope

LAST = 1000
HEADER = b"x-dynamo-lite-route"
_SHOWN = 8  # placements in a header, which proxies allow a few kilobytes
_PREFIXES = ("chatcmpl-", "cmpl-")  # before a request's id, in the id of its answer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Decision:
    request_id: str
    flight: RequestId
    placement: Placement


class Decisions:
    """The last ones."""

    def __init__(self, frontend: str, clock: Callable[[], float]) -> None:
        """`clock`: the roster's."""
        self._frontend, self._clock = frontend, clock
        self._last: deque[_Decision] = deque(maxlen=LAST)

    def add(self, request_id: str, flight: RequestId, placement: Placement) -> None:
        self._last.append(_Decision(request_id, flight, placement))

    def find(self, name: str) -> tuple[RouteDecision, ...]:
        """By the client's id, with or without what an answer's id begins with, or by the worker's."""
        names = {name, *(name.removeprefix(prefix) for prefix in _PREFIXES)}
        return tuple(self._told(one) for one in self._last if one.request_id in names or one.flight in names)

    def _told(self, one: _Decision) -> RouteDecision:
        placement = one.placement
        considered = placement.considered
        return RouteDecision(
            request_id=one.request_id,
            flight=one.flight,
            frontend=self._frontend,
            age_s=self._clock() - placement.at,
            mode=considered.mode,
            worker=placement.decode.name,
            reason=placement.reason,
            prompt_tokens=placement.prompt_tokens,
            predicted_tokens=placement.held_tokens,
            found_tokens=placement.found_tokens,
            prefill=tuple(record.name for record in placement.prefill),
            holder="" if placement.holder is None else placement.holder.incarnation,
            candidates=considered.candidates(),
        )


def header(placements: list[Placement]) -> Iterator[tuple[bytes, bytes]]:
    """What a reply tells of its request's placements, where it was asked: JSON, a list if there are several."""
    told = [
        {
            "worker": placement.decode.name,
            "reason": placement.reason,
            "cost_ms": {name: round(ms, 1) for name, ms in placement.scores.items()},
            "parts_ms": {name: round(ms, 1) for name, ms in placement.parts.items()},
            "prefill": [record.name for record in placement.prefill],
        }
        for placement in placements[:_SHOWN]
    ]
    if told:
        text = orjson.dumps(told[0] if len(told) == 1 else told).decode()
        yield HEADER, text.encode("ascii", "backslashreplace")


@asynccontextmanager
async def explaining(bus: Bus, subjects: Subjects, decisions: Decisions) -> AsyncIterator[None]:
    """Answers operators while the body runs; stays silent where another frontend must know."""
    async with scope() as group:

        def handle(message: Message) -> None:
            try:
                found = decisions.find(decode(message.data, Explain).request_id)
            except ProtocolMismatch as error:
                log.warning("dropped a question: %s", error)
                return
            if found and message.reply:
                group.create_task(_answer(bus, message.reply, Explained(found)))

        subscription = await bus.subscribe(subjects.explain(), handle)
        try:
            yield
        finally:
            await subscription.close()


async def _answer(bus: Bus, reply: str, told: Explained) -> None:
    try:
        await bus.publish(reply, encode(told))
    except PlaneError as error:
        log.warning("an operator's question is not answered: %s", error)
