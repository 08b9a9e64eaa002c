"""Which system calls move spans between memory and a file: as few as the spans allow, and none too long to cancel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from workers.transfer.engine import Spans

IOV_MAX = 1024  # the kernel's, on every Linux


@dataclass(frozen=True, slots=True)
class Batch:
    """One call's worth: pieces of memory that lie one after another in the file."""

    iovecs: NDArray[np.uint64]  # [pieces, 2]: address, bytes
    offset: int  # of the first in the file
    size: int  # bytes of all

    def after(self, moved: int) -> Batch:
        """What is left once the first `moved` bytes are: not all of them."""
        ends = np.cumsum(self.iovecs[:, 1])
        whole = int(np.searchsorted(ends, moved, side="right"))
        cut = np.uint64(moved) - (ends[whole - 1] if whole else np.uint64(0))
        rest = self.iovecs[whole:].copy()
        rest[0, 0] += cut
        rest[0, 1] -= cut
        return Batch(rest, self.offset + moved, self.size - moved)


@dataclass(frozen=True, slots=True)
class Pieces:
    """Runs of bytes of different lengths, in the file's order."""

    mine: NDArray[np.int64]  # addresses
    theirs: NDArray[np.int64]  # offsets in the file
    sizes: NDArray[np.int64]

    def aligned(self, to: int) -> bool:
        """Whether every address, offset and size is a multiple of `to`, a power of 2."""
        bits = np.bitwise_or.reduce(self.mine | self.theirs | self.sizes)
        return int(bits) & (to - 1) == 0

    def batches(self, limit: int) -> list[Batch]:
        """Calls of at most twice `limit` bytes."""
        iovecs = np.empty((len(self.sizes), 2), dtype=np.uint64)
        iovecs[:, 0], iovecs[:, 1] = self.mine, self.sizes
        if len(iovecs) == 1:
            return [Batch(iovecs, int(self.theirs[0]), int(self.sizes[0]))]
        apart = _changes(self.theirs[1:] != self.theirs[:-1] + self.sizes[:-1])
        first = np.flatnonzero(apart)[np.cumsum(apart) - 1]  # of the pieces that this one continues
        full = _changes(np.diff((self.theirs - self.theirs[first]) // limit) != 0)
        many = (np.arange(len(self.sizes)) - first) % IOV_MAX == 0
        starts = np.flatnonzero(apart | full | many)
        cuts, offsets, sizes = (
            starts.tolist(),
            self.theirs[starts].tolist(),
            np.add.reduceat(self.sizes, starts).tolist(),
        )
        ends = [*cuts, len(iovecs)][1:]
        return [Batch(iovecs[a:b], at, size) for a, b, at, size in zip(cuts, ends, offsets, sizes, strict=True)]


def pieces_of(address: int, here: Spans, there: Spans, limit: int) -> Pieces:
    """The spans in the file's order, merged where contiguous in both, then cut into at most `limit` bytes."""
    if len(here.offsets) == 1 and here.size <= limit:  # a record: what planning costs would show
        return Pieces(here.offsets + address, there.offsets, np.array([here.size], dtype=np.int64))
    order = np.argsort(there.offsets, kind="stable")
    mine, theirs = here.offsets[order] + address, there.offsets[order]
    first = np.flatnonzero(_changes((np.diff(mine) != here.size) | (np.diff(theirs) != here.size)))
    sizes = np.diff(np.append(first, len(order))) * here.size
    mine, theirs = mine[first], theirs[first]
    parts = -(-sizes // limit)
    skipped = (np.arange(int(parts.sum())) - np.repeat(np.cumsum(parts) - parts, parts)) * limit
    left = np.repeat(sizes, parts) - skipped
    return Pieces(np.repeat(mine, parts) + skipped, np.repeat(theirs, parts) + skipped, np.minimum(left, limit))


def _changes(differs: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Where something new begins, given for each but the first whether it differs from the one before."""
    return np.concatenate((np.ones(1, dtype=np.bool_), differs))
