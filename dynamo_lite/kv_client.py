"""Asks the workers of a running deployment about their KV blocks, over its NATS, as a client of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from dynamo_lite.errors import DeadlineExceeded, DynamoError, NoResponders, NotThere
from dynamo_lite.plane import discovery_set
from dynamo_lite.plane.bus import Bus
from dynamo_lite.plane.kv_wire import KvAnswer, KvAsk, KvPurge, KvRequest, KvStats, KvTier, KvTiers, KvVerify
from dynamo_lite.plane.wire import Fingerprint, InstanceRecord, Subjects, decode, encode
from dynamo_lite.state import Run
from dynamo_lite.tasks import scope
from kvbm.events import Tier

LOOK_UP_S = 15.0  # for the workers, in the discovery service
ANSWER_S = 5.0  # for what a worker knows
VERIFY_S = 60.0  # for some blocks of a tier, as long as the worker shows signs of life
PURGE_S = 3600.0  # for all of them, likewise
SILENCE_S = 10.0  # without one

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Worker:
    """One that is asked."""

    label: str  # its name; with its host where others have that name, too
    record: InstanceRecord

    @property
    def block_bytes(self) -> int:
        """Of a block on the device, all ranks together."""
        fingerprint = self.record.fingerprint
        return fingerprint.block_bytes * fingerprint.layout.tensor_parallel


@dataclass(frozen=True, slots=True)
class Failure:
    """Something was not answered, or not done."""

    worker: str
    reason: str


class KvClient:
    """Open it with `connect`. A worker that fails is named in `failures`; others go on."""

    def __init__(self, bus: Bus, namespace: str, workers: Sequence[Worker]) -> None:
        self.workers = workers
        self.failures: list[Failure] = []
        self._bus, self._subjects = bus, Subjects(namespace)
        self._silent: set[str] = set()

    async def request(self, worker: Worker, ask: KvAsk, kind: type[T]) -> T:
        """Raises DynamoError by a deadline."""
        me, data = worker.record.incarnation, encode(KvRequest(ask))
        subject, probe = self._subjects.kv_admin(me), self._subjects.ping(me)
        if isinstance(ask, KvVerify | KvPurge):
            timeout_s = PURGE_S if isinstance(ask, KvPurge) else VERIFY_S
            answer = await self._bus.call(subject, data, timeout_s=timeout_s, probe=probe, silence_s=SILENCE_S)
        else:
            answer = await self._bus.request(subject, data, ANSWER_S)
        told = decode(answer, KvAnswer).told
        assert isinstance(told, kind), "an answer is of its question's kind"
        return told

    async def ask(self, worker: Worker, ask: KvAsk, kind: type[T]) -> T | None:
        """None: it failed, and is named; one that is silent is not asked again."""
        if worker.label in self._silent:
            return None
        try:
            return await self.request(worker, ask, kind)
        except DynamoError as error:
            reason = str(error)
            if isinstance(error, NoResponders | DeadlineExceeded):
                self._silent.add(worker.label)
                reason = _silence(error)
            self.fail(worker.label, reason)
            return None

    def fail(self, worker: str, reason: str) -> None:
        self.failures.append(Failure(worker, reason))

    async def stats(self) -> dict[Worker, KvTiers]:
        """Of those that answer."""
        async with asyncio.TaskGroup() as group:
            asked = {worker: group.create_task(self.ask(worker, KvStats(), KvTiers)) for worker in self.workers}
        return {worker: told for worker, task in asked.items() if (told := task.result()) is not None}


def _silence(error: NoResponders | DeadlineExceeded) -> str:
    if isinstance(error, DeadlineExceeded):
        return f"does not answer within {error.seconds:g} s; its log may say why"
    return "is gone, or of a version without `kv` commands"


def targets(stats: Mapping[Worker, KvTiers], wanted: Tier | None = None) -> list[tuple[Worker, KvTier]]:
    """Whose tiers have to be gone through, for one tier or all, nearest first.

    An object tier is all workers' that have a fingerprint: one of them is enough, best one whose tier works.
    """
    found: list[tuple[Worker, KvTier]] = []
    shared: dict[Fingerprint, tuple[Worker, KvTier]] = {}
    for worker, told in stats.items():
        for tier in told.tiers:
            if tier.tier is not (wanted or tier.tier):
                continue
            if tier.tier is not Tier.OBJECT:
                found.append((worker, tier))
                continue
            known = shared.get(worker.record.fingerprint)
            if known is None or (tier.on and not known[1].on):
                shared[worker.record.fingerprint] = worker, tier
    return found + list(shared.values())


@asynccontextmanager
async def connect(run: Run, only: str | None = None) -> AsyncIterator[KvClient]:
    """A client of that deployment. `only`: the worker of that name. Raises PlaneError, NotThere."""
    async with Bus.connect(run.nats, "dynamo-lite kv") as bus:
        workers = await live_workers(run)
        client = KvClient(bus, run.namespace, [one for one in workers if only in (None, one.label, one.record.name)])
        known = {worker.record.name for worker in workers}
        for process in run.processes:
            if process.role != "frontend" and process.name not in known and only in (None, process.name):
                client.fail(process.name, "is not registered: it starts, or stands still; its log may say why")
        if not client.workers and not client.failures:
            there = ", ".join(worker.label for worker in workers) or "none"
            raise NotThere(f"no worker is called {only}; there are: {there}" if only else "there is no worker")
        yield client


async def live_workers(run: Run) -> list[Worker]:
    """Every one of the namespace, on whatever host. Raises PlaneError."""
    return _labelled(await _records(run))


async def _records(run: Run) -> list[InstanceRecord]:
    try:
        async with (
            asyncio.timeout(LOOK_UP_S),
            discovery_set.connect(run.etcd, run.namespace) as discovery,
            scope() as group,
        ):
            membership = await discovery.membership(group)
            return sorted(membership.instances.values(), key=lambda record: (record.name, record.host))
    except TimeoutError:
        raise DeadlineExceeded("the discovery service", LOOK_UP_S) from None
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from errors


def _labelled(records: Sequence[InstanceRecord]) -> list[Worker]:
    count = Counter(record.name for record in records)
    return [
        Worker(record.name if count[record.name] == 1 else f"{record.name}@{record.host}", record) for record in records
    ]
