"""The mover's half of onboarding: copies blocks of the host tier into those that vLLM has allocated for them.

The worker process pins the slots and checks their content meanwhile; only what it has found to be right is copied, and
the rest is handed to vLLM as invalid, which computes it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from workers.connector.arena import Arena
from workers.connector.protocol import OnboardChecked, Onboarded, OnboardPlan, Report
from workers.transfer.pack import Copy

CANCELLED = "cancelled"
CORRUPT = "corrupt"
SILENT = "silent"
_AT_ONCE = 8  # blocks between two looks at everything else
_KEPT = 4096
_PATIENCE = 10  # times the transfer's timeout, for the worker process to check what it has pinned


@dataclass(slots=True)
class _Onboarding:
    plan: OnboardPlan
    until: float  # when it is handed back unless it was checked
    copies: list[Copy] = field(default_factory=list)
    started_ns: int = 0


class Onboarder:
    """Used by the mover's thread alone."""

    def __init__(self, arena: Arena, rank: int, timeout_s: float, report: Callable[[Report], None]) -> None:
        self._arena, self._rank, self._report = arena, rank, report
        self._patience_s = timeout_s * _PATIENCE
        self._open: dict[str, _Onboarding] = {}  # by request id
        self._checked: dict[str, OnboardChecked] = {}  # by request id: the last word on what was pinned
        self._over: OrderedDict[str, None] = OrderedDict()  # request ids whose slots must not be read any more
        self.received: list[str] = []  # engine ids, for vLLM; one for each plan
        self.invalid_blocks: set[int] = set()

    def plan(self, plan: OnboardPlan) -> None:
        onboarding = _Onboarding(plan, time.monotonic() + self._patience_s)
        if plan.request_id in self._over:
            self._end(onboarding, CANCELLED)
        else:
            self._open[plan.request_id] = onboarding

    def checked(self, checked: OnboardChecked) -> None:
        if checked.request_id not in self._over:
            self._checked[checked.request_id] = checked
            if checked.request_id in self._open:
                self._open[checked.request_id].until = time.monotonic() + self._patience_s

    def cancel(self, engine_id: str) -> None:
        """The request was aborted: release its blocks now."""
        for onboarding in [one for one in self._open.values() if one.plan.engine_id == engine_id]:
            self._end(onboarding, CANCELLED)

    def over(self, request_id: str) -> None:
        """Its slots may be given to others once this is answered."""
        self._over[request_id] = None
        if len(self._over) > _KEPT:
            self._over.popitem(last=False)
        self._checked.pop(request_id, None)
        if request_id in self._open:
            self._end(self._open[request_id], CANCELLED)
        else:
            self._report(Onboarded(request_id, self._rank, CANCELLED))

    def progress(self) -> bool:
        """Copy some blocks; True when anything moved."""
        moved = [self._advance(onboarding) for onboarding in list(self._open.values())]
        return any(moved)

    def _advance(self, onboarding: _Onboarding) -> bool:
        plan = onboarding.plan
        checked = self._checked.get(plan.request_id)
        right, begun = self._right(plan), len(onboarding.copies)
        if (checked is None or (checked.more and begun == right)) and time.monotonic() > onboarding.until:
            self._end(onboarding, SILENT)
            return False
        if right and not onboarding.started_ns:
            onboarding.started_ns = time.time_ns()
        for number in range(begun, min(right, begun + _AT_ONCE)):
            onboarding.copies.append(self._arena.get(plan.slots[number], plan.block_ids[number], plan.ready))
        if checked is None or checked.more:
            return len(onboarding.copies) > begun
        if len(onboarding.copies) == right and all(copy.done for copy in onboarding.copies):
            self._end(onboarding, "" if right == len(plan.slots) else CORRUPT, right)
            return True
        return len(onboarding.copies) > begun

    def _right(self, plan: OnboardPlan) -> int:
        """How many of the plan's blocks may be copied by now."""
        checked = self._checked.get(plan.request_id)
        return 0 if checked is None else max(0, min(len(plan.slots), checked.blocks - plan.skipped))

    def _end(self, onboarding: _Onboarding, cause: str, right: int = 0) -> None:
        """Of its blocks the first `right` are usable."""
        plan = onboarding.plan
        for copy in onboarding.copies:
            copy.wait()
        self._open.pop(plan.request_id, None)
        self._checked.pop(plan.request_id, None)
        self.received.append(plan.engine_id)
        self.invalid_blocks.update(plan.block_ids[right:])
        self._report(
            Onboarded(
                plan.request_id, self._rank, cause, right, right * self._arena.block_bytes,
                onboarding.started_ns, time.time_ns(),
            )
        )  # fmt: skip

    @property
    def active(self) -> bool:
        return bool(self._open)

    @property
    def moving(self) -> bool:
        """Something is being copied, or could be."""
        return any(self._moves(onboarding) for onboarding in self._open.values())

    def _moves(self, onboarding: _Onboarding) -> bool:
        checked = self._checked.get(onboarding.plan.request_id)
        if checked is None:
            return False
        return not checked.more or len(onboarding.copies) < self._right(onboarding.plan)

    @property
    def blocks(self) -> int:
        """Allocated, and waiting for their content."""
        return sum(len(one.plan.block_ids) for one in self._open.values())
