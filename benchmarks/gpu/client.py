"""Asks a decode worker directly, with or without a prefill worker to help it; so both ways are timed alike."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from dynamo_lite.config import EtcdAddress, NatsAddress
from dynamo_lite.plane.bus import Bus, Message
from dynamo_lite.plane.discovery import Discovery, Membership
from dynamo_lite.plane.wire import (
    Cancel,
    DeltaBatch,
    FrontendId,
    GenerateRequest,
    InstanceRecord,
    RequestId,
    Sampling,
    Subjects,
    decode,
    encode,
)
from dynamo_lite.tasks import scope

REQUEST_S = 120.0


@dataclass
class Stream:
    """One request's tokens, as they come."""

    request_id: RequestId
    started: float
    token_ids: list[int] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)  # of each token, since it was sent
    cached_tokens: int = 0  # of the prompt, found in the worker's KV
    error: str | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False

    async def until_first(self) -> None:
        async with asyncio.timeout(REQUEST_S):
            while not self.token_s and not self.ended:
                self.changed.clear()
                await self.changed.wait()
        if not self.token_s:
            raise RuntimeError(f"no token came: {self.error}")

    async def until_end(self) -> list[int]:
        async with asyncio.timeout(REQUEST_S):
            while not self.ended:
                self.changed.clear()
                await self.changed.wait()
        if self.error:
            raise RuntimeError(self.error)
        return self.token_ids


class Client:
    """Plays a frontend."""

    def __init__(self, bus: Bus, membership: Membership, subjects: Subjects) -> None:
        self.bus, self.membership, self.subjects = bus, membership, subjects
        self.frontend = FrontendId(uuid.uuid4().hex)
        self.streams: dict[str, Stream] = {}
        self.watched: set[str] = set()  # requests
        self.steps: list[float] = []  # when batches of their deltas came: one per engine step of the worker

    @classmethod
    @asynccontextmanager
    async def connect(cls, run: dict[str, Any]) -> AsyncIterator[Client]:
        """`run`: the deployment's run.json."""
        async with (
            Bus.connect(NatsAddress.model_validate(run["nats"]), "benchmark") as bus,
            Discovery.connect(EtcdAddress.model_validate(run["etcd"]), run["namespace"]) as discovery,
            scope() as group,
        ):
            client = cls(bus, await discovery.membership(group), Subjects(run["namespace"]))
            await bus.subscribe(client.subjects.deltas(client.frontend), client._deltas)
            yield client

    def worker(self, name: str) -> InstanceRecord:
        return next(record for record in self.membership.instances.values() if record.name == name)

    async def send(
        self, token_ids: Sequence[int], new_tokens: int, decode_worker: InstanceRecord,
        *prefill: InstanceRecord, salt: str | None = None, seed: int | None = None,
    ) -> Stream:  # fmt: skip
        """Greedy. Without a prefill worker the decode worker computes the prompt itself."""
        stream = Stream(RequestId(uuid.uuid4().hex), time.perf_counter())
        self.streams[stream.request_id] = stream
        request = GenerateRequest(
            stream.request_id,
            self.frontend,
            list(token_ids),
            Sampling(max_tokens=new_tokens, temperature=0.0, seed=seed),
            prefill=tuple(one.incarnation for one in prefill),
            cache_salt=salt or stream.request_id,
        )
        await self.bus.publish(self.subjects.generate(decode_worker.incarnation), encode(request))
        return stream

    async def cancel(self, stream: Stream, worker: InstanceRecord) -> None:
        await self.bus.publish(self.subjects.cancel(worker.incarnation), encode(Cancel(stream.request_id)))

    def _deltas(self, message: Message) -> None:
        now = time.perf_counter()
        deltas = decode(message.data, DeltaBatch).deltas
        if any(delta.request_id in self.watched for delta in deltas):
            self.steps.append(now)
        for delta in deltas:
            stream = self.streams.get(delta.request_id)
            if stream is None:
                continue
            stream.token_s += [now - stream.started] * len(delta.token_ids)
            stream.token_ids += delta.token_ids
            stream.cached_tokens = delta.cached_tokens or stream.cached_tokens
            stream.error = delta.error.message if delta.error else None
            stream.ended = bool(delta.finish or delta.error)
            stream.changed.set()
