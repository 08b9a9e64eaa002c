"""Workers that speak the wire but have no engine, and fleets that follow them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import pytest

from dynamo_lite.config import EtcdAddress, NatsAddress
from dynamo_lite.plane.bus import Bus, Subscription
from dynamo_lite.plane.discovery import Discovery
from dynamo_lite.plane.wire import InstanceRecord, LoadReport, Subjects, encode
from dynamo_lite.router.fleet import Fleet
from kvbm.events import BlocksStored, KvEventBatch, KvSnapshot
from kvbm.ledger import BlockLedger

SUBJECTS = Subjects("test")


@dataclass
class Worker:
    """A worker's side of the control plane: registration, KV events, snapshots, load reports."""

    record: InstanceRecord
    bus: Bus
    group: asyncio.TaskGroup
    ledger: BlockLedger = field(default_factory=BlockLedger)
    seq: int = 0
    reports: int = 0
    snapshots: int = 0
    held_back: asyncio.Event = field(default_factory=asyncio.Event)  # snapshots wait until it is set
    subscription: Subscription = field(init=False)

    async def serve(self) -> None:
        subject = SUBJECTS.snapshot(self.record.incarnation)
        self.subscription = await self.bus.serve(subject, self._snapshot, self.group)

    async def store(self, *hashes: int, lose: bool = False) -> None:
        """One engine step that stored blocks; `lose` its events on the way."""
        events = self.ledger.fold([BlocksStored(hashes)])
        self.seq += 1
        if not lose:
            batch = KvEventBatch(self.record.incarnation, self.seq, events)
            await self.bus.publish(SUBJECTS.kv_events(self.record.incarnation), encode(batch))

    async def report(self, *, used: int = 0, running: int = 0) -> None:
        self.reports += 1
        incarnation = self.record.incarnation
        load = LoadReport(incarnation, self.reports, running, 0, used, self.record.kv_blocks, kv_seq=self.seq)
        await self.bus.publish(SUBJECTS.load(incarnation), encode(load))

    async def _snapshot(self, _: bytes) -> bytes:
        self.snapshots += 1
        answer = encode(KvSnapshot(self.record.incarnation, self.seq, self.ledger.snapshot()))
        await self.held_back.wait()
        return answer


@dataclass
class Plane:
    """What is opened on one NATS and one etcd."""

    nats: NatsAddress
    etcd: EtcdAddress

    @asynccontextmanager
    async def fleet(self) -> AsyncIterator[Fleet]:
        async with AsyncExitStack() as stack:
            bus = await stack.enter_async_context(Bus.connect(self.nats, "frontend"))
            discovery = await stack.enter_async_context(Discovery.connect(self.etcd, "test"))
            group = await stack.enter_async_context(asyncio.TaskGroup())
            yield await stack.enter_async_context(Fleet.open(bus, discovery, SUBJECTS, group))

    @asynccontextmanager
    async def worker(self, record: InstanceRecord) -> AsyncIterator[Worker]:
        """Registered, with its snapshots served, while the body runs."""
        async with AsyncExitStack() as stack:
            bus = await stack.enter_async_context(Bus.connect(self.nats, record.name))
            discovery = await stack.enter_async_context(Discovery.connect(self.etcd, "test"))
            worker = Worker(record, bus, await stack.enter_async_context(asyncio.TaskGroup()))
            worker.held_back.set()
            await worker.serve()
            await stack.enter_async_context(discovery.register(record))
            yield worker


@pytest.fixture
def plane(nats: NatsAddress, etcd: EtcdAddress) -> Plane:
    return Plane(nats, etcd)
