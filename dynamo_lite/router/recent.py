"""What a worker ought to hold by what was placed there: an answer while it has not told what it does hold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

REMEMBERED = 16_384  # blocks a worker
LASTS_S = 120.0


class Recent:
    """Of one worker, between the loss of its KV events and its snapshot."""

    def __init__(self) -> None:
        self._until: OrderedDict[int, float] = OrderedDict()  # by block hash, in order of time

    def __len__(self) -> int:
        return len(self._until)

    def note(self, hashes: Sequence[int], now: float) -> None:
        """A prompt of these blocks was placed there."""
        for block_hash in hashes:
            self._until[block_hash] = now + LASTS_S
            self._until.move_to_end(block_hash)
        while len(self._until) > REMEMBERED:
            self._until.popitem(last=False)

    def match(self, hashes: Sequence[int], now: float) -> int:
        """Leading blocks that it should hold."""
        until = self._until
        return next((depth for depth, one in enumerate(hashes) if until.get(one, 0.0) < now), len(hashes))

    def clear(self) -> None:
        self._until.clear()
