"""vLLM's scheduler, as far as the connector's half in it can tell."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import msgspec

from dynamo_lite.plane.wire import PushTarget
from workers.connector.offload_plan import OffloadPlans
from workers.connector.protocol import PUSH, REMOTE, REQUEST_ID, PushStep, Report, StepPlan
from workers.connector.scheduler import SchedulerSide

IDLE: Any = SimpleNamespace(
    scheduled_new_reqs=[], num_scheduled_tokens={}, preempted_req_ids=set(), total_num_scheduled_tokens=0,
    scheduled_cached_reqs=SimpleNamespace(req_ids=[]),
)  # fmt: skip


@dataclass
class Engine:
    """With one prompt, which is to be pushed to `target`, or received when there is none."""

    block_size: int
    prompt_tokens: int
    target: PushTarget | None = None
    blocks: list[int] = field(default_factory=list)  # of the prompt; from 100 on if not given
    reports: list[Report] = field(default_factory=list)
    offloads: OffloadPlans | None = None  # with a host tier

    def __post_init__(self) -> None:
        self.side = SchedulerSide(self.block_size, 1, self.reports.append, self.offloads)
        params: dict[str, Any] = {REQUEST_ID: "r"}
        if self.target is None:
            params[REMOTE] = True
        else:
            params[PUSH] = msgspec.msgpack.encode(self.target)
        self.request: Any = SimpleNamespace(
            request_id="e", kv_transfer_params=params, num_prompt_tokens=self.prompt_tokens, num_preemptions=0,
            num_output_tokens=0,
            block_hashes=[index.to_bytes(32, "big") for index in range(self.prompt_tokens // self.block_size)],
        )  # fmt: skip
        self.blocks = self.blocks or [100 + index for index in range(-(-self.prompt_tokens // self.block_size))]
        self.computed = 0
        self.given = 0  # blocks that the connector has been told of

    def step(self, tokens: int) -> list[PushStep]:
        """Compute so many more tokens of the prompt; what is pushed."""
        return self.planned(tokens).pushes

    def planned(self, tokens: int, preempted: frozenset[str] = frozenset()) -> StepPlan:
        """Compute so many more tokens of the prompt."""
        first = not self.given
        blocks = self.blocks[: -(-(self.computed + tokens) // self.block_size)]
        fresh, self.given = blocks[self.given :], len(blocks)
        new = [SimpleNamespace(req_id="e", block_ids=(fresh,), num_computed_tokens=self.computed)]
        cached = SimpleNamespace(
            req_ids=["e"], new_block_ids=[(fresh,) if fresh else None], num_computed_tokens=[self.computed],
            resumed_req_ids=set(),
        )  # fmt: skip
        nothing = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
        output = SimpleNamespace(
            scheduled_new_reqs=new if first else [], scheduled_cached_reqs=nothing if first else cached,
            num_scheduled_tokens={"e": tokens}, preempted_req_ids=set(preempted), total_num_scheduled_tokens=tokens,
        )  # fmt: skip
        self.computed += tokens
        return self.side.plan(cast(Any, output))
