"""The sending half of the mover: gathers blocks that are computed into pieces and writes them to the decode worker.

At most one piece per granted slot is on its way; a slot is used again when the receiver credits it. Pieces of the
earlier parts of a prompt leave while later parts still compute. Where the receiver's staging can be addressed from
here, on one host, a piece is gathered straight into it, and the write is only its notification.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar, cast

import msgspec
import torch

from workers.connector.protocol import IN_FLIGHT, UNWANTED, Closed, Piece, PushEnded, PushStep, Report
from workers.connector.settings import MoverSettings
from workers.connector.staging import Staging
from workers.errors import Frozen, PeerLost, TransferError, TransferTimeout
from workers.transfer.engine import Memory, PeerEngine, Spans, Target, Transfer
from workers.transfer.pack import Copier, Copy
from workers.transfer.ready import Ready

_REMEMBERED = 4096
K = TypeVar("K")
_notes = msgspec.msgpack.Encoder()


@dataclass(slots=True)
class Flight:
    """One piece on its way: gathered, then written."""

    slot: int  # of the receiver
    first: int  # block of the transfer
    count: int  # blocks
    piece: torch.Tensor  # where it is gathered
    copy: Copy
    local_slot: int | None  # None: it is gathered straight into the receiver's slot
    write: Transfer | None = None


def _remember(keys: OrderedDict[K, None], key: K) -> None:
    """The latest ones."""
    keys[key] = None
    if len(keys) > _REMEMBERED:
        keys.popitem(last=False)


def _ended(write: Transfer | None) -> bool:
    """Whether a write is over, well or badly, and released."""
    if write is None:
        return True
    try:
        if write.poll() == "pending":
            return False
    except TransferTimeout:
        return False  # late, but under way
    except TransferError:
        pass  # over, badly: the push has failed already
    try:
        write.close()
    except TransferError:
        return False
    return True


@dataclass(slots=True)
class Push:
    """One prompt's blocks on their way to one decode worker."""

    engine_id: str
    request_id: str
    transfer_id: int
    target: Target  # the receiver's staging
    slot_bytes: int  # of the receiver's slots
    piece_bytes: int  # largest piece that fits both sides' slots
    blocks: int  # all there will be
    free_slots: deque[int]
    granted: frozenset[int]
    queue: deque[tuple[int, list[int], Ready]] = field(default_factory=deque)  # first, block ids, when readable
    flights: list[Flight] = field(default_factory=list)
    written: int = 0
    introduced: bool = False
    waiting_since: float = field(default_factory=time.monotonic)  # last progress
    pieces: int = 0
    started_ns: int = 0  # unix time of the first piece


