"""The prefix index: which worker holds which block, in which tier, for longest-prefix questions.

`kvbm.runs` keeps the blocks; here is who the workers are and what their events mean. Answers are exact: a hole in
the middle of a prefix, left by an evicted block, ends the match there.

Owners are the truth. Batches carry sequence numbers; after a gap a worker's entries are stale (still matched,
since the worker checks every match again) until a snapshot replaces them. What the index's own limit made it forget
is not found any more until the owner stores it anew, or sends a snapshot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_

from kvbm.events import BlocksCleared, BlocksRemoved, BlocksStored, KvEventBatch, KvSnapshot, Tier
from kvbm.runs import Lane, Runs

TIERS = (Tier.DEVICE, Tier.HOST, Tier.DISK, Tier.OBJECT)  # the nearest first
LIMIT = 2 * 2**30  # bytes
Depths = tuple[int, int, int, int]  # leading blocks held on the device, there or in host memory, … : down to each tier

_NONE: Depths = (0, 0, 0, 0)
_PLACE = {tier: place for place, tier in enumerate(TIERS)}
_REMEMBERED = 65_536  # names in remembered parts of answers: only a shortcut, so a bound can be small
_SWEEP = 32  # runs looked at with each batch for lanes of workers that are gone
_LOAD = 4096  # blocks of a snapshot stored at a time, between which the limit is looked at


@dataclass(slots=True)
class _Worker:
    """Its lanes are four neighbouring bits, one a tier, the device's the lowest."""

    namespace: str
    lanes: tuple[Lane, ...] = ()
    seq: int = 0
    stale: bool = False

    @property
    def device(self) -> int:
        return self.lanes[0].bit

    @property
    def mask(self) -> int:
        return self.device * 0b1111


@dataclass(slots=True)
class _Names:
    """Workers by device lane, and the parts of answers that were given before."""

    by_lane: dict[int, str] = field(default_factory=dict)
    _remembered: dict[tuple[int, int], dict[str, Depths]] = field(default_factory=dict)
    _count: int = 0

    def with_depth(self, found: dict[str, Depths], lanes: int, depth: int) -> dict[str, Depths]:
        """`found`, and the workers of these lanes with that depth in every tier. It may be changed."""
        name = self.by_lane.get(lanes)
        if name is not None:
            found[name] = (depth, depth, depth, depth)
            return found
        part = self._remembered.get((lanes, depth))
        if part is None:
            if self._count > _REMEMBERED:
                self.forget()
            part = dict.fromkeys(self.of(lanes), (depth, depth, depth, depth))
            self._remembered[lanes, depth] = part
            self._count += len(part)
        if not found:
            return part.copy()  # ten times as fast as making it
        found.update(part)
        return found

    def of(self, lanes: int) -> list[str]:
        return [self.by_lane[lane] for lane in _bits(lanes)]

    def forget(self) -> None:
        self._remembered.clear()
        self._count = 0


