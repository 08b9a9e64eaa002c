"""First contact: transfer agents greet each other as soon as their instances know of each other, so that the connection
is wired up before the first request needs it. Belongs to the mover's thread.

Each side asks with a `Greeting` and answers the other's. An agent is met once both ways have carried one. One that does
not answer within the timeout is left alone: the first transfer will connect to it, or fail, by itself.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from workers.connector.protocol import Greeting, Peers
from workers.errors import TransferError

_log = logging.getLogger(__name__)
_encode = msgspec.msgpack.Encoder().encode
_STATES = ("silent", "meeting", "met")  # the worst first


class Reaching(Protocol):
    """What a first contact needs of a transfer engine."""

    def connect(self, metadata: bytes) -> str: ...

    def disconnect(self, peer: str) -> None: ...

    def notify(self, peer: str, payload: bytes) -> None: ...


@dataclass(slots=True)
class Contact:
    """One agent of another worker."""

    incarnation: str
    since: float
    greeted: bool = False  # it has asked
    answered: bool = False  # it has answered
    silent: bool = False  # it has not, in time

    @property
    def met(self) -> bool:
        return self.greeted and self.answered

    @property
    def state(self) -> str:
        return "met" if self.met else "silent" if self.silent else "meeting"


class Contacts:
    """The agents that this rank may exchange KV with."""

    def __init__(self, engine: Reaching, rank: int, timeout_s: float, report: Callable[[Peers], None]) -> None:
        self._engine, self._rank, self._timeout_s, self._report = engine, rank, timeout_s, report
        self._waiting: deque[tuple[str, bytes]] = deque()  # (incarnation, metadata) of agents to be greeted
        self._contacts: dict[str, Contact] = {}  # by agent name
        self._early: set[str] = set()  # agents that have asked before we knew of them
        self._reported: dict[str, int] = {}

    @property
    def active(self) -> bool:
        """Whether there is somebody to greet, or an answer is still waited for."""
        return bool(self._waiting) or any(contact.state == "meeting" for contact in self._contacts.values())

    def meet(self, incarnation: str, agents: Sequence[bytes]) -> None:
        """Greet every rank of a worker that was not greeted before."""
        self._waiting.extend((incarnation, metadata) for metadata in agents)

    def greeting(self, peer: str, note: Greeting) -> None:
        """What a peer sent. One that we do not know of yet is answered as soon as we do."""
        contact = self._contacts.get(peer)
        if contact is not None and note.answer:
            contact.answered = True
        elif contact is not None:
            self._asked(peer, contact)
        elif not note.answer:
            self._early.add(peer)
        self._tell()

    def agents(self, incarnation: str) -> set[str]:
        """Names of the agents of all of a worker's ranks that could be connected."""
        return {peer for peer, contact in self._contacts.items() if contact.incarnation == incarnation}

    def progress(self) -> None:
        """Greet the next agent: one a turn, as connecting takes some 10 ms, in which transfers stand still.

        Those that have not answered in time are not waited for any longer.
        """
        if self._waiting:
            self._greet(*self._waiting.popleft())
        now = time.monotonic()
        late = [
            (peer, contact)
            for peer, contact in self._contacts.items()
            if contact.state == "meeting" and now - contact.since > self._timeout_s
        ]
        for peer, contact in late:
            contact.silent = True
            _log.info("%s did not answer within %.1f s", peer, self._timeout_s)
        if late:
            self._tell()

    def _greet(self, incarnation: str, metadata: bytes) -> None:
        try:
            peer = self._engine.connect(metadata)
            if peer in self._contacts:
                return
            contact = self._contacts[peer] = Contact(incarnation, time.monotonic())
            self._engine.notify(peer, _encode(Greeting(answer=False)))
            if peer in self._early:
                self._early.discard(peer)
                self._asked(peer, contact)
        except TransferError as error:
            _log.warning("no contact with an agent of %s: %s", incarnation, error)
        self._tell()

    def forget(self, incarnation: str) -> None:
        """That worker is gone: end the connections to it."""
        self._waiting = deque(each for each in self._waiting if each[0] != incarnation)
        for peer in [peer for peer, contact in self._contacts.items() if contact.incarnation == incarnation]:
            del self._contacts[peer]
            self._engine.disconnect(peer)
        self._early = {peer for peer in self._early if not peer.startswith(f"{incarnation}:")}
        self._tell()

    def _asked(self, peer: str, contact: Contact) -> None:
        contact.greeted = True
        try:
            self._engine.notify(peer, _encode(Greeting(answer=True)))
        except TransferError as error:
            _log.info("could not answer %s: %s", peer, error)

    def _tell(self) -> None:
        """Report the number of workers by state: that of a worker is the least of its ranks'."""
        states: dict[str, set[str]] = {}
        for contact in self._contacts.values():
            states.setdefault(contact.incarnation, set()).add(contact.state)
        worst = [next(state for state in _STATES if state in ranks) for ranks in states.values()]
        counted = {state: worst.count(state) for state in _STATES}
        if counted != self._reported:
            self._reported = counted
            self._report(Peers(self._rank, counted))
