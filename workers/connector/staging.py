"""Registered staging memory, cut into slots: pieces are gathered into it, written to it and scattered from it.

Peers write into staging only, never into a model's KV blocks, so a piece that arrives too late can at worst meet a
slot that is still quarantined.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workers.transfer.engine import PeerEngine


class Staging:
    """`size // slot_bytes` slots (at least one) on `device`. Used by the mover's thread alone."""

    def __init__(self, engine: PeerEngine, size: int, slot_bytes: int, device: torch.device) -> None:
        self.slot_bytes = slot_bytes
        self.count = max(1, size // slot_bytes)
        self._memory, self.region = engine.allocate(self.count * slot_bytes, device)
        self._free = list(range(self.count))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def size(self) -> int:
        """Bytes of all slots."""
        return self.count * self.slot_bytes

    @property
    def used(self) -> int:
        """Bytes of the slots that are not free."""
        return (self.count - len(self._free)) * self.slot_bytes

    def take(self, count: int) -> tuple[int, ...]:
        """That many slots, or none at all when fewer are free."""
        if count > len(self._free):
            return ()
        taken, self._free = self._free[:count], self._free[count:]
        return tuple(taken)

    def run(self, size: int) -> range | None:
        """As many adjacent slots as hold `size` bytes, or None while there are none such; one slot is usual."""
        count = -(-size // self.slot_bytes)
        free = set(self._free)
        for first in self._free:
            slots = range(first, first + count)
            if free.issuperset(slots):
                self._free = [slot for slot in self._free if slot not in slots]
                return slots
        return None

    def give(self, *slots: int) -> None:
        self._free.extend(slots)
        assert len(set(self._free)) == len(self._free) <= self.count, "a slot was given back twice"

    def bytes_of(self, slots: Sequence[int]) -> torch.Tensor:
        """Of adjacent slots."""
        return self._memory.narrow(0, slots[0] * self.slot_bytes, (slots[-1] + 1 - slots[0]) * self.slot_bytes)
