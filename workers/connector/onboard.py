"""The mover's half of onboarding: copies blocks of the host tier into those that vLLM has allocated for them.

The worker process pins the slots and checks their content meanwhile, some blocks after the other. Only what it has
found to be right is copied, and the rest is handed to vLLM as invalid, which computes it.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from workers.connector.arena import Arena
from workers.connector.protocol import OnboardChecked, Onboarded, OnboardPlan, Report
from workers.transfer.pack import Copy, Ids

CANCELLED = "cancelled"
CORRUPT = "corrupt"
SILENT = "silent"
_UNDER_WAY = 4  # copies of one request: enough that the next one follows at once
_KEPT = 4096
_PATIENCE = 10  # times the transfer's timeout, for the worker process to check what it has pinned


@dataclass(slots=True)
class _Onboarding:
    plan: OnboardPlan
    until: float  # when it is handed back unless more of it was checked
    ids: Ids | None = None  # its blocks, where they are
    begun: int = 0  # blocks
    copies: deque[Copy] = field(default_factory=deque)  # that were not yet seen to be done
    started_ns: int = 0


class Onboarder:
    """Used by the mover's thread alone."""

    def __init__(self, arena: Arena, rank: int, timeout_s: float, report: Callable[[Report], None]) -> None:
        self._arena, self._rank, self._report = arena, rank, report
        self._patience_s = timeout_s * _PATIENCE
        self._open: dict[str, _Onboarding] = {}  # by request id
        self._checked: dict[str, OnboardChecked] = {}  # by request id; blocks are counted as they were pinned
        self._over: OrderedDict[str, None] = OrderedDict()  # request ids whose slots are not read any more
        self.received: list[str] = []  # engine ids, for vLLM; one for each plan
        self.invalid_blocks: set[int] = set()

    def plan(self, plan: OnboardPlan) -> None:
        onboarding = _Onboarding(plan, time.monotonic() + self._patience_s)
        if plan.request_id in self._over:
            self._end(onboarding, CANCELLED)
        else:
            self._open[plan.request_id] = onboarding

    def checked(self, word: OnboardChecked) -> None:
        if word.request_id in self._over:
            return
        self._checked[word.request_id] = word
        if word.request_id in self._open:
            self._open[word.request_id].until = time.monotonic() + self._patience_s

    def cancel(self, engine_id: str) -> None:
        """The request was aborted: release its blocks now."""
        for onboarding in [one for one in self._open.values() if one.plan.engine_id == engine_id]:
            self._end(onboarding, CANCELLED)

    def over(self, request_id: str) -> None:
        """Its slots may be given to others once this is answered."""
        self._forget(request_id)
        if request_id in self._open:
            self._end(self._open[request_id], CANCELLED)
        else:
            self._report(Onboarded(request_id, self._rank, CANCELLED))

    def progress(self) -> bool:
        """Copy some blocks; True when anything moved."""
        moved = [self._advance(onboarding) for onboarding in list(self._open.values())]
        return any(moved)

    def _advance(self, onboarding: _Onboarding) -> bool:
        checked, moved = self._checked.get(onboarding.plan.request_id), False
        if (checked is None or checked.more) and time.monotonic() > onboarding.until:
            self._end(onboarding, SILENT)
            return True
        if checked is None:
            return False
        right = self._right(onboarding)
        onboarding.started_ns = onboarding.started_ns or time.time_ns()
        while onboarding.copies and onboarding.copies[0].done:
            onboarding.copies.popleft()
            moved = True
        while onboarding.begun < right and len(onboarding.copies) < _UNDER_WAY:
            self._begin(onboarding, right)
            moved = True
        if onboarding.begun == right and not (checked.more or onboarding.copies):
            self._end(onboarding, "" if right == len(onboarding.plan.slots) else CORRUPT, right)
            return True
        return moved

    def _right(self, onboarding: _Onboarding) -> int:
        """How many of its blocks are known to be what was stored."""
        plan, checked = onboarding.plan, self._checked.get(onboarding.plan.request_id)
        return max(0, min(len(plan.slots), checked.blocks - plan.skipped)) if checked is not None else 0

    def _begin(self, onboarding: _Onboarding, right: int) -> None:
        """To copy the next of the blocks that are right."""
        plan, first = onboarding.plan, onboarding.begun
        if onboarding.ids is None:
            onboarding.ids = self._arena.index(plan.block_ids)
        end = min(right, first + self._arena.batch)
        onboarding.copies.append(self._arena.get(plan.slots[first:end], onboarding.ids[first:end], plan.ready))
        onboarding.begun = end

    def _end(self, onboarding: _Onboarding, cause: str, right: int = 0) -> None:
        """Of its blocks the first `right` are usable."""
        plan = onboarding.plan
        for copy in onboarding.copies:
            copy.wait()
        self._open.pop(plan.request_id, None)
        self._forget(plan.request_id)
        self.received.append(plan.engine_id)
        self.invalid_blocks.update(plan.block_ids[right:])
        self._report(
            Onboarded(
                plan.request_id, self._rank, cause, right, right * self._arena.block_bytes,
                onboarding.started_ns, time.time_ns(),
            )
        )  # fmt: skip

    def _forget(self, request_id: str) -> None:
        """Nothing of it is read any more, whatever the worker process, which does not know yet, says of it."""
        self._over[request_id] = None
        if len(self._over) > _KEPT:
            self._over.popitem(last=False)
        self._checked.pop(request_id, None)

    @property
    def active(self) -> bool:
        return bool(self._open)

    @property
    def moving(self) -> bool:
        """Something is being copied, or could be."""
        return any(one.copies or one.begun < self._right(one) for one in self._open.values())

    @property
    def blocks(self) -> int:
        """Allocated, and waiting for their content."""
        return sum(len(one.plan.block_ids) for one in self._open.values())
