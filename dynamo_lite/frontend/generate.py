"""The request path: place, send to the decode worker, take its deltas, go on elsewhere, cancel.

One HTTP request is one `Call`; each of its prompts is a `Flight` to one worker. Everything that happens to a
flight (deltas, a dead worker, a lost message) is put into its call's mailbox by synchronous handlers, and the
call's own task acts on it: no task per prompt, no lock. A flight that its worker cannot finish is followed by another
one, with the tokens that the client has.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import NoReturn

import msgspec
from opentelemetry import trace

from dynamo_lite.errors import DynamoError, NoInstance, NoResponders, ProtocolMismatch, WorkerLost
from dynamo_lite.frontend import metrics
from dynamo_lite.frontend.cancels import Cancels
from dynamo_lite.frontend.decisions import Decisions, explaining
from dynamo_lite.frontend.flight import Flight, Story
from dynamo_lite.frontend.liveness import DECODES, Liveness
from dynamo_lite.frontend.moves import Moves, left_behind
from dynamo_lite.frontend.work import Work
from dynamo_lite.plane.bus import RECONNECT_WAIT_S, Bus, Message
from dynamo_lite.plane.wire import (
    Cancel,
    Delta,
    DeltaBatch,
    FrontendId,
    GenerateRequest,
    Holder,
    Incarnation,
    InstanceRecord,
    Subjects,
    decode,
    encode,
)
from dynamo_lite.router.placement import Placement
from dynamo_lite.router.roster import Instance, Roster
from dynamo_lite.router.router import Router
from dynamo_lite.router.sharing import shared
from dynamo_lite.tasks import background
from dynamo_lite.telemetry import spanning

HOUSEKEEPING_S = 0.1
UNKNOWN = -1  # of batches: some may have been lost, and nobody waits for them any more
DOUBT_S = 2.0  # a worker that says nothing for so long after NATS was away may have said it while it was
WAIT_S = 60.0  # a stream that nobody can go on with waits so long for a worker

log = logging.getLogger(__name__)


class Elsewhere:
    """Mail: the flight's worker drains, so it is to go on at another one."""


ELSEWHERE = Elsewhere()
Mail = Delta | DynamoError | Elsewhere


