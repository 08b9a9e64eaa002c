"""A simulated worker without a process: a scheduler, a pool and tiers, driven by timers of the event loop.

It does what `workers.sim_engine` does, with the same parts. What it leaves out is what would be the same whatever
happens: tokens, streams of them, and a task for each request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from dynamo_lite.config import Config
from dynamo_lite.plane.layout import KvLayout
from dynamo_lite.plane.wire import Fingerprint, Incarnation, InstanceRecord, LoadReport, Role
from dynamo_lite.router.roster import Roster
from kvbm.events import KvEvent, KvEventBatch, KvSnapshot
from kvbm.hashing import FullHash, HashedPrompt
from kvbm.policy import PullCost
from kvbm.pool import BlockPool
from workers.engine import Output, TierLoad
from workers.rates import Speeds
from workers.sim_pace import StepTimes, Work
from workers.sim_scheduler import Scheduler, Step
from workers.sim_sequence import Sequence
from workers.sim_storage import Bucket, Lane
from workers.sim_tiers import SimTiers

STEPS_AT_ONCE = 512  # decode steps that are simulated as one, unless something comes

_MORE, _LAST = Output([]), Output([], finish="length")


class Owner(Protocol):
    """Who wants to know what becomes of a sequence. Times are the event loop's, in seconds."""

    def tokens(self, sequence: PlannedSequence, count: int, first_at: float, at: float) -> None:
        """So many more, the first of them and the last at these times."""
        ...

    def ended(self, sequence: PlannedSequence, at: float) -> None:
        """Its last token came; or, if it generates none, its prompt is complete, and has blocks until it is removed."""
        ...


class PlannedSequence(Sequence):
    """One whose answer's length is known."""

    __slots__ = ("_answer", "_hashes", "_told", "ask", "owner")

    def __init__(
        self, prompt: HashedPrompt, answer_tokens: int, owner: Owner, answer: Callable[[], FullHash] | None
    ) -> None:
        """`answer`: makes the hash of a block of it; None: the prompt is computed, and that is all."""
        super().__init__()
        self.prompt_len = self.length = self._told = len(prompt)
        self.longest = self.prompt_len + answer_tokens
        self.generates = answer is not None
        self.owner, self._answer, self._hashes = owner, answer, list(prompt.full)
        self.ask: Callable[[PlannedSequence], object] = (
            id  # called with itself once `fetch` has said yes, and it has blocks
        )

    def hashes(self, block_size: int) -> list[FullHash]:
        while self._answer is not None and len(self._hashes) < self.length // block_size:
            self._hashes.append(self._answer())
        return self._hashes

    def sample(self, times: int, limit: int) -> Output:
        longest = min(self.longest, limit)
        self.length = min(self.length + times, longest)
        self.reported = True
        return _LAST if self.length >= longest else _MORE

    def given_first_token(self) -> None:
        """Another worker has chosen it, and told its owner."""
        self.length += 1
        self._told += 1

    def news(self) -> int:
        """Tokens since the last call."""
        count, self._told = self.length - self._told, self.length
        return count


@dataclass(slots=True)
class Counts:
    """What one worker has done."""

    placed: int = 0  # requests it was chosen for
    placed_tokens: int = 0  # of their prompts
    computed_tokens: int = 0  # of prompts, and of sequences that had to give up their blocks
    generated_tokens: int = 0
    steps: int = 0
    busy_s: float = 0.0
    preempted: int = 0


