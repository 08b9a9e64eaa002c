"""What the parts of a worker process share: the engine behind them, and the requests that were cancelled early."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from dynamo_lite.plane.bus import Bus
from dynamo_lite.plane.wire import Cancel, Incarnation, RequestId, Subjects
from workers.engine import Engine
from workers.metrics import WorkerMetrics

_KEPT_S = 30.0
_KEPT_MOST = 4096


class EarlyCancels:
    """Cancels of requests that are not here, for the few milliseconds by which a cancel may overtake its request."""

    def __init__(self) -> None:
        self._cancels: OrderedDict[RequestId, tuple[float, set[int | None]]] = OrderedDict()

    def add(self, cancel: Cancel) -> None:
        now = asyncio.get_running_loop().time()
        _, indices = self._cancels.pop(cancel.request_id, (now, set()))
        indices.add(cancel.index)
        self._cancels[cancel.request_id] = (now, indices)
        while self._cancels:
            oldest, (arrived, _) = next(iter(self._cancels.items()))
            if len(self._cancels) <= _KEPT_MOST and now - arrived < _KEPT_S:
                break
            del self._cancels[oldest]

    def take(self, request_id: RequestId) -> set[int | None]:
        """Which sequences of a request that has just come were cancelled; None among them means all."""
        return self._cancels.pop(request_id, (0.0, set()))[1]


@dataclass(frozen=True, slots=True)
class Serving:
    """One worker process, as its request handlers see it."""

    name: str
    incarnation: Incarnation
    engine: Engine
    block_size: int
    bus: Bus
    subjects: Subjects
    metrics: WorkerMetrics
    group: asyncio.TaskGroup  # owns every request's task
    changed: Callable[[], None]  # the number of requests in flight went from or to zero
    early_cancels: EarlyCancels = field(default_factory=EarlyCancels)


class InFlight:
    """The tasks of one kind of request, by id."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._tasks: dict[RequestId, asyncio.Task[None]] = {}
        self._changed = changed
        self._idle = asyncio.Event()
        self._idle.set()

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._tasks

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, request_id: RequestId, task: asyncio.Task[None]) -> None:
        """Keep the task until it is done."""
        self._tasks[request_id] = task
        task.add_done_callback(lambda _: self._end(request_id))
        self._idle.clear()
        if len(self._tasks) == 1:
            self._changed()

    def _end(self, request_id: RequestId) -> None:
        del self._tasks[request_id]
        if not self._tasks:
            self._idle.set()
            self._changed()

    def cancel(self, request_id: RequestId) -> bool:
        """False when there is no such request."""
        task = self._tasks.get(request_id)
        if task is not None:
            task.cancel()
        return task is not None

    def cancel_all(self) -> None:
        for task in self._tasks.values():
            task.cancel()

    async def idle(self) -> None:
        """Returns once nothing is in flight."""
        await self._idle.wait()
