"""The roster kept current from the control plane: membership from etcd; KV events, loads and snapshots over NATS."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TypeVar

import msgspec

from dynamo_lite.errors import DynamoError, ProtocolMismatch
from dynamo_lite.plane.bus import Bus, Message
from dynamo_lite.plane.discovery import Discovery
from dynamo_lite.plane.wire import Empty, InstanceRecord, LoadReport, Subjects, decode, encode
from dynamo_lite.router import metrics
from dynamo_lite.router.roster import Instance, Roster
from kvbm.events import KvEventBatch, KvSnapshot

SNAPSHOT_DEADLINE_S = 5.0
FIRST_SNAPSHOTS_S = 2.0  # how long `open` waits for the workers that are there; the rest comes in later
RETRY_S, RETRY_MAX_S = 0.1, 2.0

log = logging.getLogger(__name__)
T = TypeVar("T", bound=msgspec.Struct)


class Fleet(Roster):
    """All live workers of a deployment. Open it with `Fleet.open`."""

    def __init__(self, bus: Bus, subjects: Subjects, group: asyncio.TaskGroup) -> None:
        super().__init__(self._refresh_soon)
        self._bus, self._subjects, self._group = bus, subjects, group
        self._refreshing: set[asyncio.Task[None]] = set()
        self._closed = False

    @classmethod
    @asynccontextmanager
    async def open(
        cls, bus: Bus, discovery: Discovery, subjects: Subjects, group: asyncio.TaskGroup
    ) -> AsyncIterator[Fleet]:
        """Follows the workers while the body runs. The workers' blocks are known on entry, where they answer."""
        fleet = cls(bus, subjects, group)
        async with AsyncExitStack() as stack:
            stack.callback(fleet._close)
            for subject, handler in (
                (subjects.kv_events(), _taking(KvEventBatch, fleet.take_batch)),
                (subjects.load(), _taking(LoadReport, fleet.take_report)),
            ):
                subscription = await bus.subscribe(subject, handler)
                stack.push_async_callback(subscription.close)
            membership = await discovery.membership(group)
            membership.add_listener(fleet._changed)
            for record in membership.instances.values():
                fleet.join(record)
            if fleet._refreshing:
                await asyncio.wait(fleet._refreshing, timeout=FIRST_SNAPSHOTS_S)
            yield fleet

    def _changed(self, added: InstanceRecord | None, removed: InstanceRecord | None) -> None:
        if self._closed:
            return
        if added is not None:
            self.join(added)
        elif removed is not None:
            self.leave(removed.incarnation)

    def _close(self) -> None:
        self._closed = True
        for task in self._refreshing:
            task.cancel()

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
