"""Transfers between two processes, one of which is killed, frozen or replaced in the middle."""

from __future__ import annotations

from typing import Literal

import pytest

from tests.integration.workers.mover_process import MoverProcess, movers, until
from workers.connector.protocol import GiveUp, PeerGone, PushEnded, ReceiveEnded, Settle

Way = Literal["shm", "tcp"]
WAYS = pytest.mark.parametrize("way", ["shm", "tcp"])
LOST = {"peer_lost", "receiver_silent", "deadline", "in_flight", "error"}
SENT, PLACED = list(range(80)), list(range(10, 90))


def acquainted(*processes: MoverProcess) -> None:
    for one in processes:
        for other in processes:
            if one is not other:
                one.meet(other)


def begin(sender: MoverProcess, receiver: MoverProcess, transfer_id: int = 256) -> None:
    """Returns in the middle: some blocks have arrived, many are on their way, and the last is still to be computed."""
    target = receiver.receive(PLACED, "r", transfer_id)
    sender.push(target, SENT[:40], "r")
    until(lambda: receiver.values(PLACED[:1]) == sender.expected(SENT[:1]), "the first block arrives")
    sender.push(target, SENT[40:-1], "r", first=40)


def give_up(receiver: MoverProcess, sender: MoverProcess, transfer_id: int = 256) -> None:
    """As the worker process does when it hears nothing of the sender any more."""
    receiver.command(Settle(transfer_id, sender.incarnation, closed=False))
    receiver.command(GiveUp("r", transfer_id))
    assert receiver.reports.take(ReceiveEnded).cause == "given up"
    receiver.look()
    assert receiver.reports.holding("receive") == 0


def completes(sender: MoverProcess, receiver: MoverProcess, transfer_id: int = 512) -> None:
    """A whole transfer to the same blocks."""
    sender.push(receiver.receive(PLACED, "again", transfer_id), SENT, "again")
    assert receiver.reports.take(ReceiveEnded).cause == ""
    assert sender.reports.take(PushEnded).cause == ""
    assert receiver.values(PLACED) == sender.expected(SENT)


@WAYS
def test_a_killed_sender_costs_its_receiver_nothing_but_another_attempt(way: Way) -> None:
    with movers(way) as start:
        sender, another, receiver = start(1000), start(2000), start(3000)
        acquainted(sender, another, receiver)
        begin(sender, receiver)
        sender.kill()
        give_up(receiver, sender)
        completes(another, receiver)
        assert receiver.reports.holding("quarantine") > 0, "nobody has said yet that it is gone"
        receiver.command(PeerGone(sender.incarnation))
        receiver.releases("receive", "quarantine")
        another.releases("push", "in_flight")


@WAYS
def test_what_a_frozen_sender_writes_after_it_thaws_shows_in_no_block(way: Way) -> None:
    with movers(way) as start:
        sender, another, receiver = start(1000), start(2000), start(3000)
        acquainted(sender, another, receiver)
        begin(sender, receiver)
        with sender.frozen():
            give_up(receiver, sender)
            completes(another, receiver)
            assert receiver.reports.holding("quarantine") > 0, "it may still write"
        assert sender.reports.take(PushEnded).cause in {"frozen", "unwanted", "deadline", "in_flight"}
        receiver.releases("receive", "quarantine")
        sender.releases("push", "in_flight")
        assert receiver.values(PLACED) == another.expected(SENT)
        completes(sender, receiver, 1024)


@WAYS
def test_a_sender_ends_within_its_deadline_when_its_receiver_is_killed(way: Way) -> None:
    with movers(way) as start:
        sender, receiver, another = start(1000), start(2000), start(3000)
        acquainted(sender, receiver, another)
        begin(sender, receiver)
        receiver.kill()
        sender.push_ends_with(LOST)
        sender.releases("push", "in_flight")
        completes(sender, another)


@WAYS
def test_a_sender_ends_within_its_deadline_when_its_receiver_is_frozen_and_serves_it_when_it_thaws(way: Way) -> None:
    with movers(way) as start:
        sender, receiver = start(1000), start(2000)
        acquainted(sender, receiver)
        begin(sender, receiver)
        with receiver.frozen():
            sender.push_ends_with(LOST)
            sender.look()
            assert sender.reports.holding("push") == 0, "its blocks are free"
        give_up(receiver, sender)
        receiver.releases("receive", "quarantine")
        sender.releases("push", "in_flight")
        completes(sender, receiver)
