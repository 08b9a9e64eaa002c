"""The roster kept current from the control plane: membership from etcd; KV events, loads and snapshots over NATS."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NoReturn, TypeVar

import msgspec

from dynamo_lite.errors import DynamoError, ProtocolMismatch
from dynamo_lite.plane.bus import Bus, Message
from dynamo_lite.plane.discovery_set import Registry
from dynamo_lite.plane.wire import Empty, InstanceRecord, LoadReport, Subjects, decode, encode
from dynamo_lite.router import metrics
from dynamo_lite.router.roster import Instance, Roster
from kvbm.events import KvEventBatch, KvSnapshot
from kvbm.index import LIMIT

SNAPSHOT_DEADLINE_S = 5.0
FIRST_SNAPSHOTS_S = 2.0  # how long `open` waits for the workers that are there; the rest comes in later
RETRY_S, RETRY_MAX_S = 0.1, 2.0

log = logging.getLogger(__name__)
T = TypeVar("T", bound=msgspec.Struct)


class Fleet(Roster):
    """All live workers of a deployment. Open it with `Fleet.open`."""

    def __init__(self, bus: Bus, subjects: Subjects, index_memory: int) -> None:
        super().__init__(self._refresh_soon, index_memory=index_memory)
        self._bus, self._subjects = bus, subjects
        self._group: asyncio.TaskGroup  # of the tasks that end with the fleet
        self._refreshing: set[asyncio.Task[None]] = set()

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        bus: Bus,
        discovery: Registry,
        subjects: Subjects,
        group: asyncio.TaskGroup,
        index_memory: int = LIMIT,
    ) -> AsyncIterator[Fleet]:
        """Follows the workers while the body runs. The workers' blocks are known on entry, where they answer."""
        fleet = cls(bus, subjects, index_memory)
        ready = asyncio.Event()
        following = group.create_task(fleet._follow(discovery, ready))
        try:
            await ready.wait()
            yield fleet
        finally:
            following.cancel()
            await asyncio.wait((following,))

    async def _follow(self, discovery: Registry, ready: asyncio.Event) -> NoReturn:
        """Keep the roster current until cancelled."""
        async with AsyncExitStack() as stack:
            # Events come before the membership, so that none is missed; those of unknown workers are ignored, as
            # a worker that joins is asked for all of its blocks.
            for subject, handler in (
                (self._subjects.kv_events(), _taking(KvEventBatch, self.take_batch)),
                (self._subjects.load(), _taking(LoadReport, self.take_report)),
            ):
                subscription = await self._bus.subscribe(subject, handler)
                stack.push_async_callback(subscription.close)
            self._group = await stack.enter_async_context(asyncio.TaskGroup())
            membership = await discovery.membership(self._group)
            membership.add_listener(self._changed)
            for record in membership.instances.values():
                self.join(record)
            if self._refreshing:
                await asyncio.wait(self._refreshing, timeout=FIRST_SNAPSHOTS_S)
            ready.set()
            while True:
                await membership.changed()

    def _changed(self, added: InstanceRecord | None, removed: InstanceRecord | None) -> None:
        if added is not None:
            self.join(added)
        elif removed is not None:
            self.leave(removed.incarnation)

    def _refresh_soon(self, instance: Instance) -> None:
        refresh = self._refresh(instance)
        try:
            task = self._group.create_task(refresh)
        except RuntimeError:  # the group is ending, and with it whoever would use the index
            refresh.close()
            return
        self._refreshing.add(task)
        task.add_done_callback(self._refreshing.discard)

    async def _refresh(self, instance: Instance) -> None:
        """Get the worker's blocks from itself, trying until it answers or leaves."""
        record, pause = instance.record, RETRY_S
        while self.instance(record.incarnation) is instance:
            try:
                data = await self._bus.request(
                    self._subjects.snapshot(record.incarnation), encode(Empty()), SNAPSHOT_DEADLINE_S
                )
                snapshot = decode(data, KvSnapshot)
            except DynamoError as error:
                metrics.SNAPSHOT_FAILURES.inc()
                log.warning("no snapshot from %s: %s; trying again", record.name, error)
            else:
                if self.instance(record.incarnation) is not instance or self.take_snapshot(snapshot):
                    return
            await asyncio.sleep(pause)
            pause = min(2 * pause, RETRY_MAX_S)


def _taking(kind: type[T], take: Callable[[T], None]) -> Callable[[Message], None]:
    """A handler that hands decoded messages on and drops, with a warning, what cannot be read."""

    def handle(message: Message) -> None:
        try:
            content = decode(message.data, kind)
        except ProtocolMismatch as error:
            log.warning("dropped a message on %s: %s", message.subject, error)
            return
        take(content)

    return handle
