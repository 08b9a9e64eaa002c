"""Walks over a worker's blocks, some at a time, for operators: millions make neither one message nor a pause.

A walk goes over what was there when it began. Whoever goes on with it names it, and how far they are. One that nobody
goes on with is forgotten.
"""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from dynamo_lite.errors import RequestError
from dynamo_lite.plane.kv_wire import KvCursor
from kvbm.events import Tier
from kvbm.hashing import FullHash

T = TypeVar("T")
_KEPT = 4  # walks
_KEPT_S = 120.0  # since somebody went on with it


@dataclass(slots=True)
class Walk:
    """What there is to see, and what is to be remembered of what was seen."""

    beneath: Sequence[tuple[Tier, Sequence[FullHash]]] = ()
    device: frozenset[int] = frozenset()  # low 64 bits of what the device had when the walk began
    alone: Sequence[int] = ()  # of these, what is to be told where no tier beneath was seen to have it
    seen: set[int] = field(default_factory=set)  # of the device's, in tiers beneath

    def __len__(self) -> int:
        return sum(len(hashes) for _, hashes in self.beneath) + len(self.alone)

    def items(self, start: int, end: int) -> Sequence[tuple[Tier, FullHash | int]]:
        """Numbers `start` to `end - 1`; of the device a number, of the tiers beneath a hash."""
        found: list[tuple[Tier, FullHash | int]] = []
        sources: list[tuple[Tier, Sequence[FullHash | int]]] = [*self.beneath, (Tier.DEVICE, self.alone)]
        for tier, hashes in sources:
            found += ((tier, one) for one in hashes[max(0, start) : max(0, end)])
            start, end = start - len(hashes), end - len(hashes)
        return found


class Walks:
    """Those under way."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._walks: OrderedDict[int, tuple[Walk, float]] = OrderedDict()

    def resume(self, cursor: KvCursor | None, begin: Callable[[], Walk]) -> tuple[Walk, KvCursor]:
        """The walk and where it stands; without a cursor one that begins. Raises RequestError."""
        now = time.monotonic()
        for number in [number for number, (_, since) in self._walks.items() if since < now - _KEPT_S]:
            del self._walks[number]
        if cursor is None:
            cursor = KvCursor(next(self._numbers), 0)
            walk = begin()
        else:
            found = self._walks.pop(cursor.walk, None)
            if found is None:
                raise RequestError("the listing was interrupted for too long, or by others: begin anew", "cursor")
            walk, _ = found
        self._walks[cursor.walk] = walk, now
        while len(self._walks) > _KEPT:
            self._walks.popitem(last=False)
        return walk, cursor

    def next(self, walk: Walk, cursor: KvCursor, taken: int) -> KvCursor | None:
        """After `taken` more; None at the end, where the walk is forgotten."""
        at = cursor.at + taken
        if at < len(walk):
            return KvCursor(cursor.walk, at)
        self._walks.pop(cursor.walk, None)
        return None
