"""Transfers between two network namespaces whose cable is cut. Root makes them, with iproute2; nobody else can."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.workers.cable import DEVICE, NEEDS_NAMESPACES, Cable, cable
from tests.integration.workers.exchange import (
    FIRST,
    LOST,
    PLACED,
    SENT,
    acquainted,
    begin,
    completes,
    completes_again,
    give_up,
    pause,
)
from tests.integration.workers.mover_process import SLACK_S, TIMEOUT_S, MoverProcess, know, movers, rest, until, within
from workers.connector.protocol import PushEnded, StopPush

pytestmark = NEEDS_NAMESPACES
FILLS = (1000, 2000, 3000)
Apart = tuple[Cable, MoverProcess, MoverProcess]


@pytest.fixture
def apart() -> Iterator[Apart]:
    """A cable, and a mover at each end of it that has met the other."""
    with cable() as joined, movers("tcp") as start:
        one, other = (
            start(fill, within=joined.ends[end], UCX_NET_DEVICES=DEVICE) for end, fill in enumerate((1, 2000))
        )
        acquainted(one, other)
        yield joined, one, other


def test_a_push_over_a_cut_link_ends_in_time_and_both_sides_exchange_kv_again_once_it_is_mended(apart: Apart) -> None:
    joined, sender, receiver = apart
    begin(sender, receiver)
    joined.cut()
    sender.push_ends_with(*LOST)
    sender.releases("push", "in_flight")
    give_up(receiver, sender)
    receiver.look()
    assert receiver.reports.holding("quarantine") > 0, "the sender cannot say that it has ended"
    joined.mend()
    rest(receiver, sender)
    know(sender, receiver, met=1)
    completes_again(sender, receiver)
    completes_again(receiver, sender, 1024)
    rest(sender, receiver)


def test_a_write_that_a_cut_link_leaves_hanging_ends_by_itself_within_a_second_deadline(apart: Apart) -> None:
    joined, sender, receiver = apart
    target = pause(sender, receiver)
    with receiver.frozen():  # it acknowledges nothing, so that the last write is under way when the link is cut
        sender.push(target, SENT[-1:], "r", first=79)
        until(lambda: sender.reports.staged() > 0, "the last piece is being written")
        joined.cut()
        sender.command(StopPush("r"))
        sender.push_ends_with("in_flight")
    sender.releases("in_flight", within=2 * TIMEOUT_S + SLACK_S)
    give_up(receiver, sender)
    joined.mend()
    rest(receiver, sender)
    completes_again(sender, receiver)


def test_a_worker_that_cannot_be_reached_keeps_transfers_to_others_waiting_for_no_moment() -> None:
    with cable() as joined, movers("tcp") as start:
        sender, near, far = (start(fill, within=joined.ends[fill == 3000], UCX_NET_DEVICES=DEVICE) for fill in FILLS)
        acquainted(sender, near)
        target = far.receive(PLACED, "far", FIRST)
        joined.cut()
        sender.push(target, SENT, "far")  # connects
        with within(TIMEOUT_S):
            completes(sender, near)
        assert sender.reports.take(PushEnded, "far").cause in LOST
        sender.meet(far)
        know(sender, met=1, silent=1)
        with within(TIMEOUT_S):
            completes(sender, near, 1024)


def test_a_first_contact_that_a_cut_link_prevented_is_made_once_it_is_mended() -> None:
    with cable() as joined, movers("tcp") as start:
        one = start(1000, within=joined.ends[0], UCX_NET_DEVICES=DEVICE)
        other = start(2000, within=joined.ends[1], UCX_NET_DEVICES=DEVICE)
        assert one.agent
        assert other.agent
        joined.cut()
        one.meet(other)
        other.meet(one)
        know(one, other, silent=1)
        joined.mend()
        know(one, other, met=1)
        completes(one, other)
