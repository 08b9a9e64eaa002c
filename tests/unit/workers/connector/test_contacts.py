from __future__ import annotations

import select
import time
from itertools import pairwise

import msgspec
import pytest
from nixl._api import nixl_agent

from tests.unit.workers.connector.pair import Side, pair, plan_receive, push, target_of
from tests.unit.workers.connector.reports import WAIT_S
from workers.connector.protocol import Greeting, Meet, PeerGone, Peers, PushEnded, ReceiveEnded, ReceiveOpened
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
