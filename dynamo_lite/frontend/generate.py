"""The request path: place, send to the decode worker, take its deltas, try again elsewhere, cancel.

One HTTP request is one `Call`; each of its prompts is a `Flight` to one worker. Everything that happens to a
flight (deltas, a dead worker, a lost message) is put into its call's mailbox by synchronous handlers, and the
call's own task acts on it: no task per prompt, no lock.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import ExitStack, asynccontextmanager
from typing import NoReturn

from opentelemetry import trace

from dynamo_lite.errors import DeadlineExceeded, DynamoError, NoResponders, PlaneError, ProtocolMismatch, WorkerLost
from dynamo_lite.frontend import metrics
from dynamo_lite.frontend.decisions import Decisions, explaining
from dynamo_lite.frontend.work import Work
from dynamo_lite.plane.bus import RECONNECT_WAIT_S, Bus, Message
from dynamo_lite.plane.wire import (
    Cancel,
    Delta,
    DeltaBatch,
    FrontendId,
    GenerateRequest,
    Incarnation,
    InstanceRecord,
    RequestId,
    Subjects,
    decode,
    encode,
)
from dynamo_lite.router.placement import Placement
from dynamo_lite.router.roster import Roster
from dynamo_lite.router.router import Router
from dynamo_lite.router.sharing import shared
from dynamo_lite.tasks import background
from dynamo_lite.telemetry import spanning

SILENCE_S = 2.0  # a worker that answers no ping for this long is frozen or cut off
HOUSEKEEPING_S = 0.5
LOST_WORKERS = 2  # a request that two workers died of is not given to a third

log = logging.getLogger(__name__)


class Flight:
    """One prompt at one worker."""

    __slots__ = ("booking", "call", "emitted", "id", "open", "placement", "prompt", "worker")

    def __init__(self, call: Call, prompt: int, placement: Placement) -> None:
        # A new id at every attempt: what a worker given up still sends belongs to nobody.
        self.id = RequestId(os.urandom(16).hex())
        self.call, self.prompt = call, prompt
        self.placement, self.worker = placement, placement.decode
        self.open = set(range(call.work.n))  # sequences that go on
        self.emitted = False  # a token came: another attempt might say something else
        self.booking = ExitStack()


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
        self._ends_at = asyncio.get_running_loop().time() + timeout_s
        self._flights: dict[int, Flight] = {}  # by prompt
        self._avoid = avoid
        self._lost = 0
        self._mail: list[tuple[Flight, Delta | DynamoError]] = []
        self._arrived = asyncio.Event()

    def put(self, flight: Flight, item: Delta | DynamoError) -> None:
        """Called by the backend's handlers; never blocks."""
        self._mail.append((flight, item))
        self._arrived.set()

    async def deltas(self) -> AsyncGenerator[list[tuple[int, Delta]], None]:
        """(prompt, delta) as they arrive; all that has gathered is one list.

        Raises what ends the request: NoInstance, WorkerLost, or the worker's own error.
        """
        try:
            for prompt, task in enumerate(self.work.tasks):
                if task.sampling.max_tokens > 0:
                    await self._launch(prompt)
            while self._flights:
                await self._arrived.wait()
                self._arrived.clear()
                mail, self._mail = self._mail, []
                batch: list[tuple[int, Delta]] = []
                for flight, item in mail:
                    error = _error_of(item)
                    if error is not None and batch:
                        yield batch  # what came before it; that may complete the request
                        batch = []
                    if self._flights.get(flight.prompt) is not flight:
                        continue  # of an attempt given up, or of a sequence that is over
                    if error is not None:
                        await self._retry(flight, error)
                    elif isinstance(item, Delta) and item.index in flight.open:
                        await self._note(flight, item)
                        batch.append((flight.prompt, item))
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
        flight.open.discard(index)
        if flight.open:
            await self._backend.cancel(flight, index)
        else:
            await self._close(flight, cancel=True)

    async def _note(self, flight: Flight, delta: Delta) -> None:
        flight.emitted = flight.emitted or bool(delta.token_ids)
        if delta.cached_tokens is not None:
            flight.placement.observed(delta.cached_tokens)
        if delta.finish is not None:
            flight.open.discard(delta.index)
            if not flight.open:
                await self._close(flight, cancel=False)

    async def _retry(self, flight: Flight, error: DynamoError) -> None:
        """Another worker, if the client has seen nothing of this prompt and the worker, not the request, failed."""
        await self._close(flight, cancel=not isinstance(error, NoResponders))
        if flight.emitted or error.status != 503:
            raise error
        if isinstance(error, WorkerLost):
            self._lost += 1
            if self._lost >= LOST_WORKERS:
                raise error
        metrics.rerouted(error.kind).inc()
        log.warning("request %s is placed again: %s", flight.id, error)
        if isinstance(error, NoResponders) and self._backend.settling:
            await asyncio.sleep(RECONNECT_WAIT_S)  # the worker may only be reconnecting
        else:
            self._avoid.add(flight.worker.incarnation)
        await self._launch(flight.prompt)

    async def _launch(self, prompt: int) -> None:
        task = self.work.tasks[prompt]
        placement = self._backend.place(task.token_ids, self.work.cache_salt, self._avoid)
        flight = self._flights[prompt] = Flight(self, prompt, placement)
        self.placements.append(placement)
        self._backend.decisions.add(self.request_id, flight.id, placement)
        flight.booking.enter_context(placement.booked())
        left_s = self._ends_at - asyncio.get_running_loop().time()
        request = GenerateRequest(
            request_id=flight.id,
            frontend=self._backend.id,
            token_ids=task.token_ids,
            sampling=task.sampling,
            n=self.work.n,
            prefill=tuple(record.incarnation for record in placement.prefill),
            cache_salt=self.work.cache_salt,
            timeout_ms=max(1, int(left_s * 1000)),
            traceparent=self._traceparent,
            route_reason=placement.reason,
            holder=placement.holder,
            held_tokens=placement.held_tokens,
        )
        await self._backend.send(flight, request)

    async def _close(self, flight: Flight, *, cancel: bool) -> None:
        del self._flights[flight.prompt]
        flight.booking.close()
        self._backend.forget(flight)
        if cancel:
            await self._backend.cancel(flight)


