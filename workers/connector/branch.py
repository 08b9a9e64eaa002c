"""What one rank sends to one rank of the decode worker: gathers pieces of the heads they share, writes them, ends.

At most one piece per granted slot is on its way; a slot is used again when the receiver credits it. While the model
still computes later layers of what is sent, nothing is asked again and again: whatever ends wakes the mover. Where the
receiver's staging can be addressed from here, on one host, a piece is gathered straight into it, and the write is only
its notification.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import msgspec
import torch

from dynamo_lite.plane.layout import KvLayout, share
from dynamo_lite.plane.wire import RankTarget
from workers.connector.contacts import Contacts
from workers.connector.cut import Cut, PieceSize, StepCuts
from workers.connector.protocol import Closed, Piece
from workers.connector.settings import MoverSettings
from workers.connector.staging import Staging
from workers.errors import Frozen, Mismatch, ReceiverSilent, TransferError, TransferTimeout
from workers.transfer.engine import Memory, PeerEngine, Spans, Target, Transfer
from workers.transfer.pack import Copier, Copy, Outlet
from workers.transfer.ready import StepReady
from workers.transfer.span import Span

_notes = msgspec.msgpack.Encoder()


@dataclass(slots=True)
class Flight:
    """One piece on its way: gathered, then written."""

    slot: int  # of the receiver
    cut: Cut
    piece: torch.Tensor  # where it is gathered
    copy: Copy
    local: range | None  # slots of our own; None: it is gathered straight into the receiver's
    write: Transfer | None = None

    @property
    def block_layers(self) -> int:
        return self.cut.count * len(self.cut.layers)

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
    size: PieceSize
    blocks: int  # of the receiver's, all there will be
    free_slots: deque[int]
    granted: frozenset[int]
    queue: deque[StepCuts] = field(default_factory=deque)
    flights: list[Flight] = field(default_factory=list)
    written: int = 0  # blocks, each layer of them counted
    introduced: bool = False
    waiting_since: float = field(default_factory=time.monotonic)  # last progress
    pieces: int = 0
    early_pieces: int | None = None  # those written when the last step of the prompt was computed, once it is
    started_ns: int = 0  # unix time of the first piece

    @property
    def done(self) -> bool:
        return self.written == self.blocks * self.size.layers

    @property
    def bytes(self) -> int:
        """Written."""
        return self.written * self.outlet.layer_bytes

    @property
    def tokens_left(self) -> int:
        """To be written, in whole blocks of the receiver's, of which a layer is missing at least."""
        return self._tokens(self.blocks * self.size.layers - self.written)

    @property
    def tokens_flying(self) -> int:
        return self._tokens(sum(flight.block_layers for flight in self.flights))

    def _tokens(self, block_layers: int) -> int:
        return -(-block_layers // self.size.layers) * self.outlet.block_size

    @property
    def late_pieces(self) -> int:
        """Those that were not written yet when the last step of the prompt was computed."""
        return self.pieces - (self.early_pieces or 0)

    @property
    def computing(self) -> bool:
        """The model still computes layers of what is to be sent: its kernels are being launched."""
        return bool(self.queue) and not self.queue[-1].ready.over

    @property
    def moving(self) -> bool:
        """Something is on its way, or could be, and is worth asking after again and again, or has to be: nothing wakes
        the mover at the end of a write.
        """
        if self.computing:
            return any(flight.write is not None for flight in self.flights)
        return bool(self.flights or self.sendable)

    @property
    def sendable(self) -> bool:
        """There is a piece that could be gathered now."""
        return bool(self.queue) and self.queue[0].sendable

    def add(self, first: int, span: Span, ready: StepReady) -> None:
        """Tokens that a step computes, from a block of the receiver's on, layer by layer."""
        if not self.queue and not self.flights:
            self.waiting_since = time.monotonic()  # the time before it was computed is not the receiver's
        self.queue.append(StepCuts(first, self.outlet.brought(span), ready, self.size))

    def look(self) -> None:
        """Take note of the moment at which the last step is found to be computed."""
        if self.early_pieces is None and self.queue and self.queue[-1].stop == self.blocks and not self.computing:
            self.early_pieces = self.pieces - len(self.flights)

    def credit(self, slot: int) -> None:
        if slot in self.granted and slot not in self.free_slots:
            self.free_slots.append(slot)
            self.waiting_since = time.monotonic()


class Carrier:
    """Moves branches on. Used by the mover's thread alone."""

    def __init__(
        self, engine: PeerEngine, contacts: Contacts, staging: Staging, copier: Copier, settings: MoverSettings,
        watch: Callable[[Copy], None],
    ) -> None:  # fmt: skip
        """`watch`: have the mover woken once that copy is done."""
        self._engine, self._contacts, self._staging, self._copier = engine, contacts, staging, copier
        self._watch = watch
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
            PieceSize.between(self._staging.slot_bytes, layout, rank, heads, target.slot_bytes), blocks,
            deque(target.slots), frozenset(target.slots),
        )  # fmt: skip

    def advance(self, branch: Branch) -> bool:
        """Poll and post; True when anything moved. Raises TransferError when it cannot go on."""
        moved = False
        for flight in list(branch.flights):
            moved |= self._carry(branch, flight)
        branch.look()
        met = self._contacts.met(branch.target.where)
        while met and branch.free_slots and branch.sendable:
            begun = self._gather(branch)
            if begun is None:
                break
            for flight in list(branch.flights):
                self._carry(branch, flight)  # earlier ones may be gathered by now, and the receiver waits for them
            moved = True
        if moved or (not branch.flights and (not branch.sendable or (met and branch.free_slots))):
            # In the latter cases it waits for the model, or for our own staging, not for the receiver.
            branch.waiting_since = time.monotonic()
        elif time.monotonic() - branch.waiting_since > self._timeout_s:
            raise ReceiverSilent(f"{branch.target.where} has emptied no slot for {self._timeout_s:g} s")
        return moved

    def _gather(self, branch: Branch) -> Flight | None:
        """Begin the next piece, in the granted slot if in reach, else in our own; None while those are full."""
        branch.look()
        cuts = branch.queue[0]
        cut = cuts.next()
        size = cut.count * len(cut.layers) * branch.outlet.layer_bytes
        if time.monotonic() > self.fence:
            raise Frozen("this process stood still; the receiver may use its slots for others by now")
        local, piece = None, self._engine.window(branch.target, self._offset(branch, branch.free_slots[0]), size)
        if piece is None:
            local = self._staging.run(size)
            if local is None:
                return None
            piece = self._staging.bytes_of(local)[:size]
        cuts.take(cut)
        if cuts.over:
            branch.queue.popleft()
        branch.started_ns = branch.started_ns or time.time_ns()
        copy = branch.outlet.gather(cut.span, cut.layers, piece)
        self._watch(copy)
        flight = Flight(branch.free_slots.popleft(), cut, piece, copy, local)
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
        branch.written += flight.block_layers
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
        heads, cut = branch.heads, flight.cut
        return _notes.encode(
            Piece(
                branch.transfer_id, flight.slot, cut.first, cut.count, heads.start, len(heads),
                cut.layers.start, len(cut.layers), agent, total,
            )
        )  # fmt: skip

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
