"""Receives whose staging is granted before vLLM has allocated their blocks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.workers.connector.pair import Side, pair, plan_receive, push, target_of
from workers.connector.protocol import (
    GiveUp,
    Prepare,
    PushEnded,
    ReceiveEnded,
    ReceiveOpened,
    ReceivePlanned,
    Reopen,
    Settle,
)

TAKEN, PLACED = [5, 9, 2, 40], [1, 33, 7, 20]


@pytest.fixture
def sides() -> Iterator[tuple[Side, Side]]:
    """(sender, receiver)"""
    with pair() as made:
        yield made


def prepare(receiver: Side, request_id: str = "r") -> ReceiveOpened:
    tokens = len(PLACED) * receiver.planes.layout.block_size
    receiver.mover.command(Prepare(request_id, 256, 0, tokens))
    return receiver.reports.take(ReceiveOpened)


def arrived(sender: Side, receiver: Side) -> bool:
    pairs = zip(sender.blocks(TAKEN), receiver.blocks(PLACED), strict=True)
    return all(mine.equal(theirs) for mine, theirs in pairs)


def test_pieces_that_come_before_the_blocks_are_known_are_placed_once_they_are(sides: tuple[Side, Side]) -> None:
    sender, receiver = sides
    push(sender, target_of(prepare(receiver)), TAKEN)
    assert sender.reports.take(PushEnded).cause == ""  # all of it fits into the staging that was granted
    receiver.look()
    plan_receive(receiver, PLACED)
    assert receiver.reports.take(ReceivePlanned).request_id == "r"
    assert receiver.reports.take(ReceiveEnded).cause == ""
    assert arrived(sender, receiver)
    receiver.mover.wait(5)
    assert receiver.mover.ended(set()).received == {"r-engine"}


def test_a_plan_that_overtakes_what_was_to_prepare_it_is_opened_once(sides: tuple[Side, Side]) -> None:
    sender, receiver = sides
    plan_receive(receiver, PLACED)
    opened = receiver.reports.take(ReceiveOpened)
    receiver.mover.command(Prepare("r", 256, 0, opened.tokens))
    push(sender, target_of(opened), TAKEN)
    assert receiver.reports.take(ReceiveEnded).cause == ""
    assert arrived(sender, receiver)
    assert receiver.reports.latest(ReceiveOpened) is None


def test_a_receive_that_is_given_up_before_it_is_planned_is_handed_back_as_soon_as_it_is(
    sides: tuple[Side, Side],
) -> None:
    _, receiver = sides
    prepare(receiver)
    receiver.mover.command(GiveUp("r", 256))
    assert receiver.reports.take(ReceiveEnded).cause == "given up"
    receiver.mover.command(Settle(256, "p", closed=True))
    assert receiver.held("quarantine") == 0
    plan_receive(receiver, PLACED)
    receiver.mover.wait(5)
    ended = receiver.mover.ended(set())
    assert (ended.received, ended.invalid_blocks) == ({"r-engine"}, set(PLACED))
    assert receiver.reports.latest(ReceiveOpened) is None


def test_another_request_of_the_same_name_has_nothing_to_do_with_one_that_was_given_up(
    sides: tuple[Side, Side],
) -> None:
    _, receiver = sides
    prepare(receiver)
    receiver.mover.command(GiveUp("r", 256))
    plan_receive(receiver, PLACED, transfer_id=512)
    assert receiver.reports.take(ReceiveOpened).transfer_id == 512


def test_a_failed_attempt_is_opened_again_before_the_blocks_are_known(sides: tuple[Side, Side]) -> None:
    sender, receiver = sides
    prepare(receiver)
    receiver.mover.command(Settle(256, "p", closed=True))
    receiver.mover.command(Reopen("r", 256))
    again = receiver.reports.take(ReceiveOpened)
    assert again.transfer_id == 257
    plan_receive(receiver, PLACED)
    assert receiver.reports.take(ReceiveEnded).cause == "retried"
    push(sender, target_of(again), TAKEN)
    assert receiver.reports.take(ReceiveEnded).cause == ""
    assert arrived(sender, receiver)
