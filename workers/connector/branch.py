"""What one rank sends to one rank of the decode worker: gathers pieces of the heads they share, writes them, ends.

At most one piece per granted slot is on its way; a slot is used again when the receiver credits it. Where the
receiver's staging can be addressed from here, on one host, a piece is gathered straight into it, and the write is only
its notification.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import cast

import msgspec
import torch

from dynamo_lite.plane.layout import KvLayout, share
from dynamo_lite.plane.wire import RankTarget
from workers.connector.contacts import Contacts
from workers.connector.protocol import Closed, Piece
from workers.connector.settings import MoverSettings
from workers.connector.staging import Staging
from workers.errors import Frozen, Mismatch, ReceiverSilent, TransferError, TransferTimeout
from workers.transfer.engine import Memory, PeerEngine, Spans, Target, Transfer
from workers.transfer.pack import Copier, Copy, Outlet
from workers.transfer.ready import Ready
from workers.transfer.span import Span

_notes = msgspec.msgpack.Encoder()


@dataclass(slots=True)
class Flight:
    """One piece on its way: gathered, then written."""

    slot: int  # of the receiver
    first: int  # block of the transfer
    count: int  # blocks of the receiver's
    piece: torch.Tensor  # where it is gathered
    copy: Copy
    local: range | None  # slots of our own; None: it is gathered straight into the receiver's
    write: Transfer | None = None

    @property
    def over(self) -> bool:
        """Whether its write has ended, well or badly, and is released."""
        if self.write is None:
            return True
        try:
            if self.write.poll() == "pending":
                return False
        except TransferTimeout:
            return False  # late, but under way
        except TransferError:
            pass  # over, badly: the push has failed already
        try:
            self.write.close()
        except TransferError:
            return False
        return True


@dataclass(slots=True)
class Branch:
    """One prompt's part for one rank of the decode worker."""

    transfer_id: int
    target: Target  # the receiver's staging
    heads: range  # of the model
    outlet: Outlet
    slot_bytes: int  # of the receiver's slots
    share: range  # the bytes of each of them that are ours
    piece_blocks: int  # the most in one piece
    blocks: int  # of the receiver's, all there will be
    free_slots: deque[int]
    granted: frozenset[int]
    queue: deque[tuple[int, Span, Ready]] = field(default_factory=deque)  # first block, tokens, when readable
    flights: list[Flight] = field(default_factory=list)
    written: int = 0  # blocks
    introduced: bool = False
    waiting_since: float = field(default_factory=time.monotonic)  # last progress
    pieces: int = 0
    started_ns: int = 0  # unix time of the first piece

    @property
    def done(self) -> bool:
        return self.written == self.blocks

    @property
    def bytes(self) -> int:
        """Written."""
        return self.written * self.outlet.block_bytes

    @property
    def tokens_left(self) -> int:
        """To be written, in whole blocks of the receiver's."""
        return (self.blocks - self.written) * self.outlet.block_size

    @property
    def tokens_flying(self) -> int:
        return sum(flight.count for flight in self.flights) * self.outlet.block_size

    @property
    def moving(self) -> bool:
        """Something is being written, or could be, and is not merely computed."""
        return bool(self.flights or (self.queue and self.queue[0][2].passed))

    def add(self, first: int, span: Span, ready: Ready) -> None:
        """Tokens that were computed by `ready`, from a block of the receiver's on."""
        span = self.outlet.brought(span)
        if not self.queue and not self.flights:
            self.waiting_since = time.monotonic()  # the time it took to compute is not the receiver's
        self.queue.append((first, span, ready))

    def credit(self, slot: int) -> None:
        if slot in self.granted and slot not in self.free_slots:
            self.free_slots.append(slot)
            self.waiting_since = time.monotonic()


