"""What goes on at other workers and has its KV here still: a draining worker stays until it was fetched."""

from __future__ import annotations

import asyncio

from dynamo_lite.plane.wire import RequestId

PATIENCE_S = 10.0  # for each: whoever was to fetch it, or to say so, may be gone


class Left:
    """Requests by id, each until its frontend says that it has a token from elsewhere."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._waiting: dict[RequestId, asyncio.Event] = {}
        self._none = asyncio.Event()
        self._none.set()
        self.total = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def behind(self, request_id: RequestId) -> None:
        """It has gone, and its KV has not."""
        self.total += 1
        self._none.clear()
        self._waiting[request_id] = fetched = asyncio.Event()
        self._group.create_task(self._forget(request_id, fetched))

    def fetched(self, request_id: RequestId) -> bool:
        """Nobody needs it any more. False when it is not among them."""
        waiting = self._waiting.get(request_id)
        if waiting is not None:
            waiting.set()
        return waiting is not None

    async def none(self) -> None:
        """Returns once nothing is waited for."""
        await self._none.wait()

    async def _forget(self, request_id: RequestId, fetched: asyncio.Event) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                await fetched.wait()
        except TimeoutError:
            pass
        del self._waiting[request_id]
        if not self._waiting:
            self._none.set()
