from __future__ import annotations

import select
from collections.abc import Iterator

import pytest

from workers.errors import PeerLost, TransferError
from workers.transfer.engine import Notification
from workers.transfer.near import NearNotes

WAIT_S = 10.0


@pytest.fixture
def agents() -> Iterator[tuple[NearNotes, NearNotes]]:
    """ "a", connected to "b"."""
    one, other = NearNotes("a"), NearNotes("b")
    assert one.connect("b", other.address)
    yield one, other
    one.close()
    other.close()


def wait(agent: NearNotes) -> list[Notification]:
    found: list[Notification] = []
    while not found:  # a new connection wakes as well
        assert select.select([agent], [], [], WAIT_S)[0], "nothing came"
        found = agent.receive()
    return found


def test_notes_arrive_whole_in_order_and_with_their_senders_name(agents: tuple[NearNotes, NearNotes]) -> None:
    one, other = agents
    sent = [b"x" * size for size in (1, 70_000, 3)]
    for payload in sent:
        one.send("b", payload)
    assert wait(other) == [Notification("a", payload) for payload in sent]
    assert other.receive() == []


def test_whoever_waits_is_woken_by_a_note(agents: tuple[NearNotes, NearNotes]) -> None:
    one, other = agents
    other.receive()
    assert not select.select([other], [], [], 0)[0]
    one.send("b", b"wake up")
    assert wait(other) == [Notification("a", b"wake up")]


def test_telling_an_agent_that_has_ended_is_a_lost_peer(agents: tuple[NearNotes, NearNotes]) -> None:
    one, other = agents
    other.close()
    with pytest.raises(PeerLost):
        one.send("b", b"hello")
    assert not one.connect("b", other.address)


def test_notes_of_an_agent_that_has_ended_are_still_read(agents: tuple[NearNotes, NearNotes]) -> None:
    one, other = agents
    one.send("b", b"last words")
    one.close()
    assert wait(other) == [Notification("a", b"last words")]
    assert other.receive() == []
    assert not select.select([other], [], [], 0)[0]


def test_an_agent_that_reads_nothing_does_not_hold_up_who_tells_it(agents: tuple[NearNotes, NearNotes]) -> None:
    one, other = agents

    def fill() -> None:
        for _ in range(10_000):
            one.send("b", b"x" * 1000)

    with pytest.raises(TransferError, match="reads no notifications"):
        fill()
    assert wait(other)
    one.send("b", b"again")


def test_a_peer_may_be_connected_to_again(agents: tuple[NearNotes, NearNotes]) -> None:
    one, other = agents
    one.send("b", b"1")
    assert one.connect("b", other.address)
    one.send("b", b"2")
    found = wait(other)
    while len(found) < 2:
        found += wait(other)
    assert {note.payload for note in found} == {b"1", b"2"}
