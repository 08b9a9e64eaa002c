from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq.asyncio
from zmq.constants import SocketType

from kvbm.events import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent, Tier
from workers.kv_feed import KvFeed


class Publisher:
    """vLLM's side of the two sockets, over real ZMQ."""

    def __init__(self, folder: Path) -> None:
        self.endpoint, self.replay_endpoint = f"ipc://{folder}/events", f"ipc://{folder}/replay"
        self._context = zmq.asyncio.Context()
        self._events = self._context.socket(SocketType.PUB)
        self._events.bind(self.endpoint)
        self._replay = self._context.socket(SocketType.ROUTER)
        self._replay.bind(self.replay_endpoint)
        self.kept: dict[int, bytes] = {}

    async def publish(self, number: int, *events: Any, lose: bool = False) -> None:
        payload = msgspec.msgpack.encode([0.0, list(events), 0])
        self.kept[number] = payload
        if not lose:
            await self._events.send_multipart((b"", number.to_bytes(8, "big"), payload))

    async def serve_replay(self) -> None:
        """Answer one replay request."""
        client, _, start = await self._replay.recv_multipart()
        for number, payload in sorted(self.kept.items()):
            if number >= int.from_bytes(start, "big"):
                await self._replay.send_multipart((client, b"", b"", number.to_bytes(8, "big"), payload))
        await self._replay.send_multipart((client, b"", b"", (-1).to_bytes(8, "big", signed=True), b""))

    def close(self) -> None:
        self._events.close(linger=0)
        self._replay.close(linger=0)
        self._context.term()


def stored(*hashes: int, **more: Any) -> dict[str, Any]:
    blank: dict[str, Any] = {"parent_block_hash": None, "token_ids": [], "block_size": 32}
    blank |= {"lora_id": None, "lora_name": None}
    return {"type": "BlockStored", "block_hashes": list(hashes), "medium": "GPU", **blank, **more}


def removed(*hashes: int) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU"}


@pytest.fixture
async def publisher(tmp_path: Path) -> AsyncIterator[Publisher]:
    made = Publisher(tmp_path)
    yield made
    made.close()


async def take(feed: AsyncIterator[tuple[KvEvent, ...]]) -> tuple[KvEvent, ...]:
    async with asyncio.timeout(5):
        return await anext(feed)


async def connected(publisher: Publisher) -> tuple[KvFeed, AsyncIterator[tuple[KvEvent, ...]]]:
    """A feed that has asked for the replay of everything, and whose subscription is known to the publisher."""
    feed = KvFeed(publisher.endpoint, publisher.replay_endpoint)
    events = feed.events()
    await publisher.publish(0, stored(1, 2), lose=True)
    async with asyncio.TaskGroup() as group:
        group.create_task(publisher.serve_replay())
        first = await take(events)
    assert first == (BlocksStored((1, 2)),)
    return feed, events


async def test_events_from_before_the_subscription_are_replayed(publisher: Publisher) -> None:
    feed, _ = await connected(publisher)
    assert feed.snapshot() == {Tier.DEVICE: (1, 2)}
    feed.close()


async def test_a_lost_batch_is_fetched_again_and_the_order_kept(publisher: Publisher) -> None:
    feed, events = await connected(publisher)
    await publisher.publish(1, removed(1), lose=True)
    await publisher.publish(2, stored(3, parent_block_hash=2))
    async with asyncio.TaskGroup() as group:
        group.create_task(publisher.serve_replay())
        assert await take(events) == (BlocksRemoved((1,)),)
    assert await take(events) == (BlocksStored((3,), 2),)
    assert set(feed.snapshot()[Tier.DEVICE]) == {2, 3}
    feed.close()


async def test_a_batch_that_nobody_kept_clears_what_is_known(publisher: Publisher) -> None:
    feed, events = await connected(publisher)
    publisher.kept.clear()
    await publisher.publish(5, stored(9))
    publisher.kept.clear()
    async with asyncio.TaskGroup() as group:
        group.create_task(publisher.serve_replay())
        assert await take(events) == (BlocksCleared(),)
    assert await take(events) == (BlocksStored((9,)),)
    assert feed.snapshot() == {Tier.DEVICE: (9,)}
    feed.close()


async def test_other_tiers_of_the_engine_are_not_ours(publisher: Publisher) -> None:
    feed, events = await connected(publisher)
    await publisher.publish(1, stored(7, medium="CPU"), stored(8))
    assert await take(events) == (BlocksStored((8,)),)
    feed.close()