class Backend:
    """The workers as the frontend's handlers see them. Open it with `Backend.open`."""

    def __init__(
        self, bus: Bus, subjects: Subjects, roster: Roster, router: Router, group: asyncio.TaskGroup, name: str
    ) -> None:
        self.id = FrontendId(os.urandom(16).hex())
        self.decisions = Decisions(name, roster.clock)
        self.roster = roster
        self._bus, self._subjects, self._router, self._group = bus, subjects, router, group
        self._flights: dict[str, Flight] = {}
        self._of_worker: dict[Incarnation, set[Flight]] = {}
        self._watches: dict[Incarnation, asyncio.Task[None]] = {}
        self._seqs: dict[Incarnation, int] = {}  # last delta batch

    @classmethod
    @asynccontextmanager
    async def open(
        cls, bus: Bus, subjects: Subjects, roster: Roster, router: Router, name: str = "frontend"
    ) -> AsyncIterator[Backend]:
        """`name`: for people."""
        async with asyncio.TaskGroup() as group:
            backend = cls(bus, subjects, roster, router, group, name)
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
        """End every request in flight with an error."""
        for flight in list(self._flights.values()):
            flight.emitted = True  # no other worker is tried
            flight.call.put(flight, error)

    def place(self, token_ids: list[int], cache_salt: str | None, avoid: set[Incarnation]) -> Placement:
        """Raises NoInstance."""
        with spanning("route") as span:
            placement = self._router.place(token_ids, cache_salt=cache_salt, exclude=avoid)
            _describe(placement, span)
        metrics.routed("prefix" if placement.overlap_blocks else "load").inc()
        return placement

    async def send(self, flight: Flight, request: GenerateRequest) -> None:
        worker = flight.worker.incarnation
        self._flights[flight.id] = flight
        self._of_worker.setdefault(worker, set()).add(flight)
        if worker not in self._watches:
            self._watches[worker] = self._group.create_task(self._watch(flight.worker))
        reply = self._subjects.undelivered(self.id, flight.id)
        await self._bus.publish(self._subjects.generate(worker), encode(request), reply)

    async def cancel(self, flight: Flight, index: int | None = None) -> None:
        try:
            message = encode(Cancel(flight.id, index))
            await self._bus.publish(self._subjects.cancel(flight.worker.incarnation), message)
        except PlaneError as error:  # the worker has the request's deadline
            log.warning("request %s cannot be cancelled: %s", flight.id, error)

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
        expected = self._seqs.get(batch.worker, 0) + 1
        self._seqs[batch.worker] = batch.seq
        if batch.seq != expected:
            self._lose(batch.worker, f"batch {batch.seq} came after {expected - 1}, tokens were lost")
        for delta in batch.deltas:
            flight = self._flights.get(delta.request_id)
            if flight is not None:  # else it was cancelled
                flight.call.put(flight, delta)

    def _undelivered(self, message: Message) -> None:
        flight = self._flights.get(message.subject.rpartition(".")[2])
        if flight is not None and message.no_responders:
            if not self.settling:
                self.roster.lost(flight.worker.incarnation)
            flight.call.put(flight, NoResponders(flight.worker.name))

    def _lose(self, worker: Incarnation, cause: str) -> None:
        """Every flight to `worker` ends."""
        for flight in self._of_worker.get(worker, set()):
            flight.call.put(flight, WorkerLost(flight.worker.name, cause))

    async def _watch(self, worker: InstanceRecord) -> None:
        """Runs while something is in flight to `worker`."""
        probe = self._subjects.ping(worker.incarnation)
        try:
            await self._bus.watch_alive(probe, silence_s=SILENCE_S)
        except NoResponders:
            cause = "its process is gone"
        except DeadlineExceeded:
            cause = f"nothing was heard of it for {SILENCE_S:.3g} s" + ("" if self._bus.connected else "; NATS is away")
        except PlaneError as error:
            cause = str(error)
        self._watches.pop(worker.incarnation, None)
        log.warning("worker %s is lost: %s", worker.name, cause)
        if self._bus.connected:  # else it is NATS that is gone
            self.roster.lost(worker.incarnation)
        self._lose(worker.incarnation, cause)

    async def _keep_house(self) -> NoReturn:
        """End watches of idle workers, and notice when NATS was away."""
        seen = self._bus.reconnects
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            for worker in [worker for worker in self._watches if worker not in self._of_worker]:
                self._watches.pop(worker).cancel()
            if self._bus.reconnects != seen:
                seen = self._bus.reconnects
                await self._doubt(dict(self._seqs), list(self._flights.values()))

    async def _doubt(self, before: dict[Incarnation, int], flights: list[Flight]) -> None:
        """A batch sent while NATS was away is lost; if it was a worker's last, no later one shows the gap.

        So flights to a worker that says nothing for a while after a reconnect are given up.
        """
        await asyncio.sleep(SILENCE_S)
        for flight in flights:
            worker = flight.worker
            silent = self._seqs.get(worker.incarnation) == before.get(worker.incarnation)
            if flight.id in self._flights and silent:
                flight.call.put(flight, WorkerLost(worker.name, "nothing came from it after NATS was away"))


def _error_of(item: Delta | DynamoError) -> DynamoError | None:
    if isinstance(item, DynamoError):
        return item
    return None if item.error is None else item.error.exception()


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
