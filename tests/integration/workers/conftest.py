"""Worker processes with simulated engines on real NATS and etcd, and a client that speaks the wire as frontends do."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from prometheus_client import CollectorRegistry, generate_latest

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # read at its first import; children exec at once anyhow

from dynamo_lite.config import Config, EtcdAddress, NatsAddress, ProcessSpec
from dynamo_lite.plane.bus import Bus, Message
from dynamo_lite.plane.discovery import Discovery, Membership
from dynamo_lite.plane.wire import (
    Cancel,
    Delta,
    DeltaBatch,
    Empty,
    FrontendId,
    GenerateRequest,
    Incarnation,
    InstanceRecord,
    LoadReport,
    RequestId,
    Role,
    Sampling,
    Subjects,
    decode,
    encode,
)
from dynamo_lite.processes import Child, running
from dynamo_lite.status import Phase
from dynamo_lite.tasks import scope
from kvbm.events import KvEventBatch, KvSnapshot
from workers.metrics import WorkerMetrics
from workers.service import Service, instance_record
from workers.sim_engine import SimEngine

DEADLINE_S = 30.0
CONFIG = {"vocab_size": 5000, "max_position_embeddings": 4096, "eos_token_id": 2, "bos_token_id": 1}
PROMPT = [10 + i % 4000 for i in range(1000)]  # 62 blocks and 8 tokens
GREEDY = Sampling(max_tokens=8, temperature=0.0)


@dataclass
class Stream:
    """The deltas of one request as they come."""

    request_id: RequestId
    record: InstanceRecord
    deltas: list[Delta] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, delta: Delta) -> None:
        self.deltas.append(delta)
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def first(self) -> Delta:
        await self.until(lambda: bool(self.deltas))
        return self.deltas[0]

    async def ended(self, n: int = 1) -> list[Delta]:
        """All deltas, once every sequence has its last."""
        await self.until(lambda: sum(bool(delta.finish or delta.error) for delta in self.deltas) == n)
        return self.deltas

    def text(self, index: int = 0) -> list[int]:
        return [token for delta in self.deltas if delta.index == index for token in delta.token_ids]


@dataclass
class Local:
    """A worker that runs in this process."""

    engine: SimEngine
    task: asyncio.Task[None]
    stop: asyncio.Event
    phases: list[Phase]
    registry: CollectorRegistry


class Fleet:
    """Sends requests to workers; knows what they report."""

    def __init__(self, bus: Bus, membership: Membership, subjects: Subjects) -> None:
        self.bus, self.membership, self.subjects = bus, membership, subjects
        self.frontend = FrontendId(uuid.uuid4().hex)
        self.streams: dict[str, Stream] = {}
        self.batches: list[DeltaBatch] = []
        self.events: list[KvEventBatch] = []
        self.bounced: list[str] = []
        self.loads: dict[str, LoadReport] = {}
        self.children: dict[str, Child] = {}
        self.local: dict[str, Local] = {}
        self._news = asyncio.Event()

    async def follow(self) -> None:
        await self.bus.subscribe(self.subjects.deltas(self.frontend), self._deltas)
        await self.bus.subscribe(self.subjects.undelivered(self.frontend), self._undelivered)
        await self.bus.subscribe(self.subjects.load(), self._load)
        await self.bus.subscribe(self.subjects.kv_events(), self._kv_events)

    def _deltas(self, message: Message) -> None:
        batch = decode(message.data, DeltaBatch)
        self.batches.append(batch)
        for delta in batch.deltas:
            self.streams[delta.request_id].put(delta)

    def _undelivered(self, message: Message) -> None:
        self.bounced.append(message.subject.rpartition(".")[2])
        self._news.set()

    def _load(self, message: Message) -> None:
        report = decode(message.data, LoadReport)
        self.loads[report.worker] = report
        self._news.set()

    def _kv_events(self, message: Message) -> None:
        self.events.append(decode(message.data, KvEventBatch))
        self._news.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Until a report, an event or a bounce has made it true."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._news.clear()
                await self._news.wait()

    def load(self, record: InstanceRecord) -> LoadReport:
        return self.loads.get(record.incarnation) or LoadReport(record.incarnation, 0, 0, 0, 0, 0)

    async def free(self, *records: InstanceRecord) -> None:
        """Until these workers hold and run nothing, by reports made after this call."""
        for record in records:
            seen = self.load(record).seq

            def idle(record: InstanceRecord = record, seen: int = seen) -> bool:
                now = self.load(record)
                busy = now.running + now.waiting + now.kv_used_blocks + now.held_blocks
                return now.seq > seen and busy == 0

            await self.until(idle)

    async def send(
        self,
        to: InstanceRecord,
        tokens: list[int],
        sampling: Sampling = GREEDY,
        prefill: tuple[InstanceRecord, ...] = (),
        **more: Any,
    ) -> Stream:
        request_id = RequestId(more.pop("request_id", uuid.uuid4().hex))
        stream = self.streams[request_id] = Stream(request_id, to)
        candidates = tuple(record.incarnation for record in prefill)
        request = GenerateRequest(request_id, self.frontend, tokens, sampling, prefill=candidates, **more)
        reply = self.subjects.undelivered(self.frontend, request_id)
        await self.bus.publish(self.subjects.generate(to.incarnation), encode(request), reply)
        return stream

    async def cancel(self, stream: Stream, index: int | None = None) -> None:
        cancel = encode(Cancel(stream.request_id, index))
        await self.bus.publish(self.subjects.cancel(stream.record.incarnation), cancel)

    async def leave(self, stream: Stream) -> None:
        """It goes on elsewhere."""
        cancel = encode(Cancel(stream.request_id, moved=True))
        await self.bus.publish(self.subjects.cancel(stream.record.incarnation), cancel)

    async def snapshot(self, record: InstanceRecord) -> KvSnapshot:
        data = await self.bus.request(self.subjects.snapshot(record.incarnation), encode(Empty()), 5.0)
        return decode(data, KvSnapshot)

    async def metrics(self, record: InstanceRecord) -> dict[str, float]:
        """Samples by name and labels as the page writes them."""
        if record.name in self.local:
            page = generate_latest(self.local[record.name].registry).decode()
        else:
            page = await asyncio.to_thread(lambda: urlopen(record.metrics_url, timeout=5).read().decode())
        lines = [line.rpartition(" ") for line in page.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    async def record(self, name: str) -> InstanceRecord:
        """Of a worker by name, once it has registered."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                for record in self.membership.instances.values():
                    if record.name == name:
                        return record
                await self.membership.changed()

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        self.children[name].signal(number)


