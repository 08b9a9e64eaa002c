"""The engine around vLLM's AsyncLLM: this process talks to it; an EngineCore process computes and moves KV.

`prepare` builds it before any thread or event loop exists: on CPU the EngineCore is forked from a process that has
vLLM imported already, which is ready in 3–5 s where a fresh process needs 20–44 s.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, suppress
from typing import Any

import msgspec
import vllm
from vllm.inputs.engine import tokens_input
from vllm.outputs import RequestOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from dynamo_lite.config import ProcessSpec, WorkerGroup
from dynamo_lite.errors import PrefillFailed, RequestError, StartError, WorkerLost
from dynamo_lite.plane.kv_wire import KvAsk, KvTold
from dynamo_lite.plane.wire import Fingerprint, Incarnation, Rates, Role, Sampling
from dynamo_lite.tasks import background, scope
from kvbm.errors import TierRefused
from kvbm.events import KvEvent, Tier
from kvbm.policy import PullCost
from workers.connector.channel import WorkerEnd
from workers.connector.protocol import (
    FIRST,
    PREPARED,
    PULL,
    PUSH,
    REMOTE,
    REQUEST_ID,
    Alive,
    Hello,
    Holds,
    Meet,
    Offloaded,
    Onboarded,
    PeerGone,
    Peers,
    Prepare,
    Probe,
    PushEnded,
    ReceiveEnded,
    ReceiveOpened,
    ReceivePlanned,
    Report,
    Skipped,
    SlotsWanted,
    new_transfer_id,
)
from workers.engine import EngineInfo, EngineLoad, Job, Output, Prefilled, PrefillJob
from workers.first_token import may_be_chosen_elsewhere, results_after
from workers.kv_feed import KvFeed
from workers.pulse import Pulse
from workers.pushes import Pushes
from workers.rank_reports import RankReports
from workers.rates import Answers, Queue, Speeds
from workers.receives import Receive, Receives
from workers.resumed import carried
from workers.tiers.admin import KvAdmin
from workers.tiers.onboarding import Onboarding
from workers.tiers.place import place_of
from workers.tiers.tiers import Tiers
from workers.vllm_arguments import arguments
from workers.vllm_stats import EngineStats, stat_logger
from workers.vllm_values import output, sampling_params

log = logging.getLogger(__name__)

_HELLO_TIMEOUT_S = 30.0
_FROZEN_PATIENCE = 10  # times the transfer's timeout, until a silent engine is ended and started again
_DEATH_POLL_S = 0.2


class VllmEngine:
    """See `workers.engine.Engine`."""

    def __init__(self, spec: ProcessSpec, role: Role, incarnation: Incarnation) -> None:
        self._spec, self._role, self._incarnation = spec, role, incarnation
        group = getattr(spec.config.workers, role.value)
        assert isinstance(group, WorkerGroup)
        self._workers = group
        self._ranks = group.tensor_parallel
        self._timeout_s = spec.config.kv_transfer.timeout_ms / 1000
        self._channel = WorkerEnd()
        self._stats = EngineStats()
        self._hellos: dict[int, Hello] = {}
        self._hello = asyncio.Event()
        self._ranks_say = RankReports()
        self._stack = AsyncExitStack()
        self._llm: AsyncLLM | None = None
        self._feed: KvFeed | None = None
        self._receives: Receives | None = None
        self._pulse = Pulse(range(-1, self._ranks), lambda: self._channel.command(Probe()), self._timeout_s)
        self._pushes = Pushes(self._ranks, self._channel.command, self._pulse, self._timeout_s)
        self.cost = PullCost()
        self._stats.prefilled = self._computed
        self._queue, self._answers = Queue(), Answers()
        self._speeds: Speeds | None = None
        self._blocks = self._block_bytes = 0
        self._tiers: Tiers | None = None
        self._admin: KvAdmin | None = None
        self._arena = ""

    # ---- life ----

    def prepare(self) -> None:
        """Load the model in an EngineCore process; blocks until it is ready. Raises StartError."""
        try:
            if self._spec.config.kv_tiers.host is not None:
                self._tiers = Tiers(self._spec.config.kv_tiers)
                self._arena = self._tiers.memory.path
            config = arguments(
                self._spec, self._role, self._workers, self._incarnation, self._channel, self._arena
            ).create_engine_config()
            if vllm.platforms.current_platform.is_cpu():
                # After create_engine_config, which insists on spawn.
                os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
            self._llm = AsyncLLM.from_vllm_config(config, stat_loggers=[stat_logger(self._stats)])
        except (RuntimeError, ValueError, OSError) as error:
            raise StartError(self._spec.name, f"vLLM did not start: {error}") from error
        self._config = config

    async def start(self) -> EngineInfo:
        """Meet the connectors. Raises StartError when one of them did not come up."""
        await self._channel.serve(self._report)
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                while len(self._hellos) < self._ranks + 1:
                    await self._hello.wait()
                    self._hello.clear()
        except TimeoutError:
            raise StartError(self._spec.name, "the transfer engine did not come up") from None
        await self._stack.enter_async_context(background(self._pulse.watch()))
        group = await self._stack.enter_async_context(asyncio.TaskGroup())
        hello = self._hellos[0]
        self._blocks = hello.kv_blocks
        fingerprint = self._fingerprint(hello)
        layout = fingerprint.layout
        self._receives = Receives(self._incarnation, layout, self._channel.command, self._timeout_s, group)
        self._feed = KvFeed(self._channel.endpoint("events"), self._channel.endpoint("replay"))
        if self._tiers is not None:
            await self._start_tiers(self._tiers, fingerprint, self._feed)
        self._admin = KvAdmin(self.load, self._feed.snapshot, self._tiers)
        self._block_bytes = fingerprint.block_bytes * self._ranks
        onboarding = self._tiers.cost if self._tiers is not None else None
        self._speeds = Speeds(self.cost, fingerprint.block_size, self._block_bytes, onboarding, answers=self._answers)
        self._stats.stepped = self._speeds.steps.took
        return EngineInfo(
            fingerprint,
            hello.kv_blocks,
            self._config.model_config.max_model_len,
            self._workers.max_num_seqs,
            tuple(self._hellos[rank].agent for rank in range(self._ranks)),
        )

    async def _start_tiers(self, tiers: Tiers, fingerprint: Fingerprint, feed: KvFeed) -> None:
        group = await self._stack.enter_async_context(scope())  # its end waits for reads, also of a dead volume
        try:
            place = place_of(self._spec.config.namespace, self._spec.name, fingerprint, self._spec.model_path)
            await tiers.start(fingerprint, place, self._channel.command, group)
        except (ValueError, OSError, TierRefused) as error:
            raise StartError(self._spec.name, str(error)) from error
        await self._stack.enter_async_context(background(tiers.forward(feed.events()), *tiers.loops()))

    def _fingerprint(self, hello: Hello) -> Fingerprint:
        assert hello.layout is not None, "a rank's connector says how its KV lies"
        config = self._spec.config
        return Fingerprint(config.model, config.revision or "", "vllm", hello.device, hello.layout)

    async def failed(self) -> str:
        frozen = False
        while not self._engine.errored:  # vLLM offers a flag, no event
            await asyncio.sleep(_DEATH_POLL_S)
            if not frozen and self._pulse.silence_s > _FROZEN_PATIENCE * self._timeout_s:
                frozen = True
                self._kill()
        return f"vLLM's EngineCore process {'stood still and was ended' if frozen else 'died'}"

    def _kill(self) -> None:
        """End processes that are frozen, before anybody is told that we are gone: awake again, they could write."""
        for hello in self._hellos.values():
            log.error("process %d has been silent for %.0f s and is ended", hello.pid, self._pulse.silence_s)
            with suppress(ProcessLookupError):
                os.kill(hello.pid, signal.SIGKILL)

    async def answering(self) -> None:
        await self._pulse.answering()

    def silent_s(self) -> float:
        return self._pulse.silence_s

    async def close(self) -> None:
        if self._llm is not None:
            if self._llm.output_handler is not None:
                self._llm.output_handler.cancel()  # first, or it reports the end of the engine as a failure
            await asyncio.to_thread(self._llm.shutdown)
        if self._tiers is not None:
            await self._tiers.flush()
        await self._stack.aclose()
        if self._feed is not None:
            self._feed.close()
        if self._tiers is not None:
            await self._tiers.close()
        self._channel.close()

    def _computed(self, tokens: int, seconds: float) -> None:
        """What a prompt has taken."""
        self.cost.computed(tokens, seconds)
        if self._tiers is not None:
            self._tiers.cost.computed(tokens, seconds)

    @property
    def _engine(self) -> AsyncLLM:
        assert self._llm is not None, "the engine was not prepared"
        return self._llm

    # ---- reports of the connectors ----

    def _report(self, report: Report) -> None:
        match report:
            case Hello():
                self._hellos[report.rank] = report
                self._hello.set()
            case Alive():
                self._pulse.alive(report.rank)
            case Holds() | Peers():
                self._ranks_say.take(report)
            case Offloaded() | SlotsWanted() | Onboarded():
                assert self._tiers is not None, "without tiers nothing is offloaded"
                self._tiers.handle(report)
            case PushEnded():
                self._pushes.handle(report)
            case Skipped() | ReceivePlanned() | ReceiveOpened() | ReceiveEnded():
                assert self._receives is not None, "a receive was opened before the engine was started"
                self._receives.handle(report)

    # ---- decode ----

    async def generate(self, job: Job) -> AsyncGenerator[Output, None]:
        params: dict[str, Any] = {}
        try:
            # Refused before anything is pinned or prepared.
            sampling = sampling_params(carried(job.sampling, job.history), params)
        except ValueError as error:
            raise RequestError(str(error)) from error
        onboarding = self._onboard(job, job.trace_headers.get("traceparent", ""))
        if onboarding is not None:
            params |= onboarding.params
        receive, more = self._expect(job, onboarding)
        params |= more
        stream = self._engine.generate(
            tokens_input(job.token_ids, cache_salt=job.cache_salt),
            sampling,
            job.request_id,
            trace_headers=job.trace_headers or None,
        )
        first, generated = True, 0
        results = results_after(stream, receive.first_token if receive is not None else None)
        try:
            async for result in results:
                cached = None
                if first:
                    cached, first = self._cached_tokens(receive, result), False
                    self._queue.done(job.request_id)
                if isinstance(result, int):
                    stopped = result in job.sampling.stop_token_ids
                    yield Output([result], None, "stop" if stopped else None, result if stopped else None, cached)
                    if stopped:
                        break
                else:
                    self._onboarded(job.request_id)  # the engine's own word: a prefill worker's token may come before
                    told = output(result, cached)
                    generated += len(told.token_ids)
                    yield told
            self._answers.ended(generated)
        except EngineDeadError as error:
            raise WorkerLost(self._spec.name, "its engine died") from error
        except ValueError as error:
            raise RequestError(str(error)) from error
        finally:
            try:
                await results.aclose()
                await stream.aclose()
            finally:  # also when the request is cancelled once more meanwhile
                self._over(job.request_id)

    def _over(self, request_id: str) -> None:
        """A request has ended: nothing is held for it any more."""
        self._queue.done(request_id)
        self._onboarded(request_id)
        if self._receives is not None:
            self._receives.release(request_id)

    def _cached_tokens(self, receive: Receive | None, result: RequestOutput | int) -> int | None:
        """Of the prompt, not counting those that a prefill worker was asked for: vLLM takes these for cached, too."""
        if receive is not None and receive.local_blocks is not None:
            block_size: int = self._config.cache_config.block_size
            return receive.local_blocks * block_size
        if not isinstance(result, RequestOutput):
            return None
        cached: int = result.num_cached_tokens or 0
        return cached

    def _onboard(self, job: Job | PrefillJob, traceparent: str = "") -> Onboarding | None:
        """What of the prompt the engine is to read from the tiers. `_onboarded` must follow."""
        if self._tiers is None:
            return None
        return self._tiers.onboard(job.request_id, job.token_ids, job.cache_salt, self._local_blocks(job), traceparent)

    def _onboarded(self, request_id: str) -> None:
        if self._tiers is not None:
            self._tiers.release(request_id)

    def _local_blocks(self, job: Job | PrefillJob) -> int:
        """Of the prompt, on the device as far as is known here."""
        assert self._feed is not None
        return self._feed.local_blocks(job.token_ids, self._config.cache_config.block_size, job.cache_salt)

    def _expect(self, job: Job, onboarding: Onboarding | None) -> tuple[Receive | None, dict[str, Any]]:
        """A receive for the job, unless nobody can be asked, and what the connector is to know of it."""
        assert self._receives is not None
        remote, here, end = job.remote, 0, 0
        if remote is not None:
            here = self._local_blocks(job) if onboarding is None else onboarding.end
            end = remote.plan(here * self._config.cache_config.block_size)
        if remote is None or not remote.more:
            self._queue.add(job.request_id, len(job.token_ids) - job.held_tokens)
            return None, {}
        room = len(job.token_ids) + 1 < self._config.model_config.max_model_len  # for a second token
        pulled = end < len(job.token_ids)
        early = job.alone and room and not pulled and may_be_chosen_elsewhere(job.sampling)
        prepare = self._prepare(job, here, end)
        receive = self._receives.expect(job.request_id, remote, first_token=early, prepare=prepare)
        params: dict[str, Any] = {REQUEST_ID: job.request_id, REMOTE: True, FIRST: early}
        if pulled:
            params[PULL] = end
        if prepare is not None:
            params[PREPARED] = (prepare.transfer_id, prepare.first_block)
        return receive, params

    def _prepare(self, job: Job, here: int, end: int) -> Prepare | None:
        """What another worker is to be asked for before the engine plans the prompt, a step or two from now.

        `here`: blocks of the prompt that need not be. `end`: in tokens of it. None where the engine will not plan it
        then, for want of room, or where there is too little to ask for.
        """
        assert self._receives is not None
        least = self._spec.config.kv_transfer.min_remote_tokens
        stats, size = self._stats, self._config.cache_config.block_size
        tokens = end - here * size
        if tokens < least:
            return None
        ahead = self._receives.unplanned
        room = not stats.waiting and stats.running + ahead < self._workers.max_num_seqs
        needed = (ahead + 1) * -(-len(job.token_ids) // size)  # as if those before it were as long
        if not room or needed > (1 - stats.kv_usage) * self._blocks:
            return None
        return Prepare(job.request_id, new_transfer_id(), here, tokens)

    # ---- prefill ----

    async def prefill(self, job: PrefillJob) -> Prefilled:
        if (
            job.only_held
            and not job.leaving
            and (self._stats.waiting or self._stats.running >= self._workers.max_num_seqs)
        ):
            raise PrefillFailed("busy")  # before anything is read for it
        onboarding = self._onboard(job)
        try:
            held = self._local_blocks(job) if onboarding is None else onboarding.end
            if job.only_held:
                self._require_held(job, held)
            self._queue.add(job.request_id, len(job.token_ids) - held * self._config.cache_config.block_size)
            return await self._push(job, onboarding)
        except TimeoutError as error:
            raise PrefillFailed("deadline") from error
        except EngineDeadError as error:
            raise PrefillFailed("engine_died") from error
        except ValueError as error:
            raise PrefillFailed("refused", str(error)) from error
        finally:
            self._queue.done(job.request_id)
            self._onboarded(job.request_id)

    def _require_held(self, job: PrefillJob, held: int) -> None:
        """Raises PrefillFailed where a block would have to be computed."""
        most = (len(job.token_ids) - 1) // self._config.cache_config.block_size  # as at least a token is computed
        if held < most:
            raise PrefillFailed("not held", f"{held} of {most} blocks are here")

    async def _push(self, job: PrefillJob, onboarding: Onboarding | None) -> Prefilled:
        cached, first_token = 0, None
        sampling = msgspec.structs.replace(job.sampling or Sampling(1, 0.0), max_tokens=1, seed=None)
        params = {REQUEST_ID: job.request_id, PUSH: msgspec.msgpack.encode(job.target)}
        if onboarding is not None:
            params |= onboarding.params
        with self._pushes.expected(job.request_id) as push:
            try:
                async with asyncio.timeout(job.timeout_s), self._pulse.required():
                    async for result in self._engine.generate(
                        tokens_input(job.token_ids, cache_salt=job.cache_salt),
                        sampling_params(sampling, params),
                        job.request_id,
                    ):
                        self._queue.done(job.request_id)
                        self._onboarded(job.request_id)
                        cached = result.num_cached_tokens or 0
                        if job.first_token is not None and result.outputs[0].token_ids:
                            first_token = result.outputs[0].token_ids[0]
                            job.first_token(first_token)
                    await self._pushes.ended(push)
            finally:
                if not self._engine.errored:  # else its processes, which did the writing, are gone
                    await self._pushes.stop(push)
            return Prefilled(cached, push.report(job.target.num_blocks), first_token)

    def meet(self, incarnation: str, agents: tuple[bytes, ...]) -> None:
        self._channel.command(Meet(incarnation, agents))

    def peer_gone(self, incarnation: str) -> None:
        self._channel.command(PeerGone(incarnation))

    # ---- state ----

    async def kv_events(self) -> AsyncIterator[tuple[KvEvent, ...]]:
        assert self._feed is not None
        async for events in self._feed.events() if self._tiers is None else self._tiers.events():
            yield events

    def snapshot(self) -> dict[Tier, tuple[int, ...]]:
        assert self._feed is not None
        return self._feed.snapshot() | (self._tiers.snapshot() if self._tiers is not None else {})

    def load(self) -> EngineLoad:
        held = self._ranks_say.held
        stats = self._stats
        used = round(stats.kv_usage * self._blocks)
        held_bytes = sum(held.values()) * self._block_bytes
        return EngineLoad(
            stats.running, stats.waiting, used, self._blocks, held, held_bytes, self._ranks_say.staged,
            self._ranks_say.peers,
            self._tiers.load() if self._tiers is not None else (), self._queue.tokens,
            self._speeds.rates() if self._speeds is not None else Rates(),
        )  # fmt: skip

    async def kv_admin(self, ask: KvAsk) -> KvTold:
        assert self._admin is not None, "the engine was not started"
        return await self._admin.answer(ask)
