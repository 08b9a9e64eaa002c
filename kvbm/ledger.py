"""What an engine's raw KV events amount to.

vLLM may hold several copies of one block and tells the storing and the eviction of each, so a plain set would
lose a block while a copy is still there. The ledger counts copies, passes on only what changes the answer to
"can it be matched", and is the source of snapshots.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile

from kvbm.events import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent, Tier


class BlockLedger:
    """Copies of each block by tier, as of the events folded in so far."""

    def __init__(self) -> None:
        self._copies: dict[Tier, dict[int, int]] = {}

    def fold(self, events: Iterable[KvEvent]) -> tuple[KvEvent, ...]:
        """Take events in; returns those that matter to an index, without the copies."""
        told: list[KvEvent] = []
        for event in events:
            if isinstance(event, BlocksStored):
                told += self._stored(event)
            elif isinstance(event, BlocksRemoved):
                told += self._removed(event)
            else:
                self._copies.clear()
                told.append(BlocksCleared())
        return tuple(told)

    def snapshot(self) -> dict[Tier, tuple[int, ...]]:
        """All hashes that can be matched, by tier."""
        return {tier: tuple(copies) for tier, copies in self._copies.items()}

    def prefix(self, hashes: Iterable[int], tier: Tier = Tier.DEVICE) -> int:
        """How many of them, from the first on, are in that tier."""
        copies = self._copies.get(tier, {})
        return sum(1 for _ in takewhile(copies.__contains__, hashes))

    def _stored(self, event: BlocksStored) -> list[KvEvent]:
        copies = self._copies.setdefault(event.tier, {})
        fresh = copies.keys().isdisjoint(event.hashes)
        parent, told = event.parent, list[KvEvent]()
        for block in event.hashes:
            copies[block] = copies.get(block, 0) + 1
            if not fresh:
                if copies[block] == 1:
                    told.append(BlocksStored((block,), parent, event.tier))
                parent = block
        return [event] if fresh and event.hashes else told

    def _removed(self, event: BlocksRemoved) -> list[KvEvent]:
        copies = self._copies.get(event.tier, {})
        gone = []
        for block in event.hashes:
            left = copies.get(block, 0) - 1
            if left > 0:
                copies[block] = left
            elif copies.pop(block, None) is not None:
                gone.append(block)
        return [BlocksRemoved(tuple(gone), event.tier)] if gone else []
