"""Equal places of a tier: each is free, granted to somebody who fills it, or stored, when its block can be found.

Two phases: a granted place becomes visible only by `store`, once its content is there and its checksum known. The least
recently used block that nobody has pinned is evicted first, of one prefix the tail before the head; or (`fifo`) the one
that was stored first, however often it was used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvbm.hashing import FullHash

Eviction = Literal["lru", "fifo"]


@dataclass(slots=True)
class Stored:
    """A block in a tier."""

    slot: int
    hash: FullHash
    checksum: int  # of its bytes, taken when it was stored
    pins: int = 0
    dropped: bool = False  # cannot be found any more, and is free once nobody pins it


class SlotTable:
    """Slots 0 … count-1 of one tier. Not thread-safe; nothing here waits, and every operation is O(1) a block.

    With `fifo`, finding what to evict also steps over the pinned blocks that are older.
    """

    def __init__(self, count: int, eviction: Eviction = "lru") -> None:
        self.count, self._eviction = count, eviction
        self._free = list(range(count - 1, -1, -1))
        self._granted: set[int] = set()
        self._stored: OrderedDict[FullHash, Stored] = OrderedDict()  # the oldest first
        self._idle: OrderedDict[FullHash, None] = OrderedDict()  # stored and unpinned, least recently used first
        self._dropped: dict[int, Stored] = {}  # by slot, still pinned

    @property
    def stored(self) -> int:
        """Blocks that can be found."""
        return len(self._stored)

    @property
    def granted(self) -> int:
        return len(self._granted)

    def hashes(self) -> tuple[FullHash, ...]:
        return tuple(self._stored)

    def grant(self, count: int) -> tuple[list[int], list[FullHash]]:
        """Up to `count` slots to be filled, and the blocks that were evicted for them."""
        slots: list[int] = []
        evicted: list[FullHash] = []
        while len(slots) < count and (self._free or self._idle):
            if not self._free:
                victim = self._victim()
                del self._idle[victim]
                self._free.append(self._stored.pop(victim).slot)
                evicted.append(victim)
            slots.append(self._free.pop())
        self._granted.update(slots)
        return slots, evicted

    def _victim(self) -> FullHash:
        """Which idle block goes next; there is one."""
        if self._eviction == "lru":
            return next(iter(self._idle))
        return next(block_hash for block_hash, block in self._stored.items() if not block.pins)

    def give_back(self, slot: int) -> None:
        """A granted slot was not filled after all."""
        self._granted.remove(slot)
        self._free.append(slot)

    def store(self, slot: int, block_hash: FullHash, checksum: int) -> bool:
        """A granted slot holds that block now. False when another has it already: then the slot is free again."""
        if block_hash in self._stored:
            self.give_back(slot)
            self.touch((block_hash,))
            return False
        self._granted.remove(slot)
        self._stored[block_hash] = Stored(slot, block_hash, checksum)
        self._idle[block_hash] = None
        return True

    def find(self, block_hash: FullHash) -> Stored | None:
        return self._stored.get(block_hash)

    def touch(self, hashes: Sequence[FullHash]) -> None:
        """These blocks of one prefix, in its order, have just been used."""
        for block_hash in reversed(hashes):
            if block_hash in self._idle:
                self._idle.move_to_end(block_hash)

    def pin(self, blocks: Sequence[Stored]) -> None:
        """Protect them from eviction, once more for each call."""
        for block in blocks:
            block.pins += 1
            self._idle.pop(block.hash, None)

    def unpin(self, blocks: Sequence[Stored]) -> None:
        """Undo one pin of each; given in their prefix's order."""
        for block in reversed(blocks):
            assert block.pins > 0, f"slot {block.slot} is unpinned once too often"
            block.pins -= 1
            if block.pins:
                continue
            if block.dropped:
                del self._dropped[block.slot]
                self._free.append(block.slot)
            else:
                self._idle[block.hash] = None

    def drop(self, block: Stored) -> None:
        """Forget a block, e.g. since its content is not what was stored; its slot is free once nobody pins it."""
        if block.dropped or self._stored.get(block.hash) is not block:
            return
        del self._stored[block.hash]
        self._idle.pop(block.hash, None)
        if block.pins:
            block.dropped = True
            self._dropped[block.slot] = block
        else:
            self._free.append(block.slot)

    def check(self) -> None:
        """Assert the invariants; for tests."""
        slots = [*self._free, *self._granted, *self._dropped, *(one.slot for one in self._stored.values())]
        assert sorted(slots) == list(range(self.count))
        assert set(self._idle) == {one.hash for one in self._stored.values() if not one.pins}
        assert all(one.pins > 0 and one.dropped for one in self._dropped.values())
