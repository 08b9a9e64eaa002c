"""What is known to be in a store that others write to and delete from as well.

The store is listed page after page while all of that goes on, so what a page says may be outdated when it arrives.
Every entry therefore has a stamp of a counter that rises with each page that is asked for: a page has its say only on
entries that are older than the question.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

from kvbm.hashing import FullHash
from kvbm.tiers.base import Changes

T = TypeVar("T")
_REMEMBERED = 65_536  # deletions; past that the oldest may be found once more, and read in vain


class Catalog:
    """Not thread-safe, nothing waits. O(1) but for `hashes`, `changes`, and a part of it at a time while it is
    listed."""

    parts = 256  # by a hash's first byte: so a listing, which is in order, finishes one after another

    def __init__(self, limit: int) -> None:
        """`limit`: entries."""
        self.limit = limit
        self._parts: list[dict[FullHash, int]] = [{} for _ in range(self.parts)]  # stamp of when it was seen last
        self._count = 0
        self._now = 0
        self._doomed: OrderedDict[FullHash, None] = OrderedDict()  # to be deleted
        self._gone: OrderedDict[FullHash, int] = OrderedDict()  # what we deleted, and when
        self._stored: dict[FullHash, None] = {}  # since the last `changes`
        self._removed: dict[FullHash, None] = {}

    def __len__(self) -> int:
        return self._count

    def __contains__(self, block_hash: FullHash) -> bool:
        return block_hash in self._parts[block_hash[0]]

    def hashes(self) -> tuple[FullHash, ...]:
        return tuple(block_hash for part in self._parts for block_hash in part)

    def changes(self) -> Changes:
        """Since the last call."""
        changes = Changes(tuple(self._stored), tuple(self._removed))
        self._stored, self._removed = {}, {}
        return changes

    # ---- what this worker does ----

    def wrote(self, block_hash: FullHash) -> None:
        """It is there now, as it should be. When the catalog is full, another has to go."""
        self._doomed.pop(block_hash, None)
        self._gone.pop(block_hash, None)
        if block_hash not in self and self._count >= self.limit:
            self._remove(next(block_hash for part in self._parts for block_hash in part))
        self._add(block_hash, self._now)

    def missed(self, block_hash: FullHash) -> None:
        """It was not there to be read."""
        self._remove(block_hash)

    def doom(self, block_hash: FullHash) -> None:
        """It cannot be found any more, whatever listings say, until it was deleted or written anew."""
        self._remove(block_hash)
        _remember(self._doomed, block_hash, None)

    def doomed(self, block_hash: FullHash) -> bool:
        return block_hash in self._doomed

    def deleted(self, block_hash: FullHash) -> None:
        """As of now: a listing that is asked for from here on, and has it, is right."""
        if self.doomed(block_hash):  # and not written anew meanwhile
            del self._doomed[block_hash]
            _remember(self._gone, block_hash, self._now)

    # ---- what a `Listing` says ----

    def tick(self) -> int:
        """The stamp of a page that is asked for now."""
        self._now += 1
        return self._now

    def listed(self, block_hash: FullHash, stamp: int) -> bool:
        """A page that was asked for at `stamp` has it. False: there is no room for it."""
        if block_hash in self._doomed or self._gone.get(block_hash, 0) >= stamp:
            return True
        if block_hash not in self and self._count >= self.limit:
            return False
        self._gone.pop(block_hash, None)
        self._add(block_hash, max(stamp, self._parts[block_hash[0]].get(block_hash, 0)))
        return True

    def sweep(self, part: int, begun: int) -> None:
        """All of this part has been listed, by pages asked for at `begun` and later: what was not seen is gone."""
        for block_hash in [block_hash for block_hash, seen in self._parts[part].items() if seen < begun]:
            self._remove(block_hash)

    # ---- entries ----

    def _add(self, block_hash: FullHash, stamp: int) -> None:
        part = self._parts[block_hash[0]]
        if block_hash not in part:
            self._count += 1
            if block_hash in self._removed:
                del self._removed[block_hash]
            else:
                self._stored[block_hash] = None
        part[block_hash] = stamp

    def _remove(self, block_hash: FullHash) -> None:
        if self._parts[block_hash[0]].pop(block_hash, None) is None:
            return
        self._count -= 1
        if block_hash in self._stored:
            del self._stored[block_hash]
        else:
            self._removed[block_hash] = None

    def check(self) -> None:
        """Raises AssertionError when its parts contradict each other."""
        assert self._count == sum(map(len, self._parts)) <= self.limit
        assert all(block_hash[0] == number for number, part in enumerate(self._parts) for block_hash in part)
        assert not self._stored.keys() & self._removed.keys()
        assert all(block_hash in self for block_hash in self._stored)
        assert not any(block_hash in self for block_hash in self._removed)
        assert not any(block_hash in self for block_hash in self._doomed)
        assert max(len(self._doomed), len(self._gone)) <= _REMEMBERED


class Listing:
    """One listing from its beginning, in the order of hashes: for each page `ask`, then `found`; `end` after the last.

    It may be given up at any time. What it did not come to is as it was before.
    """

    complete = True  # False: there was no room for all it found

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._part = 0  # that the next page begins in, or before
        self._begun = self._asked = 0  # when that part's first page was asked for, and the last page

    def ask(self) -> None:
        """The next page is about to be asked for."""
        self._asked = self._catalog.tick()
        self._begun = self._begun or self._asked

    def found(self, block_hash: FullHash) -> None:
        """That page has it. In order."""
        self._reach(block_hash[0])
        self.complete = self._catalog.listed(block_hash, self._asked) and self.complete

    def end(self) -> None:
        """That page had no more."""
        self._reach(self._catalog.parts)

    def _reach(self, part: int) -> None:
        while self._part < part:
            self._catalog.sweep(self._part, self._begun)
            self._part, self._begun = self._part + 1, self._asked


def _remember(hashes: OrderedDict[FullHash, T], block_hash: FullHash, what: T) -> None:
    hashes[block_hash] = what
    hashes.move_to_end(block_hash)
    if len(hashes) > _REMEMBERED:
        hashes.popitem(last=False)
