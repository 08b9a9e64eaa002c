"""The receiving half of the mover: grants staging to a prefill worker, scatters the pieces that arrive.

A receive waits for staging → is opened (the worker process is told, and asks a prefill worker) → collects pieces →
ends, once all layers of all blocks are here. Several ranks of the prefill worker may fill it at once, each with its
heads in its share of every slot. One that ends early leaves its slots in quarantine.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import replace

import msgspec
import numpy as np
import torch

from dynamo_lite.plane.layout import share
from dynamo_lite.plane.wire import RankTarget
from workers.connector.arrivals import Arrivals, Landing, Receive
from workers.connector.contacts import Contacts
from workers.connector.protocol import (
    NO_STAGING,
    Closed,
    Credit,
    Note,
    Piece,
    Prepare,
    ReceiveEnded,
    ReceiveOpened,
    ReceivePlan,
    ReceivePlanned,
    Refused,
    Report,
    same_request,
)
from workers.connector.quarantine import Held, Quarantine
from workers.connector.settings import MoverSettings
from workers.connector.staging import Staging
from workers.errors import Corrupt, TransferError
from workers.transfer.engine import PeerEngine
from workers.transfer.pack import Copier
from workers.transfer.ready import Ready
from workers.transfer.span import Span

_log = logging.getLogger(__name__)
_GIVEN_UP_KEPT = 4096
_STAGING_PATIENCE = 10  # times the transfer's timeout: longer than a quarantine lasts whose owner is really gone
_notes = msgspec.msgpack.Encoder()


class Receiver:
    """Used by the mover's thread alone."""

    def __init__(
        self, engine: PeerEngine, contacts: Contacts, staging: Staging, copier: Copier, settings: MoverSettings,
        report: Callable[[Report], None],
    ) -> None:  # fmt: skip
        self._engine, self._staging, self._copier = engine, staging, copier
        self._rank, self._window, self._report = settings.rank, settings.window, report
        self._proof = torch.empty_like(staging.bytes_of((0,))) if settings.verify else None  # blocks read back
        self._patience_s = settings.timeout_s * _STAGING_PATIENCE
        self._waiting: deque[tuple[ReceivePlan, float]] = deque()  # with the time at which it is handed back
        self._open: dict[int, Receive] = {}  # by transfer id
        self._by_request: dict[str, int] = {}
        self.quarantine = Quarantine(engine, contacts, staging, settings.timeout_s)
        self._settled: dict[int, tuple[str, bool]] = {}  # said before the transfer ended here
        self._untold: set[str] = set()  # request ids whose first token may still come
        self._over: dict[str, tuple[ReceivePlan, bool]] = {}  # of these, receives that have ended; and whether well
        self._given_up: OrderedDict[str, int] = OrderedDict()  # request ids, before they were planned: transfer ids
        self.received: set[str] = set()  # engine ids, for vLLM
        self.invalid_blocks: set[int] = set()

    # ---- asked by the scheduler and the worker process ----

    def prepare(self, wanted: Prepare) -> None:
        """Have staging granted before vLLM has allocated the blocks. `plan` follows, or `give_up`."""
        waiting = any(plan.request_id == wanted.request_id for plan, _ in self._waiting)
        if not waiting and wanted.request_id not in self._by_request:  # else the plan was faster
            plan = ReceivePlan("", wanted.request_id, [], wanted.first_block, wanted.tokens, wanted.transfer_id)
            self._waiting.append((plan, time.monotonic() + self._patience_s))
            self._open_waiting()

    def plan(self, plan: ReceivePlan, ready: Ready) -> None:
        """`ready`: the engine's earlier work, which may still use those blocks, is done."""
        plan = replace(plan, ready=ready, ids=self._copier.index(plan.block_ids))
        if plan.first_token:
            self._untold.add(plan.request_id)
        self._report(ReceivePlanned(plan.request_id, self._rank))
        if same_request(self._given_up.pop(plan.request_id, -1), plan.transfer_id):
            self._give_back(plan, well=False)
        elif not self._attach(plan):
            self._waiting.append((plan, time.monotonic() + self._patience_s))
            self._open_waiting()

    def _attach(self, plan: ReceivePlan) -> bool:
        """To the receive that was prepared for it, of which pieces may have come."""
        for index, (waiting, until) in enumerate(self._waiting):
            if waiting.request_id == plan.request_id and not waiting.block_ids:
                self._waiting[index] = (replace(plan, transfer_id=waiting.transfer_id), until)
                return True
        receive = self._open.get(self._by_request.get(plan.request_id, -1))
        if receive is None or receive.plan.block_ids:
            return False
        receive.plan = replace(plan, transfer_id=receive.transfer_id)  # of the present attempt
        for sender, piece in receive.early:
            self.piece(sender, piece)
        receive.early.clear()
        return True

    def expire(self) -> None:
        """Hand back what has waited too long for staging: the decode worker computes it. See to the quarantine."""
        if self.quarantine.progress():
            self._open_waiting()
        if not self._waiting:
            return
        now = time.monotonic()
        late = [plan for plan, until in self._waiting if until <= now]
        self._waiting = deque(item for item in self._waiting if item[1] > now)
        for plan in late:
            self._hand_back(plan)
            self._report(ReceiveEnded(plan.request_id, plan.transfer_id, self._rank, NO_STAGING))

    def cancel(self, engine_id: str) -> None:
        """The request was aborted: release its blocks now."""
        for item in [item for item in self._waiting if item[0].engine_id == engine_id]:
            self._waiting.remove(item)
            self._cancelled(item[0])
        for receive in [one for one in self._open.values() if one.plan.engine_id == engine_id]:
            self._end(receive, "cancelled")
            self._cancelled(receive.plan)
        for plan, _ in [over for over in self._over.values() if over[0].engine_id == engine_id]:
            self._cancelled(plan)
        self._open_waiting()

    def _cancelled(self, plan: ReceivePlan) -> None:
        self._untold.discard(plan.request_id)
        self._over.pop(plan.request_id, None)
        self.received.add(plan.engine_id)

    def first_token(self, request_id: str) -> None:
        """It is known whether, and with what, the prefill worker has gone on."""
        self._untold.discard(request_id)
        over = self._over.pop(request_id, None)
        if over is not None:
            self._give_back(*over)

    def reopen(self, request_id: str, transfer_id: int) -> None:
        receive = self._current(request_id, transfer_id)
        if receive is not None:
            self._end(receive, "retried")
            again = replace(receive.plan, transfer_id=transfer_id + 1)
            self._waiting.appendleft((again, time.monotonic() + self._patience_s))
            self._open_waiting()

    def give_up(self, request_id: str, transfer_id: int) -> None:
        receive = self._current(request_id, transfer_id)
        if receive is not None:
            self._end(receive, "given up")
            self._hand_back(receive.plan)
            self._open_waiting()
        else:
            self._unprepare(request_id, transfer_id)

    def _unprepare(self, request_id: str, transfer_id: int) -> None:
        """Of a request that is not planned yet, end whatever attempt there is, and remember it for when it is."""
        mine = [plan for plan, _ in self._waiting if plan.request_id == request_id]
        receive = self._open.get(self._by_request.get(request_id, -1))
        if receive is not None:
            mine.append(receive.plan)
        if any(plan.block_ids or not same_request(plan.transfer_id, transfer_id) for plan in mine):
            return  # it has been planned meanwhile: the scheduler ends it
        self._waiting = deque(item for item in self._waiting if item[0].request_id != request_id)
        if receive is not None:
            self._end(receive, "given up")
        self._remember_given_up(request_id, transfer_id)
        self._open_waiting()

    def _hand_back(self, plan: ReceivePlan) -> None:
        """For the decode worker to compute; where vLLM has not planned it yet, as soon as it has."""
        if plan.block_ids:
            self._give_back(plan, well=False)
        else:
            self._remember_given_up(plan.request_id, plan.transfer_id)

    def _remember_given_up(self, request_id: str, transfer_id: int) -> None:
        self._given_up[request_id] = transfer_id
        if len(self._given_up) > _GIVEN_UP_KEPT:
            self._given_up.popitem(last=False)

    def _give_back(self, plan: ReceivePlan, well: bool) -> None:
        """To vLLM, once it may go on. Where it did not end well it recomputes from the first invalid block on."""
        if plan.request_id in self._untold:
            self._over[plan.request_id] = (plan, well)
            return
        if not well:
            self.invalid_blocks.update(plan.block_ids)
        self.received.add(plan.engine_id)

    def settle(self, transfer_id: int, peer: str, closed: bool) -> None:
        closed = closed or self.quarantine.gone(peer) or self._settled.get(transfer_id, ("", False))[1]
        if transfer_id in self._open:
            self._settled[transfer_id] = (peer, closed)
        else:
            self.quarantine.settle(transfer_id, peer, closed)

    def closed(self, sender: str, note: Closed) -> None:
        """One rank of the sender writes nothing more under this id; it takes the word of all of them."""
        receive = self._open.get(note.transfer_id)
        if receive is None:
            self.quarantine.closed(note.transfer_id, sender, note.ranks)
            return
        receive.closers.add(sender)
        if len(receive.closers) >= note.ranks:
            self._settled[note.transfer_id] = ("", True)

    # ---- pieces ----

    def piece(self, sender: str, piece: Piece) -> None:
        """Scatter one piece; ignore what is of another generation or out of bounds."""
        receive = self._open.get(piece.transfer_id)
        if receive is None or receive.corrupt or piece.slot not in receive.slots:
            return
        staged = self._staged(receive, piece)
        if staged is None:
            return
        if not receive.started_ns:
            receive.started_ns = time.time_ns()
        if piece.agent:
            self._meet(receive, piece.agent)
        if not receive.plan.block_ids:
            receive.early.append((sender, piece))  # at most one in each slot, as none is credited before
            return
        receive.pieces += 1
        assert receive.plan.ids is not None, "planned"
        blocks = receive.plan.ids[piece.first : piece.first + piece.count]
        copy = self._copier.scatter(blocks, staged, piece.head_range, piece.layer_range, receive.plan.ready)
        receive.landings.append(Landing(sender, piece, copy))
        self._land(receive)

    def _staged(self, receive: Receive, piece: Piece) -> torch.Tensor | None:
        """A piece's share of its slot; None where it says what cannot be."""
        if not receive.arrivals.expects(piece):
            return None
        layout = self._copier.layout
        part = share(layout, self._rank, piece.head_range, self._staging.slot_bytes)
        if piece.count * layout.part_bytes(piece.heads, piece.layers) > len(part):
            return None
        return self._staging.bytes_of((piece.slot,)).narrow(0, part.start, len(part))

    def progress(self) -> bool:
        """Take note of what was scattered; True when anything was."""
        landed = [self._land(receive) for receive in list(self._open.values()) if receive.landings]
        return any(landed)

    def _land(self, receive: Receive) -> bool:
        """Pieces are scattered in the order in which they came."""
        moved = False
        while receive.landings and receive.landings[0].copy.done:
            self._landed(receive, receive.landings.pop(0))
            moved = True
        return moved

    def _landed(self, receive: Receive, landing: Landing) -> None:
        if receive.corrupt:
            return
        piece = landing.piece
        if piece.checksum is not None and not self._verified(receive.plan, piece, piece.checksum):
            self._refuse(receive)
            return
        receive.arrivals.add(piece)
        if receive.arrivals.complete:
            self._finish(receive)
        else:
            receive.uncredited.setdefault(landing.sender, []).append(piece.slot)
            self._credit(receive, landing.sender)

    def _verified(self, plan: ReceivePlan, piece: Piece, total: int) -> bool:
        """Whether the blocks themselves hold what was sent: read back, so that staging and scatter are covered too."""
        if self._proof is None:
            return True  # asked for by the sender only
        layout, block_ids = self._copier.layout, plan.block_ids[piece.first : piece.first + piece.count]
        span = Span(np.array(block_ids, dtype=np.int64), layout.block_size, 0, len(block_ids) * layout.block_size)
        copy = self._copier.outlet(layout, piece.head_range).gather(span, piece.layer_range, self._proof)
        return self._copier.checksum(self._proof[: copy.size]) == total

    def _refuse(self, receive: Receive) -> None:
        """Corrupt: the attempt fails, by the senders' word once they have stopped writing."""
        receive.corrupt = True
        self._report(ReceiveEnded(receive.plan.request_id, receive.transfer_id, self._rank, Corrupt.cause))
        for sender in list(receive.senders):
            self._say(receive, sender, Refused(receive.transfer_id, Corrupt.cause))

    def _meet(self, receive: Receive, agent: bytes) -> None:
        try:
            receive.senders.add(self._engine.connect(agent))
        except TransferError as error:  # it may have died since; the worker process will learn of it
            _log.info("a sender cannot be answered: %s", error)

    def _credit(self, receive: Receive, sender: str) -> None:
        """Give back the slots that are empty again; those of pieces that overtook the first wait for it."""
        slots = receive.uncredited.get(sender, [])
        while slots and sender in receive.senders:
            self._say(receive, sender, Credit(receive.transfer_id, slots.pop()))

    def _say(self, receive: Receive, sender: str, note: Note) -> None:
        try:
            self._engine.notify(sender, _notes.encode(note))
        except TransferError:
            receive.senders.discard(sender)  # the worker process learns of the loss from the unanswered request

    def _finish(self, receive: Receive) -> None:
        """Every block is here, so the sender has nothing left to write."""
        self._forget(receive)
        self._staging.give(*receive.slots)
        self._give_back(receive.plan, well=True)
        blocks = len(receive.plan.block_ids)
        self._report(
            ReceiveEnded(
                receive.plan.request_id, receive.transfer_id, self._rank,
                bytes=blocks * self._copier.block_bytes, blocks=blocks, pieces=receive.pieces,
                path=self._engine.path(next(iter(receive.senders))) if receive.senders else "",
                started_ns=receive.started_ns, ended_ns=time.time_ns(),
            )
        )  # fmt: skip
        self._open_waiting()

    # ---- opening and ending ----

    def _open_waiting(self) -> None:
        """Grant staging in order of arrival; a receive that has to wait keeps those behind it waiting too."""
        while self._waiting:
            plan, _ = self._waiting[0]
            per_slot = max(1, self._staging.slot_bytes // self._copier.block_bytes)
            blocks = -(-plan.tokens // self._copier.layout.block_size)
            wanted = min(self._window, -(-blocks // per_slot), self._staging.count)
            slots = self._staging.take(min(wanted, max(1, self._staging.free)))
            if not slots:
                return
            self._waiting.popleft()
            arrivals = Arrivals(self._copier.heads, self._copier.layout.layers, blocks)
            receive = Receive(plan, plan.transfer_id, slots, arrivals)
            self._open[receive.transfer_id] = receive
            self._by_request[plan.request_id] = receive.transfer_id
            self._report(
                ReceiveOpened(
                    plan.request_id, receive.transfer_id, self._rank,
                    plan.first_block, plan.tokens, self._target(slots),
                )
            )  # fmt: skip

    def _target(self, slots: tuple[int, ...]) -> RankTarget:
        region = self._staging.region
        return RankTarget(
            agent=self._engine.metadata(),
            agent_name=self._engine.name,
            address=region.address,
            device=region.device,
            memory=region.memory,
            slot_bytes=self._staging.slot_bytes,
            slots=slots,
        )

    def _end(self, receive: Receive, cause: str) -> None:
        """End an attempt early: its slots go into quarantine, where they stay if its sender may still write."""
        for landing in receive.landings:
            landing.copy.wait()  # vLLM may use the blocks for something else as soon as it is told
        peer, closed = self._settled.get(receive.transfer_id, ("", False))
        self._forget(receive)
        held = Held(receive.slots, receive.senders, receive.closers, peer, closed)
        self.quarantine.put(receive.transfer_id, held)
        self._report(ReceiveEnded(receive.plan.request_id, receive.transfer_id, self._rank, cause))

    def _forget(self, receive: Receive) -> None:
        del self._open[receive.transfer_id]
        self._by_request.pop(receive.plan.request_id, None)
        self._settled.pop(receive.transfer_id, None)

    def _current(self, request_id: str, transfer_id: int) -> Receive | None:
        if self._by_request.get(request_id) != transfer_id:
            return None
        return self._open.get(transfer_id)

    # ---- state ----

    @property
    def moving(self) -> bool:
        """Something is being scattered."""
        return any(receive.landings for receive in self._open.values())

    @property
    def active(self) -> bool:
        return bool(self._waiting or self._open or self.quarantine.slots)

    def holds(self) -> dict[str, int]:
        """Blocks waiting for their content, and staging slots in quarantine."""
        waiting = sum(len(plan.block_ids) for plan, _ in self._waiting)
        return {
            "receive": waiting + sum(len(one.plan.block_ids) for one in self._open.values()),
            "first_token": sum(len(plan.block_ids) for plan, _ in self._over.values()),
            "quarantine": self.quarantine.slots,
        }

    def check(self) -> None:
        """Every slot is free, granted or quarantined, exactly once."""
        granted = sum(len(one.slots) for one in self._open.values())
        assert self._staging.free + granted + self.quarantine.slots == self._staging.count
        assert set(self._by_request.values()) == set(self._open)