StartWorker = Callable[..., Any]


@pytest.fixture
async def fleet(nats: NatsAddress, etcd: EtcdAddress) -> AsyncIterator[Fleet]:
    async with (
        Bus.connect(nats, "test") as bus,
        Discovery.connect(etcd, "test") as discovery,
        scope() as group,
    ):
        fleet = Fleet(bus, await discovery.membership(group), Subjects("test"))
        await fleet.follow()
        yield fleet


@pytest.fixture
def spec(nats: NatsAddress, etcd: EtcdAddress, tmp_path: Path) -> Callable[[str, dict[str, object]], ProcessSpec]:
    """The spec of a worker of the role in its name, with these `sim` settings."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))

    def make(name: str, sim: dict[str, object]) -> ProcessSpec:
        config = Config.model_validate(
            {
                "engine": "sim",
                "namespace": "test",
                "kv_transfer": {"timeout_ms": 1000},
                "telemetry": {"traces": {"file": str(tmp_path / "traces.jsonl")}},
                "sim": {"decode_step_ms": 1, "prefill_ms_per_token": 0.001} | sim,
            }
        )
        fields = {"role": name.partition("-")[0], "name": name, "model_path": model, "state_dir": tmp_path}
        return ProcessSpec.model_validate({"config": config, "nats": nats, "etcd": etcd} | fields)

    return make


@pytest.fixture
async def start(fleet: Fleet, spec: Callable[..., ProcessSpec]) -> AsyncIterator[StartWorker]:
    """`await start("decode-0", kv_blocks=…)`: a worker in this process; keywords are `sim` settings."""
    async with AsyncExitStack() as stack:

        async def begin(name: str, **sim: object) -> InstanceRecord:
            worker = spec(name, sim)
            role, incarnation, registry = Role(worker.role), Incarnation(uuid.uuid4().hex), CollectorRegistry()
            engine = SimEngine(worker, role, incarnation, registry)
            stack.push_async_callback(engine.close)
            record = instance_record(worker, incarnation, await engine.start(), "")
            bus = await stack.enter_async_context(Bus.connect(worker.nats, name))
            discovery = await stack.enter_async_context(Discovery.connect(worker.etcd, "test"))
            group = await stack.enter_async_context(scope())
            service = Service(worker, record, engine, bus, WorkerMetrics(role, registry), group)
            stop, phases = asyncio.Event(), list[Phase]()
            task = asyncio.get_running_loop().create_task(service.run(discovery, stop, phases.append))
            stack.push_async_callback(asyncio.wait, (task,))
            stack.callback(stop.set)
            fleet.local[name] = Local(engine, task, stop, phases, registry)
            return await fleet.record(name)

        yield begin


@pytest.fixture
async def start_process(fleet: Fleet, spec: Callable[..., ProcessSpec], tmp_path: Path) -> AsyncIterator[StartWorker]:
    """Like `start`, but a process of its own, which can be killed."""
    async with AsyncExitStack() as stack:

        async def begin(name: str, **sim: object) -> InstanceRecord:
            file = tmp_path / f"{name}.json"
            file.write_text(spec(name, sim).model_dump_json())
            command = [sys.executable, "-m", "dynamo_lite.process", str(file)]
            child = Child.start(name, command, tmp_path / "logs" / f"{name}.log")
            await stack.enter_async_context(running(child, grace_s=10))
            fleet.children[name] = child
            return await fleet.record(name)

        yield begin


def spans(folder: Path) -> list[dict[str, Any]]:
    """What the workers have exported so far."""
    file = folder / "traces.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
