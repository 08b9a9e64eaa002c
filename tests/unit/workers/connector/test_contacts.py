from __future__ import annotations

import threading
from collections import Counter

import pytest
from nixl._api import nixl_agent

from tests.unit.workers.connector.pair import Side, pair, plan_receive, push, target_of
from workers.connector.protocol import Meet, PeerGone, Peers, PushEnded, ReceiveEnded, ReceiveOpened

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


def test_a_peer_that_never_answers_costs_nothing_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    read, polls = nixl_agent.get_new_notifs, Counter[int]()

    def counting(agent: nixl_agent) -> dict[str, list[bytes]]:
        polls[threading.get_ident()] += 1
        found: dict[str, list[bytes]] = read(agent)
        return found

    monkeypatch.setattr(nixl_agent, "get_new_notifs", counting)
    with pair(timeout_s=0.05) as (one, mute), pair(timeout_s=0.05) as (other, another):
        meet(one, mute)
        until(one, SILENT)
        before = dict(polls)
        meet(other, another)  # takes another deadline
        until(other, SILENT)
        assert polls.keys() > before.keys()
        assert {thread: polls[thread] for thread in before} == before


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
