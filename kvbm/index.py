"""The prefix index: which worker holds which block, in which tier, for longest-prefix questions.

One dict maps a block hash to an integer whose set bits are *lanes*, a lane being one worker's one tier. That
costs about 110 bytes a block, however many workers share it. Answers are exact: a hole in the middle of a
prefix, left by an evicted block, ends the match there.

Owners are the truth. Batches carry sequence numbers; after a gap a worker's entries are stale (still matched,
since the worker checks every match again) until a snapshot replaces them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from kvbm.events import BlocksCleared, BlocksRemoved, BlocksStored, KvEventBatch, KvSnapshot, Tier

TIERS = (Tier.DEVICE, Tier.HOST, Tier.DISK, Tier.OBJECT)  # the nearest first
REMEMBERED = 4096  # sets of lanes and their names: only a shortcut, so a bound can be small
SWEEP = 2048  # entries of gone lanes looked at with each batch


@dataclass(slots=True)
class _Worker:
    lanes: dict[Tier, int] = field(default_factory=dict)  # one bit a tier; the device's always exists
    seq: int = 0
    stale: bool = False

    @property
    def mask(self) -> int:
        return sum(self.lanes.values())


class PrefixIndex:
    """Exact block hash → workers and tiers. Not thread-safe; nothing here waits."""

    def __init__(self) -> None:
        self._lanes_of: dict[int, int] = {}
        self._workers: dict[str, _Worker] = {}
        self._name: dict[int, str] = {}  # lane → worker
        self._names_of: dict[int, tuple[str, ...]] = {}  # remembered answers of `_names`
        self._sets: dict[int, int] = {}  # sets of several lanes, so that equal ones are one object
        self._device = 0  # device lanes of all workers
        self._other: dict[Tier, dict[int, int]] = {}  # of each other tier, lane → the same worker's device lane
        self._free: list[int] = []  # lanes that no entry mentions
        self._used = 0  # lanes ever handed out
        self._gone = 0  # lanes of removed workers: entries still mention them
        self._sweeping = 0  # of those, the ones the running sweep takes out
        self._unswept: list[int] = []

    @property
    def blocks(self) -> int:
        """Entries, those of removed workers included until a sweep has passed."""
        return len(self._lanes_of)

    @property
    def workers(self) -> tuple[str, ...]:
        return tuple(self._workers)

    def seq(self, worker: str) -> int:
        """The last batch that was applied; 0 when nothing is known of the worker."""
        entry = self._workers.get(worker)
        return entry.seq if entry else 0

    def stale(self, worker: str) -> bool:
        """Whether a batch of the worker was missed and no snapshot has come since."""
        entry = self._workers.get(worker)
        return entry is not None and entry.stale

    def apply(self, batch: KvEventBatch) -> bool:
        """Take one batch in. False: batches before it are missing, and a snapshot must be loaded."""
        worker = self._worker(batch.worker)
        if batch.seq <= worker.seq:
            return True
        if worker.stale or batch.seq != worker.seq + 1:
            worker.stale = True
            return False
        worker.seq = batch.seq
        for event in batch.events:
            match event:
                case BlocksStored():
                    self._store(event.hashes, self._lane(worker, event.tier))
                case BlocksRemoved():
                    self._drop(event.hashes, self._lane(worker, event.tier))
                case BlocksCleared():
                    self._renew(batch.worker, worker)
        if self._gone:
            self.sweep(SWEEP)
        return True

    def load(self, snapshot: KvSnapshot) -> None:
        """Replace everything known of the worker, unless that is newer."""
        worker = self._worker(snapshot.worker)
        if snapshot.seq < worker.seq:
            return
        self._renew(snapshot.worker, worker)
        for tier, hashes in snapshot.blocks.items():
            self._store(hashes, self._lane(worker, tier))
        worker.seq = snapshot.seq
        worker.stale = False

    def remove_worker(self, worker: str) -> None:
        """Forget a worker. Takes the same time however much it held: entries are swept later, bit by bit."""
        entry = self._workers.pop(worker, None)
        if entry is not None:
            self._retire(entry)

    @property
    def beneath(self) -> tuple[Tier, ...]:
        """Tiers beneath the device in which some worker has, or had, blocks; the nearest first."""
        return tuple(tier for tier in TIERS if self._other.get(tier))

    def match(self, hashes: Sequence[int], down_to: Tier = TIERS[-1]) -> dict[str, int]:
        """Leading blocks each worker holds, on its device or in a tier down to that; without who lacks the first."""
        others = [lanes for tier in TIERS[1 : TIERS.index(down_to) + 1] for lanes in self._other.get(tier, {}).items()]
        alive = self._device
        depths: dict[str, int] = {}
        found = self._lookup(hashes)
        before = None
        for depth, lanes in enumerate(found):
            if lanes is before:  # equal sets are mostly one object
                continue
            before = lanes
            here = lanes
            for other, device in others:  # a block may be in any of them
                if lanes & other:
                    here |= device
            if dropped := alive & ~here:
                if depth:
                    depths.update(dict.fromkeys(self._names(dropped), depth))
                alive &= here
                if not alive:
                    return depths
        if found:
            depths.update(dict.fromkeys(self._names(alive), len(found)))
        return depths

    def sweep(self, limit: int | None = None) -> None:
        """Take removed workers out of up to `limit` entries, or of all."""
        while self._gone:
            if not self._sweeping:
                self._sweeping, self._unswept = self._gone, list(self._lanes_of)
            keys = self._unswept[-limit:] if limit else self._unswept[:]
            del self._unswept[-len(keys) :]
            self._drop(keys, self._sweeping)
            if not self._unswept:
                self._free += _bits(self._sweeping)
                self._gone &= ~self._sweeping
                self._sweeping = 0
            if limit:
                return

    def check(self) -> None:
        """Assert the invariants; for tests."""
        assert set(self._name.values()) == set(self._workers)
        live = sum(worker.mask for worker in self._workers.values())
        assert not live & self._gone
        assert not any(lane & (live | self._gone) for lane in self._free)
        assert len(self._free) + (live | self._gone).bit_count() == self._used
        for lanes in self._lanes_of.values():
            assert lanes
            assert not lanes & ~(live | self._gone)

    def _worker(self, name: str) -> _Worker:
        worker = self._workers.get(name)
        if worker is None:
            worker = self._workers[name] = _Worker()
            self._open_lanes(name, worker)
        return worker

    def _open_lanes(self, name: str, worker: _Worker) -> None:
        lane = worker.lanes[Tier.DEVICE] = self._new_lane()
        self._name[lane] = name
        self._device |= lane
        self._names_of.clear()

    def _renew(self, name: str, worker: _Worker) -> None:
        """Empty the worker by giving it new lanes."""
        self._retire(worker)
        self._open_lanes(name, worker)

    def _retire(self, worker: _Worker) -> None:
        device = worker.lanes[Tier.DEVICE]
        self._device &= ~device
        for lane in worker.lanes.values():
            del self._name[lane]
            for lanes_of_tier in self._other.values():
                lanes_of_tier.pop(lane, None)
        self._names_of.clear()
        self._gone |= worker.mask
        worker.lanes.clear()

    def _lane(self, worker: _Worker, tier: Tier) -> int:
        lane = worker.lanes.get(tier)
        if lane is None:
            lane = worker.lanes[tier] = self._new_lane()
            device = worker.lanes[Tier.DEVICE]
            self._other.setdefault(tier, {})[lane] = device
            self._name[lane] = self._name[device]
        return lane

    def _new_lane(self) -> int:
        if self._free:
            return self._free.pop()
        self._used += 1
        return 1 << (self._used - 1)

    def _store(self, hashes: Sequence[int], lane: int) -> None:
        entries, sets = self._lanes_of, self._sets
        get = entries.get
        for block in hashes:
            lanes = get(block)
            if lanes is None:
                entries[block] = lane
            elif not lanes & lane:
                lanes |= lane
                entries[block] = sets.setdefault(lanes, lanes)
        if len(sets) > REMEMBERED:
            sets.clear()

    def _drop(self, hashes: Sequence[int], lanes: int) -> None:
        entries = self._lanes_of
        for block in hashes:
            mine = entries.get(block)
            if mine is None:
                continue
            if left := mine & ~lanes:
                entries[block] = left
            else:
                del entries[block]

    def _lookup(self, hashes: Sequence[int]) -> Sequence[int]:
        """The lanes of each block, 0 for a block nobody has."""
        if not hashes or hashes[0] not in self._lanes_of:
            return (0,) * bool(hashes)
        if len(hashes) > 1 and hashes[-1] in self._lanes_of:
            try:  # nearly always all are there, and this is twice as fast as `get`
                found: tuple[int, ...] = itemgetter(*hashes)(self._lanes_of)
            except KeyError:
                pass
            else:
                return found
        get = self._lanes_of.get
        return [get(block, 0) for block in hashes]

    def _names(self, lanes: int) -> tuple[str, ...]:
        """The workers of some lanes."""
        names = self._names_of.get(lanes)
        if names is None:
            if len(self._names_of) > REMEMBERED:
                self._names_of.clear()
            names = self._names_of[lanes] = tuple(self._name[lane] for lane in _bits(lanes))
        return names


def _bits(mask: int) -> list[int]:
    """The set bits, each as an integer of its own."""
    bits = []
    while mask:
        bits.append(mask & -mask)
        mask &= mask - 1
    return bits
