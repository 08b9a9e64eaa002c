"""A pool of KV blocks with prefix reuse, behaving as vLLM's does.

A block is pinned by every sequence that uses it. When nobody does, it is free, yet keeps its contents: a later
prompt with the same prefix matches it, and only when an allocation needs its place is it evicted, least
recently used first, the tail of a prompt before its head. Every operation is O(1) a block.

Events tell what can be matched: of several blocks with the same contents only the first and the last count.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvbm.errors import OutOfBlocks
from kvbm.events import BlocksRemoved, BlocksStored, KvEvent


@dataclass(slots=True)
class _Block:
    pins: int = 0
    hash: int | None = None  # set once the block is full; two blocks may hold the same contents


class BlockPool:
    """Block ids 0 … size-1. Not thread-safe; nothing here waits."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._blocks = [_Block() for _ in range(size)]
        self._free = OrderedDict.fromkeys(range(size))  # eviction order, least recently used first
        self._cached: dict[int, list[int]] = {}  # hash → the blocks that hold it
        self._events: list[KvEvent] = []

    @property
    def free(self) -> int:
        """Blocks an allocation may take, evicting what they hold."""
        return len(self._free)

    @property
    def pinned(self) -> int:
        return self.size - len(self._free)

    @property
    def cached(self) -> int:
        """Distinct hashes that can be matched."""
        return len(self._cached)

    def match(self, hashes: Sequence[int]) -> list[int]:
        """The blocks of the longest cached prefix. They may be evicted by the next `allocate` unless pinned."""
        blocks = []
        for block_hash in hashes:
            holders = self._cached.get(block_hash)
            if holders is None:
                break
            blocks.append(holders[0])
        return blocks

    def pin(self, blocks: Iterable[int]) -> None:
        """Protect blocks from eviction, once more for each call."""
        for block_id in blocks:
            block = self._blocks[block_id]
            if block.pins == 0:
                del self._free[block_id]
            block.pins += 1

    def allocate(self, count: int) -> list[int]:
        """Take blocks for new contents, pinned once, evicting where needed. All or nothing: OutOfBlocks."""
        if count > len(self._free):
            raise OutOfBlocks(count, len(self._free))
        taken = []
        for _ in range(count):
            block_id, _ = self._free.popitem(last=False)
            self._evict(block_id)
            self._blocks[block_id].pins = 1
            taken.append(block_id)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Undo one pin of each block of a sequence, given in the sequence's order.

        Blocks nobody pins any more become free: at once reusable if they hold nothing, else the sequence's last
        block is the first to be evicted.
        """
        for block_id in reversed(blocks):
            block = self._blocks[block_id]
            assert block.pins > 0, f"block {block_id} is released once too often"
            block.pins -= 1
            if block.pins == 0:
                self._free[block_id] = None
                if block.hash is None:
                    self._free.move_to_end(block_id, last=False)

    def commit(self, blocks: Sequence[int], hashes: Sequence[int], parent: int | None = None) -> None:
        """Make pinned, now full blocks matchable; `parent` is the hash before `hashes[0]`."""
        new: list[int] = []
        for block_id, block_hash in zip(blocks, hashes, strict=True):
            block = self._blocks[block_id]
            assert block.pins > 0, f"block {block_id} is committed while free"
            assert block.hash is None, f"block {block_id} is committed twice"
            block.hash = block_hash
            holders = self._cached.setdefault(block_hash, [])
            holders.append(block_id)
            if len(holders) == 1:
                new.append(block_hash)
            else:  # a copy: matchable already, so it only ends the run that one event can tell
                self._tell_stored(new, parent)
                new, parent = [], block_hash
        self._tell_stored(new, parent)

    def events(self) -> tuple[KvEvent, ...]:
        """What changed since the last call, in order; to be called once a step."""
        events = tuple(self._events)
        self._events.clear()
        return events

    def snapshot(self) -> tuple[int, ...]:
        """Every hash that can be matched now."""
        return tuple(self._cached)

    def check(self) -> None:
        """Assert the invariants; for tests."""
        assert {i for i, block in enumerate(self._blocks) if block.pins == 0} == set(self._free)
        assert all(block.pins >= 0 for block in self._blocks)
        holders = [(h, i) for h, ids in self._cached.items() for i in ids]
        assert sorted(holders) == sorted((b.hash, i) for i, b in enumerate(self._blocks) if b.hash is not None)
        assert all(self._cached.values())

    def _tell_stored(self, hashes: Sequence[int], parent: int | None) -> None:
        if hashes:
            self._events.append(BlocksStored(tuple(hashes), parent))

    def _evict(self, block_id: int) -> None:
        block = self._blocks[block_id]
        if block.hash is None:
            return
        holders = self._cached[block.hash]
        holders.remove(block_id)
        if not holders:
            del self._cached[block.hash]
            self._events.append(BlocksRemoved((block.hash,)))
        block.hash = None
