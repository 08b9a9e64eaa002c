"""Which blocks there are and who has them: block hash → lanes, kept in runs. The lower half of `kvbm.index`.

A *lane* is one bit of an integer, and stands for one worker's one tier. A *run* is up to `RUN` blocks that were stored
one after the other, as a tuple; a dict names every block's run. A hash is that of a block and all before it. So where a
run is known to follow one chain, and it and a prompt have two blocks in common that are equally far apart in both, all
between them are the same: how far they go together is searched for, not walked, and the dict is looked into once a
run, not once a block. Who has a block is kept block by block, so answers are exact whatever is gone from the middle.
Blocks that are scattered over runs, as they were stored one by one or in no order, cost a look each; a prompt that met
many such puts them side by side.

The limit is in bytes, estimated from above. Above it runs go, the oldest first, but for those that a prompt has
met since they were last looked at: what many prompts begin with is met most, so a prefix's end goes before its start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import compress, groupby

RUN = 128  # most blocks of a run: changing one of them copies the run
FEW = 16  # so many, or more, are stored as a run of their own
SCATTERED = 4  # runs that a prompt may meet beside one for every FEW blocks before they are gathered
BLOCK_BYTES, RUN_BYTES = 176, 384  # at the worst; a block mostly takes about 100, its hash and dict entry


class Lane:
    """One worker's one tier. `bit` has one bit set; `open` is the run that takes the next few blocks."""

    __slots__ = ("bit", "open")

    def __init__(self, bit: int) -> None:
        self.bit, self.open = bit, 0


class Run:
    """Blocks side by side. Nobody is in the lanes of a block that is not there, so none are 0."""

    __slots__ = ("_lanes", "chained", "hashes", "key", "met", "same")

    def __init__(self, key: int) -> None:
        self.key = key
        self.hashes: tuple[int, ...] = ()
        self.same = 0  # the lanes of every block; 0 where they differ
        self._lanes: tuple[int, ...] = ()  # by block, where they differ
        self.chained = False  # each block comes after the one before it here, if not next to it
        self.met = False  # by a prompt, since eviction last came by

    @property
    def lanes(self) -> tuple[int, ...]:
        return (self.same,) * len(self.hashes) if self.same else self._lanes

    def put(self, hashes: tuple[int, ...], lanes: tuple[int, ...]) -> None:
        """Both anew."""
        self.hashes = hashes
        self.same = lanes[0] if lanes and lanes.count(lanes[0]) == len(lanes) else 0
        self._lanes = () if self.same else lanes

    def common(self, prompt: Sequence[int], at: int) -> tuple[int, int]:
        """Where `prompt[at]` is in the run, and how many of the prompt's blocks are there from then on."""
        mine = self.hashes
        if not self.chained:
            start, length = self.equal(prompt, at)
            self.chained = length == len(mine)  # as the prompt is
            return start, length
        start = 0 if mine[0] == prompt[at] else mine.index(prompt[at])
        same, beyond = 1, min(len(mine) - start, len(prompt) - at) + 1
        probe = beyond - 1  # mostly all
        while beyond - same > 1:
            if mine[start + probe - 1] == prompt[at + probe - 1]:
                same = probe
            else:
                beyond = probe
            probe = (same + beyond) // 2
        return start, same

    def equal(self, hashes: Sequence[int], at: int) -> tuple[int, int]:
        """The same for blocks in any order."""
        mine = self.hashes
        start = 0 if mine[0] == hashes[at] else mine.index(hashes[at])
        length = min(len(mine) - start, len(hashes) - at)
        theirs = tuple(hashes[at : at + length])
        if mine[start : start + length] != theirs:
            length = next(i for i in range(1, length) if mine[start + i] != theirs[i])
        return start, length


