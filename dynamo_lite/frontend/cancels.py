"""Cancels on their way to workers, and once more to those that cannot have heard of them."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict

from dynamo_lite.errors import PlaneError
from dynamo_lite.plane.bus import Bus
from dynamo_lite.plane.wire import Cancel, Incarnation, RequestId, Subjects, encode

KEPT = 4096
AGAIN_S = 0.5

log = logging.getLogger(__name__)


class Cancels:
    """Of one frontend. Tasks of `group` publish."""

    def __init__(self, bus: Bus, subjects: Subjects, group: asyncio.TaskGroup) -> None:
        self._bus, self._subjects, self._group = bus, subjects, group
        self._clock = asyncio.get_running_loop().time
        self._sent: OrderedDict[RequestId, float] = OrderedDict()  # when last, of whole requests

    async def send(self, worker: Incarnation, cancel: Cancel) -> None:
        if cancel.index is None:
            self._sent[cancel.request_id] = self._clock()
            while len(self._sent) > KEPT:
                self._sent.popitem(last=False)
        try:
            await self._bus.publish(self._subjects.cancel(worker), encode(cancel))
        except PlaneError as error:  # the worker has the request's deadline
            log.warning("request %s cannot be cancelled: %s", cancel.request_id, error)

    def stray(self, worker: Incarnation, request_id: RequestId) -> None:
        """The worker generates what nobody here waits for: it was frozen or cut off, and has missed the cancel."""
        if self._clock() - self._sent.get(request_id, float("-inf")) > AGAIN_S:
            self._sent[request_id] = self._clock()
            self._group.create_task(self.send(worker, Cancel(request_id)))
