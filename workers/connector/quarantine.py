"""Staging slots of transfers that ended early: someone may still write to them.

They are free again once every rank of the sender has closed the transfer, or is known to be gone. Until then the ranks
are asked from time to time, as their word may be lost with a connection. Where bytes come through sockets the slots
then stay for another moment: what a connection that broke has brought to this host may still be read from its socket.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from dataclasses import dataclass

import msgspec

from workers.connector.contacts import Contacts
from workers.connector.protocol import UNWANTED, Refused
from workers.connector.staging import Staging
from workers.errors import TransferError
from workers.transfer.engine import PeerEngine

_log = logging.getLogger(__name__)
_encode = msgspec.msgpack.Encoder().encode
_GONE_KEPT = 1024
_DRAIN_S = 0.1  # of polling
_DRAIN_STEP_S = 0.002  # at most so much of it in one turn: a process that stood still has read nothing meanwhile


@dataclass(slots=True)
class Held:
    """The slots of one transfer."""

    slots: tuple[int, ...]
    senders: set[str]  # agents that have written
    closers: set[str]  # agents that write nothing more
    peer: str  # incarnation of the sender, once known
    closed: bool  # by all of its ranks
    ask_at: float = 0.0  # when to ask them next
    draining_s: float = _DRAIN_S  # once closed


class Quarantine:
    """Belongs to the receiver. Slots that are free again are given back by `progress`."""

    def __init__(self, engine: PeerEngine, contacts: Contacts, staging: Staging, timeout_s: float) -> None:
        """`timeout_s`: the time after which a sender is asked again."""
        self._engine, self._contacts, self._staging, self._timeout_s = engine, contacts, staging, timeout_s
        self._held: dict[int, Held] = {}  # by transfer id
        self._gone: OrderedDict[str, None] = OrderedDict()  # incarnations, the latest ones
        self._looked = time.monotonic()

    def put(self, transfer_id: int, held: Held) -> None:
        self._held[transfer_id] = held

    def settle(self, transfer_id: int, peer: str, closed: bool) -> None:
        """What is known of the sender of a transfer."""
        held = self._held.get(transfer_id)
        if held is not None:
            held.peer, held.closed = peer, held.closed or closed

    def closed(self, transfer_id: int, sender: str, ranks: int) -> None:
        """One of so many ranks has closed it."""
        held = self._held.get(transfer_id)
        if held is not None:
            held.closers.add(sender)
            held.closed |= len(held.closers) >= ranks

    def peer_gone(self, incarnation: str) -> None:
        self._gone[incarnation] = None  # it may be asked once more before everybody knows
        if len(self._gone) > _GONE_KEPT:
            self._gone.popitem(last=False)
        for held in self._held.values():
            held.closed |= held.peer == incarnation

    def peer_back(self, incarnation: str) -> None:
        """It had only lost its lease."""
        self._gone.pop(incarnation, None)

    def gone(self, incarnation: str) -> bool:
        """Whether that process no longer exists: nothing of it can be written any more."""
        return incarnation in self._gone

    def progress(self) -> bool:
        """Give back the slots to which nobody writes any more, and ask after the others; True when any were."""
        now, free = time.monotonic(), list[int]()
        for transfer_id, held in self._held.items():
            if held.closed:
                held.draining_s -= min(now - self._looked, _DRAIN_STEP_S) if self._engine.polled else _DRAIN_S
                if held.draining_s <= 0:
                    free.append(transfer_id)
            elif held.peer and held.ask_at <= now:
                held.ask_at = now + self._timeout_s
                self._ask(transfer_id, held)
        for transfer_id in free:
            self._staging.give(*self._held.pop(transfer_id).slots)
        self._looked = now
        return bool(free)

    def _ask(self, transfer_id: int, held: Held) -> None:
        """Have every rank of the sender say, once it can, that it writes nothing more."""
        for peer in (held.senders | self._contacts.agents(held.peer)) - held.closers:
            try:
                self._engine.notify(peer, _encode(Refused(transfer_id, UNWANTED)))
            except TransferError as error:
                _log.info("%s cannot be asked to end transfer %d: %s", peer, transfer_id, error)

    @property
    def slots(self) -> int:
        return sum(len(held.slots) for held in self._held.values())