class SimWorker:
    """One engine and what its worker process tells of it."""

    def __init__(self, config: Config, role: Role, number: int, kv_bytes: int, roster: Roster, bucket: Bucket) -> None:
        """`config`: with blocks as they are hashed. `kv_bytes`: of a token. Raises ConfigError, ValueError."""
        sim, group = config.sim, getattr(config.workers, role.value)
        self.role, self.name, self.counts = role, f"{role.value}-{number}", Counts()
        self._pool = BlockPool(sim.kv_blocks)
        self._scheduler = Scheduler(self._pool, sim.block_size, group.max_num_seqs, sim.max_num_batched_tokens)
        self._scheduler.steps_at_once = STEPS_AT_ONCE
        if config.max_model_len is not None:
            self._scheduler.max_model_len = min(self._scheduler.max_model_len, config.max_model_len)
        self.block_size = sim.block_size
        self._times, self.link = StepTimes(sim), Lane(sim.transfer_ms_per_block)
        layout = _layout(sim.block_size, kv_bytes)
        self._speeds = Speeds(PullCost(), sim.block_size, layout.block_bytes)
        self.record = self._record(config, layout, group.max_num_seqs)
        self._roster = roster
        self._tiers: SimTiers | None = None
        if config.kv_tiers.host is not None:
            self._tiers = SimTiers(config, layout, bucket, self._tell)
            self._scheduler.worth_reading, self._scheduler.completed = self._tiers.worth, self._tiers.completed
            self._speeds.onboarding = self._tiers.cost
        self.held = 0  # blocks that are being moved
        self._kv_seq = self._load_seq = 0
        self._told_running = False
        self._step: Step | None = None  # under way since `_since`, until `_timer`
        self._work, self._since = Work(), 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._waking = False  # a step is about to be planned

    def _record(self, config: Config, layout: KvLayout, max_num_seqs: int) -> InstanceRecord:
        return InstanceRecord(
            name=self.name,
            incarnation=Incarnation(self.name),
            role=self.role,
            host="simulated",
            pid=0,
            served_model=config.model_name,
            fingerprint=Fingerprint(config.model, "", "sim", "sim", layout),
            kv_blocks=self._pool.size,
            max_model_len=self._scheduler.max_model_len,
            max_num_seqs=max_num_seqs,
        )

    def open(self) -> None:
        """Routers hear of it."""
        self._roster.join(self.record)
        self._roster.take_snapshot(KvSnapshot(self.record.incarnation, 0, {}))
        if self._tiers is not None:
            self._tiers.open()

    def close(self) -> None:
        if self._tiers is not None:
            self._tiers.close()

    @property
    def tiers(self) -> tuple[TierLoad, ...]:
        """Those beneath the device."""
        return self._tiers.load() if self._tiers is not None else ()

    # ---- work ----

    def place(self, sequence: PlannedSequence) -> None:
        """It is to be computed here."""
        self.counts.placed += 1
        self.counts.placed_tokens += sequence.prompt_len
        if self._tiers is not None:
            self._tiers.used(sequence.hashes(self.block_size))
        self._scheduler.add(sequence)
        self._wake()

    def received(self, sequence: PlannedSequence) -> None:
        """All of its prompt has come from another worker."""
        self._scheduler.fetched(sequence, sequence.prompt_len)
        self._wake()

    def remove(self, sequence: PlannedSequence) -> None:
        """Free its blocks."""
        self._scheduler.remove(sequence)
        self._wake()

    def _wake(self) -> None:
        """There is something to do that was not there before."""
        if self._waking:
            return
        if self._step is None:
            self._waking = True
            self._begin()
        elif self._step.repeats > 1:
            self._shorten(self._step)

    def _shorten(self, step: Step) -> None:
        """The one that is under way of steps at once is the last of them."""
        loop = asyncio.get_running_loop()
        begun = self._times.begun(self._work, loop.time() - self._since, step.repeats)
        if begun < step.repeats:
            assert self._timer is not None, "steps have an end"
            self._timer.cancel()
            step.repeats = begun
            self._timer = loop.call_at(max(self._until(step), loop.time()), self._end)

    def _begin(self) -> None:
        loop = asyncio.get_running_loop()
        step = self._scheduler.plan()
        self.counts.preempted += step.preempted
        for sequence in step.fetches:
            assert isinstance(sequence, PlannedSequence)
            sequence.ask(sequence)
        for sequence, hashes in step.onboards:
            assert self._tiers is not None, "onboarding is from tiers"
            self._tiers.read(hashes, partial(self._onboarded, sequence))
        if step.tokens:
            self._step, self._work, self._since = step, step.work, loop.time()
            self._timer = loop.call_at(self._until(step), self._end)
        else:
            self._tell(self._pool.events())
            if step.preempted:
                loop.call_soon(self._begin)
                return
        self._waking = False
        self._tell_changes()

    def _until(self, step: Step) -> float:
        return self._since + self._times.times(self._work, step.repeats)

    def _end(self) -> None:
        step, work, now = self._step, self._work, asyncio.get_running_loop().time()
        assert step is not None, "what ends was under way"
        self._step, self._waking = None, True
        once = self._times.once(work)
        self.counts.steps += step.repeats
        self.counts.busy_s += now - self._since
        self.counts.computed_tokens += work.tokens
        self._learn(work, once)
        first_at = min(self._since + once, now)
        for sequence, output in self._scheduler.finish(step, step.repeats):
            assert isinstance(sequence, PlannedSequence)
            if sequence.generates:
                count = sequence.news()
                self.counts.generated_tokens += count
                sequence.owner.tokens(sequence, count, first_at, now)
            if output.finish:
                self._speeds.answers.ended(sequence.generated)
            if output.finish or not sequence.generates:
                sequence.owner.ended(sequence, now)
        self._tell(self._pool.events())
        self._begin()

    def _learn(self, work: Work, seconds: float) -> None:
        """A step took so long."""
        if not work.tokens:
            self._speeds.steps.took(work.decodes, seconds)
            return
        self._speeds.cost.computed(work.tokens, seconds)
        if self._tiers is not None:
            self._tiers.cost.computed(work.tokens, seconds)

    def _onboarded(self, sequence: Sequence, blocks: int) -> None:
        self._scheduler.onboarded(sequence, blocks)
        self._wake()

    # ---- what routers hear ----

    def _tell(self, events: tuple[KvEvent, ...]) -> None:
        if events:
            self._kv_seq += 1
            self._roster.take_batch(KvEventBatch(self.record.incarnation, self._kv_seq, events))

    def _tell_changes(self) -> None:
        """A worker that begins to work, or has nothing left, says so at once."""
        running = self._scheduler.running > 0
        if running is not self._told_running:
            self.report()

    def report(self) -> None:
        """The load."""
        scheduler, pool = self._scheduler, self._pool
        self._load_seq += 1
        self._told_running = scheduler.running > 0
        self._roster.take_report(
            LoadReport(
                self.record.incarnation, self._load_seq, scheduler.running, scheduler.waiting, pool.pinned, pool.size,
                self.held, self._kv_seq, queued_tokens=scheduler.queued_tokens, rates=self._speeds.rates(),
            )
        )  # fmt: skip


def _layout(block: int, kv_bytes: int) -> KvLayout:
    """One that takes as many bytes."""
    return KvLayout(
        layers=1, block_size=block, kv_heads=1, tensor_parallel=1, key_size=kv_bytes, value_size=0, dtype="fp8",
        keys="NHD", values="NHD",
    )  # fmt: skip
