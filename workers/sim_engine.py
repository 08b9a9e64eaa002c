"""The simulated engine: no model and no torch, yet the batching, blocks, events, transfers and failures of one."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from array import array
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
from prometheus_client import REGISTRY, CollectorRegistry

from dynamo_lite.config import ProcessSpec
from dynamo_lite.errors import PrefillFailed, RequestError, StartError, WorkerError, WorkerLost
from dynamo_lite.plane.kv_wire import KvAsk, KvTold
from dynamo_lite.plane.layout import KvLayout
from dynamo_lite.plane.wire import Fingerprint, Incarnation, PushTarget, Role, Sampling
from kvbm.events import KvEvent, Tier
from kvbm.hashing import block_hashes
from kvbm.ledger import BlockLedger
from kvbm.policy import PullCost
from kvbm.pool import BlockPool
from workers.engine import EngineInfo, EngineLoad, Job, Output, Prefilled, PrefillJob, RemotePrefill, TransferReport
from workers.metrics import SimMetrics
from workers.rates import Speeds
from workers.sim_pace import Pace
from workers.sim_scheduler import Scheduler, Step
from workers.sim_sequence import Sequence, TokenSequence
from workers.sim_storage import Bucket
from workers.sim_tiers import SimTiers
from workers.sim_tokens import Sampler, SimModel
from workers.tiers.admin import KvAdmin

log = logging.getLogger(__name__)

BACKEND = "sim"
EVENTS_S = 0.002  # at least, between two hand-outs of KV events: steps may take no time, and real ones take longer
_PROMPT_ONLY = Sampling(max_tokens=1)

# None: the sequence has its blocks and waits for somebody else to compute its prompt.
Item = Output | WorkerError | None


class Inbox:
    """What the engine's loop has for one sequence; an asyncio.Queue costs twice as much, at every token."""

    __slots__ = ("_items", "_waiter")

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Item) -> None:
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> Output | None:
        """The next one, by the one who waits. Raises what was put as an error."""
        if not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        item = self._items.popleft()
        if isinstance(item, WorkerError):
            raise item
        return item


