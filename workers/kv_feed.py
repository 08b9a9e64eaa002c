"""vLLM's KV events, read from the engine's ZMQ publisher and turned into ours, with a mirror of what is stored.

The publisher may drop under pressure; its sequence numbers show that, and its replay socket gives the missing
batches back. Format: vLLM `distributed/kv_events.py` (frames: topic, 8-byte big-endian sequence number, msgpack).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import zmq.asyncio
from zmq.constants import SocketOption, SocketType

from kvbm.events import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent, Tier
from kvbm.hashing import block_hashes
from kvbm.ledger import BlockLedger

_log = logging.getLogger(__name__)
_REPLAY_TIMEOUT_S = 5.0
_END = (-1).to_bytes(8, "big", signed=True)
# Field order of vLLM's structs, for versions that encode them as arrays.
_FIELDS = {
    "BlockStored": ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium"),
    "BlockRemoved": ("block_hashes", "medium"),
    "AllBlocksCleared": (),
}


class KvFeed:
    """Events of one engine's device tier, gapless and in order. One consumer."""

    def __init__(self, endpoint: str, replay_endpoint: str) -> None:
        self._context = zmq.asyncio.Context()
        self._subscriber = self._context.socket(SocketType.SUB)
        self._subscriber.setsockopt(SocketOption.RCVHWM, 0)  # losing here what vLLM did not lose would be silly
        self._subscriber.setsockopt(SocketOption.SUBSCRIBE, b"")
        self._subscriber.connect(endpoint)
        self._replay = self._context.socket(SocketType.DEALER)
        self._replay.connect(replay_endpoint)
        self._next = 0  # sequence number of the batch to come
        self._ledger = BlockLedger()

    def snapshot(self) -> dict[Tier, tuple[int, ...]]:
        return self._ledger.snapshot()

    def local_blocks(self, token_ids: list[int], block_size: int, cache_salt: str | None) -> int:
        """Blocks of the prompt's prefix that the engine, as far as it has told, need not compute.

        Like vLLM, at least one token is left to compute.
        """
        most = (len(token_ids) - 1) // block_size
        for count in (min(1, most), most):  # most prompts end the search with their first block
            hashes = block_hashes(token_ids[: count * block_size], block_size, cache_salt)
            found = self._ledger.prefix(hashes)
            if found < count:
                return found
        return most

    async def events(self) -> AsyncIterator[tuple[KvEvent, ...]]:
        """One tuple per engine step that stored or removed blocks."""
        for payload in await self._missed(self._next):
            yield self._apply(payload)
        while True:
            _, number, payload = await self._subscriber.recv_multipart()
            sequence = int.from_bytes(number, "big")
            if sequence < self._next:
                continue  # the replay had it already
            if sequence > self._next:
                for missed in await self._missed(self._next):
                    yield self._apply(missed)
                if sequence < self._next:
                    continue
                if sequence > self._next:  # not even replay has it: forget all rather than claim what may be gone
                    _log.warning("KV event batches %d to %d are lost", self._next, sequence - 1)
                    yield self._ledger.fold((BlocksCleared(),))
            self._next = sequence + 1
            yield self._apply(payload, counted=True)

    async def _missed(self, start: int) -> list[bytes]:
        """Batches from `start` on that the publisher still keeps, without a gap."""
        payloads: list[bytes] = []
        await self._replay.send_multipart((b"", start.to_bytes(8, "big")))
        try:
            async with asyncio.timeout(_REPLAY_TIMEOUT_S):
                while True:
                    *_, number, payload = await self._replay.recv_multipart()
                    if number == _END:
                        return payloads
                    if int.from_bytes(number, "big") == start + len(payloads):
                        payloads.append(payload)
        except TimeoutError:
            _log.warning("the engine did not replay its KV events within %.0f s", _REPLAY_TIMEOUT_S)
            return payloads

    def _apply(self, payload: bytes, *, counted: bool = False) -> tuple[KvEvent, ...]:
        if not counted:
            self._next += 1
        raw_events = msgspec.msgpack.decode(payload)[1]
        # vLLM tells of every copy of a block; an index must hear of the first and the last only.
        return self._ledger.fold(event for raw in raw_events if (event := _translate(raw)) is not None)

    def close(self) -> None:
        self._subscriber.close(linger=0)
        self._replay.close(linger=0)
        self._context.term()


def _translate(raw: Any) -> KvEvent | None:
    """One vLLM event; None for what is not about the device tier."""
    if isinstance(raw, dict):
        kind, fields = raw["type"], raw
    else:
        kind, fields = raw[0], dict(zip(_FIELDS[raw[0]], raw[1:], strict=False))
    if kind == "AllBlocksCleared":
        return BlocksCleared()
    if fields.get("medium") not in (None, "GPU"):
        return None
    if kind == "BlockStored":
        return BlocksStored(tuple(fields["block_hashes"]), fields.get("parent_block_hash"))
    return BlocksRemoved(tuple(fields["block_hashes"]))
