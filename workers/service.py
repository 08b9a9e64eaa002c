"""A worker on the control plane: its subjects, its registration, its drain."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec

from dynamo_lite.config import ProcessSpec
from dynamo_lite.errors import ProtocolMismatch, WorkerError, WorkerLost
from dynamo_lite.plane.bus import Bus, Message, Subscription
from dynamo_lite.plane.discovery_set import Registry
from dynamo_lite.plane.drain_wire import Draining
from dynamo_lite.plane.kv_wire import KvAnswer, KvRequest
from dynamo_lite.plane.wire import Cancel, Incarnation, InstanceRecord, Pong, Role, Subjects, decode, encode
from dynamo_lite.status import Phase
from workers.deltas import DeltaSender
from workers.engine import Engine, EngineInfo
from workers.leaving import Leaving
from workers.metrics import WorkerMetrics
from workers.prefills import Prefills
from workers.pulls import Pulls
from workers.reports import Reports
from workers.requests import Requests
from workers.serving import Serving
from workers.spot import noticed

log = logging.getLogger(__name__)

LAST_ARRIVALS_S = 0.25  # for requests that were sent before it was known that we drain
SETTLE_DEADLINE_S = 5.0  # for aborted requests to end, and again for their last deltas to leave


def instance_record(spec: ProcessSpec, incarnation: Incarnation, info: EngineInfo, metrics_url: str) -> InstanceRecord:
    """What others learn of this process."""
    return InstanceRecord(
        name=spec.name,
        incarnation=incarnation,
        role=Role(spec.role),
        host=socket.gethostname(),
        pid=os.getpid(),
        served_model=spec.config.model_name,
        fingerprint=info.fingerprint,
        kv_blocks=info.kv_blocks,
        max_model_len=info.max_model_len,
        max_num_seqs=info.max_num_seqs,
        metrics_url=metrics_url,
        agents=info.agents,
    )


def exchanges_kv(one: InstanceRecord, other: InstanceRecord, *, pulls: bool = True) -> bool:
    """Whether one of them may push a prompt's KV to the other; routers pair no others.

    `pulls`: also what it holds for others, and not only what a prefill worker computes for a decode worker.
    """
    if one.incarnation == other.incarnation:
        return False
    if not pulls and {one.role, other.role} != {Role.PREFILL, Role.DECODE}:
        return False
    pairs = ((one, other), (other, one))
    return any(to.role.decodes and to.fingerprint.problem_with(of.fingerprint) is None for to, of in pairs)


class Service:
    """Serves one engine from registration to the end of its drain."""

    def __init__(
        self,
        spec: ProcessSpec,
        record: InstanceRecord,
        engine: Engine,
        bus: Bus,
        metrics: WorkerMetrics,
        group: asyncio.TaskGroup,
    ) -> None:
        self._record, self._engine, self._bus, self._group = record, engine, bus, group
        self._subjects = Subjects(spec.config.namespace)
        self._reports = Reports(bus, self._subjects, record.incarnation, engine, metrics)
        self._deltas = DeltaSender(bus, self._subjects, record.incarnation, metrics)
        self._serving = Serving(
            record.name,
            record.incarnation,
            engine,
            record.fingerprint.block_size,
            bus,
            self._subjects,
            metrics,
            group,
            self._reports.changed,
        )
        transfer, fingerprint = spec.config.kv_transfer, record.fingerprint
        self._pulls = Pulls(
            transfer.pull,
            transfer.min_remote_tokens,
            fingerprint.block_size,
            fingerprint.block_bytes * fingerprint.layout.tensor_parallel,
            transfer.timeout_ms / 1000,
            engine.cost,
        )
        self._requests = Requests(self._serving, self._deltas, self._pulls)
        self._prefills = Prefills(self._serving)
        self._reports.prefills = lambda: self._prefills.served
        self._leaving = Leaving()
        self._leaving.told = self._so_far
        workers = getattr(spec.config.workers, spec.role)
        self._spot_notice: Path | None = workers.spot_notice_file if workers is not None else None
        self._intake: list[Subscription] = []  # subjects that bring new work

    async def run(self, discovery: Registry, stop: asyncio.Event, phase: Callable[[Phase], None]) -> None:
        """Returns once drained, after `stop` or an operator's wish; raises WorkerError when the engine died."""
        for loop in (self._deltas.run(), self._reports.publish_events(), self._reports.publish_load()):
            self._group.create_task(loop)
        await self._subscribe()
        membership = await discovery.membership(self._group)
        async with discovery.register(self._record):
            # Only now, as those we meet can answer only once they can find us.
            membership.add_listener(self._heed)
            for record in membership.instances.values():
                self._heed(record, None)
            phase("ready")
            failure = await self._served(stop)
            if failure is None:
                phase("draining")
                await self._drain()  # still registered, as others take KV from here meanwhile
        await self._abort(failure)
        if failure is not None:
            raise WorkerError(failure)
        if self._leaving.for_good:
            phase("drained")

    async def _subscribe(self) -> None:
        bus, subjects, me = self._bus, self._subjects, self._record.incarnation
        await bus.subscribe(subjects.cancel(me), self._cancel)
        await bus.serve(subjects.ping(me), self._pong, self._group)
        await bus.serve(subjects.snapshot(me), self._reports.snapshot, self._group)
        await bus.serve(subjects.kv_admin(me), self._kv_admin, self._group)
        await bus.serve(subjects.drain(me), self._leaving.answer, self._group)
        if self._record.role.decodes:
            await bus.subscribe(subjects.bounced(me), self._requests.bounced)
            await bus.subscribe(subjects.first_token(me), self._requests.first_token)
            self._intake.append(await bus.subscribe(subjects.generate(me), self._requests.receive))
        # Of every role, as others may pull a prefix that is here.
        prefill = await bus.serve(subjects.prefill(me), self._prefills.answer, self._group)
        if not self._record.role.decodes:  # others answer to the end, for those who go on with what was here
            self._intake.append(prefill)

    async def _served(self, stop: asyncio.Event) -> str | None:
        """Until it is to leave (None), or until the engine dies (why)."""
        if self._spot_notice is not None:
            self._group.create_task(self._heed_notice(self._spot_notice))
        leaving = self._group.create_task(self._leaving.until(stop))
        died = self._group.create_task(self._engine.failed())
        await asyncio.wait((leaving, died), return_when=asyncio.FIRST_COMPLETED)
        return died.result() if died.done() else None

    async def _heed_notice(self, file: Path) -> None:
        self._leaving.ask("spot notice", await noticed(file), for_good=True)

    async def _drain(self) -> None:
        """Accept nothing, and stay until what is here is finished, or is elsewhere with its KV."""
        self._reports.draining = True
        self._reports.changed()
        try:
            async with asyncio.timeout_at(self._leaving.deadline) as limit:
                self._leaving.limit = limit
                await asyncio.sleep(LAST_ARRIVALS_S)
                for subscription in self._intake:
                    await subscription.close()
                while self._busy:
                    await self._requests.in_flight.idle()
                    await self._requests.left.none()
                    await self._prefills.idle()
        except TimeoutError:
            left = len(self._requests.in_flight) + len(self._prefills)
            log.warning("%d requests did not finish in time", left)

    @property
    def _busy(self) -> int:
        return len(self._requests.in_flight) + len(self._requests.left) + len(self._prefills)

    def _so_far(self, draining: Draining) -> Draining:
        left, running = self._requests.left, len(self._requests.in_flight) + len(self._prefills)
        return msgspec.structs.replace(draining, running=running, moved=left.total, waiting=len(left))

    async def _abort(self, failure: str | None) -> None:
        """End what is left, and see the last deltas out."""
        name = self._record.name
        lost = WorkerLost(name, "it shuts down", "left") if failure is None else WorkerLost(name, failure, "died")
        self._requests.abort(lost)
        self._prefills.cancel_all()
        try:
            async with asyncio.timeout(SETTLE_DEADLINE_S):
                await self._requests.in_flight.idle()
                await self._prefills.idle()
        except TimeoutError:
            log.error("the engine does not let go of its requests")
        try:
            async with asyncio.timeout(SETTLE_DEADLINE_S):
                await self._deltas.flushed()
        except TimeoutError:
            log.error("the last deltas could not be sent")

    async def _pong(self, _: bytes) -> bytes:
        await self._engine.answering()  # a worker whose engine is frozen is as good as frozen
        return encode(Pong(self._record.incarnation, self._engine.silent_s()))

    async def _kv_admin(self, data: bytes) -> bytes:
        return encode(KvAnswer(await self._engine.kv_admin(decode(data, KvRequest).ask)))

    def _cancel(self, message: Message) -> None:
        try:
            cancel = decode(message.data, Cancel)
        except ProtocolMismatch as error:
            log.warning("dropped a cancel: %s", error)
            return
        if not self._requests.cancel(cancel) and not self._prefills.cancel(cancel):
            self._serving.early_cancels.add(cancel)

    def _heed(self, added: InstanceRecord | None, removed: InstanceRecord | None) -> None:
        pulls = self._pulls.mode != "never"
        if added is not None and exchanges_kv(added, self._record, pulls=pulls):
            self._engine.meet(added.incarnation, added.agents)
        if removed is not None and added is None:
            self._engine.peer_gone(removed.incarnation)