class SimEngine:
    """Implements `workers.engine.Engine`."""

    def __init__(
        self,
        spec: ProcessSpec,
        role: Role,
        incarnation: Incarnation,
        registry: CollectorRegistry = REGISTRY,
        bucket: Bucket | None = None,
    ) -> None:
        """`bucket`: the object tier's, shared with other engines of this process."""
        self._spec, self._role, self._incarnation, self._registry = spec, role, incarnation, registry
        sim = spec.config.sim
        self._block_size = spec.config.block_size or sim.block_size
        self._pool = BlockPool(sim.kv_blocks)
        group = getattr(spec.config.workers, role.value)
        self._max_num_seqs = group.max_num_seqs if group else 64
        self._scheduler = Scheduler(self._pool, self._block_size, self._max_num_seqs, sim.max_num_batched_tokens)
        self._scheduler.steps_at_once = sim.steps_at_once
        self._pace = Pace(sim)
        self.cost = PullCost()
        self._bucket = bucket or Bucket()
        self._tiers: SimTiers | None = None
        self._inboxes: dict[Sequence, Inbox] = {}
        self._holds: dict[str, int] = {}
        self._work = asyncio.Event()
        self._events: asyncio.Queue[tuple[KvEvent, ...]] = asyncio.Queue()
        self._ledger = BlockLedger()  # as of the events handed out
        self._admin = KvAdmin(self.load, self._ledger.snapshot)
        self._loop: asyncio.Task[None] | None = None
        self._reason = ""
        self._dead = asyncio.Event()

    # -- lifecycle

    def prepare(self) -> None:
        """Nothing of it forks."""

    async def start(self) -> EngineInfo:
        config = self._spec.config
        self._shape = SimModel.read(self._spec.model_path)
        self._metrics = SimMetrics(self._registry)
        self._metrics.kv_usage.set_function(lambda: self._pool.pinned / self._pool.size)
        self._metrics.running.set_function(lambda: self._scheduler.running)
        self._metrics.waiting.set_function(lambda: self._scheduler.waiting)
        capacity = self._pool.size * self._block_size
        if config.max_model_len is not None and config.max_model_len > capacity:
            raise StartError(
                "sim engine", f"max_model_len {config.max_model_len} is over the {capacity} tokens of its KV"
            )
        longest = config.max_model_len or min(self._shape.max_model_len, capacity)
        self._scheduler.max_model_len = self._max_model_len = longest
        layout = KvLayout(
            layers=1,
            block_size=self._block_size,
            kv_heads=1,
            tensor_parallel=1,
            key_size=self._shape.kv_values,  # over all layers
            value_size=0,
            dtype="float32" if config.dtype == "float32" else "bfloat16",
            keys="NHD",
            values="NHD",
        )
        fingerprint = Fingerprint(config.model, config.revision or "", BACKEND, BACKEND, layout)
        self._layout = layout
        self._speeds = Speeds(self.cost, self._block_size, layout.block_bytes)
        if config.kv_tiers.host is not None:
            self._open_tiers(layout)
        # The engine outlives every task group of the worker, as a real one (a process) does; close() ends it.
        self._loop = asyncio.get_running_loop().create_task(self._guarded())
        return EngineInfo(fingerprint, self._pool.size, longest, self._max_num_seqs)

    def _open_tiers(self, layout: KvLayout) -> None:
        try:
            tiers = SimTiers(self._spec.config, layout, self._bucket, self._events.put_nowait)
        except ValueError as error:
            raise StartError("sim engine", str(error)) from error
        self._scheduler.worth_reading, self._scheduler.completed = tiers.worth, tiers.completed
        tiers.open()
        self._tiers, self._speeds.onboarding = tiers, tiers.cost

    async def close(self) -> None:
        if self._tiers is not None:
            self._tiers.close()
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.wait([self._loop])
            self._loop = None

    async def answering(self) -> None:
        """It has no process of its own."""

    def silent_s(self) -> float:
        return 0.0

    async def failed(self) -> str:
        await self._dead.wait()
        return self._reason

    def fail(self, reason: str) -> None:
        """Die: everything in flight and everything that follows gets a WorkerLost."""
        self._reason = reason
        for inbox in self._inboxes.values():
            inbox.put(WorkerLost(self._spec.name, reason))
        self._dead.set()

    # -- work

    async def generate(self, job: Job) -> AsyncGenerator[Output, None]:
        self._check(job.token_ids, self._max_model_len - 1)
        seed = job.sampling.seed if job.sampling.seed is not None else secrets.randbits(63)
        sampler = Sampler(self._shape, job.sampling, seed)
        sequence = TokenSequence(job.request_id, list(job.token_ids), job.sampling, sampler, job.cache_salt)
        remote = job.remote
        if remote is not None:
            sequence.fetch = lambda cached: self._worth_asking(sequence, cached, remote)
        clock = asyncio.get_running_loop().time
        arrived, last, external = clock(), 0.0, 0
        with self._enrolled(sequence) as inbox:
            while True:
                item = await inbox.take()
                if item is None:
                    assert remote is not None, "only a sequence that can ask is told to"
                    external = await self._fetch(sequence, remote)
                    continue
                now = clock()
                if last:
                    self._metrics.inter_token_latency.observe((now - last) / len(item.token_ids))
                else:
                    self._metrics.time_to_first_token.observe(now - arrived)
                    self._count_prompt(sequence, external)
                last = now
                if item.finish:
                    self._speeds.answers.ended(sequence.generated)
                yield item
                if item.finish:
                    return

    async def prefill(self, job: PrefillJob) -> Prefilled:
        end = job.target.first_token + job.target.tokens
        if end > len(job.token_ids):
            raise PrefillFailed("mismatch", f"the target ends after {end} tokens, the prompt before")
        if job.only_held:
            self._require_held(job)
        try:
            self._check(job.token_ids, self._max_model_len)
            sequence = TokenSequence(job.request_id, list(job.token_ids), _PROMPT_ONLY, None, job.cache_salt)
            async with asyncio.timeout(job.timeout_s):
                with self._enrolled(sequence) as inbox:
                    await inbox.take()
                    self._count_prompt(sequence, 0)
                    blocks, started = job.target.num_blocks, time.time_ns()
                    with self._held("push", blocks):
                        await asyncio.sleep(self._pace.transfer_s(blocks))
                    size = blocks * job.target.layout.block_bytes
                    moved = TransferReport(size, blocks, 1, BACKEND, started, time.time_ns())
                    return Prefilled(sequence.cached or 0, moved)
        except TimeoutError:
            raise PrefillFailed("deadline", f"not done within {job.timeout_s:.3g} s") from None
        except RequestError as error:
            raise PrefillFailed("refused", str(error)) from error
        except WorkerError as error:
            raise PrefillFailed("engine", str(error)) from error

    def _require_held(self, job: PrefillJob) -> None:
        """Raises PrefillFailed where a block would have to be computed, or waited for."""
        if self._scheduler.waiting and not job.leaving:
            raise PrefillFailed("busy")
        most = (len(job.token_ids) - 1) // self._block_size  # the last token is computed in any case
        hashes = block_hashes(job.token_ids, self._block_size, job.cache_salt)[:most]
        held = len(self._pool.match(hashes))
        if held < most:
            raise PrefillFailed("not held", f"{held} of {most} blocks are here")

    def meet(self, incarnation: str, agents: tuple[bytes, ...]) -> None:
        """Nothing is ever connected here."""

    def peer_gone(self, incarnation: str) -> None:
        """Nothing is ever written here, so nothing is quarantined."""

    async def kv_events(self) -> AsyncGenerator[tuple[KvEvent, ...], None]:
        clock, handed_at = asyncio.get_running_loop().time, float("-inf")
        while True:
            events = await self._events.get()
            if (left_s := handed_at + EVENTS_S - clock()) > 0:
                await asyncio.sleep(left_s)
            while not self._events.empty():
                events += self._events.get_nowait()
            handed_at = clock()
            yield self._ledger.fold(events)

    def snapshot(self) -> dict[Tier, tuple[int, ...]]:
        return self._ledger.snapshot()

    def load(self) -> EngineLoad:
        return EngineLoad(
            self._scheduler.running,
            self._scheduler.waiting,
            self._pool.pinned,
            self._pool.size,
            dict(self._holds),
            tiers=self._tiers.load() if self._tiers is not None else (),
            queued_tokens=self._scheduler.queued_tokens,
            rates=self._speeds.rates(),
        )

    async def kv_admin(self, ask: KvAsk) -> KvTold:
        return await self._admin.answer(ask)

    # -- sequences

    @contextmanager
    def _enrolled(self, sequence: Sequence) -> Iterator[Inbox]:
        """The scheduler has the sequence while the body runs; at its end, however it comes, the blocks are free."""
        if self._tiers is not None:
            self._tiers.used(sequence.hashes(self._block_size))
        inbox = Inbox()
        self._inboxes[sequence] = inbox
        self._scheduler.add(sequence)
        self._work.set()
        try:
            yield inbox
        finally:
            del self._inboxes[sequence]
            self._scheduler.remove(sequence)
            self._work.set()

    def _check(self, token_ids: list[int], limit: int) -> None:
        if self._dead.is_set():
            raise WorkerLost(self._spec.name, self._reason)
        if not token_ids:
            raise RequestError("the prompt is empty", "prompt")
        if len(token_ids) > limit:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens; at most {limit} fit", "prompt", "context_length_exceeded"
            )
        try:
            ids = np.frombuffer(array("q", token_ids), dtype=np.int64)
            known = ids.min() >= 0 and ids.max() < self._shape.vocab_size
        except OverflowError:
            known = False
        if not known:
            raise RequestError(f"token ids must be from 0 to {self._shape.vocab_size - 1}", "prompt")

    def _count_prompt(self, sequence: Sequence, external: int) -> None:
        cached = sequence.cached or 0
        source = self._metrics.prompt_source
        source["local_cache_hit"].inc(cached)
        source["external_kv_transfer"].inc(external)
        source["local_compute"].inc(sequence.prompt_len - cached - external)

    # -- remote prefill

    def _worth_asking(self, sequence: Sequence, cached: int, remote: RemotePrefill) -> bool:
        if not sequence.fetch_end:
            sequence.fetch_end = remote.plan(cached)
        if not remote.more:
            return False
        if sequence.fetch_end - cached < self._spec.config.kv_transfer.min_remote_tokens:
            remote.skipped("prefix hit" if cached else "short")
            return False
        return True

    async def _fetch(self, sequence: TokenSequence, remote: RemotePrefill) -> int:
        """Have the prompt, or its prefix, from elsewhere; returns the tokens received, none when that failed."""
        cached, end = sequence.cached or 0, sequence.fetch_end
        first = cached // self._block_size
        blocks = -(-end // self._block_size) - first
        size, start = blocks * self._layout.block_bytes, first * self._block_size
        with self._held("receive", blocks):
            while remote.more:
                attempt, tokens = secrets.randbits(64), end - start
                target = PushTarget(attempt, self._incarnation, self._layout, start, tokens, ())
                try:
                    await remote.ask(target)
                except PrefillFailed as error:
                    log.info("%s: %s", sequence.request_id, error)
                    continue
                ended = time.time_ns()
                started = ended - int(self._pace.transfer_s(blocks) * 1e9)
                remote.transferred(TransferReport(size, blocks, 1, BACKEND, started, ended))
                received = min(end, sequence.prompt_len - 1)
                self._resume(sequence, received)
                return received - cached
        self._resume(sequence, cached)
        return 0

    def _onboarded(self, sequence: Sequence, blocks: int) -> None:
        self._scheduler.onboarded(sequence, blocks)
        self._work.set()

    def _resume(self, sequence: Sequence, computed: int) -> None:
        self._scheduler.fetched(sequence, computed)
        self._work.set()

    @contextmanager
    def _held(self, reason: str, blocks: int) -> Iterator[None]:
        self._holds[reason] = self._holds.get(reason, 0) + blocks
        try:
            yield
        finally:
            self._holds[reason] -= blocks

    # -- the loop

    async def _guarded(self) -> None:
        try:
            await self._run()
        except Exception as error:
            log.exception("the simulated engine's loop failed")
            self.fail(f"the engine's loop failed: {error!r}")

    async def _run(self) -> None:
        self._pace.idle()
        while True:
            self._work.clear()
            step = self._scheduler.plan()
            for sequence in step.fetches:
                self._inboxes[sequence].put(None)
            if self._tiers is not None:
                for sequence, hashes in step.onboards:
                    self._tiers.read(hashes, partial(self._onboarded, sequence))
            if step.tokens:
                times = await self._compute(step)
                for sequence, output in self._scheduler.finish(step, times):
                    self._inboxes[sequence].put(output)
            self._publish(step)
            if not step.tokens and not step.preempted:
                await self._work.wait()
                self._pace.idle()

    async def _compute(self, step: Step) -> int:
        """Take the step's time; returns how many steps like it this was."""
        work = step.work
        if not work.tokens:
            self._speeds.steps.took(work.decodes, self._pace.times.once(work))
        if step.repeats > 1:
            return await self._pace.steps(work, step.repeats, self._work)
        seconds = self._pace.times.once(work)
        await self._pace.step(seconds)
        self.cost.computed(work.tokens, seconds)
        if self._tiers is not None:
            self._tiers.cost.computed(work.tokens, seconds)
        return 1

    def _publish(self, step: Step) -> None:
        events = self._pool.events()
        if events:
            self._events.put_nowait(events)
        self._metrics.preemptions.inc(step.preempted)