class Call:
    """All prompts of one HTTP request. Iterate over `deltas` once; its end cancels what is still in flight."""

    def __init__(
        self, backend: Backend, work: Work, traceparent: str, timeout_s: float, request_id: str, avoid: set[Incarnation]
    ) -> None:
        self.work = work
        self.request_id = request_id
        self.placements: list[Placement] = []  # so far, the last the latest
        self._backend = backend
        self._traceparent = traceparent
        self._clock = asyncio.get_running_loop().time
        self._ends_at = self._clock() + timeout_s
        self._flights: dict[int, Flight] = {}  # by prompt
        self._avoid = avoid
        self._mail: list[tuple[Flight, Mail]] = []
        self._arrived = asyncio.Event()

    def put(self, flight: Flight, item: Mail) -> None:
        """Called by the backend's handlers; never blocks."""
        self._mail.append((flight, item))
        self._arrived.set()

    async def deltas(self) -> AsyncGenerator[list[tuple[int, Delta]], None]:
        """(prompt, delta) as they arrive, each token once; all that has gathered is one list.

        Raises what ends the request: NoInstance, WorkerLost, or the worker's own error.
        """
        try:
            for prompt, task in enumerate(self.work.tasks):
                if task.sampling.max_tokens > 0:
                    placement = self._backend.place(task.token_ids, self.work.cache_salt, self._avoid)
                    await self._launch(Flight(self, prompt, placement, Story(self.work.n)))
            while self._flights:
                await self._arrived.wait()
                self._arrived.clear()
                mail, self._mail = self._mail, []
                batch: list[tuple[int, Delta]] = []
                for flight, item in mail:
                    if isinstance(item, Delta) and item.error is None:
                        # Else it is of an attempt given up, or of a sequence that is over.
                        if self._flights.get(flight.prompt) is flight and item.index in flight.open:
                            batch.append((flight.prompt, await self._note(flight, item)))
                        continue
                    if batch:
                        yield batch  # what came before it; that may complete the request
                        batch = []
                    if self._flights.get(flight.prompt) is flight:
                        batch += await self._go_elsewhere(flight, item)
                if batch:
                    yield batch
        finally:
            for flight in list(self._flights.values()):
                await self._close(flight, cancel=True)

    async def stop(self, prompt: int, index: int) -> None:
        """The frontend has seen the end of a sequence that the worker would continue."""
        flight = self._flights.get(prompt)
        if flight is None or index not in flight.open:
            return
        del flight.open[index]
        if flight.open:
            await self._backend.cancel(flight, index)
        else:
            await self._close(flight, cancel=True)

    async def _note(self, flight: Flight, delta: Delta) -> Delta:
        """Returns what of it is news to the client."""
        story = flight.story
        if delta.token_ids:
            story.open[delta.index] += delta.token_ids
            story.begun = flight.news = True
            now = self._clock()
            if flight.cause:
                metrics.migration_gap(flight.cause).observe(now - story.heard)
                await self._backend.settled(flight)
            story.heard = now
        if delta.cached_tokens is not None:
            flight.placement.observed(delta.cached_tokens)
            if story.cached_told:
                delta = msgspec.structs.replace(delta, cached_tokens=None)
            story.cached_told = True
        if delta.finish is not None:
            del story.open[delta.index]
            if not story.open:
                await self._close(flight, cancel=False)
        return delta

    async def _go_elsewhere(self, flight: Flight, why: Mail) -> list[tuple[int, Delta]]:
        """Returns deltas that are to be told at once."""
        if isinstance(why, Elsewhere):
            await self._move(flight)
            return []
        return await self._retry(flight, _error_of(why))

    async def _retry(self, flight: Flight, error: DynamoError) -> list[tuple[int, Delta]]:
        """Another worker, if the worker, not the request, failed."""
        await self._close(flight, cancel=not isinstance(error, NoResponders))
        story = flight.story
        if flight.abandoned or error.status != 503 or not story.attempts.failed(error, progressed=flight.news):
            raise error
        cause = getattr(error, "how", error.kind)
        if not story.begun:
            metrics.rerouted(error.kind).inc()
        log.warning("request %s goes on elsewhere: %s", flight.id, error)
        full = story.take_full(self.work.tasks[flight.prompt].sampling.max_tokens)
        if story.open:
            if isinstance(error, NoResponders) and self._backend.settling:
                await asyncio.sleep(RECONNECT_WAIT_S)  # the worker may only be reconnecting
            elif cause != "gap":  # then the worker itself is well, and has the KV
                self._avoid.add(flight.worker.incarnation)
            placement = await self._place_again(flight, error)
            await self._launch(self._successor(flight, placement, cause))
        return [(flight.prompt, Delta(flight.id, index, finish="length")) for index in full]

    async def _move(self, flight: Flight) -> None:
        """To another worker, with its KV; where there is none, it goes on where it is."""
        try:
            placement = self._place_rest(flight, self._avoid | {flight.worker.incarnation})
        except NoInstance:
            flight.asked_to_move = False
            return
        successor = self._successor(flight, placement, "moved")
        holder = left_behind(flight.worker, successor)
        if holder is not None:
            successor.former = flight.worker.incarnation, flight.id
            self._backend.moves.left(flight)
        await self._close(flight, cancel=True, moved=holder is not None)
        await self._launch(successor, holder)

    def _successor(self, flight: Flight, placement: Placement, cause: str) -> Flight:
        successor = Flight(self, flight.prompt, placement, flight.story)
        if flight.story.begun:
            metrics.migrations(cause).inc()
            successor.cause = cause
        return successor

    def _tokens(self, flight: Flight) -> list[int]:
        """The prompt, and what of its longest sequence is to be computed like one."""
        return self.work.tasks[flight.prompt].token_ids + flight.story.longest

    def _place_rest(self, flight: Flight, avoid: Collection[Incarnation]) -> Placement:
        """Raises NoInstance."""
        token_ids = self._tokens(flight)
        return self._backend.place(
            token_ids, self.work.cache_salt, self._backend.too_short(len(token_ids)).union(avoid)
        )

    async def _place_again(self, flight: Flight, error: DynamoError) -> Placement:
        """A stream that has begun waits for a worker; the client of one that has not may rather come again."""
        try:
            return self._place_rest(flight, self._avoid)
        except NoInstance:
            if not flight.story.begun:
                raise
        log.warning("request %s waits for a worker that can go on with it", flight.id)
        self._avoid.clear()  # a worker that was frozen, or is asked to stay after all, is as good as a new one
        left_s = min(WAIT_S, self._ends_at - self._clock())
        if not await self._backend.somebody(len(self._tokens(flight)), left_s):
            raise error
        return self._place_rest(flight, self._avoid)

    async def _launch(self, flight: Flight, holder: Holder | None = None) -> None:
        placement, task = flight.placement, self.work.tasks[flight.prompt]
        self._flights[flight.prompt] = flight
        self.placements.append(placement)
        self._backend.decisions.add(self.request_id, flight.id, placement)
        flight.booking.enter_context(placement.booked())
        request = GenerateRequest(
            request_id=flight.id,
            frontend=self._backend.id,
            token_ids=task.token_ids,
            sampling=task.sampling,
            n=self.work.n,
            resumed=flight.story.resumed(),
            prefill=tuple(record.incarnation for record in placement.prefill),
            cache_salt=self.work.cache_salt,
            timeout_ms=max(1, int((self._ends_at - self._clock()) * 1000)),
            traceparent=self._traceparent,
            route_reason=placement.reason,
            holder=holder or placement.holder,
            held_tokens=placement.held_tokens,
        )
        await self._backend.send(flight, request)

    async def _close(self, flight: Flight, *, cancel: bool, moved: bool = False) -> None:
        del self._flights[flight.prompt]
        flight.booking.close()
        self._backend.forget(flight)
        if cancel:
            await self._backend.cancel(flight, moved=moved)
        await self._backend.settled(flight)


