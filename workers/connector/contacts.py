"""First contact, and every one after it: transfer agents greet each other as soon as their instances know of each
other, so that the connection is wired up before the first request needs it. Belongs to the mover's thread.

A `Greeting` is numbered and its answer names the number, so an answer proves two things of the present connection: it
carries notifications both ways, and at its other end is the agent that was meant, not one that was started later under
the same address. Nothing is written to an agent that has not answered. One that does not answer, and one whose
connection was lost, is greeted again after growing pauses; one that is met, from time to time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from dynamo_lite.plane.wire import RankTarget
from workers.connector.protocol import Greeting, Peers
from workers.errors import Mismatch, PeerLost, StaleIncarnation, TransferError

_log = logging.getLogger(__name__)
_encode = msgspec.msgpack.Encoder().encode
_STATES = ("silent", "meeting", "met")  # the worst first
_CHECK_S = 10.0  # after an answer: an idle connection that breaks says nothing
# Between two greetings of one that does not answer. With UCX 1.23 every attempt to connect where no route leads costs
# the process a file descriptor for good (one where nobody answers does not), so the attempts must be few.
_LONGEST_PAUSE_S = 30.0
_LISTEN_S = 0.1  # polling for the answer of one that was silent before


class Reaching(Protocol):
    """What a contact needs of a transfer engine."""

    def connect(self, metadata: bytes) -> str: ...

    def renew(self, peer: str) -> None: ...

    def disconnect(self, peer: str) -> None: ...

    def notify(self, peer: str, payload: bytes) -> None: ...

    def metadata(self) -> bytes: ...


@dataclass(slots=True)
class Contact:
    """One agent of another worker."""

    incarnation: str
    metadata: bytes
    due: float  # when to greet it next
    pause_s: float  # from one greeting to the next, while it does not answer
    peer: str = ""  # agent name, once connected
    number: int = 0  # of the latest greeting
    sent: float = 0.0  # when that was
    waiting: bool = False  # its answer may still come in time
    answered: bool = False  # on the present connection
    silent: bool = False  # it did not answer in time, or could not be asked
    stale: bool = False  # the present connection is the one on which it did not answer
    unreachable: bool = False  # none could be made

    @property
    def state(self) -> str:
        return "met" if self.answered else "silent" if self.silent else "meeting"


class Contacts:
    """The agents that this rank may exchange KV with."""

    def __init__(self, engine: Reaching, rank: int, timeout_s: float, report: Callable[[Peers], None]) -> None:
        self._engine, self._rank, self._timeout_s, self._report = engine, rank, timeout_s, report
        self._contacts: dict[bytes, Contact] = {}  # by metadata
        self._by_peer: dict[str, Contact] = {}
        self._strangers: set[str] = set()  # agents that were answered, and that we may not have heard of otherwise
        self._reported: dict[str, int] = {}
        self._next = float("inf")  # when there is something to do

    @property
    def active(self) -> bool:
        """Whether an answer is to be polled for."""
        now = time.monotonic()
        return any(one.waiting and now - one.sent < self._listen_s(one) for one in self._contacts.values())

    def _listen_s(self, contact: Contact) -> float:
        """An answer that comes later is read when the mover next looks, as it does for every probe."""
        return self._timeout_s if contact.state == "meeting" else _LISTEN_S

    @property
    def idle_s(self) -> float | None:
        """How long there is nothing to do; None: until somebody is met."""
        return None if self._next == float("inf") else max(0.0, self._next - time.monotonic())

    def meet(self, incarnation: str, agents: Sequence[bytes]) -> None:
        """Greet every rank of a worker that was not greeted before."""
        for metadata in agents:
            self._add(incarnation, metadata)

    def _add(self, incarnation: str, metadata: bytes) -> Contact:
        contact = self._contacts.get(metadata)
        if contact is None:
            contact = self._contacts[metadata] = Contact(incarnation, metadata, time.monotonic(), self._timeout_s)
            self._plan()
        return contact

    def reach(self, target: RankTarget) -> str:
        """The agent's name, for a transfer to it; it is greeted at once unless it is met.

        Raises TransferError; PeerLost, without another attempt, where connecting has just failed.
        """
        contact = self._add(target.agent_name.partition(":")[0], target.agent)
        if contact.unreachable and time.monotonic() < contact.due:
            raise PeerLost(f"{target.agent_name} could not be connected a moment ago")
        if not contact.answered and not contact.waiting:
            self._greet(contact)
        return contact.peer

    def met(self, peer: str) -> bool:
        """Whether it is certain that what is written to this agent arrives there and nowhere else."""
        contact = self._by_peer.get(peer)
        return contact is not None and contact.answered

    def greeting(self, peer: str, note: Greeting) -> None:
        """What a peer sent. One that we have not heard of yet says itself how to answer it."""
        contact = self._by_peer.get(peer)
        if not note.answer:
            self._answer(peer, note)
            if contact is not None and not contact.answered and not contact.waiting:
                self._hurry(contact)  # it can be reached again
        elif contact is not None and note.number == contact.number:
            contact.answered, contact.waiting, contact.silent, contact.stale = True, False, False, False
            contact.pause_s, contact.due = self._timeout_s, time.monotonic() + _CHECK_S
            self._plan()
        self._tell()

    def agents(self, incarnation: str) -> set[str]:
        """Names of the agents of all of a worker's ranks that could be connected."""
        return {one.peer for one in self._contacts.values() if one.incarnation == incarnation and one.peer}

    def progress(self) -> None:
        """Greet the next agent: one a turn, as connecting takes some 10 ms, in which transfers stand still.

        Those that have not answered in time are not waited for any longer.
        """
        now = time.monotonic()
        if now < self._next:
            return
        for contact in self._contacts.values():
            if contact.waiting and now - contact.sent > self._timeout_s:
                contact.answered, contact.waiting, contact.silent, contact.stale = False, False, True, True
                contact.due = max(now, contact.sent + contact.pause_s)
                _log.info("%s did not answer within %.1f s", contact.peer, self._timeout_s)
        due = next((one for one in self._contacts.values() if one.due <= now), None)
        if due is not None:
            try:
                self._greet(due)
            except TransferError as error:
                _log.warning("no contact with an agent of %s: %s", due.incarnation, error)
        self._plan()
        self._tell()

    def doubt(self, peer: str) -> None:
        """It was silent in a transfer: find out whether the connection still carries anything."""
        contact = self._by_peer.get(peer)
        if contact is not None and not contact.waiting:
            self._hurry(contact)

    def _hurry(self, contact: Contact) -> None:
        contact.due = time.monotonic()
        self._plan()

    def lost(self, peer: str) -> None:
        """The connection to that agent broke: make another, and find out who is there."""
        contact = self._by_peer.get(peer)
        if contact is not None:
            contact.silent |= contact.waiting and not contact.answered  # it was the greeting that did not get there
            contact.answered = contact.waiting = contact.stale = False
            contact.due = max(time.monotonic(), contact.sent + contact.pause_s)
            self._plan()
            self._tell()

    def forget(self, incarnation: str) -> None:
        """That worker is gone: end the connections to it."""
        for contact in [one for one in self._contacts.values() if one.incarnation == incarnation]:
            self._drop(contact)
            self._engine.disconnect(contact.peer)
        for peer in [peer for peer in self._strangers if peer.startswith(f"{incarnation}:")]:
            self._strangers.discard(peer)
            self._engine.disconnect(peer)
        self._tell()

    def _drop(self, contact: Contact) -> None:
        del self._contacts[contact.metadata]
        self._by_peer.pop(contact.peer, None)
        self._plan()

    def _greet(self, contact: Contact) -> None:
        """Raises TransferError: for good when that is another process by now, or cannot be understood."""
        contact.sent = time.monotonic()
        if contact.silent:
            contact.pause_s = min(2 * contact.pause_s, _LONGEST_PAUSE_S)
        contact.due = contact.sent + contact.pause_s
        try:
            contact.unreachable = True
            contact.peer = self._engine.connect(contact.metadata)
            contact.unreachable = False
            self._by_peer[contact.peer] = contact
            if contact.stale:
                self._engine.renew(contact.peer)
            contact.stale, contact.number = False, contact.number + 1
            self._engine.notify(contact.peer, _encode(Greeting(False, contact.number, self._engine.metadata())))
            contact.waiting = True
        except (Mismatch, StaleIncarnation):
            self._drop(contact)
            raise
        except TransferError:
            contact.silent = True
            raise
        finally:
            self._plan()
            self._tell()

    def _answer(self, peer: str, note: Greeting) -> None:
        answer = _encode(Greeting(True, note.number))
        try:
            self._strangers.add(self._engine.connect(note.agent))
            try:
                self._engine.notify(peer, answer)
            except PeerLost:  # ours broke while nothing was sent: theirs has not
                self._engine.notify(self._engine.connect(note.agent), answer)
        except TransferError as error:
            _log.info("could not answer %s: %s", peer, error)

    def _plan(self) -> None:
        """Work out when there is something to do, only when that may have changed."""
        late = [one.sent + self._timeout_s for one in self._contacts.values() if one.waiting]
        self._next = min([*late, *(one.due for one in self._contacts.values())], default=float("inf"))

    def _tell(self) -> None:
        """Report the number of workers by state: that of a worker is the least of its ranks'."""
        states: dict[str, set[str]] = {}
        for contact in self._contacts.values():
            if contact.sent:
                states.setdefault(contact.incarnation, set()).add(contact.state)
        worst = [next(state for state in _STATES if state in ranks) for ranks in states.values()]
        counted = {state: worst.count(state) for state in _STATES}
        if counted != self._reported:
            self._reported = counted
            self._report(Peers(self._rank, counted))
