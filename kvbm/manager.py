"""The block manager of one worker: which blocks its host tier holds, which are on their way there, and who uses them.

It decides and remembers; others move the bytes. A block gets to the host tier in two phases. From the device: a slot is
granted, every rank of the worker fills its share of it, and only when its checksum is known can it be found. From a
tier beneath: it is expected in a slot of its own until it has arrived and proven to be right. One that is to be
onboarded is pinned under its owner's name until the owner lets go. What the tiers beneath hold they know themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvbm.events import BlocksRemoved, BlocksStored, KvEvent, Tier
from kvbm.hashing import FullHash, low64
from kvbm.tiers.slots import Eviction, SlotTable, Stored


@dataclass(slots=True)
class Counts:
    """Blocks, since the start."""

    offloaded: int = 0  # stored
    evicted: int = 0
    onboarded: int = 0
    corrupt: int = 0  # dropped, as their content was not what was stored
    missed: int = 0  # given up on their way here


@dataclass(slots=True)
class _Filling:
    block_hash: FullHash
    ranks: set[int] = field(default_factory=set)  # that have ended
    whole: bool = True  # every one of these has filled its share


class BlockManager:
    """Not thread-safe; nothing here waits."""

    def __init__(self, slots: int, ranks: int, eviction: Eviction = "lru") -> None:
        """`slots` of the host tier, each with a share for every one of `ranks`."""
        self._host = SlotTable(slots, eviction)
        self._ranks = ranks
        self._filling: dict[int, _Filling] = {}  # by slot
        self._pins: dict[str, list[Stored]] = {}  # by owner
        self._lent: set[int] = set()  # slots
        self._events: list[KvEvent] = []
        self._lost: list[FullHash] = []
        self._gained: list[FullHash] = []
        self.counts = Counts()

    # ---- offload ----

    def grant(self, count: int) -> list[int]:
        """Up to `count` slots that the engine may have filled."""
        slots, evicted = self._host.grant(count)
        self.counts.evicted += len(evicted)
        self._removed(evicted)
        return slots

    @property
    def granted(self) -> int:
        """Slots that the engine has."""
        return self._host.granted - len(self._lent)

    def lend(self, count: int) -> list[int]:
        """Up to `count` slots for whoever needs some memory of this tier for a while; `give_back` must follow."""
        slots = self.grant(count)
        self._lent.update(slots)
        return slots

    def give_back(self, slots: Sequence[int]) -> None:
        """Slots that were lent; nobody touches them any more."""
        for slot in slots:
            self._lent.remove(slot)
            self._host.give_back(slot)

    def filled(self, slot: int, block_hash: FullHash, rank: int, well: bool) -> bool:
        """One rank has filled its share, or (not `well`) will not. True once the slot holds the block: `store` follows.

        Once every rank has ended and one of them not well, the slot is granted no more.
        """
        filling = self._filling.setdefault(slot, _Filling(block_hash))
        assert filling.block_hash == block_hash, f"slot {slot} is filled with two blocks at once"
        filling.ranks.add(rank)
        filling.whole &= well
        if len(filling.ranks) < self._ranks:
            return False
        if not filling.whole:
            self.abandon(slot)
        return filling.whole

    def store(self, slot: int, checksum: int) -> bool:
        """The block can be found from now on. False when it could already; the slot is then free again."""
        block_hash = self._filling.pop(slot).block_hash
        new = self._host.store(slot, block_hash, checksum)
        if new:
            self.counts.offloaded += 1
            self._events.append(BlocksStored((low64(block_hash),), tier=Tier.HOST))
        return new

    def abandon(self, slot: int) -> None:
        """A granted slot is not to be used, whatever it holds."""
        filling = self._filling.pop(slot, None)
        if filling is not None and self._host.find(filling.block_hash) is None:
            self._lost.append(filling.block_hash)
        self.counts.missed += 1
        self._host.give_back(slot)

    # ---- from a tier beneath ----

    def expect(self, hashes: Sequence[FullHash]) -> list[Stored]:
        """Slots for the first of these blocks, as many as can be had, each pinned once for whoever brings its content.

        None of them is here or expected yet. `arrived` or `failed`, of each, must follow.
        """
        slots, evicted = self._host.grant(len(hashes))
        self.counts.evicted += len(evicted)
        self._removed(evicted)
        return [self._host.expect(slot, block_hash) for slot, block_hash in zip(slots, hashes, strict=False)]

    def arrived(self, block: Stored, checksum: int) -> None:
        """Its content is in its slot, and right."""
        if self._host.arrive(block, checksum):
            self._gained.append(block.hash)
            self._events.append(BlocksStored((low64(block.hash),), tier=Tier.HOST))
        self._host.unpin([block])

    def failed(self, block: Stored) -> None:
        """Its content does not come."""
        self._host.drop(block)
        self._host.unpin([block])

    # ---- onboard ----

    def find(self, block_hash: FullHash) -> Stored | None:
        """The block, here or expected."""
        return self._host.find(block_hash) or self._host.expected(block_hash)

    def match(self, hashes: Sequence[FullHash]) -> list[Stored]:
        """The longest prefix of `hashes` that is stored."""
        found: list[Stored] = []
        for block_hash in hashes:
            block = self._host.find(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def used(self, hashes: Sequence[FullHash]) -> None:
        """A request's prefix consists of these, wherever it finds them: the device forgets later what it uses, and what
        it has forgotten is to be here still."""
        self._host.touch(hashes)

    def pin(self, owner: str, blocks: Sequence[Stored]) -> None:
        """Keep them where they are until `unpin(owner)`."""
        self._pins.setdefault(owner, []).extend(blocks)
        self._host.pin(blocks)

    def unpin(self, owner: str) -> None:
        """Idempotent."""
        self._host.unpin(self._pins.pop(owner, ()))

    def corrupt(self, block: Stored) -> None:
        """Its content is not what was stored: it cannot be found any more."""
        if self._host.find(block.hash) is block:
            self.counts.corrupt += 1
            self._removed([block.hash])
        self._host.drop(block)

    def purge(self) -> int:
        """Drop every block; returns how many. Those in use go when their users let go."""
        blocks = self.match_all()
        for block in blocks:
            self._host.drop(block)
        self._removed([block.hash for block in blocks])
        return len(blocks)

    def match_all(self) -> list[Stored]:
        """Every block that can be found."""
        found = (self._host.find(block_hash) for block_hash in self._host.hashes())
        return [block for block in found if block is not None]

    # ---- state ----

    @property
    def slots(self) -> int:
        return self._host.count

    @property
    def stored(self) -> int:
        return self._host.stored

    def hashes(self) -> tuple[FullHash, ...]:
        """Of every block that is stored."""
        return self._host.hashes()

    @property
    def pinned(self) -> dict[str, int]:
        """Blocks by owner."""
        return {owner: len(blocks) for owner, blocks in self._pins.items()}

    def lost(self) -> list[FullHash]:
        """Blocks that cannot be found any more, or never could be, since the last call."""
        lost, self._lost = self._lost, []
        return lost

    def gained(self) -> list[FullHash]:
        """Blocks that came from a tier beneath, since the last call; some of them may be `lost` by now."""
        gained, self._gained = self._gained, []
        return gained

    def events(self) -> tuple[KvEvent, ...]:
        """What changed since the last call, in order."""
        events, self._events = tuple(self._events), []
        return events

    def snapshot(self) -> dict[Tier, tuple[int, ...]]:
        return {Tier.HOST: tuple(low64(block_hash) for block_hash in self._host.hashes())}

    def check(self) -> None:
        """Assert the invariants; for tests."""
        self._host.check()
        assert len(self._filling) <= self.granted
        assert not self._lent & self._filling.keys()
        pinned = [block for blocks in self._pins.values() for block in blocks]
        assert all(block.pins > 0 for block in pinned)

    def _removed(self, hashes: Sequence[FullHash]) -> None:
        self._lost += hashes
        if hashes:
            self._events.append(BlocksRemoved(tuple(map(low64, hashes)), Tier.HOST))
