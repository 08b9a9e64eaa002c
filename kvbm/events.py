"""KV events: what a worker says of its blocks, in sequence-numbered batches.

The shape follows vLLM's own events (`vllm/distributed/kv_events.py`); block hashes are the low 64 bits of the
chained sha256_cbor hash, as unsigned integers.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Tier(StrEnum):
    """Where a block lives."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    OBJECT = "object"


class BlocksStored(msgspec.Struct, frozen=True, tag="stored"):
    """Blocks that can now be matched. `parent` is the hash before `hashes[0]`; None at a prompt's start."""

    hashes: tuple[int, ...]
    parent: int | None = None
    tier: Tier = Tier.DEVICE


class BlocksRemoved(msgspec.Struct, frozen=True, tag="removed"):
    """Blocks that can no longer be matched in `tier`."""

    hashes: tuple[int, ...]
    tier: Tier = Tier.DEVICE


class BlocksCleared(msgspec.Struct, frozen=True, tag="cleared"):
    """Every block of the worker, in every tier, is gone."""


KvEvent = BlocksStored | BlocksRemoved | BlocksCleared


class KvEventBatch(msgspec.Struct, frozen=True):
    """Events of one engine step. `seq` starts at 1 for an incarnation and rises by one a batch."""

    worker: str  # incarnation
    seq: int
    events: tuple[KvEvent, ...]


class KvSnapshot(msgspec.Struct, frozen=True):
    """All blocks of one worker as of batch `seq`: the owner's answer to a gap."""

    worker: str  # incarnation
    seq: int
    blocks: dict[Tier, tuple[int, ...]]
