"""Staging slots of transfers that ended early: someone may still write to them.

They are free again once every rank of the sender has closed the transfer, or is known to be gone.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from workers.connector.staging import Staging

_GONE_KEPT = 1024


@dataclass(slots=True)
class Held:
    """The slots of one transfer."""

    slots: tuple[int, ...]
    closers: set[str]  # agents that write nothing more
    peer: str = ""  # incarnation of the sender, once known
    closed: bool = False  # by all of its ranks


class Quarantine:
    """Belongs to the receiver. Slots that are free again are given back by `progress`."""

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self._held: dict[int, Held] = {}  # by transfer id
        self._gone: OrderedDict[str, None] = OrderedDict()  # incarnations, the latest ones

    def put(self, transfer_id: int, slots: tuple[int, ...], closers: set[str], peer: str, closed: bool) -> None:
        """`peer`: incarnation of the sender, if known; `closed`: it writes nothing more."""
        self._held[transfer_id] = Held(slots, closers, peer, closed)

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
        """Whether that process no longer exists: nothing of it can arrive any more."""
        return incarnation in self._gone

    def progress(self) -> bool:
        """Give back the slots to which nobody writes any more; True when there were any."""
        free = [transfer_id for transfer_id, held in self._held.items() if held.closed]
        for transfer_id in free:
            self._staging.give(*self._held.pop(transfer_id).slots)
        return bool(free)

    @property
    def slots(self) -> int:
        return sum(len(held.slots) for held in self._held.values())
