"""Transfers between two processes, one of which is killed or frozen in the middle."""

from __future__ import annotations

from tests.integration.workers.exchange import (
    LOST,
    PLACED,
    SENT,
    WAYS,
    Way,
    acquainted,
    begin,
    completes,
    completes_again,
    give_up,
)
from tests.integration.workers.mover_process import TIMEOUT_S, movers, rest, within
from workers.connector.protocol import PeerGone, PushEnded


@WAYS
def test_a_killed_sender_costs_its_receiver_nothing_but_another_attempt(way: Way) -> None:
    with movers(way) as start:
        sender, another, receiver = acquainted(start(1000), start(2000), start(3000))
        begin(sender, receiver)
        sender.kill()
        give_up(receiver, sender)
        completes(another, receiver)
        receiver.look()
        assert receiver.reports.holding("quarantine") > 0, "nobody has said yet that it is gone"
        receiver.command(PeerGone(sender.incarnation))
        rest(receiver, another)


@WAYS
def test_what_a_frozen_sender_writes_after_it_thaws_shows_in_no_block(way: Way) -> None:
    with movers(way) as start:
        sender, another, receiver = acquainted(start(1000), start(2000), start(3000))
        begin(sender, receiver)
        with sender.frozen():
            give_up(receiver, sender)
            completes(another, receiver)
            receiver.look()
            assert receiver.reports.holding("quarantine") > 0, "it may still write"
        sender.push_ends_with("frozen", "unwanted", *LOST)
        rest(receiver, sender, another)
        assert receiver.values(PLACED) == another.expected(SENT)
        completes(sender, receiver, 1024)


@WAYS
def test_a_frozen_receiver_keeps_transfers_to_others_waiting_for_no_moment(way: Way) -> None:
    with movers(way) as start:
        sender, frozen, another = acquainted(start(1000), start(2000), start(3000))
        begin(sender, frozen)
        with frozen.frozen():
            with within(TIMEOUT_S):
                completes(sender, another)
            assert sender.reports.take(PushEnded, "r").cause in LOST
            with within(TIMEOUT_S):
                completes(sender, another, 1024)
        give_up(frozen, sender)
        rest(sender, frozen, another)


@WAYS
def test_a_sender_ends_within_its_deadline_when_its_receiver_is_killed(way: Way) -> None:
    with movers(way) as start:
        sender, receiver, another = acquainted(start(1000), start(2000), start(3000))
        begin(sender, receiver)
        receiver.kill()
        sender.push_ends_with(*LOST)
        rest(sender)
        completes(sender, another)


@WAYS
def test_a_sender_ends_within_its_deadline_when_its_receiver_is_frozen_and_serves_it_when_it_thaws(way: Way) -> None:
    with movers(way) as start:
        sender, receiver = acquainted(start(1000), start(2000))
        begin(sender, receiver)
        with receiver.frozen():
            sender.push_ends_with(*LOST)
            sender.releases("push")
        give_up(receiver, sender)
        rest(receiver, sender)
        completes_again(sender, receiver)
