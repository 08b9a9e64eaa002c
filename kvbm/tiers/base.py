"""What a storage tier is: one beneath host memory, on a volume or in an object store. `disk` and `object` are such.

The host tier's memory is the only way in and out: a block is written from a host slot, and read into one, as a record
(`kvbm.tiers.record`). The tier knows what it holds and moves records; it neither judges them nor decides which to keep
where. That, and turning a tier off that fails, is up to whoever uses it (`kvbm.storage`).
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

from kvbm.events import Tier
from kvbm.hashing import FullHash


@dataclass(frozen=True, slots=True)
class HostRecord:
    """A block and the slot of the host tier that holds its record, or is to."""

    hash: FullHash
    slot: int


@dataclass(frozen=True, slots=True)
class Changes:
    """What can be found in a tier, or no longer, since the last time."""

    stored: tuple[FullHash, ...] = ()
    removed: tuple[FullHash, ...] = ()


class StorageTier(Protocol):
    """On one event loop. Nothing but the awaited methods waits for a volume or a store, and these only off the loop.

    `read` and `write` return or raise only once the host slots they were given are not touched any more, however long
    a volume takes: a caller that cannot wait goes on without, and leaves the call its slots.
    """

    tier: Tier

    async def open(self) -> None:
        """Find out what is there from before. Called once, before anything else.

        Raises TierRefused (another worker uses it, …), TierFailed (does not work now: `probe` later does the rest).
        """
        ...

    def loops(self, changed: Callable[[], None]) -> list[Coroutine[object, object, NoReturn]]:
        """What its user has to run as long as the tier is open; `changed` is called when `changes` has something."""
        ...

    async def probe(self) -> None:
        """Whether a tier that failed works again: write, read back and remove something small. Raises TierFailed."""
        ...

    def __contains__(self, block_hash: FullHash) -> bool:
        """Whether a read is worth trying. O(1)."""
        ...

    def hashes(self) -> tuple[FullHash, ...]:
        """Every block that can be found."""
        ...

    async def write(self, records: Sequence[HostRecord]) -> int:
        """Store records; each can be found once its write is complete. Returns how many can: first come, first stored.

        Those that are here already are left as they are, and count. Makes room by evicting what is least worth
        keeping; a tier too small for all of them at once stores the first ones. Raises TierFailed: what was complete
        before stays, the rest cannot be found.
        """
        ...

    async def read(self, records: Sequence[HostRecord], *, use: bool = True) -> list[bool]:
        """Read records into host slots; for each, whether its bytes are there now, to be judged by the caller.

        One that is here no more (evicted, deleted by somebody) is forgotten and gives False. Without `use` they are
        only looked at: that changes nothing about which blocks are kept, and they may go meanwhile, which gives False.
        Raises TierFailed.
        """
        ...

    def used(self, hashes: Sequence[FullHash]) -> None:
        """These blocks of one prefix, in its order, were just of use: keep them longer than others."""
        ...

    async def forget(self, block_hash: FullHash) -> None:
        """Its record is not what it should be: it cannot be found any more from the moment of the call, nor after a
        restart. Never raises."""
        ...

    async def purge(self) -> int:
        """Remove every block; returns how many. Raises TierFailed."""
        ...

    async def sync(self) -> None:
        """What was written by now survives a power cut, where the tier can promise that. Raises TierFailed."""
        ...

    def changes(self) -> Changes:
        """Since the last call, in an order in which applying `removed` before `stored` is right."""
        ...

    @property
    def evicted(self) -> int:
        """Blocks that had to make room, since the start."""
        ...

    @property
    def blocks(self) -> int:
        """That can be found."""
        ...

    @property
    def used_bytes(self) -> int: ...

    @property
    def size_bytes(self) -> int:
        """0: without a limit of ours."""
        ...

    async def close(self) -> None:
        """Release files and connections. Never raises."""
        ...
