"""Planned moves: what a draining worker generates goes on elsewhere, a few prompts at a time.

The others run on meanwhile, so a stream stands still only while its own KV is moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from dynamo_lite.frontend.flight import Flight
from dynamo_lite.frontend.liveness import DECODES
from dynamo_lite.plane.wire import Holder, Incarnation, InstanceRecord, RequestId
from dynamo_lite.router.roster import Roster

AT_ONCE = 2  # prompts of one worker
FEW_TOKENS = 16  # a sequence that ends within so many may do so where it is


class Moves:
    """Of one frontend. `begin` is called for each flight whose turn it is; it takes it elsewhere, or leaves it."""

    def __init__(self, roster: Roster, flights: Mapping[Incarnation, Iterable[Flight]],
                 begin: Callable[[Flight], None]) -> None:  # fmt: skip
        self._roster, self._flights, self._begin = roster, flights, begin
        self._under_way: dict[Incarnation, set[RequestId]] = {}  # flights whose successors have no token yet

    def review(self) -> None:
        """Begin what can be begun."""
        for worker, flights in self._flights.items():
            instance = self._roster.instance(worker)
            if instance is None or not instance.load.draining or not self._roster.usable(DECODES):
                continue
            room = AT_ONCE - len(self._under_way.get(worker, ()))
            room -= sum(flight.asked_to_move for flight in flights)
            movable = [flight for flight in flights if not flight.asked_to_move and _worth_moving(flight)]
            for flight in movable[: max(0, room)]:
                flight.asked_to_move = True
                self._begin(flight)

    def left(self, flight: Flight) -> None:
        """It goes on elsewhere, and its KV is still where it was."""
        self._under_way.setdefault(flight.worker.incarnation, set()).add(flight.id)

    def arrived(self, worker: Incarnation, request_id: RequestId) -> None:
        """Nobody needs it there any more."""
        there = self._under_way.get(worker, set())
        there.discard(request_id)
        if not there:
            self._under_way.pop(worker, None)


def _worth_moving(flight: Flight) -> bool:
    """Of what has no token yet there is no KV, or too little, to take along; it moves when it has one."""
    most = flight.call.work.tasks[flight.prompt].sampling.max_tokens
    return flight.story.begun and any(len(tokens) + FEW_TOKENS < most for tokens in flight.open.values())


def left_behind(worker: InstanceRecord, by: Flight) -> Holder | None:
    """Whom the worker of `by` may take the KV from; None where the two cannot exchange any."""
    if by.worker.fingerprint.problem_with(worker.fingerprint) is not None:
        return None
    size = worker.fingerprint.block_size
    tokens = len(by.call.work.tasks[by.prompt].token_ids) + len(by.story.longest)
    # The KV of the last token has not been computed yet.
    return Holder(worker.incarnation, max(0, tokens - 1) // size * size, leaving=True)
