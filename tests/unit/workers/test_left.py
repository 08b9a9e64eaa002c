from __future__ import annotations

import asyncio

import pytest

from dynamo_lite.plane.wire import RequestId
from dynamo_lite.tasks import scope
from workers import left as module
from workers.left import Left


async def test_a_worker_waits_for_all_that_is_to_be_fetched() -> None:
    async with scope() as group:
        left = Left(group)
        await left.none()
        left.behind(RequestId("a"))
        left.behind(RequestId("b"))
        assert (len(left), left.total) == (2, 2)
        assert left.fetched(RequestId("a"))
        assert not left.fetched(RequestId("c"))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await left.none()
        left.fetched(RequestId("b"))
        async with asyncio.timeout(1):
            await left.none()
        assert (len(left), left.total) == (0, 2)


async def test_what_nobody_fetches_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.01)
    async with scope() as group:
        left = Left(group)
        left.behind(RequestId("a"))
        async with asyncio.timeout(5):
            await left.none()