class PrefixIndex:
    """Exact block hash → workers and tiers. Not thread-safe; nothing here waits.

    `limit` bounds its memory, in bytes. Workers of different namespaces (models, say) never answer one question.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._blocks = Runs(limit)
        self._workers: dict[str, _Worker] = {}
        self._names = _Names()
        self._members: dict[str, int] = {}  # namespace → its workers' device lanes
        self._tiered = False  # whether anything was ever stored beneath a device
        self._free: list[int] = []  # device lanes of workers that no block mentions
        self._used = 0  # workers' places ever handed out

    @property
    def blocks(self) -> int:
        """Blocks, those of removed workers included until a sweep has passed."""
        return len(self._blocks)

    @property
    def bytes(self) -> int:
        """Memory in use, estimated from above; never more than the limit."""
        return self._blocks.bytes

    @property
    def evicted(self) -> int:
        """Blocks forgotten so far because of the limit."""
        return self._blocks.evicted

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

    def join(self, worker: str, namespace: str) -> None:
        """Say to which namespace a worker belongs, before anything else of it. One that never joined is in ""."""
        if worker not in self._workers:
            self._workers[worker] = _Worker(namespace)
            self._open(worker, self._workers[worker])

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
                    lane = self._lane(worker, event.tier)
                    # Other tiers tell of what was moved there together, in no order.
                    self._blocks.store(event.hashes, event.parent, lane, chained=event.tier is Tier.DEVICE)
                case BlocksRemoved():
                    self._blocks.drop(event.hashes, self._lane(worker, event.tier).bit)
                case BlocksCleared():
                    self._renew(batch.worker, worker)
        if self._blocks.retired:
            self.sweep(_SWEEP)
        return True

    def load(self, snapshot: KvSnapshot) -> None:
        """Replace everything known of the worker, unless that is newer."""
        worker = self._worker(snapshot.worker)
        if snapshot.seq < worker.seq:
            return
        self._renew(snapshot.worker, worker)
        for tier, hashes in snapshot.blocks.items():
            lane = self._lane(worker, tier)
            for at in range(0, len(hashes), _LOAD):
                self._blocks.store(hashes[at : at + _LOAD], None, lane, chained=False)
        worker.seq = snapshot.seq
        worker.stale = False

    def remove_worker(self, worker: str) -> None:
        """Forget a worker. Takes the same time however much it held: entries are swept later, bit by bit."""
        entry = self._workers.pop(worker, None)
        if entry is not None:
            self._retire(entry)

    def match(self, hashes: Sequence[int], namespace: str = "") -> dict[str, Depths]:
        """How many leading blocks each worker of the namespace holds, down to each tier; without who has none."""
        members = self._members.get(namespace, 0)
        if not members or not hashes:
            return {}
        stretches = self._blocks.along(hashes)
        if self._tiered:
            seen = reduce(or_, [lanes for _, lanes in stretches])
            if seen & members * 0b1110:
                return self._match_tiers(stretches, members, len(hashes), seen)
        return self._depths(stretches, members, len(hashes), 0)

    def sweep(self, limit: int | None = None) -> None:
        """Take removed workers out of up to `limit` runs of blocks, or out of all."""
        self._free += _bits(self._blocks.sweep(limit) // 0b1111)

    def check(self) -> None:
        """Assert the invariants; for tests."""
        self._blocks.check()
        live = {name: worker.mask for name, worker in self._workers.items()}
        assert self._names.by_lane == {worker.device: name for name, worker in self._workers.items()}
        assert sum(self._members.values()) == sum(worker.device for worker in self._workers.values())
        parts = [*live.values(), *(lane * 0b1111 for lane in self._free), self._blocks.retired]
        assert sum(parts) == (1 << 4 * self._used) - 1, "every lane is a worker's, or free, or not yet swept"
        known = sum(live.values()) | self._blocks.retired
        assert not any(lanes & ~known for lanes in self._blocks.lanes())

    def _match_tiers(self, stretches: list[tuple[int, int]], members: int, count: int, seen: int) -> dict[str, Depths]:
        found = self._depths(stretches, members, count, len(TIERS) - 1)
        tiered = members & reduce(or_, [seen >> place for place in range(1, len(TIERS))])
        nearer: list[dict[str, Depths]] = []
        for place in range(len(TIERS) - 1):
            if not place or seen & tiered << place:
                depths = self._depths(stretches, tiered, count, place)
            nearer.append(depths)
        device, host, disk = nearer
        for name in self._names.of(tiered):
            if name in found:
                parts = device.get(name, _NONE)[0], host.get(name, _NONE)[0], disk.get(name, _NONE)[0]
                found[name] = (*parts, found[name][0])
        return found

    def _depths(self, stretches: list[tuple[int, int]], members: int, count: int, place: int) -> dict[str, Depths]:
        """How many leading blocks each worker holds on its device or in `place` tiers beneath it, four times."""
        found: dict[str, Depths] = {}
        alive = members
        for at, lanes in stretches:
            here = lanes
            if place:
                here = reduce(or_, [lanes >> tier for tier in range(place + 1)])
            if ended := alive & ~here:
                left = alive ^ ended
                if at:
                    # Those whose prefix ends deeper are written over. Where few are, all of them are more often the
                    # same than all but these, so that part of the answer is remembered.
                    few = 2 * left.bit_count() < alive.bit_count()
                    found = self._names.with_depth(found, alive if few else ended, at)
                if not left:
                    return found
                alive = left
        return self._names.with_depth(found, alive, count)

    def _worker(self, name: str) -> _Worker:
        worker = self._workers.get(name)
        if worker is None:
            self.join(name, "")
            worker = self._workers[name]
        return worker

    def _open(self, name: str, worker: _Worker) -> None:
        """Give the worker lanes."""
        if self._free:
            device = self._free.pop()
        else:
            device = 1 << len(TIERS) * self._used
            self._used += 1
        worker.lanes = tuple(Lane(device << place) for place in range(len(TIERS)))
        self._names.by_lane[device] = name
        self._members[worker.namespace] = self._members.get(worker.namespace, 0) | device

    def _renew(self, name: str, worker: _Worker) -> None:
        """Empty the worker by giving it new lanes."""
        self._retire(worker)
        self._open(name, worker)

    def _retire(self, worker: _Worker) -> None:
        self._members[worker.namespace] &= ~worker.device
        if not self._members[worker.namespace]:
            del self._members[worker.namespace]
        del self._names.by_lane[worker.device]
        self._names.forget()
        self._blocks.retire(worker.mask)

    def _lane(self, worker: _Worker, tier: Tier) -> Lane:
        self._tiered |= tier is not Tier.DEVICE
        return worker.lanes[_PLACE[tier]]


def _bits(mask: int) -> list[int]:
    """The set bits, each as an integer of its own."""
    bits = []
    while mask:
        bits.append(mask & -mask)
        mask &= mask - 1
    return bits
