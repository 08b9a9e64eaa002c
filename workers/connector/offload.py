"""The mover's half of offloading: copies blocks that the engine has completed to the host tier, after everything else.

vLLM frees a finished request's blocks only once nothing of it is to be copied any more; those of a preempted one are
given up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from workers.connector.arena import Arena
from workers.connector.protocol import Offloaded, OffloadStep, Report
from workers.transfer.pack import Copy, Ids
from workers.transfer.ready import Ready

_UNDER_WAY = 4  # copies: enough that the next one follows at once, few enough that a preemption does not wait long


@dataclass(slots=True)
class _Offload:
    """One step's blocks of one request."""

    step: OffloadStep
    ready: Ready
    ids: Ids | None = None  # its blocks, where they are
    begun: int = 0  # blocks
    copies: deque[Copy] = field(default_factory=deque)  # that were not yet seen to be done

    @property
    def over(self) -> bool:
        return self.begun == len(self.step.slots) and not self.copies


class Offloader:
    """Used by the mover's thread alone, and by vLLM's while it holds the mover's lock."""

    def __init__(self, arena: Arena, rank: int, report: Callable[[Report], None]) -> None:
        self._arena, self._rank, self._report = arena, rank, report
        self._offloads: deque[_Offload] = deque()
        self._revoked: dict[str, int] = {}  # engine ids: steps that were planned, but must not be read any more
        self.fresh: list[str] = []  # engine ids, one for each step that has ended since the mover last looked

    def step(self, step: OffloadStep, ready: Ready) -> None:
        offload = _Offload(step, ready)
        revoked = self._revoked.pop(step.engine_id, 0)
        if not revoked:
            self._offloads.append(offload)
            return
        if revoked > 1:
            self._revoked[step.engine_id] = revoked - 1
        self._end(offload, well=False)

    def progress(self) -> bool:
        """Copy some blocks; True when anything moved."""
        moved, under_way = False, 0
        for offload in self._offloads:
            while offload.copies and offload.copies[0].done:
                offload.copies.popleft()
                moved = True
            under_way += len(offload.copies)
        for _ in range(_UNDER_WAY - under_way):
            waiting = next((one for one in self._offloads if one.begun < len(one.step.slots)), None)
            if waiting is None or not waiting.ready.passed:
                break
            self._begin(waiting)
            moved = True
        while self._offloads and self._offloads[0].over:
            self._end(self._offloads.popleft(), well=True)
            moved = True
        return moved

    def _begin(self, offload: _Offload) -> None:
        """To copy the next of its blocks."""
        step, first = offload.step, offload.begun
        if offload.ids is None:
            offload.ids = self._arena.index(step.block_ids)
        slots = step.slots[first : first + self._arena.batch]
        offload.copies.append(self._arena.put(offload.ids[first : first + len(slots)], slots, offload.ready))
        offload.begun += len(slots)

    def preempt(self, engine_id: str, planned: int) -> None:
        """vLLM hands the request's blocks out again: on return none of them is read, nor will be.

        `planned`: its steps of which the mover does not know yet that they have ended; some may still come here.
        """
        mine = [one for one in self._offloads if one.step.engine_id == engine_id]
        late = planned - len(mine) - self.fresh.count(engine_id)
        if late:
            self._revoked[engine_id] = late
        for offload in mine:
            for copy in offload.copies:
                copy.wait()
            self._offloads.remove(offload)
            self._end(offload, well=False)

    def _end(self, offload: _Offload, *, well: bool) -> None:
        step = offload.step
        self.fresh.append(step.engine_id)
        self._report(
            Offloaded(self._rank, tuple((slot, each, well) for slot, each in zip(step.slots, step.hashes, strict=True)))
        )

    @property
    def active(self) -> bool:
        return bool(self._offloads)

    @property
    def moving(self) -> bool:
        """Something is being copied, or could be."""
        return bool(self._offloads) and self._offloads[0].ready.passed

    @property
    def blocks(self) -> int:
        """Held until they are copied."""
        return sum(len(offload.step.slots) for offload in self._offloads)
