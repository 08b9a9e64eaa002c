"""What an operator asks a worker about its blocks, and what it answers: `dynamo-lite kv`. See `wire`."""

from __future__ import annotations

import msgspec

from kvbm.events import Tier


class KvCursor(msgspec.Struct, frozen=True):
    """Where a walk over a worker's blocks goes on. A walk that nobody continues is soon forgotten."""

    walk: int
    at: int


class KvStats(msgspec.Struct, frozen=True, tag="stats"):
    """How a worker's tiers are. → KvTiers."""


class KvList(msgspec.Struct, frozen=True, tag="list"):
    """Which blocks these tiers have, each told once, some at a time. → KvListed."""

    tiers: tuple[Tier, ...]
    cursor: KvCursor | None = None  # None: from the first
    limit: int = 1000  # blocks


class KvVerify(msgspec.Struct, frozen=True, tag="verify"):
    """Read a tier's next blocks and prove them; drop those that are not what was stored. → KvVerified."""

    tier: Tier
    cursor: KvCursor | None = None


class KvPurge(msgspec.Struct, frozen=True, tag="purge"):
    """Drop every block of a tier. → KvPurged."""

    tier: Tier


class KvTier(msgspec.Struct, frozen=True):
    """One tier beneath the device; `workers.engine.TierLoad` on the wire."""

    tier: Tier
    on: bool
    blocks: int
    used_bytes: int
    size_bytes: int  # 0: without a limit of ours
    hits: int
    misses: int
    offloaded: int
    onboarded: int
    evicted: int
    missed: int
    corrupt: int
    waiting: int


class KvTiers(msgspec.Struct, frozen=True, tag="tiers"):
    """The device's blocks: in use, that can be matched, all; and the tiers beneath it, nearest first."""

    device_used: int
    device_cached: int
    device_total: int
    tiers: tuple[KvTier, ...]


class KvBlock(msgspec.Struct, frozen=True, array_like=True):
    """A block and every tier that has it. Of one that only the device has, the hash's last 8 bytes are all we know."""

    hash: bytes
    tiers: tuple[Tier, ...]


class KvListed(msgspec.Struct, frozen=True, tag="listed"):
    """The next blocks, possibly none; `cursor` is None with the last."""

    blocks: tuple[KvBlock, ...]
    cursor: KvCursor | None


class KvVerified(msgspec.Struct, frozen=True, tag="verified"):
    """What became of the next blocks."""

    right: int
    corrupt: int  # dropped
    gone: int  # since the walk began
    cursor: KvCursor | None


class KvPurged(msgspec.Struct, frozen=True, tag="purged"):
    blocks: int


KvAsk = KvStats | KvList | KvVerify | KvPurge
KvTold = KvTiers | KvListed | KvVerified | KvPurged


class KvRequest(msgspec.Struct, frozen=True):
    """An operator → worker."""

    ask: KvAsk


class KvAnswer(msgspec.Struct, frozen=True):
    told: KvTold
