"""The sending half of the mover: a push per prompt, with a branch to each rank of the decode worker that takes heads of
this one. Pieces of the earlier parts of a prompt, and of the earlier layers of a step, leave while later ones compute.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from dynamo_lite.plane.layout import exchange_problem, parts
from workers.connector.branch import Branch, Carrier
from workers.connector.contacts import Contacts
from workers.connector.protocol import IN_FLIGHT, UNWANTED, PushEnded, PushStep, Report
from workers.connector.settings import MoverSettings
from workers.connector.staging import Staging
from workers.errors import Mismatch, PeerLost, ReceiverSilent, TransferError, TransferTimeout
from workers.transfer.engine import PeerEngine
from workers.transfer.pack import Copier, Copy
from workers.transfer.ready import StepReady

_log = logging.getLogger(__name__)
_REMEMBERED = 4096
K = TypeVar("K")


def _remember(keys: OrderedDict[K, None], key: K) -> None:
    """The latest ones."""
    keys[key] = None
    if len(keys) > _REMEMBERED:
        keys.popitem(last=False)


@dataclass(slots=True)
class Push:
    """This rank's part of one prompt on its way to one decode worker."""

    engine_id: str
    request_id: str
    transfer_id: int
    branches: dict[str, Branch]  # by the receiving agent's name
    cause: str = ""  # why it failed

    @property
    def done(self) -> bool:
        return all(branch.done for branch in self.branches.values())


