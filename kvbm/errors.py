"""Errors of the block manager; `workers` translates them for the wire.

BlockError
└── OutOfBlocks      fewer free blocks than asked for
"""

from __future__ import annotations


class BlockError(Exception):
    """The block manager could not do what was asked."""


class OutOfBlocks(BlockError):
    """The pool has fewer free blocks than asked for; nothing was taken."""

    def __init__(self, wanted: int, free: int) -> None:
        super().__init__(f"{wanted} blocks wanted, {free} free")
        self.wanted, self.free = wanted, free