class Carrier:
    """Moves branches on. Used by the mover's thread alone."""

    def __init__(
        self, engine: PeerEngine, contacts: Contacts, staging: Staging, copier: Copier, settings: MoverSettings
    ) -> None:
        self._engine, self._contacts, self._staging, self._copier = engine, contacts, staging, copier
        self._timeout_s, self._verify = settings.timeout_s, settings.verify
        self.fence = 0.0  # nothing is written after this time: the mover moves it on while it runs

    def open(
        self, transfer_id: int, target: RankTarget, layout: KvLayout, rank: int, heads: range, blocks: int
    ) -> Branch:
        """A branch to `rank` of a worker of that layout. Raises TransferError, Mismatch where no block fits."""
        outlet = self._copier.outlet(layout, heads)
        mine = share(layout, rank, heads, target.slot_bytes)
        if len(mine) < outlet.block_bytes or self._staging.size < outlet.block_bytes:
            raise Mismatch("one block of the receiver's does not fit into the staging of both sides")
        peer = self._contacts.reach(target)
        return Branch(
            transfer_id,
            Target(
                peer, (max(target.slots, default=0) + 1) * target.slot_bytes,
                target.address, target.device, cast(Memory, target.memory),
            ),
            heads, outlet, target.slot_bytes, mine,
            max(1, min(len(mine), self._staging.slot_bytes) // outlet.block_bytes), blocks,
            deque(target.slots), frozenset(target.slots),
        )  # fmt: skip

    def advance(self, branch: Branch) -> bool:
        """Poll and post; True when anything moved. Raises TransferError when it cannot go on."""
        moved = False
        for flight in list(branch.flights):
            moved |= self._carry(branch, flight)
        met = self._contacts.met(branch.target.where)
        while met and branch.queue and branch.free_slots and branch.queue[0][2].passed:
            begun = self._gather(branch)
            if begun is None:
                break
            for flight in list(branch.flights):
                self._carry(branch, flight)  # earlier ones may be gathered by now, and the receiver waits for them
            moved = True
        if moved or (met and branch.queue and branch.free_slots and not branch.flights):
            # In the latter case it waits for our own staging or the GPU, not for the receiver.
            branch.waiting_since = time.monotonic()
        elif (branch.queue or branch.flights) and time.monotonic() - branch.waiting_since > self._timeout_s:
            raise ReceiverSilent(f"{branch.target.where} has emptied no slot for {self._timeout_s:g} s")
        return moved

    def _gather(self, branch: Branch) -> Flight | None:
        """Begin the next piece, in the granted slot if in reach, else in our own; None while those are full."""
        first, span, ready = branch.queue[0]
        tokens = branch.piece_blocks * branch.outlet.block_size
        head, rest = span.head(tokens), span.rest(tokens)
        count = -(-head.tokens // branch.outlet.block_size)
        size = count * branch.outlet.block_bytes
        if time.monotonic() > self.fence:
            raise Frozen("this process stood still; the receiver may use its slots for others by now")
        local, piece = None, self._engine.window(branch.target, self._offset(branch, branch.free_slots[0]), size)
        if piece is None:
            local = self._staging.run(size)
            if local is None:
                return None
            piece = self._staging.bytes_of(local)[:size]
        branch.queue.popleft()
        if rest.tokens:
            branch.queue.appendleft((first + count, rest, ready))
        branch.started_ns = branch.started_ns or time.time_ns()
        copy = branch.outlet.gather(head, piece, ready)
        flight = Flight(branch.free_slots.popleft(), first, count, piece, copy, local)
        branch.flights.append(flight)
        branch.pieces += 1
        return flight

    @staticmethod
    def _offset(branch: Branch, slot: int) -> int:
        return slot * branch.slot_bytes + branch.share.start

    def _carry(self, branch: Branch, flight: Flight) -> bool:
        """Take a piece as far as it goes now; True when that is any further."""
        if flight.write is None:
            if not flight.copy.done:
                return False
            note = self._note(branch, flight)
            if flight.local is not None:
                flight.write = self._write(branch, flight, flight.local, note)
                return True
            self._engine.notify(branch.target.where, note)
        elif flight.write.poll() == "pending":
            return False
        else:
            flight.write.close()
        self._land(branch, flight)
        branch.written += flight.count
        return True

    def _write(self, branch: Branch, flight: Flight, local: range, note: bytes) -> Transfer:
        size = flight.copy.size
        return self._engine.write(
            self._staging.region, Spans.one(local.start * self._staging.slot_bytes, size),
            branch.target, Spans.one(self._offset(branch, flight.slot), size),
            time.monotonic() + self._timeout_s, note,
        )  # fmt: skip

    def _note(self, branch: Branch, flight: Flight) -> bytes:
        agent = b"" if branch.introduced else self._engine.metadata()
        branch.introduced = True
        total = self._copier.checksum(flight.piece) if self._verify else None
        heads = branch.heads
        return _notes.encode(
            Piece(branch.transfer_id, flight.slot, flight.first, flight.count, heads.start, len(heads), agent, total)
        )

    def _land(self, branch: Branch, flight: Flight) -> None:
        branch.flights.remove(flight)
        if flight.local is not None:
            self._staging.give(*flight.local)

    def settle(self, branch: Branch) -> bool:
        """Of a branch that has failed: take note of writes that are over; True when none is under way any more.

        Cancelling one does not stop it for certain (UCX may go on with a put), so its end is waited for.
        """
        for flight in list(branch.flights):
            if flight.over:
                self._land(branch, flight)
        return not branch.flights

    def path(self, branch: Branch) -> str:
        return self._engine.path(branch.target.where)

    def say_closed(self, peer: str, transfer_id: int, cause: str) -> None:
        try:
            ranks = self._copier.layout.tensor_parallel
            self._engine.notify(peer, _notes.encode(Closed(transfer_id, cause, ranks)))
        except TransferError:
            return  # a receiver that is not gone asks again
