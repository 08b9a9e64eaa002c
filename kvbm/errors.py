"""Errors of the block manager; `workers` translates them for the wire.

BlockError
├── OutOfBlocks      fewer free blocks than asked for
├── TierFailed       a tier could not do its work; it may, later
└── TierRefused      a tier cannot be used as the configuration says
"""

from __future__ import annotations

from kvbm.events import Tier


class BlockError(Exception):
    """The block manager could not do what was asked."""


class OutOfBlocks(BlockError):
    """The pool has fewer free blocks than asked for; nothing was taken."""

    def __init__(self, wanted: int, free: int) -> None:
        super().__init__(f"{wanted} blocks wanted, {free} free")
        self.wanted, self.free = wanted, free


class TierFailed(BlockError):
    """A tier's volume or store did not do what was asked: full, broken, gone, silent. It may work again later."""

    def __init__(self, tier: Tier, cause: str, text: str) -> None:
        """`cause`: a short word for metrics ("no_space", "denied", "deadline", …); `text`: a sentence for people."""
        super().__init__(text)
        self.tier, self.cause = tier, cause


class TierRefused(BlockError):
    """A tier cannot be used as it is configured, however long one waits: another worker uses its folder, say."""