class Sender:
    """Used by the mover's thread alone."""

    def __init__(
        self, engine: PeerEngine, contacts: Contacts, staging: Staging, copier: Copier, settings: MoverSettings,
        report: Callable[[Report], None], watch: Callable[[Copy], None],
    ) -> None:  # fmt: skip
        """`watch`: have the mover woken once that copy is done."""
        self._carrier = Carrier(engine, contacts, staging, copier, settings, watch)
        self._contacts, self._layout, self._rank, self._report = contacts, copier.layout, settings.rank, report
        self._pushes: dict[int, Push] = {}  # by transfer id
        self._closing: list[Push] = []  # failed, but a write could not be given up yet
        self._ended: set[str] = set()  # engine ids of pushes that need their blocks no more
        self._stopped: OrderedDict[str, None] = OrderedDict()  # request ids the receiver gave up on, the latest ones
        self._refused: OrderedDict[int, None] = OrderedDict()  # transfer ids that it refused before they began
        self._preempted: set[str] = set()  # engine ids whose steps may still come, but must not be read any more
        self.fresh: list[str] = []  # those that ended since the mover last looked

    def fence(self, until: float) -> None:
        """Write nothing after this time: the mover moves it on while it runs."""
        self._carrier.fence = until

    def step(self, step: PushStep, ready: StepReady) -> None:
        """Tokens that the engine computes, or has just computed. The first step of a prompt opens the push."""
        transfer_id = step.target.transfer_id
        if step.request_id in self._stopped:
            self._release(step.engine_id)
        if step.engine_id in self._preempted:
            self._preempted.discard(step.engine_id)
            self._finish(step.engine_id, step.request_id, step.target.transfer_id, "preempted")
        if step.engine_id in self._ended:
            return  # it has failed, or was stopped, before all its steps came
        if transfer_id in self._refused:
            self._finish(step.engine_id, step.request_id, transfer_id, UNWANTED)
            return
        push = self._pushes.get(transfer_id)
        if push is not None and push.engine_id != step.engine_id:
            self._release(step.engine_id)  # the same prefill, asked for twice: one of them is enough
            return
        if push is None:
            try:
                push = self._open(step)
            except TransferError as error:
                _log.warning("%s cannot be pushed: %s", step.request_id, error)
                self._finish(step.engine_id, step.request_id, transfer_id, error.cause)
                return
        if not push.branches:
            self._finish(step.engine_id, step.request_id, transfer_id, "")  # other ranks have copies of these heads
            return
        self._pushes[transfer_id] = push
        for branch in push.branches.values():
            branch.add(step.first, step.span, ready)

    def _open(self, step: PushStep) -> Push:
        target = step.target
        problem = exchange_problem(self._layout, target.layout)
        if problem is not None:
            raise Mismatch(problem)
        if len(target.ranks) != target.layout.tensor_parallel:
            raise Mismatch(f"{len(target.ranks)} ranks of a worker that has {target.layout.tensor_parallel}")
        branches: dict[str, Branch] = {}
        for rank, each in enumerate(target.ranks):
            heads = parts(self._layout, self._rank, target.layout, rank)
            if heads is not None:
                branch = self._carrier.open(target.transfer_id, each, target.layout, rank, heads, target.num_blocks)
                branches[branch.target.where] = branch
        return Push(step.engine_id, step.request_id, target.transfer_id, branches)

    def credit(self, peer: str, transfer_id: int, slot: int) -> None:
        push = self._pushes.get(transfer_id)
        branch = push.branches.get(peer) if push is not None else None
        if branch is not None:
            branch.credit(slot)

    def refused(self, peer: str, transfer_id: int, cause: str) -> None:
        """A receiving rank wants no more of it. One that has not begun, or is over there, is closed as well."""
        push = self._pushes.get(transfer_id)
        if push is not None and peer in push.branches:
            self._fail(push, cause)
        elif not any(peer in one.branches for one in self._closing if one.transfer_id == transfer_id):
            _remember(self._refused, transfer_id)
            self._carrier.say_closed(peer, transfer_id, cause)

    def cancel(self, engine_id: str, cause: str) -> bool:
        """False when no push of that request is open."""
        mine = [one for one in self._pushes.values() if one.engine_id == engine_id]
        for push in mine:
            self._fail(push, cause)
        return bool(mine)

    def preempt(self, engine_id: str) -> None:
        """vLLM hands the prompt's blocks out again: on return none of them is read, nor will be."""
        if not self.cancel(engine_id, "preempted") and engine_id not in self._ended:
            self._preempted.add(engine_id)  # its first step has been planned, but not come yet

    def stop(self, request_id: str) -> None:
        """The receiver does not want it any more, and may use its staging again once PushEnded was reported.

        vLLM may be computing a step of it right now, so the request is remembered and its later steps are ignored.
        """
        _remember(self._stopped, request_id)
        mine = [one for one in self._pushes.values() if one.request_id == request_id]
        for push in mine:
            self._fail(push, "cancelled")
        if not mine and not any(push.request_id == request_id for push in self._closing):
            self._report(PushEnded(request_id, 0, self._rank, "cancelled"))

    def fail_all(self, cause: str) -> None:
        for push in list(self._pushes.values()):
            self._fail(push, cause)

    def lost(self, peer: str) -> None:
        """The connection to that agent broke, and what was on its way is gone."""
        for push in [one for one in self._pushes.values() if peer in one.branches]:
            self._fail(push, PeerLost.cause)

    def gone(self, incarnation: str) -> None:
        """That worker's process no longer exists."""
        for peer in {peer for push in self._pushes.values() for peer in push.branches}:
            if peer.startswith(f"{incarnation}:"):
                self.lost(peer)

    def progress(self) -> bool:
        """Poll and post; True when anything moved."""
        moved = self._close_failed()
        for push in list(self._pushes.values()):
            moved |= self._advance(push)
        return moved

    def _advance(self, push: Push) -> bool:
        moved = False
        for branch in push.branches.values():
            try:
                moved |= self._carrier.advance(branch)
            except TransferError as error:
                if isinstance(error, ReceiverSilent | TransferTimeout):
                    self._contacts.doubt(branch.target.where)
                self._fail(push, error.cause)
                return True
        if push.done:
            del self._pushes[push.transfer_id]
            self._finish(push.engine_id, push.request_id, push.transfer_id, "", list(push.branches.values()))
        return moved

    def _fail(self, push: Push, cause: str) -> None:
        """End a push early. Its blocks are free on return: writes read staging, and gathering is waited for.

        While one of its writes is still under way the worker process is told just that, and the receiver nothing.
        """
        for branch in push.branches.values():
            for flight in branch.flights:
                flight.copy.wait()
        del self._pushes[push.transfer_id]
        push.cause = cause
        self._closing.append(push)
        self._close_failed()
        under_way = any(closing is push for closing in self._closing)
        self._finish(push.engine_id, push.request_id, push.transfer_id, IN_FLIGHT if under_way else cause)

    def _close_failed(self) -> bool:
        """Once no write of a failed push is under way any more to one of its receivers, tell that."""
        moved = False
        for push in list(self._closing):
            for peer in [peer for peer, branch in push.branches.items() if self._carrier.settle(branch)]:
                del push.branches[peer]
                moved = True
                self._carrier.say_closed(peer, push.transfer_id, push.cause)
            if not push.branches:
                self._closing.remove(push)
        return moved

    def _finish(
        self, engine_id: str, request_id: str, transfer_id: int, cause: str, branches: list[Branch] | None = None
    ) -> None:
        """`branches`: those that were wholly written."""
        self._release(engine_id)
        if not branches:
            self._report(PushEnded(request_id, transfer_id, self._rank, cause))
            return
        self._report(
            PushEnded(
                request_id, transfer_id, self._rank,
                bytes=sum(branch.bytes for branch in branches), pieces=sum(branch.pieces for branch in branches),
                path=self._carrier.path(branches[0]),
                started_ns=min(branch.started_ns for branch in branches), ended_ns=time.time_ns(),
                late_pieces=sum(branch.late_pieces for branch in branches),
            )
        )  # fmt: skip

    @property
    def active(self) -> bool:
        return bool(self._pushes or self._closing)

    @property
    def moving(self) -> bool:
        """Something is being written, or could be, and has to be asked after."""
        return any(branch.moving for push in self._pushes.values() for branch in push.branches.values())

    def _release(self, engine_id: str) -> None:
        if engine_id not in self._ended:
            self._ended.add(engine_id)
            self.fresh.append(engine_id)

    def forget(self, engine_ids: set[str]) -> None:
        """vLLM has freed these prompts: no further step of them can come."""
        self._ended -= engine_ids
        self._preempted -= engine_ids

    def holds(self) -> dict[str, int]:
        """Blocks to be pushed, and blocks in staging that a failed push is still writing, of this worker's size."""
        left = [max(branch.tokens_left for branch in push.branches.values()) for push in self._pushes.values()]
        flying = [branch.tokens_flying for push in self._closing for branch in push.branches.values()]
        size = self._layout.block_size
        return {"push": sum(-(-tokens // size) for tokens in left), "in_flight": sum(-(-n // size) for n in flying)}