class Backend:
    """The workers as the frontend's handlers see them. Open it with `Backend.open`."""

    def __init__(
        self, bus: Bus, subjects: Subjects, roster: Roster, router: Router, liveness: Liveness,
        group: asyncio.TaskGroup, name: str,
    ) -> None:  # fmt: skip
        self.id = FrontendId(os.urandom(16).hex())
        self.decisions = Decisions(name, roster.clock)
        self.roster = roster
        self._bus, self._subjects, self._router, self._group = bus, subjects, router, group
        self._liveness = liveness
        self._flights: dict[str, Flight] = {}
        self._of_worker: dict[Incarnation, set[Flight]] = {}
        self._watches: dict[Incarnation, asyncio.Task[None]] = {}
        self._seqs: dict[Incarnation, int] = {}  # last delta batch
        self._cancels = Cancels(bus, subjects, group)
        self._waiting: set[asyncio.Timeout] = set()  # calls that nobody can go on with
        self.moves = Moves(roster, self._of_worker, lambda flight: flight.call.put(flight, ELSEWHERE))

    @classmethod
    @asynccontextmanager
    async def open(
        cls, bus: Bus, subjects: Subjects, roster: Roster, router: Router, name: str = "frontend"
    ) -> AsyncIterator[Backend]:
        """`name`: for people."""
        async with Liveness.open(bus, subjects, roster) as liveness, asyncio.TaskGroup() as group:
            backend = cls(bus, subjects, roster, router, liveness, group, name)
            deltas = await bus.subscribe(subjects.deltas(backend.id), backend._receive)
            undelivered = await bus.subscribe(subjects.undelivered(backend.id), backend._undelivered)
            try:
                async with (
                    background(backend._keep_house()),
                    shared(bus, subjects, router.bookings),
                    explaining(bus, subjects, backend.decisions),
                ):
                    yield backend
            finally:
                for watch in backend._watches.values():
                    watch.cancel()
                await deltas.close()
                await undelivered.close()

    @property
    def settling(self) -> bool:
        """Whether "no responders" may mean a worker that is only reconnecting."""
        return self._bus.settling

    def call(
        self, work: Work, traceparent: str, timeout_s: float, request_id: str = "", avoid: Collection[Incarnation] = ()
    ) -> Call:
        """`avoid`: workers that it is not to be placed on."""
        return Call(self, work, traceparent, timeout_s, request_id, set(avoid))

    def fail_all(self, error: DynamoError) -> None:
        """End every request in flight with an error, and those that wait for a worker with theirs."""
        for limit in self._waiting:
            if not limit.expired():
                limit.reschedule(asyncio.get_running_loop().time())
        for flight in list(self._flights.values()):
            flight.abandoned = True
            flight.call.put(flight, error)

    def place(self, token_ids: list[int], cache_salt: str | None, avoid: Collection[Incarnation]) -> Placement:
        """Raises NoInstance."""
        with spanning("route") as span:
            placement = self._router.place(token_ids, cache_salt=cache_salt, exclude=avoid)
            _describe(placement, span)
        metrics.routed("prefix" if placement.overlap_blocks else "load").inc()
        return placement

    def too_short(self, tokens: int) -> set[Incarnation]:
        """Workers that cannot generate after so many."""
        return {each.record.incarnation for each in self.roster.usable(DECODES) if not _fits(each, tokens)}

    async def somebody(self, tokens: int, timeout_s: float) -> bool:
        """Whether, in time, there is a worker that can go on after so many tokens."""
        try:
            async with asyncio.timeout(timeout_s) as limit:
                self._waiting.add(limit)
                await self.roster.until(lambda: any(_fits(each, tokens) for each in self.roster.usable(DECODES)))
        except TimeoutError:
            return False
        finally:
            self._waiting.discard(limit)
        return True

    async def send(self, flight: Flight, request: GenerateRequest) -> None:
        worker = flight.worker.incarnation
        self._flights[flight.id] = flight
        self._of_worker.setdefault(worker, set()).add(flight)
        if worker not in self._watches:
            self._watches[worker] = self._group.create_task(self._watch(flight.worker))
        reply = self._subjects.undelivered(self.id, flight.id)
        await self._bus.publish(self._subjects.generate(worker), encode(request), reply)

    async def cancel(self, flight: Flight, index: int | None = None, *, moved: bool = False) -> None:
        await self._cancels.send(flight.worker.incarnation, Cancel(flight.id, index, moved))

    async def settled(self, flight: Flight) -> None:
        """A flight that came after another one has its first token, or never will: nothing waits for it any more."""
        flight.cause = ""
        if flight.former is None:
            return
        worker, request_id = flight.former
        flight.former = None
        await self._cancels.send(worker, Cancel(request_id))
        self.moves.arrived(worker, request_id)
        self.moves.review()

    def forget(self, flight: Flight) -> None:
        self._flights.pop(flight.id, None)
        flights = self._of_worker.get(flight.worker.incarnation, set())
        flights.discard(flight)
        if not flights:  # the watch lingers, as the next request may come at once
            self._of_worker.pop(flight.worker.incarnation, None)

    def _receive(self, message: Message) -> None:
        try:
            batch = decode(message.data, DeltaBatch)
        except ProtocolMismatch as error:
            log.error("a batch of deltas is dropped: %s", error)
            return
        self._liveness.heard(batch.worker)
        before = self._seqs.get(batch.worker, 0)
        self._seqs[batch.worker] = batch.seq
        if batch.seq != before + 1 and before != UNKNOWN:
            self._lose(batch.worker, f"batch {batch.seq} came after {before}, tokens were lost", "gap")
        for delta in batch.deltas:
            flight = self._flights.get(delta.request_id)
            if flight is not None:
                flight.call.put(flight, delta)
            elif delta.finish is None and delta.error is None:
                self._cancels.stray(batch.worker, delta.request_id)

    def _undelivered(self, message: Message) -> None:
        flight = self._flights.get(message.subject.rpartition(".")[2])
        if flight is not None and message.no_responders:
            if not self.settling:
                self.roster.lost(flight.worker.incarnation)
            flight.call.put(flight, NoResponders(flight.worker.name))

    def _lose(self, worker: Incarnation, cause: str, how: str) -> None:
        """Every flight to `worker` ends."""
        for flight in self._of_worker.get(worker, set()):
            flight.call.put(flight, WorkerLost(flight.worker.name, cause, how))

    async def _watch(self, worker: InstanceRecord) -> None:
        """Runs while something is in flight to `worker`."""
        lost = await self._liveness.lost(worker)
        self._watches.pop(worker.incarnation, None)
        log.warning("%s", lost)
        if self._bus.connected:  # else it is NATS that is gone
            self.roster.lost(worker.incarnation)
        self._lose(worker.incarnation, lost.cause, lost.how)

    async def _keep_house(self) -> NoReturn:
        """End watches of idle workers, take what draining ones have elsewhere, and notice when NATS was away."""
        seen = self._bus.reconnects
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            self.moves.review()
            self._liveness.keep_house()
            for worker in [worker for worker in self._watches if worker not in self._of_worker]:
                self._watches.pop(worker).cancel()
            if self._bus.reconnects != seen:
                seen = self._bus.reconnects
                await self._doubt(dict(self._seqs), list(self._flights.values()))

    async def _doubt(self, before: dict[Incarnation, int], flights: list[Flight]) -> None:
        """A batch sent while NATS was away is lost; if it was a worker's last, no later one shows the gap.

        So flights to a worker that says nothing for a while after a reconnect are given up.
        """
        await asyncio.sleep(DOUBT_S)
        workers = {flight.worker.incarnation for flight in flights if flight.id in self._flights}
        silent = {worker for worker in workers if self._seqs.get(worker) == before.get(worker)}
        self._seqs |= dict.fromkeys(silent, UNKNOWN)
        for flight in flights:
            worker = flight.worker
            if flight.id in self._flights and worker.incarnation in silent:
                flight.call.put(flight, WorkerLost(worker.name, "nothing came from it after NATS was away", "gap"))


def _error_of(item: Delta | DynamoError) -> DynamoError:
    if isinstance(item, DynamoError):
        return item
    assert item.error is not None, "else it is news of a sequence"
    return item.error.exception()


def _fits(instance: Instance, tokens: int) -> bool:
    """Whether the worker can generate after so many."""
    return instance.record.max_model_len > tokens


def _describe(placement: Placement, span: trace.Span) -> None:
    if not span.is_recording():
        return
    span.set_attribute("dynamo.route.worker", placement.decode.name)
    span.set_attribute("dynamo.route.incarnation", placement.decode.incarnation)
    span.set_attribute("dynamo.route.reason", placement.reason)
    span.set_attribute("dynamo.route.overlap_blocks", placement.overlap_blocks)
    span.set_attribute("dynamo.route.prefill_candidates", [record.name for record in placement.prefill])
    if placement.holder is not None:
        span.set_attribute("dynamo.route.holder", placement.holder.incarnation)
        span.set_attribute("dynamo.route.holder_tokens", placement.holder.tokens)
    for worker, score in placement.scores.items():
        span.set_attribute(f"dynamo.route.cost.{worker}", score)
    for part, milliseconds in placement.parts.items():
        span.set_attribute(f"dynamo.route.part.{part}", milliseconds)
