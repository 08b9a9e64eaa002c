"""The scheduler's half of offloading: which blocks of the running requests go to the host tier, and to which slot.

The worker process grants slots ahead, and hears of prompts that need more when they come, so that these are here by the
time the blocks are complete; without one a block is simply not offloaded.
Where every rank is to copy its share of a block, all of them learn the same slot here.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING

from workers.connector.protocol import GrantSlots, OffloadStep, TierChanged

if TYPE_CHECKING:
    from vllm.v1.request import Request

_SEEN = 65536  # hashes remembered for a second use


class OffloadPlans:
    """One per engine; called by vLLM's scheduler, but for `granted` and `changed`, which any thread may call."""

    def __init__(self, block_size: int, second_use: bool) -> None:
        """`second_use`: offload a block only when a second request has it."""
        self._block_size = block_size
        self._second_use = second_use
        self._slots: deque[int] = deque()
        self._there: set[bytes] = set()  # hashes in the tier, or on their way
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._requests: dict[str, Request] = {}
        self._looked_at: dict[str, int] = {}  # blocks of each request that were dealt with
        self._full: dict[str, int] = {}  # blocks of each request that are computed
        self._block_ids: dict[str, list[int]] = {}
        self._copied: set[str] = set()  # engine ids of which blocks were handed to the mover
        self.missed = 0  # blocks for which no slot came in time

    # ---- from the worker process ----

    def granted(self, grant: GrantSlots) -> None:
        self._slots.extend(grant.slots)

    def changed(self, change: TierChanged) -> None:
        self._there.update(change.stored)
        self._there.difference_update(change.removed)

    # ---- from vLLM's scheduler ----

    def arrived(self, request: Request) -> int:
        """It is about to be scheduled, perhaps not for the first time. Returns how many slots more it will need."""
        if request.request_id in self._requests:
            return 0
        self._requests[request.request_id] = request
        fresh = (one for one in request.block_hashes if one not in self._there)
        needed = sum(not self._second_use or one in self._seen for one in fresh)
        return max(0, needed - len(self._slots))

    def step(self, engine_id: str, fresh: list[int] | None, resumed: bool, computed: int) -> OffloadStep | None:
        """What to copy once `computed` tokens of the request are there; `fresh`: blocks it was given in this step."""
        request = self._requests.get(engine_id)
        if request is None:
            return None
        block_ids = self._block_ids.setdefault(engine_id, [])
        if resumed:
            block_ids.clear()
            self._looked_at[engine_id] = 0
        block_ids.extend(fresh or ())
        hashes: list[bytes] = request.block_hashes
        first = self._looked_at.get(engine_id, 0)
        full = min(computed // self._block_size, len(hashes), len(block_ids))
        chosen = OffloadStep(engine_id, [], [], [])
        for number in range(first, full):
            if self._wanted(hashes[number]):
                if not self._slots:  # there may be some at the next step
                    full = number
                    break
                self._there.add(hashes[number])
                chosen.block_ids.append(block_ids[number])
                chosen.hashes.append(hashes[number])
                chosen.slots.append(self._slots.popleft())
        self._looked_at[engine_id] = max(first, full)
        self._full[engine_id] = computed // self._block_size
        if not chosen.slots:
            return None
        self._copied.add(engine_id)
        return chosen

    def _wanted(self, block_hash: bytes) -> bool:
        if block_hash in self._there:
            return False
        if not self._second_use or block_hash in self._seen:
            return True
        self._seen[block_hash] = None
        if len(self._seen) > _SEEN:
            self._seen.popitem(last=False)
        return False

    def preempted(self, engine_id: str) -> bool:
        """Whether the mover may still have to copy blocks of it."""
        return engine_id in self._copied

    def finished(self, engine_id: str) -> bool:
        """vLLM is done with the request; True when its blocks must stay until the mover says that they are copied."""
        self._requests.pop(engine_id, None)
        self.missed += self._full.pop(engine_id, 0) - self._looked_at.pop(engine_id, 0)
        self._block_ids.pop(engine_id, None)
        copied = engine_id in self._copied
        self._copied.discard(engine_id)
        return copied