class Runs:
    """All blocks. The dict maps to integers, which the garbage collector need not visit, and a run's share one."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.evicted = 0  # blocks, so far
        self.retired = 0  # lanes of nobody, which blocks still mention
        self._run_of: dict[int, int] = {}
        self._runs: dict[int, Run] = {}
        self._keys = 0  # handed out so far; 0 is no run's
        self._queue: list[int] = []  # runs that eviction looks at next, from the end
        self._sweeping = 0  # of the retired lanes, those that the running sweep takes out
        self._unswept: list[int] = []  # runs that are there since before it began

    def __len__(self) -> int:
        return len(self._run_of)

    @property
    def bytes(self) -> int:
        """Memory, estimated from above."""
        return len(self._run_of) * BLOCK_BYTES + len(self._runs) * RUN_BYTES

    def along(self, prompt: Sequence[int]) -> list[tuple[int, int]]:
        """(position, lanes) wherever the lanes of a prompt's blocks change, from the first on; lanes 0 end it."""
        find, runs = self._run_of.get, self._runs
        stretches: list[tuple[int, int]] = []
        at, looks, count = 0, 0, len(prompt)
        while at < count:
            key = find(prompt[at])
            if key is None:
                stretches.append((at, 0))
                break
            run = runs[key]
            run.met = True
            mine = run.hashes
            start, length = 0, len(mine)
            if not run.chained or at + length > count or mine[-1] != prompt[at + length - 1] or mine[0] != prompt[at]:
                start, length = run.common(prompt, at)
            if run.same:
                stretches.append((at, run.same))
            else:
                place = at
                for lanes, equal in groupby(run.lanes[start : start + length]):
                    stretches.append((place, lanes))
                    place += len(list(equal))
            at += length
            looks += 1
        if looks > SCATTERED + at // FEW and not self._sweeping:  # a sweep must meet every run
            self._gather(tuple(prompt[:at]))
        return stretches

    def store(self, hashes: tuple[int, ...], parent: int | None, lane: Lane, *, chained: bool) -> None:
        """The lane has these blocks now. `chained`: each comes after the one before it, the first after `parent`."""
        if self._run_of.keys().isdisjoint(hashes):
            self._append(hashes, parent, lane, chained)
        else:
            for at, end, run, start in self._pieces(hashes):
                if run is None:
                    self._append(hashes[at:end], hashes[at - 1] if at else parent, lane, chained)
                elif not run.same & lane.bit:
                    stop = start + end - at
                    lanes = run.lanes
                    run.put(run.hashes, lanes[:start] + _each(lanes[start:stop], lane.bit, 0) + lanes[stop:])
        if self.bytes > self.limit:
            self._evict()

    def drop(self, hashes: tuple[int, ...], lanes: int) -> None:
        """These lanes have these blocks no more."""
        by_run: dict[int, list[int]] = {}
        for block in hashes:
            key = self._run_of.get(block)
            if key is not None:
                by_run.setdefault(key, []).append(block)
        for key, blocks in by_run.items():
            run = self._runs[key]
            blocks.reverse()  # the last block of a prompt is mostly the first to go
            start = run.hashes.index(blocks[0])
            if run.hashes[start : start + len(blocks)] == tuple(blocks):
                self._take(run, start, start + len(blocks), lanes)
                continue
            for block in blocks:
                if block in self._run_of:  # it may be named twice
                    start = run.hashes.index(block)
                    self._take(run, start, start + 1, lanes)

    def retire(self, lanes: int) -> None:
        """These lanes have nothing more. `sweep` takes them out; until then nobody else may use them."""
        self.retired |= lanes

    def sweep(self, limit: int | None) -> int:
        """Take retired lanes out of up to `limit` runs, or of all; those that no block mentions any more."""
        swept = 0
        while self.retired:
            if not self._sweeping:
                self._sweeping, self._unswept = self.retired, list(self._runs)
            keys = self._unswept[-limit:] if limit else self._unswept[:]
            del self._unswept[len(self._unswept) - len(keys) :]
            for key in keys:
                run = self._runs.get(key)
                if run is not None:
                    self._take(run, 0, len(run.hashes), self._sweeping)
            if not self._unswept:
                swept |= self._sweeping
                self.retired &= ~self._sweeping
                self._sweeping = 0
            if limit:
                break
        return swept

    def check(self) -> None:
        """Assert the invariants; for tests."""
        held = 0
        for key, run in self._runs.items():
            assert run.key == key
            assert 0 < len(run.hashes) == len(run.lanes) <= RUN
            assert all(run.lanes)
            assert bool(run.same) == (len(set(run.lanes)) == 1)
            assert all(self._run_of[block] == key for block in run.hashes)
            held += len(run.hashes)
        assert held == len(self._run_of)
        assert self.bytes <= self.limit

    def lanes(self) -> Iterator[int]:
        """Of every block; for tests."""
        for run in self._runs.values():
            yield from run.lanes

    def _pieces(self, hashes: tuple[int, ...]) -> Iterator[tuple[int, int, Run | None, int]]:
        """`hashes[at:end]` are in a run from `start` on, or in none: (at, end, run, start)."""
        find = self._run_of.get
        at = 0
        while at < len(hashes):
            key = find(hashes[at])
            end = at + 1
            if key is None:
                while end < len(hashes) and hashes[end] not in self._run_of:
                    end += 1
                yield at, end, None, 0
            else:
                run = self._runs[key]
                start, length = run.equal(hashes, at)
                end = at + length
                yield at, end, run, start
            at = end

    def _append(self, hashes: tuple[int, ...], parent: int | None, lane: Lane, chained: bool) -> None:
        """Blocks that are in no run yet: behind their parent, or with other few ones, or in runs of their own."""
        few = len(hashes) < FEW
        run = None if parent is None else self._runs.get(self._run_of.get(parent, 0))
        follows = run is not None and run.hashes[-1] == parent
        if not follows:
            run = self._runs.get(lane.open)
        if few and run is not None and len(run.hashes) + len(hashes) <= RUN:
            run.chained &= follows and chained
            more = self._claim(hashes, run.key)
            if run.same == lane.bit:
                run.hashes += more
            else:
                run.put(run.hashes + more, run.lanes + (lane.bit,) * len(more))
            return
        if len(hashes) > RUN:
            hashes = tuple(dict.fromkeys(hashes))
        for at in range(0, len(hashes), RUN):
            run = self._add()
            run.hashes, run.same, run.chained = self._claim(hashes[at : at + RUN], run.key), lane.bit, chained
            if few:
                lane.open = run.key

    def _add(self) -> Run:
        self._keys += 1
        run = self._runs[self._keys] = Run(self._keys)
        return run

    def _claim(self, hashes: tuple[int, ...], key: int) -> tuple[int, ...]:
        """Name the run of blocks that are in none; each of them once."""
        run_of = self._run_of
        held = len(run_of)
        for block in hashes:
            run_of[block] = key
        return hashes if len(run_of) == held + len(hashes) else tuple(dict.fromkeys(hashes))

    def _take(self, run: Run, start: int, stop: int, lanes: int) -> None:
        """Lanes out of a part of a run, and blocks that nobody has then."""
        all_lanes = run.lanes
        before = all_lanes[start:stop]
        after = _each(before, 0, lanes)
        if after == before:
            return
        hashes = run.hashes
        if not all(after):
            part = hashes[start:stop]
            for block, left in zip(part, after, strict=True):
                if not left:
                    del self._run_of[block]
            hashes = hashes[:start] + tuple(compress(part, after)) + hashes[stop:]
            after = tuple(filter(None, after))
        if hashes:
            run.put(hashes, all_lanes[:start] + after + all_lanes[stop:])
        else:
            del self._runs[run.key]

    def _gather(self, prompt: tuple[int, ...]) -> None:
        """Put blocks that are scattered side by side."""
        if len(set(prompt)) < len(prompt):
            return  # not a prompt, then
        lanes: list[int] = []
        for at, end, run, start in self._pieces(prompt):
            assert run is not None
            stop = start + end - at
            hashes, theirs = run.hashes, run.lanes
            lanes += theirs[start:stop]
            if end - at < len(hashes):
                run.put(hashes[:start] + hashes[stop:], theirs[:start] + theirs[stop:])
            else:
                del self._runs[run.key]
        for at in range(0, len(prompt), RUN):
            run = self._add()
            run.put(prompt[at : at + RUN], tuple(lanes[at : at + RUN]))
            run.chained = True
            self._run_of.update(dict.fromkeys(run.hashes, run.key))
        if self.bytes > self.limit:
            self._evict()

    def _evict(self) -> None:
        while self.bytes > self.limit:
            if not self._queue:
                runs = list(self._runs)
                self._queue = runs[len(runs) // 2 :: -1]  # the newer half had no time to be met
            run = self._runs.get(self._queue.pop())
            if run is None:
                continue
            if run.met:
                run.met = False
                continue
            for block in run.hashes:
                del self._run_of[block]
            del self._runs[run.key]
            self.evicted += len(run.hashes)


def _each(lanes: tuple[int, ...], more: int, less: int) -> tuple[int, ...]:
    """The same change to every block's lanes. Equal ones stay one object, and mostly all are equal."""
    first = lanes[0]
    changed = first & ~less | more
    if lanes.count(first) == len(lanes):
        return (changed,) * len(lanes)
    known = {first: changed}
    return tuple([known[each] if each in known else known.setdefault(each, each & ~less | more) for each in lanes])
