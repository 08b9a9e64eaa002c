"""Which workers live: etcd. The only file that imports etcd3aio (and grpc beneath it).

The watch is our own, on etcd3aio's channel. Its `watch()` hangs when the revision it wants was compacted away, and
reconnects by itself at a revision that may skip events; here either ends the watch, and the listing is read again.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import grpc
import msgspec
from etcd3aio import (
    Etcd3Client,
    EtcdConnectionError,
    EtcdError,
    EtcdTransientError,
    EtcdUnauthenticatedError,
    prefix_range_end,
)
from etcd3aio._protobuf import WatchCreateRequest, WatchRequest  # importing the .proto modules anew would clash

from dynamo_lite.config import EtcdAddress
from dynamo_lite.errors import PlaneError
from dynamo_lite.plane.wire import PROTOCOL, Incarnation, InstanceRecord
from dynamo_lite.tasks import background

CALL_DEADLINE_S = 2.0
CONNECT_DEADLINE_S = 10.0
RETRY_S = 0.2
_DELETE = 1  # mvccpb.Event.DELETE
_UNREACHABLE = (EtcdConnectionError, EtcdTransientError, TimeoutError)
_FAILURES = (EtcdError, grpc.aio.AioRpcError, TimeoutError)

log = logging.getLogger(__name__)
T = TypeVar("T")
Listener = Callable[[InstanceRecord | None, InstanceRecord | None], None]


class Membership:
    """The live workers as far as etcd has told; while etcd is down, as it last told."""

    def __init__(self) -> None:
        self._instances: dict[Incarnation, InstanceRecord] = {}
        self._listeners: list[Listener] = []
        self._change = asyncio.Event()
        self.instances: Mapping[Incarnation, InstanceRecord] = MappingProxyType(self._instances)

    def add_listener(self, listener: Listener) -> None:
        """Call `listener(added, removed)` at every change; a changed record is both."""
        self._listeners.append(listener)

    async def changed(self) -> None:
        """Wait for the next change."""
        await self._change.wait()

    async def until(self, condition: Callable[[Mapping[Incarnation, InstanceRecord]], bool]) -> None:
        """Wait until `condition` holds of the instances."""
        while not condition(self.instances):
            await self._change.wait()

    def set(self, incarnation: Incarnation, record: InstanceRecord | None) -> None:
        """Take over what was told of one worker; None: it is gone."""
        before = self._instances.get(incarnation)
        if before == record:
            return
        if record is None:
            del self._instances[incarnation]
        else:
            self._instances[incarnation] = record
        self._change.set()
        self._change = asyncio.Event()
        for listener in self._listeners:
            listener(record, before)

    def replace(self, records: Mapping[Incarnation, InstanceRecord]) -> None:
        """Take over a whole listing; what is not in it is gone."""
        for incarnation in [known for known in self._instances if known not in records]:
            self.set(incarnation, None)
        for incarnation, record in records.items():
            self.set(incarnation, record)


class Discovery:
    """One connection to etcd. Open it with `Discovery.connect`."""

    def __init__(self, client: Any, address: EtcdAddress, namespace: str) -> None:
        self._client, self._address = client, address
        self._prefix = f"/dynamo-lite/{namespace}/instances/"
        self._token: tuple[tuple[str, str], ...] | None = None

    @classmethod
    @asynccontextmanager
    async def connect(cls, address: EtcdAddress, namespace: str) -> AsyncIterator[Discovery]:
        """PlaneError when etcd does not answer or refuses the credentials."""
        async with cls.open(address, namespace) as discovery:
            await discovery.greet()
            yield discovery

    @classmethod
    @asynccontextmanager
    async def open(cls, address: EtcdAddress, namespace: str) -> AsyncIterator[Discovery]:
        """Like `connect`, but asks nothing of etcd yet. PlaneError when its host is not known."""
        client = await _client(address)
        async with client:
            yield cls(client, address, namespace)

    async def greet(self) -> None:
        """Raises PlaneError as `connect` does."""
        await self._insist(self._greet)

    @asynccontextmanager
    async def register(self, record: InstanceRecord) -> AsyncIterator[None]:
        """Visible to every membership while the body runs, and for one lease time after an unclean end.

        A lease that was lost (etcd was down or lost its data) is granted again and the record put again.
        """
        lease = self._lease(record)
        await self._insist(lease.grant)
        try:
            async with background(lease.keep()):
                yield
        finally:
            await lease.revoke()

    async def hold(self, record: InstanceRecord, granted: asyncio.Event) -> NoReturn:
        """Like `register`, until cancelled, but for an etcd that may be down: `granted` is set once it is there."""
        lease = self._lease(record)
        try:
            while True:
                try:
                    await self._ask(lease.grant)
                    break
                except _FAILURES as error:
                    log.warning("cannot register with etcd: %s", _detail(error))
                    await asyncio.sleep(RETRY_S)
            granted.set()
            await lease.keep()
        finally:
            if granted.is_set():
                await lease.revoke()

    def _lease(self, record: InstanceRecord) -> _Lease:
        return _Lease(self, self._prefix + record.incarnation, msgspec.json.encode(record))

    async def membership(self, group: asyncio.TaskGroup) -> Membership:
        """The live view, after its first listing; a task of `group` keeps it current until cancelled."""
        membership = Membership()
        revision = await self._insist(lambda: self._list(membership))
        group.create_task(self._follow(membership, revision, lambda _: None))
        return membership

    async def follow(self, membership: Membership, reach: Callable[[bool], None]) -> NoReturn:
        """Keep `membership` current until cancelled. `reach` is told when etcd answers, and when it ceases to."""
        await self._follow(membership, await self._list_until_answered(membership, reach), reach)

    async def _follow(self, membership: Membership, revision: int, reach: Callable[[bool], None]) -> NoReturn:
        while True:
            try:
                await self._watch(membership, revision)
            except grpc.aio.AioRpcError as error:
                log.warning("watching etcd failed: %s", _detail(error))
                await asyncio.sleep(RETRY_S)
            revision = await self._list_until_answered(membership, reach)

    async def _watch(self, membership: Membership, revision: int) -> None:
        """Apply changes after `revision`. Returns, or raises, when the listing must be read again."""
        create = WatchCreateRequest(
            key=self._prefix.encode(), range_end=prefix_range_end(self._prefix), start_revision=revision + 1
        )
        # A member that has lost the others would otherwise go on watching, and see nothing.
        metadata = (("hasleader", "true"), *(self._token or ()))
        stream = self._client.watch._stub.Watch(metadata=metadata)
        try:
            await stream.write(WatchRequest(create_request=create))
            while (response := await stream.read()) is not grpc.aio.EOF:
                if response.canceled:
                    log.info("etcd cancelled the watch: %s", response.cancel_reason or "compacted")
                    return
                for event in response.events:
                    incarnation = Incarnation(event.kv.key.decode().removeprefix(self._prefix))
                    record = None if event.type == _DELETE else _record(event.kv.value)
                    membership.set(incarnation, record)
        finally:
            stream.cancel()

    async def _list(self, membership: Membership) -> int:
        """Returns the revision of the listing."""
        found = await self._client.kv.get(self._prefix, prefix_range_end(self._prefix))
        records = [_record(pair.value) for pair in found.kvs]
        membership.replace({record.incarnation: record for record in records if record is not None})
        return int(found.header.revision)

    async def _list_until_answered(self, membership: Membership, reach: Callable[[bool], None]) -> int:
        while True:
            try:
                revision = await self._ask(lambda: self._list(membership))
            except _FAILURES as error:
                log.warning("etcd: %s; keeping its last view", _detail(error))
                reach(False)
                await asyncio.sleep(RETRY_S)
            else:
                reach(True)
                return revision

    async def _greet(self) -> None:
        await self._authenticate()
        await self._ask(lambda: self._client.kv.get(self._prefix, count_only=True))

    async def _authenticate(self) -> None:
        if self._address.user is not None:
            self._client.set_token(None)
            answer = await self._client.auth.authenticate(
                self._address.user, self._address.password or "", timeout=CALL_DEADLINE_S
            )
            self._client.set_token(answer.token)
            self._token = (("token", answer.token),)

    async def _ask(self, call: Callable[[], Awaitable[T]]) -> T:
        """One call with a deadline. A token that ran out, or that etcd forgot in a restart, is renewed."""
        async with asyncio.timeout(CALL_DEADLINE_S):
            try:
                return await call()
            except (EtcdError, grpc.aio.AioRpcError) as error:
                if not _unauthenticated(error) or self._address.user is None:
                    raise
            await self._authenticate()
            return await call()

    async def _insist(self, call: Callable[[], Awaitable[T]]) -> T:
        """Like `_ask`, but silence is borne for a while: etcd may be starting. Every failure is a PlaneError."""
        try:
            async with asyncio.timeout(CONNECT_DEADLINE_S):
                while True:
                    try:
                        return await self._ask(call)
                    except _UNREACHABLE as error:
                        log.info("etcd does not answer yet: %s", error)
                    await asyncio.sleep(RETRY_S)
        except TimeoutError:
            raise PlaneError(f"etcd at {', '.join(self._address.endpoints)} does not answer") from None
        except _FAILURES as error:
            raise PlaneError(f"etcd refuses: {_detail(error)}") from error


def _unauthenticated(error: Exception) -> bool:
    if isinstance(error, grpc.aio.AioRpcError):  # streams raise gRPC's own error
        return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return isinstance(error, EtcdUnauthenticatedError)


def _detail(error: BaseException) -> str:
    text = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
    return text or type(error).__name__


class _Lease:
    """One key under one lease that is kept alive."""

    def __init__(self, discovery: Discovery, key: str, value: bytes) -> None:
        self._ask, self._client = discovery._ask, discovery._client
        self._ttl_s = float(discovery._address.lease_ttl_s)
        self._wanted_ttl_s = discovery._address.lease_ttl_s
        self._key, self._value = key, value
        self._id = 0

    async def grant(self) -> None:
        granted = await self._client.lease.grant(self._wanted_ttl_s)
        self._id, self._ttl_s = granted.ID, float(granted.TTL)
        await self._client.kv.put(self._key, self._value, lease=self._id)

    async def keep(self) -> NoReturn:
        """Refresh three times a lease time. While etcd is down try more often: the lease outlives a short outage."""
        pause = self._ttl_s / 3
        while True:
            await asyncio.sleep(pause)
            try:
                if not await self._ask(self._refresh):
                    log.warning("the lease of %s was lost; registering again", self._key)
                    await self._ask(self.grant)
                pause = self._ttl_s / 3
            except _FAILURES as error:
                log.warning("cannot refresh the lease: %s", _detail(error))
                pause = RETRY_S

    async def _refresh(self) -> bool:
        """Whether etcd still knows the lease."""
        stream = self._client.lease.keep_alive(self._id)
        try:
            answer = await stream.read()
            return answer is not grpc.aio.EOF and answer.TTL > 0
        finally:
            stream.cancel()

    async def revoke(self) -> None:
        """Deletes the key as well. Without an answer the lease runs out by itself."""
        try:
            await self._ask(lambda: self._client.lease.revoke(self._id))
        except _FAILURES as error:
            log.warning("cannot revoke the lease: %s", _detail(error))


def _record(value: bytes) -> InstanceRecord | None:
    """None, with a warning, for a record of another version of this software."""
    try:
        record = msgspec.json.decode(value, type=InstanceRecord)
    except msgspec.MsgspecError as error:
        log.warning("ignoring an instance record: %s", error)
        return None
    if record.protocol != PROTOCOL:
        log.warning("ignoring %s: it speaks protocol %d, this process %d", record.name, record.protocol, PROTOCOL)
        return None
    return record


async def _client(address: EtcdAddress) -> Any:
    """etcd3aio dials only numbers, so names are looked up here."""
    loop = asyncio.get_running_loop()
    endpoints, names = [], []
    for endpoint in address.endpoints:
        parts = urlsplit(endpoint if "://" in endpoint else f"tcp://{endpoint}")
        host, port = parts.hostname or "", parts.port or 2379
        try:
            found = await loop.getaddrinfo(host, port, family=socket.AF_INET, type=socket.SOCK_STREAM)
        except OSError as error:
            raise PlaneError(f"etcd's host {host} is not known: {error}") from error
        endpoints.append(f"{found[0][4][0]}:{port}")
        names.append(host)
    ca_cert = None if address.ca_cert is None else await asyncio.to_thread(address.ca_cert.read_bytes)
    if ca_cert is None and any(endpoint.startswith("https:") for endpoint in address.endpoints):
        raise PlaneError("etcd over https needs etcd.ca_cert")
    client = Etcd3Client(
        endpoints,
        rpc_max_attempts=1,  # `_insist` and the loops above retry
        ca_cert=ca_cert,
        tls_server_name=names[0] if ca_cert else None,
    )
    # gRPC waits up to two minutes before it dials again; a worker must be back long before its peers give up.
    client._manager.grpc_options += [
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 5000),  # in truth the deadline of one attempt
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
    return client
