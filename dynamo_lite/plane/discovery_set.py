"""Several independent discovery services behind one list: the loss of one loses nothing.

Two etcds are no cluster, since two of two need both. So workers register with every one of them, and who watches takes
the union. A worker is gone when no server that can be reached has it; one that has just come back may have lost its
data, so for a lease time its not having a worker says nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import NoReturn, Protocol

from dynamo_lite.config import EtcdAddress
from dynamo_lite.errors import PlaneError
from dynamo_lite.plane.discovery import CONNECT_DEADLINE_S, RETRY_S, Discovery, Membership
from dynamo_lite.plane.wire import Incarnation, InstanceRecord
from dynamo_lite.tasks import background

OTHERS_DEADLINE_S = 0.5  # for the other servers, once one has answered
SETTLING_S = 1.0  # beyond a lease time: what workers need at most to find a server that came back

log = logging.getLogger(__name__)


class Registry(Protocol):
    """Where workers register and others see them: a Discovery, or several."""

    def register(self, record: InstanceRecord) -> AbstractAsyncContextManager[None]: ...

    async def membership(self, group: asyncio.TaskGroup) -> Membership: ...


@asynccontextmanager
async def connect(address: EtcdAddress, namespace: str) -> AsyncIterator[Registry]:
    """PlaneError when no server answers, or one refuses the credentials."""
    if not address.independent:
        async with Discovery.connect(address, namespace) as discovery:
            yield discovery
        return
    apart = [address.model_copy(update={"endpoints": (one,), "independent": False}) for one in address.endpoints]
    servers = [Server(one, namespace) for one in apart]
    async with background(*(server.stay_open() for server in servers)):
        greeted = [asyncio.Event() for _ in servers]
        async with background(*(server.greet(event) for server, event in zip(servers, greeted, strict=True))):
            await _answered(greeted, address)
        yield DiscoverySet(address, servers)


async def _answered(events: Collection[asyncio.Event], address: EtcdAddress) -> None:
    """Until one is set, and the others too if they are soon. Raises PlaneError."""
    async with asyncio.TaskGroup() as group:
        waiting = {group.create_task(event.wait()) for event in events}
        done, left = await asyncio.wait(waiting, timeout=CONNECT_DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
        if done and left:
            await asyncio.wait(left, timeout=OTHERS_DEADLINE_S)
        for task in waiting:
            task.cancel()
    if not done:
        raise PlaneError(f"none of the discovery services {', '.join(address.endpoints)} answers")


class Server:
    """One of the services. Its host's name may not be known yet, and it may be down for as long as it likes."""

    def __init__(self, address: EtcdAddress, namespace: str) -> None:
        self.address, self._namespace = address, namespace
        self._discovery: Discovery | None = None
        self._opened = asyncio.Event()

    async def stay_open(self) -> NoReturn:
        while True:
            try:
                async with Discovery.open(self.address, self._namespace) as self._discovery:
                    self._opened.set()
                    await asyncio.Event().wait()
            except PlaneError as error:
                log.warning("%s", error)
                await asyncio.sleep(RETRY_S)

    async def opened(self) -> Discovery:
        await self._opened.wait()
        assert self._discovery is not None, "it stays open"
        return self._discovery

    async def greet(self, answered: asyncio.Event) -> NoReturn:
        discovery = await self.opened()
        try:
            await discovery.greet()
            answered.set()
        except PlaneError as error:
            log.warning("%s", error)
        await asyncio.Event().wait()
        raise AssertionError("waits until it is cancelled")


class View:
    """What one server has told."""

    def __init__(self, ttl_s: float) -> None:
        self.membership = Membership()
        self.reached = False
        self._settling_s, self._since = ttl_s + SETTLING_S, 0.0

    def reach(self, reached: bool) -> None:
        self.reached, self._since = reached, time.monotonic()

    @property
    def settled(self) -> bool:
        """Whether every live worker has had the time to register there."""
        return self.reached and time.monotonic() - self._since >= self._settling_s

    async def settle(self) -> None:
        await asyncio.sleep(self._settling_s)


class Union:
    """The membership over all views."""

    def __init__(self, views: Collection[View], group: asyncio.TaskGroup) -> None:
        self.membership = Membership()
        self._views, self._group = views, group
        for view in views:
            view.membership.add_listener(self._heed)

    def reach(self, view: View, reached: bool) -> None:
        """A server answers, or has ceased to."""
        if view.reached == reached:
            return
        view.reach(reached)
        self._review_all()
        if reached:
            self._group.create_task(self._settle(view))

    async def _settle(self, view: View) -> None:
        await view.settle()
        self._review_all()

    def _heed(self, added: InstanceRecord | None, removed: InstanceRecord | None) -> None:
        self._review(each.incarnation for each in (added, removed) if each is not None)

    def _review_all(self) -> None:
        self._review({*self.membership.instances, *(one for view in self._views for one in view.membership.instances)})

    def _review(self, incarnations: Iterable[Incarnation]) -> None:
        certain = any(view.settled for view in self._views)
        for incarnation in incarnations:
            found = (view.membership.instances.get(incarnation) for view in self._views if view.reached)
            record = next((one for one in found if one is not None), None)
            if record is not None or certain:
                self.membership.set(incarnation, record)


class DiscoverySet:
    """See `Registry`. Open it with `connect`."""

    def __init__(self, address: EtcdAddress, servers: Collection[Server]) -> None:
        self._address, self._servers = address, servers

    @asynccontextmanager
    async def register(self, record: InstanceRecord) -> AsyncIterator[None]:
        """Visible to every membership while the body runs; with servers that are down, as soon as they are up."""
        granted = [asyncio.Event() for _ in self._servers]
        holding = (self._hold(server, record, one) for server, one in zip(self._servers, granted, strict=True))
        async with background(*holding):
            await _answered(granted, self._address)
            yield

    @staticmethod
    async def _hold(server: Server, record: InstanceRecord, granted: asyncio.Event) -> NoReturn:
        await (await server.opened()).hold(record, granted)

    async def membership(self, group: asyncio.TaskGroup) -> Membership:
        """The live union, after the first listings; tasks of `group` keep it current until cancelled."""
        views = [View(self._address.lease_ttl_s) for _ in self._servers]
        union = Union(views, group)
        listed = [asyncio.Event() for _ in self._servers]
        for server, view, event in zip(self._servers, views, listed, strict=True):
            group.create_task(self._follow(server, union, view, event))
        await _answered(listed, self._address)
        return union.membership

    @staticmethod
    async def _follow(server: Server, union: Union, view: View, listed: asyncio.Event) -> NoReturn:
        def reach(reached: bool) -> None:
            union.reach(view, reached)
            if reached:
                listed.set()

        await (await server.opened()).follow(view.membership, reach)