class Sender:
    """Used by the mover's thread alone."""

    def __init__(
        self, engine: PeerEngine, staging: Staging, copier: Copier, settings: MoverSettings,
        report: Callable[[Report], None],
    ) -> None:  # fmt: skip
        self._engine, self._staging, self._copier = engine, staging, copier
        self._rank, self._timeout_s, self._verify = settings.rank, settings.timeout_s, settings.verify
        self._report = report
        self._pushes: dict[int, Push] = {}  # by transfer id
        self._closing: list[tuple[Push, str]] = []  # failed, but a write could not be given up yet
        self._ended: set[str] = set()  # engine ids of pushes that need their blocks no more
        self._stopped: OrderedDict[str, None] = OrderedDict()  # request ids the receiver gave up on, the latest ones
        self._refused: OrderedDict[int, None] = OrderedDict()  # transfer ids that it refused before they began
        self._preempted: set[str] = set()  # engine ids whose steps may still come, but must not be read any more
        self.fence = 0.0  # nothing is written after this time: the mover moves it on while it runs
        self.fresh: list[str] = []  # those that ended since the mover last looked

    def step(self, step: PushStep, ready: Ready) -> None:
        """Blocks that the engine has just computed. The first step of a prompt opens the push."""
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
                self._finish(step.engine_id, step.request_id, transfer_id, error.cause)
                return
        if not push.queue and not push.flights:
            push.waiting_since = time.monotonic()  # the time it took to compute is not the receiver's
        push.queue.append((step.first, step.block_ids, ready))

    def _open(self, step: PushStep) -> Push:
        if len(step.target.ranks) <= self._rank:
            raise TransferError(f"the target has {len(step.target.ranks)} ranks, this is rank {self._rank}")
        target = step.target.ranks[self._rank]
        if target.slot_bytes < self._copier.block_bytes:
            raise TransferError("the receiver's slots are smaller than one block")
        size = (max(target.slots, default=0) + 1) * target.slot_bytes
        peer = self._engine.connect(target.agent)
        push = Push(
            step.engine_id, step.request_id, step.target.transfer_id,
            Target(peer, size, target.address, target.device, cast(Memory, target.memory)),
            target.slot_bytes, min(target.slot_bytes, self._staging.slot_bytes), step.target.num_blocks,
            deque(target.slots), frozenset(target.slots),
        )  # fmt: skip
        self._pushes[push.transfer_id] = push
        return push

    def credit(self, transfer_id: int, slot: int) -> None:
        push = self._pushes.get(transfer_id)
        if push is not None and slot in push.granted and slot not in push.free_slots:
            push.free_slots.append(slot)
            push.waiting_since = time.monotonic()

    def refused(self, peer: str, transfer_id: int, cause: str) -> None:
        """The receiver wants no more of it. One that has not begun, or is over, is closed as well."""
        push = self._pushes.get(transfer_id)
        if push is not None:
            self._fail(push, cause)
        elif not any(push.transfer_id == transfer_id for push, _ in self._closing):
            _remember(self._refused, transfer_id)
            self._say_closed(peer, transfer_id, cause)

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
        if not mine and not any(push.request_id == request_id for push, _ in self._closing):
            self._report(PushEnded(request_id, 0, self._rank, "cancelled"))

    def fail_all(self, cause: str) -> None:
        for push in list(self._pushes.values()):
            self._fail(push, cause)

    def progress(self) -> bool:
        """Poll and post; True when anything moved."""
        moved = self._close_failed()
        for push in list(self._pushes.values()):
            try:
                moved |= self._advance(push)
            except TransferError as error:
                self._fail(push, error.cause)
                moved = True
        return moved

    def _advance(self, push: Push) -> bool:
        moved = False
        for flight in list(push.flights):
            moved |= self._carry(push, flight)
        while push.queue and push.free_slots and self._staging.free and push.queue[0][2].passed:
            self._carry(push, self._gather(push))
            moved = True
        if push.written == push.blocks:
            del self._pushes[push.transfer_id]
            self._finish(push.engine_id, push.request_id, push.transfer_id, "", push)
            return True
        if moved:
            push.waiting_since = time.monotonic()
        elif push.queue and push.free_slots and not push.flights:
            push.waiting_since = time.monotonic()  # it waits for our own staging or the GPU, not for the receiver
        elif (push.queue or push.flights) and time.monotonic() - push.waiting_since > self._timeout_s:
            self._fail(push, "receiver_silent")
        return moved

    def _gather(self, push: Push) -> Flight:
        """Begin to gather the next piece: into a slot of our own, or the granted one where we can reach it."""
        first, ids, ready = push.queue.popleft()
        count = min(len(ids), max(1, push.piece_bytes // self._copier.block_bytes))
        if count < len(ids):
            push.queue.appendleft((first + count, ids[count:], ready))
        if time.monotonic() > self.fence:
            raise Frozen("this process stood still; the receiver may use its slots for others by now")
        push.started_ns = push.started_ns or time.time_ns()
        slot = push.free_slots.popleft()
        offset, size = slot * push.slot_bytes, count * self._copier.block_bytes
        local_slot, piece = None, self._engine.window(push.target, offset, size)
        if piece is None:
            (local_slot,) = self._staging.take(1)
            piece = self._staging.bytes_of(local_slot)[:size]
        copy = self._copier.gather(ids[:count], piece, ready)
        flight = Flight(slot, first, count, piece, copy, local_slot)
        push.flights.append(flight)
        push.pieces += 1
        return flight

    def _carry(self, push: Push, flight: Flight) -> bool:
        """Take a piece as far as it goes now; True when that is any further."""
        if flight.write is None:
            if not flight.copy.done:
                return False
            note = self._note(push, flight)
            if flight.local_slot is not None:
                flight.write = self._write(push, flight, flight.local_slot, note)
                return True
            self._engine.notify(push.target.where, note)
        elif flight.write.poll() == "pending":
            return False
        else:
            flight.write.close()
        self._land(push, flight)
        push.written += flight.count
        return True

    def _write(self, push: Push, flight: Flight, local_slot: int, note: bytes) -> Transfer:
        size = flight.copy.size
        return self._engine.write(
            self._staging.region, Spans.one(local_slot * self._staging.slot_bytes, size),
            push.target, Spans.one(flight.slot * push.slot_bytes, size),
            time.monotonic() + self._timeout_s, note,
        )  # fmt: skip

    def _note(self, push: Push, flight: Flight) -> bytes:
        agent = b"" if push.introduced else self._engine.metadata()
        push.introduced = True
        total = self._copier.checksum(flight.piece) if self._verify else None
        return _notes.encode(Piece(push.transfer_id, flight.slot, flight.first, flight.count, agent, total))

    def _land(self, push: Push, flight: Flight) -> None:
        push.flights.remove(flight)
        if flight.local_slot is not None:
            self._staging.give(flight.local_slot)

    def _fail(self, push: Push, cause: str) -> None:
        """End a push early. Its blocks are free on return: writes read staging, and gathering is waited for.

        While one of its writes is still under way the worker process is told just that, and the receiver nothing.
        """
        for flight in push.flights:
            flight.copy.wait()
        del self._pushes[push.transfer_id]
        self._closing.append((push, cause))
        self._close_failed()
        under_way = any(closing is push for closing, _ in self._closing)
        self._finish(push.engine_id, push.request_id, push.transfer_id, IN_FLIGHT if under_way else cause)

    def _close_failed(self) -> bool:
        """Once no write of a failed push is under way any more, tell its receiver.

        Cancelling one does not stop it for certain (UCX may go on with a put), so its end is waited for.
        """
        moved = False
        for push, cause in list(self._closing):
            for flight in list(push.flights):
                if _ended(flight.write):
                    self._land(push, flight)
                    moved = True
            if not push.flights:
                self._closing.remove((push, cause))
                if cause == PeerLost.cause:
                    self.lost(push.target.where)  # or its next push would meet the broken connection again
                else:
                    self._say_closed(push.target.where, push.transfer_id, cause)
                moved = True
        return moved

    def lost(self, peer: str) -> None:
        self._engine.disconnect(peer)

    def _say_closed(self, peer: str, transfer_id: int, cause: str) -> None:
        try:
            self._engine.notify(peer, _notes.encode(Closed(transfer_id, cause)))
        except TransferError:
            return  # the receiver is gone, and with it what it would have done with this

    def _finish(self, engine_id: str, request_id: str, transfer_id: int, cause: str, push: Push | None = None) -> None:
        """`push`: the one that was wholly written."""
        self._release(engine_id)
        if push is None:
            self._report(PushEnded(request_id, transfer_id, self._rank, cause))
            return
        self._report(
            PushEnded(
                request_id, transfer_id, self._rank,
                bytes=push.blocks * self._copier.block_bytes, pieces=push.pieces,
                path=self._engine.path(push.target.where), started_ns=push.started_ns, ended_ns=time.time_ns(),
            )
        )  # fmt: skip

    @property
    def active(self) -> bool:
        return bool(self._pushes or self._closing)

    @property
    def moving(self) -> bool:
        """Something is being written, or could be, and is not merely computed."""
        return any(push.flights or (push.queue and push.queue[0][2].passed) for push in self._pushes.values())

    def _release(self, engine_id: str) -> None:
        if engine_id not in self._ended:
            self._ended.add(engine_id)
            self.fresh.append(engine_id)

    def forget(self, engine_ids: set[str]) -> None:
        """vLLM has freed these prompts: no further step of them can come."""
        self._ended -= engine_ids
        self._preempted -= engine_ids

    def holds(self) -> dict[str, int]:
        """Blocks to be pushed, and blocks in staging that a failed push is still writing."""
        return {
            "push": sum(push.blocks - push.written for push in self._pushes.values()),
            "in_flight": sum(flight.count for push, _ in self._closing for flight in push.flights),
        }
