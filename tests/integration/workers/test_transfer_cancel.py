"""Deadlines and cancellation at each stage of a transfer between two processes."""

from __future__ import annotations

from tests.integration.workers.exchange import (
    FIRST,
    LOST,
    PLACED,
    SENT,
    WAYS,
    Way,
    acquainted,
    begin,
    complete_or_given_up,
    completes,
    completes_again,
    give_up,
    pause,
)
from tests.integration.workers.mover_process import movers, rest, until
from workers.connector.protocol import ReceiveEnded, Settle, StopPush


@WAYS
def test_a_push_that_is_cancelled_before_its_first_piece_never_writes(way: Way) -> None:
    with movers(way) as start:
        sender, receiver = acquainted(start(1000), start(2000))
        target = receiver.receive(PLACED, "r", FIRST)
        sender.command(StopPush("r"))
        sender.push_ends_with("cancelled")
        sender.push(target, SENT, "r")  # the step that vLLM was computing meanwhile
        sender.lets_go("r-engine")
        give_up(receiver, sender, closed=True)
        rest(sender, receiver)
        assert receiver.values(PLACED) == receiver.expected(PLACED), "nothing was written"
        completes(sender, receiver)


@WAYS
def test_a_push_that_is_cancelled_between_two_pieces_is_closed_at_once(way: Way) -> None:
    with movers(way) as start:
        sender, receiver = acquainted(start(1000), start(2000))
        pause(sender, receiver)
        sender.command(StopPush("r"))
        sender.push_ends_with("cancelled")
        give_up(receiver, sender)
        rest(sender, receiver)
        assert receiver.values(PLACED[:79]) == sender.expected(SENT[:79])
        assert receiver.values(PLACED[79:]) == receiver.expected(PLACED[79:])
        completes(sender, receiver)


def test_a_push_that_is_cancelled_while_a_write_is_under_way_is_closed_once_that_has_ended() -> None:
    with movers("tcp") as start:
        sender, receiver = acquainted(start(1000), start(2000))
        target = pause(sender, receiver)
        with receiver.frozen():
            sender.push(target, SENT[-1:], "r", first=79)
            until(lambda: sender.reports.staged() > 0, "the last piece is being written")
            sender.command(StopPush("r"))
            sender.push_ends_with("in_flight")
            sender.releases("push")  # its blocks are free: the write reads staging
        complete_or_given_up(receiver, sender)
        rest(sender, receiver)
        completes_again(sender, receiver)


@WAYS
def test_a_receive_that_is_aborted_in_the_middle_frees_its_blocks_at_once_and_its_slots_when_the_sender_has_ended(
    way: Way,
) -> None:
    with movers(way) as start:
        sender, receiver = acquainted(start(1000), start(2000))
        begin(sender, receiver)
        receiver.abort("r")
        assert receiver.reports.take(ReceiveEnded).cause == "cancelled"
        receiver.tells_vllm(received={"r-engine"})
        before = receiver.values(PLACED)  # vLLM's again
        receiver.command(Settle(FIRST, sender.incarnation, closed=False))
        sender.push_ends_with("unwanted", "receiver_silent", "in_flight")
        rest(sender, receiver)
        assert receiver.values(PLACED) == before, "no late piece was scattered"
        completes(sender, receiver)


@WAYS
def test_a_push_to_a_frozen_receiver_ends_by_its_deadline_before_its_first_piece(way: Way) -> None:
    with movers(way) as start:
        sender, receiver = start(1000), start(2000)
        target = receiver.receive(PLACED, "r", FIRST)
        assert sender.agent
        with receiver.frozen():
            sender.push(target, SENT, "r")
            sender.push_ends_with("receiver_silent")
            rest(sender)
        give_up(receiver, sender)
        rest(receiver)
        assert receiver.values(PLACED) == receiver.expected(PLACED), "nothing was written"
        completes(sender, receiver)


@WAYS
def test_a_push_to_a_frozen_receiver_ends_by_its_deadline_between_pieces_or_in_one(way: Way) -> None:
    with movers(way) as start:
        sender, receiver = acquainted(start(1000), start(2000))
        target = pause(sender, receiver)
        with receiver.frozen():
            sender.push(target, SENT[-1:], "r", first=79)
            # Over shared memory nothing is left to be done: the receiver finds the piece, and the note of it.
            sender.push_ends_with(*("",) if way == "shm" else LOST)
        complete_or_given_up(receiver, sender)
        rest(sender, receiver)
        completes_again(sender, receiver)
