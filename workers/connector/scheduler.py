"""The scheduler's half of the connector: decides what is asked of a remote prefill, and what a step pushes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from dynamo_lite.plane.wire import PushTarget
from workers.connector.first_token import FirstTokens, go_on_with
from workers.connector.protocol import (
    FIRST,
    PREPARED,
    PUSH,
    REMOTE,
    REQUEST_ID,
    FirstToken,
    PushStep,
    ReceivePlan,
    Report,
    Skipped,
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
    prompt_tokens: int
    block_ids: list[int] = field(default_factory=list)
    handed_over: int = 0  # tokens of the prompt given to the mover


class SchedulerSide:
    """One per engine, in the EngineCore; called by vLLM's scheduler, never concurrently."""

    def __init__(self, block_size: int, min_remote_tokens: int, report: Callable[[Report], None]) -> None:
        """`report` may be called at any time."""
        self._block_size = block_size
        self._min_remote_tokens = min_remote_tokens
        self._report = report
        self._plan = StepPlan()
        self._decided: set[str] = set()  # decode requests whose prompt has been dealt with: never asked twice
        self._computed: dict[str, int] = {}  # tokens found on the device, of requests not yet decided
        self._receiving: dict[str, Request] = {}
        self._first_tokens = FirstTokens()
        self._pushes: dict[str, PushProgress] = {}

    # ---- decode ----

    def remote_tokens(self, request: Request, computed: int) -> int:
        """Tokens to ask a prefill worker for, `computed` being on the device already; 0 computes here."""
        params = request.kv_transfer_params or {}
        if not params.get(REMOTE) or request.request_id in self._decided:
            return 0
        self._computed[request.request_id] = computed
        if self._prepared_otherwise(params, computed):
            return 0
        missing = request.num_prompt_tokens - computed
        return missing if missing >= self._min_remote_tokens else 0

    def _prepared_otherwise(self, params: dict[str, Any], computed: int) -> bool:
        """A prefill worker was asked already, for other tokens than are missing: blocks came, or went, meanwhile."""
        return PREPARED in params and params[PREPARED][1] * self._block_size != computed

    def allocated(self, request: Request, blocks: KVCacheBlocks, external: int) -> None:
        """vLLM has allocated the request's blocks; `external` tokens of them are to be received."""
        params = request.kv_transfer_params or {}
        if not params.get(REMOTE) or request.request_id in self._decided:
            return
        self._decided.add(request.request_id)
        computed = self._computed.pop(request.request_id, 0)
        if not external:
            changed = self._prepared_otherwise(params, computed)
            reason = "prefix changed" if changed else "prefix hit" if computed else "short"
            self._report(Skipped(params[REQUEST_ID], reason))
            return
        first = (request.num_prompt_tokens - external) // self._block_size
        last = -(-request.num_prompt_tokens // self._block_size)
        (block_ids,) = blocks.get_block_ids()
        self._receiving[request.request_id] = request
        if params.get(FIRST):
            self._first_tokens.expect(params[REQUEST_ID])
        transfer_id = params[PREPARED][0] if PREPARED in params else new_transfer_id()
        self._plan.receives.append(
            ReceivePlan(
                request.request_id, params[REQUEST_ID], list(block_ids[first:last]), first,
                request.num_prompt_tokens - first * self._block_size, transfer_id,
                first_token=bool(params.get(FIRST)),
            )
        )  # fmt: skip

    def first_token(self, told: FirstToken) -> None:
        """From any thread."""
        self._first_tokens.told(told)

    def received(self, engine_ids: Iterable[str]) -> None:
        """These receives have ended: vLLM is about to schedule their requests."""
        for engine_id in engine_ids:
            request = self._receiving.pop(engine_id, None)
            if request is not None:
                token_id = self._first_tokens.take(request.kv_transfer_params[REQUEST_ID])
                if token_id is not None:
                    go_on_with(request, token_id)

    # ---- prefill ----

    def arrived(self, request: Request) -> None:
        """vLLM considers the request for scheduling, perhaps not for the first time."""
        packed = (request.kv_transfer_params or {}).get(PUSH)
        if packed is not None and request.request_id not in self._pushes and not request.num_preemptions:
            target = msgspec.msgpack.decode(packed, type=PushTarget)
            request_id = request.kv_transfer_params[REQUEST_ID]
            self._pushes[request.request_id] = PushProgress(request_id, target, request.num_prompt_tokens)

    def _step(self, engine_id: str, computed: int) -> None:
        """Hand over what fills blocks of the decode worker's once `computed` tokens are there, and is wanted."""
        push = self._pushes[engine_id]
        ready = min(computed, push.prompt_tokens)
        size = push.target.layout.block_size
        if ready < push.prompt_tokens:
            ready -= ready % size  # its last, partial block goes with the prompt's last token
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
        for new in output.scheduled_new_reqs:
            if new.req_id in self._pushes:
                self._pushes[new.req_id].block_ids = list(new.block_ids[0])
                self._step(new.req_id, new.num_computed_tokens + output.num_scheduled_tokens[new.req_id])
        cached = output.scheduled_cached_reqs
        for index, engine_id in enumerate(cached.req_ids):
            if engine_id not in self._pushes:
                continue
            fresh = cached.new_block_ids[index]
            if engine_id in cached.resumed_req_ids:
                self._pushes[engine_id].block_ids.clear()
            if fresh is not None:
                self._pushes[engine_id].block_ids.extend(fresh[0])
            self._step(engine_id, cached.num_computed_tokens[index] + output.num_scheduled_tokens[engine_id])
        self._drop_preempted(output.preempted_req_ids or set())
        plan, self._plan = self._plan, StepPlan()
        plan.idle = output.total_num_scheduled_tokens == 0
        return plan

    def _drop_preempted(self, preempted: set[str]) -> None:
        """A preempted prompt's blocks are given away: its push fails, and the decode worker turns elsewhere."""
        for engine_id in preempted & self._pushes.keys():
            if self._pushes[engine_id].handed_over:  # else it simply starts again
                del self._pushes[engine_id]
                self._plan.preempted_pushes.append(engine_id)

    def finished(self, request: Request) -> bool:
        """vLLM is done with the request; True when its blocks must stay until the mover reports them sent."""
        engine_id = request.request_id
        self._decided.discard(engine_id)
        self._computed.pop(engine_id, None)
        if self._receiving.pop(engine_id, None) is not None:
            self._plan.cancelled_receives.append(engine_id)
            self._first_tokens.forget(request.kv_transfer_params[REQUEST_ID])
        push = self._pushes.pop(engine_id, None)
        if push is None or not push.handed_over:
            return False
        if push.handed_over < push.target.first_token + push.target.tokens:
            self._plan.cancelled_pushes.append(engine_id)
        return True
