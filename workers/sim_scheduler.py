"""Continuous batching over a block pool, after vLLM's V1 scheduler; knows nothing of time or of asyncio.

A step is planned, takes some time elsewhere, and is then finished. Sequences already in the batch come first and
take from the step's token budget; then the queue is admitted in order while blocks last. When a running
sequence finds no block, the youngest one is preempted: it loses its blocks and computes them again later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from kvbm.errors import OutOfBlocks
from kvbm.hashing import FullHash, low64
from kvbm.pool import BlockPool
from workers.engine import Output
from workers.sim_pace import Work
from workers.sim_sequence import Sequence


@dataclass(slots=True)
class Step:
    """What is computed together: tokens per sequence."""

    tokens: dict[Sequence, int] = field(default_factory=dict)
    fetches: list[Sequence] = field(default_factory=list)  # got their blocks; now someone else computes them
    onboards: list[tuple[Sequence, list[FullHash]]] = field(default_factory=list)  # likewise; these come from tiers
    preempted: int = 0
    repeats: int = 1  # times that it may be computed at once: nothing but requests that come would change it

    @property
    def work(self) -> Work:
        """What computing it once takes. A sequence that had to give up its blocks computes its answer like a prompt."""
        tokens = before = decodes = context = 0
        for sequence, count in self.tokens.items():
            if count == 1 and sequence.length > sequence.prompt_len:
                decodes += 1
                context += sequence.length
            else:
                tokens += count
                before += count * sequence.computed + count * (count - 1) // 2
        return Work(tokens, before, decodes, context)


class Scheduler:
    """Owns every sequence's blocks from `add` until it finishes or is removed."""

    def __init__(self, pool: BlockPool, block_size: int, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.pool, self.block_size = pool, block_size
        self.max_model_len = pool.size * block_size
        self.steps_at_once = 1
        self.worth_reading: Callable[[list[FullHash]], int] = lambda _: 0  # of a prompt's next blocks, from tiers
        self.completed: Callable[[list[FullHash]], None] = lambda _: None  # told of blocks on the device, in order
        self._max_num_seqs, self._budget = max_num_seqs, max_num_batched_tokens
        self._waiting: deque[Sequence] = deque()
        self._fetched: deque[Sequence] = deque()  # have their blocks, so they go before the queue
        self._fetching: set[Sequence] = set()
        self._running: dict[Sequence, None] = {}  # oldest first
        self._done: set[Sequence] = set()  # prompts computed for another worker, blocks kept until removed

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting) + len(self._fetched) + len(self._fetching)

    @property
    def queued_tokens(self) -> int:
        """Of prompts, yet to be computed here, the last of each included; what comes from elsewhere is not."""
        admitted = sum(one.length - one.computed for one in self._running if not one.generated)
        fetched = sum(one.length - one.computed for one in self._fetched)
        return admitted + fetched + sum(map(self._missing, self._waiting))

    def _missing(self, sequence: Sequence) -> int:
        cached = self.pool.match([low64(full) for full in sequence.hashes(self.block_size)])
        return max(1, sequence.length - len(cached) * self.block_size)

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence in whatever state and free its blocks at once. Harmless when it is gone already."""
        if sequence in self._running:
            del self._running[sequence]
        else:
            for queue in (self._waiting, self._fetched):
                if sequence in queue:
                    queue.remove(sequence)
            self._fetching.discard(sequence)
            self._done.discard(sequence)
        self._release(sequence)

    def plan(self) -> Step:
        """Choose the next step's tokens and allocate their blocks."""
        step, budget = Step(), self._budget
        size = self.block_size
        for sequence in list(self._running):
            if not budget or sequence not in self._running:
                break  # the rest, all younger, was preempted
            count = min(sequence.length - sequence.computed, budget)
            short = sequence.computed + count > len(sequence.blocks) * size
            if short and not self._make_room(sequence, count, step):
                break
            step.tokens[sequence] = count
            budget -= count
        if not step.preempted:
            self._admit(step, budget)
        step.repeats = self._repeats(step)
        return step

    def finish(self, step: Step, times: int = 1) -> list[tuple[Sequence, Output]]:
        """The step was computed: outputs of every sequence that got a token or, for a prompt alone, is complete.

        `times`: that many steps like it, at most its `repeats`.
        """
        outputs = []
        for sequence, count in step.tokens.items():
            if sequence not in self._running:
                continue  # removed while the step ran
            sequence.computed += count
            if sequence.computed < sequence.length:
                self._commit(sequence)
                continue
            if not sequence.generates:
                self._commit(sequence)
                del self._running[sequence]
                self._done.add(sequence)
                outputs.append((sequence, Output([], cached_tokens=sequence.cached)))
                continue
            output = sequence.sample(times, self.max_model_len)
            sequence.computed = sequence.length - 1
            if times > 1:
                self._grow(sequence, 0)  # `repeats` has seen to it that there is room
            self._commit(sequence)
            outputs.append((sequence, output))
            if output.finish:
                self.remove(sequence)
        return outputs

    def fetched(self, sequence: Sequence, computed: int) -> None:
        """A fetch ended; `computed` leading tokens have their KV now. The rest is computed here."""
        if sequence not in self._fetching:
            return  # removed meanwhile
        self._fetching.discard(sequence)
        sequence.computed = computed
        self._commit(sequence)
        self._fetched.append(sequence)

    def onboarded(self, sequence: Sequence, blocks: int) -> None:
        """So many of its next blocks have come from tiers."""
        if sequence not in self._fetching:
            return
        computed = sequence.computed + blocks * self.block_size
        if not sequence.reported:
            sequence.cached = max(sequence.cached or 0, computed)
        self.fetched(sequence, computed)

    def _admit(self, step: Step, budget: int) -> None:
        while budget and len(self._running) < self._max_num_seqs and (self._fetched or self._waiting):
            queue = self._fetched or self._waiting
            sequence = queue[0]
            onboard: list[FullHash] = []
            if queue is self._waiting:
                onboard = self._match(sequence)
            fetch = not onboard and sequence.fetch is not None and sequence.fetch(sequence.computed)
            missing = sequence.length - sequence.computed
            # What is computed elsewhere may come with a token, for which there has to be room as well: if it had to be
            # found then, sequences that have all blocks there are could wait for each other.
            count = missing + 1 if fetch else missing if onboard else min(missing, budget)
            if not self._grow(sequence, count):
                if queue is self._waiting:
                    self._release(sequence)
                return
            queue.popleft()
            sequence.cached = sequence.computed if sequence.cached is None else sequence.cached
            self.completed(sequence.hashes(self.block_size)[: sequence.committed])
            if onboard:
                self._fetching.add(sequence)
                step.onboards.append((sequence, onboard))
                continue
            sequence.fetch = None
            if fetch:
                self._fetching.add(sequence)
                step.fetches.append(sequence)
                continue
            self._running[sequence] = None
            step.tokens[sequence] = count
            budget -= count

    def _repeats(self, step: Step) -> int:
        """While every running sequence generates, and none ends, steps are alike, as long as there are blocks.

        One that ends at a stop token before keeps its blocks until the last of them.
        """
        if self.steps_at_once == 1 or step.onboards or step.fetches or len(step.tokens) < len(self._running):
            return 1
        most = self.steps_at_once
        for sequence, count in step.tokens.items():
            if count > 1 or sequence.length == sequence.prompt_len:
                return 1
            most = min(most, min(sequence.longest, self.max_model_len) - sequence.length)
        size, needed, room = self.block_size, 0, most
        for sequence in step.tokens:
            left = len(sequence.blocks) * size - sequence.computed  # tokens
            if left < most:
                needed -= (left - most) // size
                room = min(room, left)
        return max(1, most if needed <= self.pool.free else room)

    def _match(self, sequence: Sequence) -> list[FullHash]:
        """Pin the cached prefix; returns the blocks behind it that are worth reading from tiers.

        The last token is always computed, as its output is what is sampled from.
        """
        hashes = sequence.hashes(self.block_size)[: (sequence.length - 1) // self.block_size]
        sequence.blocks = self.pool.match([low64(full) for full in hashes])
        self.pool.pin(sequence.blocks)
        sequence.committed = len(sequence.blocks)
        sequence.computed = sequence.committed * self.block_size
        behind = hashes[sequence.committed :]
        return behind[: self.worth_reading(behind)] if behind else []

    def _make_room(self, sequence: Sequence, count: int, step: Step) -> bool:
        """Grow a running sequence, preempting from the youngest; False when it had to preempt itself."""
        while not self._grow(sequence, count):
            victim, _ = self._running.popitem()
            self._release(victim)
            self._waiting.appendleft(victim)
            step.preempted += 1
            if victim is sequence:
                return False
        return True

    def _grow(self, sequence: Sequence, count: int) -> bool:
        """Blocks for `count` tokens more than are computed."""
        needed = -(-(sequence.computed + count) // self.block_size) - len(sequence.blocks)
        try:
            sequence.blocks += self.pool.allocate(max(0, needed))
        except OutOfBlocks:
            return False
        return True

    def _commit(self, sequence: Sequence) -> None:
        full, first = sequence.computed // self.block_size, sequence.committed
        if full > first:
            hashes = sequence.hashes(self.block_size)
            parent = low64(hashes[first - 1]) if first else None
            self.pool.commit(
                sequence.blocks[first:full], [low64(full_hash) for full_hash in hashes[first:full]], parent
            )
            sequence.committed = full
            self.completed(hashes[first:full])

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.computed, sequence.committed = [], 0, 0
