"""Equal places of a tier: each is free, granted to somebody who fills it, expecting a block, or stored.

Two phases: a place becomes visible only by `store` or `arrive`, once its content is there and its checksum known. Who
grants a place does not know what will be in it; one that expects a block has its name already, so that everybody who
wants it waits for the same copy. The least recently used block that nobody has pinned is evicted first, of one prefix
the tail before the head; or (`fifo`) the one that was stored first, however often it was used.
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
    here: bool = True  # its content is; it is only expected otherwise
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
        self._expected: dict[FullHash, Stored] = {}
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

    def expect(self, slot: int, block_hash: FullHash) -> Stored:
        """A granted slot is to hold that block, from elsewhere; pinned once, for whoever brings it."""
        assert block_hash not in self._expected, "a block is brought twice at once"
        self._granted.remove(slot)
        block = self._expected[block_hash] = Stored(slot, block_hash, 0, pins=1, here=False)
        return block

    def arrive(self, block: Stored, checksum: int) -> bool:
        """The content of an expected block is there. False where another slot holds it too by now: then the block
        cannot be found by its name, but whoever pins it may use it.
        """
        del self._expected[block.hash]
        block.here, block.checksum = True, checksum
        if block.hash in self._stored:
            block.dropped = True
            self._dropped[block.slot] = block
            return False
        self._stored[block.hash] = block
        return True

    def find(self, block_hash: FullHash) -> Stored | None:
        return self._stored.get(block_hash)

    def expected(self, block_hash: FullHash) -> Stored | None:
        """A block that is on its way here."""
        return self._expected.get(block_hash)

    def touch(self, hashes: Sequence[FullHash]) -> None:
        """These blocks of one prefix, in its order, have just been used."""
        for block_hash in reversed(hashes):
            if block_hash in self._idle:
                self._idle.move_to_end(block_hash)

    def pin(self, blocks: Sequence[Stored]) -> None:
        """Protect them from eviction, once more for each call."""
        for block in blocks:
            block.pins += 1
            if self._stored.get(block.hash) is block:  # and not another copy of it
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
        where = self._stored if block.here else self._expected
        if block.dropped or where.get(block.hash) is not block:
            return
        del where[block.hash]
        if block.here:
            self._idle.pop(block.hash, None)
        if block.pins:
            block.dropped = True
            self._dropped[block.slot] = block
        else:
            self._free.append(block.slot)

    def check(self) -> None:
        """Assert the invariants; for tests."""
        named = [*self._stored.values(), *self._expected.values()]
        slots = [*self._free, *self._granted, *self._dropped, *(one.slot for one in named)]
        assert all(one.pins > 0 and not one.here for one in self._expected.values())
        assert sorted(slots) == list(range(self.count))
        assert set(self._idle) == {one.hash for one in self._stored.values() if not one.pins}
        assert all(one.pins > 0 and one.dropped for one in self._dropped.values())
