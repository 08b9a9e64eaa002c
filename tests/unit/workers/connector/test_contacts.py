from __future__ import annotations

import select
import time
from itertools import pairwise

import msgspec
import pytest
from nixl._api import nixl_agent

from dynamo_lite.plane.wire import RankTarget
from tests.unit.workers.connector.pair import Side, pair, plan_receive, push, target_of
from tests.unit.workers.connector.reports import WAIT_S
from workers.connector.contacts import Contacts
from workers.connector.protocol import Greeting, Meet, PeerGone, Peers, PushEnded, ReceiveEnded, ReceiveOpened
from workers.errors import PeerLost
from workers.transfer.fabric import Fabric

MET, MEETING = {"met": 1, "meeting": 0, "silent": 0}, {"met": 0, "meeting": 1, "silent": 0}
SILENT, NOBODY = {"met": 0, "meeting": 0, "silent": 1}, {"met": 0, "meeting": 0, "silent": 0}


def meet(side: Side, other: Side) -> None:
    side.mover.command(Meet("the other", (other.mover.agent,)))


def until(side: Side, workers: dict[str, int]) -> None:
    """Wait for a mover to report these."""
    seen: list[dict[str, int]] = []
    while not seen or seen[-1] != workers:
        seen.append(side.reports.take(Peers).workers)


def test_two_workers_have_met_before_any_transfer_and_the_first_one_connects_to_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    added: list[bytes] = []
    with pair() as (sender, receiver):
        meet(sender, receiver)
        meet(receiver, sender)
        until(sender, MET)
        until(receiver, MET)
        monkeypatch.setattr(nixl_agent, "add_remote_agent", lambda _, metadata: added.append(metadata))
        plan_receive(receiver, [3, 4])
        push(sender, target_of(receiver.reports.take(ReceiveOpened)), [1, 2])
        assert receiver.reports.take(ReceiveEnded).cause == ""
        assert sender.reports.take(PushEnded).cause == ""
    assert added == []


def test_whoever_hears_of_the_other_later_answers_what_it_was_asked_before() -> None:
    with pair() as (sender, receiver):
        meet(sender, receiver)
        until(sender, MEETING)
        meet(receiver, sender)
        until(receiver, MET)
        until(sender, MET)


def test_meeting_again_changes_nothing() -> None:
    with pair() as (sender, receiver):
        for _ in range(2):
            meet(sender, receiver)
            meet(receiver, sender)
        until(sender, MET)
        until(receiver, MET)
        assert sender.reports.latest(Peers) is None


def next_greeting(agent: Fabric) -> tuple[float, Greeting]:
    """That an agent without a mover gets, and when."""
    deadline = time.monotonic() + WAIT_S
    while not (found := agent.notifications()):
        assert time.monotonic() < deadline, "no greeting came"
        select.select([agent.fileno()], [], [], 0.01)
    return time.monotonic(), msgspec.msgpack.decode(found[-1].payload, type=Greeting)


def test_a_peer_that_does_not_answer_is_greeted_again_after_ever_longer_pauses_and_met_when_it_does() -> None:
    mute = Fabric("mute:0")
    with pair(timeout_s=0.05) as (one, _):
        one.mover.command(Meet("mute", (mute.metadata(),)))
        until(one, SILENT)
        greetings = [next_greeting(mute) for _ in range(5)]
        pauses = [later - earlier for (earlier, _), (later, _) in pairwise(greetings)]
        assert all(pause > 0.04 * 2**index for index, pause in enumerate(pauses[1:])), pauses
        assert one.reports.latest(Peers) is None, "it is silent still"
        peer, (_, latest) = mute.connect(one.mover.agent), greetings[-1]
        mute.notify(peer, msgspec.msgpack.encode(Greeting(answer=True, number=latest.number - 1)))
        mute.notify(peer, msgspec.msgpack.encode(Greeting(answer=True, number=latest.number)))
        until(one, MET)
    mute.close()


def test_a_peer_that_is_gone_is_forgotten() -> None:
    with pair() as (sender, receiver):
        meet(sender, receiver)
        meet(receiver, sender)
        until(sender, MET)
        sender.mover.command(PeerGone("the other"))
        until(sender, NOBODY)


def test_a_worker_counts_as_met_only_with_all_of_its_ranks() -> None:
    with pair() as (sender, receiver), pair() as (another, _):
        sender.mover.command(Meet("two ranks", (receiver.mover.agent, another.mover.agent)))
        meet(receiver, sender)
        until(receiver, MET)
        until(sender, MEETING)
        meet(another, sender)
        until(sender, MET)


def test_metadata_that_cannot_be_read_is_passed_over() -> None:
    with pair() as (sender, receiver):
        sender.mover.command(Meet("unreadable", (b"nonsense",)))
        meet(sender, receiver)
        meet(receiver, sender)
        until(sender, MET)


class Wires:
    """An engine all of whose peers are cut off, until they are `there`."""

    def __init__(self) -> None:
        self.there, self.attempts, self.renewed = False, 0, 0
        self.sent: list[Greeting] = []

    def metadata(self) -> bytes:
        return b"me"

    def connect(self, metadata: bytes) -> str:
        self.attempts += 1
        if not self.there:
            raise PeerLost("no route")
        return "peer:0"

    def renew(self, peer: str) -> None:
        self.renewed += 1

    def disconnect(self, peer: str) -> None:
        pass

    def notify(self, peer: str, payload: bytes) -> None:
        self.sent.append(msgspec.msgpack.decode(payload, type=Greeting))


TARGET = RankTarget(b"card", "peer:0", 0, 0, "DRAM", 64, (0,))


def test_pushes_to_a_peer_that_could_not_be_connected_fail_without_another_attempt_until_it_is_due() -> None:
    wires = Wires()
    contacts = Contacts(wires, 0, 0.05, lambda _: None)
    for _ in range(3):
        with pytest.raises(PeerLost):
            contacts.reach(TARGET)
    assert wires.attempts == 1
    wires.there = True
    deadline = time.monotonic() + WAIT_S
    while not wires.sent:
        assert time.monotonic() < deadline
        contacts.progress()
    assert contacts.reach(TARGET) == "peer:0"
    assert not contacts.met("peer:0"), "it has not answered"
    contacts.greeting("peer:0", Greeting(answer=True, number=wires.sent[-1].number))
    assert contacts.met("peer:0")


def test_a_peer_that_was_silent_in_a_transfer_is_greeted_at_once_and_connected_anew_when_it_does_not_answer() -> None:
    wires = Wires()
    wires.there = True
    contacts = Contacts(wires, 0, 0.05, lambda _: None)
    contacts.reach(TARGET)
    contacts.greeting("peer:0", Greeting(answer=True, number=1))
    contacts.progress()
    assert len(wires.sent) == 1, "nothing is due"
    contacts.doubt("peer:0")
    contacts.progress()
    assert len(wires.sent) == 2
    assert contacts.met("peer:0"), "until it proves to be silent"
    deadline = time.monotonic() + WAIT_S
    while len(wires.sent) < 3:
        assert time.monotonic() < deadline
        contacts.progress()
    assert not contacts.met("peer:0")
    assert wires.renewed == 1
    contacts.greeting("peer:0", Greeting(answer=True, number=2))
    assert not contacts.met("peer:0"), "that was asked on the connection before"
