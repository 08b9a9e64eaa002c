"""The scheduler's half of the connector: decides what is asked of a remote prefill, and what a step pushes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from dynamo_lite.plane.wire import PushTarget
from workers.connector.first_token import FirstTokens, go_on_with
from workers.connector.offload_plan import OffloadPlans
from workers.connector.protocol import (
    FIRST,
    ONBOARD,
    PREPARED,
    PULL,
    PUSH,
    REMOTE,
    REQUEST_ID,
    FirstToken,
    Offloaded,
    OnboardPlan,
    PushStep,
    ReceivePlan,
    Report,
    Skipped,
    SlotsWanted,
    StepPlan,
    new_transfer_id,
)
from workers.transfer.span import Span

if TYPE_CHECKING:  # importing vLLM takes seconds, and its scheduler hands us these anyway
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


@dataclass(slots=True)
class PushProgress:
    """A prompt being computed here for a decode worker."""

    request_id: str
    target: PushTarget
    block_ids: list[int] = field(default_factory=list)
    handed_over: int = 0  # tokens of the prompt given to the mover


class SchedulerSide:
    """One per engine, in the EngineCore; called by vLLM's scheduler, never concurrently."""

    def __init__(
        self, block_size: int, min_remote_tokens: int, report: Callable[[Report], None],
        offloads: OffloadPlans | None = None,
    ) -> None:  # fmt: skip
        """`report` may be called at any time. `offloads`: with a host tier."""
        self._offloads = offloads
        self._block_size = block_size
        self._min_remote_tokens = min_remote_tokens
        self._report = report
        self._plan = StepPlan()
        self._decided: set[str] = set()  # decode requests whose prompt has been dealt with: never asked twice
        self._computed: dict[str, int] = {}  # tokens found on the device, of requests not yet decided
        self._receiving: dict[str, Request] = {}
        self._onboarding: set[str] = set()
        self._first_tokens = FirstTokens()
        self._pushes: dict[str, PushProgress] = {}

    # ---- decode ----

    def external_tokens(self, request: Request, computed: int) -> int:
        """Tokens that are to come from elsewhere, `computed` being on the device already; 0 computes all here."""
        params = request.kv_transfer_params or {}
        if request.request_id in self._decided or not (params.get(REMOTE) or ONBOARD in params):
            return 0
        self._computed[request.request_id] = computed
        onboarded = max(computed, self._onboarded(params, computed))
        if params.get(REMOTE) and not self._prepared_otherwise(params, onboarded):
            missing = self._end(request) - onboarded
            if missing >= self._min_remote_tokens:
                onboarded += missing
        return onboarded - computed

    @staticmethod
    def _end(request: Request) -> int:
        """Of what is asked of others, in tokens of the prompt: behind it vLLM computes."""
        end: int = (request.kv_transfer_params or {}).get(PULL, request.num_prompt_tokens)
        return end

    def _onboarded(self, params: dict[str, Any], computed: int) -> int:
        """Tokens of the prompt that are there once the tiers were read; 0 where they do not help.

        The worker process looked before vLLM did: what has left the device since leaves a gap that nobody pinned.
        """
        pinned: tuple[int, list[int]] = params.get(ONBOARD, (0, []))
        first, slots = pinned
        return (first + len(slots)) * self._block_size if first * self._block_size <= computed else 0

    def _prepared_otherwise(self, params: dict[str, Any], computed: int) -> bool:
        """A prefill worker was asked already, for other tokens than are missing: blocks came, or went, meanwhile."""
        return PREPARED in params and params[PREPARED][1] * self._block_size != computed

    def allocated(self, request: Request, blocks: KVCacheBlocks, external: int) -> None:
        """vLLM has allocated the request's blocks; `external` tokens of them are to be received."""
        params = request.kv_transfer_params or {}
        if request.request_id in self._decided or not (params.get(REMOTE) or ONBOARD in params):
            return
        self._decided.add(request.request_id)
        computed = self._computed.pop(request.request_id, 0)
        block_ids = blocks.get_block_ids()[0] if external else []
        onboarded = min(computed + external, max(computed, self._onboarded(params, computed)))
        if onboarded > computed:
            self._onboard(request, params, block_ids, computed, onboarded)
        if params.get(REMOTE):
            self._receive(request, params, block_ids, onboarded, computed + external - onboarded)

    def _onboard(
        self, request: Request, params: dict[str, Any], block_ids: list[int], computed: int, onboarded: int
    ) -> None:
        """Have the blocks between these two counts of tokens read from the host tier."""
        first, slots = params[ONBOARD]
        start, end = computed // self._block_size, onboarded // self._block_size
        self._onboarding.add(request.request_id)
        self._plan.onboards.append(
            OnboardPlan(
                request.request_id, params[REQUEST_ID], start - first, list(block_ids[start:end]),
                list(slots[start - first : end - first]),
            )
        )  # fmt: skip

    def _receive(
        self, request: Request, params: dict[str, Any], block_ids: list[int], computed: int, external: int
    ) -> None:
        """Have the `external` tokens that follow the `computed` ones received from another worker."""
        if not external:
            changed = self._prepared_otherwise(params, computed)
            reason = "prefix changed" if changed else "prefix hit" if computed else "short"
            self._report(Skipped(params[REQUEST_ID], reason))
            return
        end = self._end(request)
        first, last = (end - external) // self._block_size, -(-end // self._block_size)
        self._receiving[request.request_id] = request
        if params.get(FIRST):
            self._first_tokens.expect(params[REQUEST_ID])
        transfer_id = params[PREPARED][0] if PREPARED in params else new_transfer_id()
        self._plan.receives.append(
            ReceivePlan(
                request.request_id, params[REQUEST_ID], list(block_ids[first:last]), first,
                end - first * self._block_size, transfer_id,
                first_token=bool(params.get(FIRST)),
            )
        )  # fmt: skip

    def first_token(self, told: FirstToken) -> None:
        """From any thread."""
        self._first_tokens.told(told)

    def received(self, engine_ids: Iterable[str]) -> None:
        """These receives have ended: vLLM is about to schedule their requests."""
        for engine_id in engine_ids:
            self._onboarding.discard(engine_id)
            request = self._receiving.pop(engine_id, None)
            if request is not None:
                token_id = self._first_tokens.take(request.kv_transfer_params[REQUEST_ID])
                if token_id is not None:
                    go_on_with(request, token_id)

    # ---- prefill ----

    def arrived(self, request: Request) -> None:
        """vLLM considers the request for scheduling, perhaps not for the first time."""
        if self._offloads is not None and (wanted := self._offloads.arrived(request)):
            self._report(SlotsWanted(wanted))
        packed = (request.kv_transfer_params or {}).get(PUSH)
        if packed is not None and request.request_id not in self._pushes and not request.num_preemptions:
            target = msgspec.msgpack.decode(packed, type=PushTarget)
            request_id = request.kv_transfer_params[REQUEST_ID]
            self._pushes[request.request_id] = PushProgress(request_id, target)

    def _step(self, engine_id: str, computed: int) -> None:
        """Hand over what fills blocks of the decode worker's once `computed` tokens are there, and is wanted."""
        push = self._pushes[engine_id]
        end = push.target.first_token + push.target.tokens
        ready = min(computed, end)
        size = push.target.layout.block_size
        if ready < end:
            ready -= ready % size  # its last, partial block goes with the last token
        start = max(push.handed_over, push.target.first_token)
        if ready > start:
            first, skipped = divmod(start, self._block_size)
            blocks = push.block_ids[first : -(-ready // self._block_size)]
            span = Span(np.array(blocks, dtype=np.int64), self._block_size, skipped, ready - start)
            index = (start - push.target.first_token) // size
            self._plan.pushes.append(PushStep(engine_id, push.request_id, push.target, span, index))
            push.handed_over = ready

    # ---- every step ----

    def plan(self, output: SchedulerOutput) -> StepPlan:
        """What the workers are to do beside this step."""
        self._drop_preempted(output.preempted_req_ids or set())
        for new in output.scheduled_new_reqs:
            computed = new.num_computed_tokens + output.num_scheduled_tokens[new.req_id]
            self._scheduled(new.req_id, list(new.block_ids[0]), True, computed)
        cached = output.scheduled_cached_reqs
        for index, engine_id in enumerate(cached.req_ids):
            fresh = cached.new_block_ids[index]
            computed = cached.num_computed_tokens[index] + output.num_scheduled_tokens[engine_id]
            resumed = engine_id in cached.resumed_req_ids
            self._scheduled(engine_id, list(fresh[0]) if fresh is not None else [], resumed, computed)
        plan, self._plan = self._plan, StepPlan()
        plan.idle = output.total_num_scheduled_tokens == 0
        return plan

    def _scheduled(self, engine_id: str, fresh: list[int], resumed: bool, computed: int) -> None:
        """This step computes the request up to `computed` tokens, and gives it blocks; `resumed`: these are all."""
        push = self._pushes.get(engine_id)
        if push is not None:
            if resumed:
                push.block_ids.clear()
            push.block_ids.extend(fresh)
            self._step(engine_id, computed)
        if self._offloads is not None:
            offload = self._offloads.step(engine_id, fresh, resumed, computed)
            if offload is not None:
                self._plan.offloads.append(offload)

    def _offload_finished(self, offloads: OffloadPlans, engine_id: str) -> bool:
        copied = offloads.finished(engine_id)
        if offloads.missed:
            self._report(Offloaded(-1, missed=offloads.missed))
            offloads.missed = 0
        return copied

    def _drop_preempted(self, preempted: set[str]) -> None:
        """A preempted prompt's blocks are given away: its push fails, and the decode worker turns elsewhere."""
        for engine_id in preempted & self._pushes.keys():
            if self._pushes[engine_id].handed_over:  # else it simply starts again
                del self._pushes[engine_id]
                self._plan.preempted_pushes.append(engine_id)
        if self._offloads is not None:
            self._plan.preempted_offloads += filter(self._offloads.preempted, preempted)

    def finished(self, request: Request) -> bool:
        """vLLM is done with the request; True when its blocks must stay until the mover reports them sent."""
        engine_id = request.request_id
        self._decided.discard(engine_id)
        self._computed.pop(engine_id, None)
        if self._receiving.pop(engine_id, None) is not None:
            self._plan.cancelled_receives.append(engine_id)
            self._first_tokens.forget(request.kv_transfer_params[REQUEST_ID])
        elif engine_id in self._onboarding:
            self._plan.cancelled_receives.append(engine_id)
        self._onboarding.discard(engine_id)
        copied = self._offloads is not None and self._offload_finished(self._offloads, engine_id)
        push = self._pushes.pop(engine_id, None)
        if push is None or not push.handed_over:
            return copied
        if push.handed_over < push.target.first_token + push.target.tokens:
            self._plan.cancelled_pushes.append(engine_id)
        return True
