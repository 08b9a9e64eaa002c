from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
import torch

from tests.unit.workers.connector.pair import BLOCKS, LAYERS, Side, pair, plan_receive, push, target_of, tell, whole
from tests.unit.workers.connector.reports import WAIT_S
from workers.connector.protocol import (
    GiveUp,
    Meet,
    PeerGone,
    Piece,
    PushEnded,
    PushStep,
    ReceiveEnded,
    ReceiveOpened,
    Reopen,
    Settle,
    StepPlan,
    StopPush,
)


def same(sender: Side, taken: list[int], receiver: Side, placed: list[int]) -> bool:
    pairs = zip(sender.blocks(taken), receiver.blocks(placed), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def until(condition: Callable[[], bool], meanwhile: Callable[[], None] = lambda: None) -> None:
    """Wait for what shows in memory alone, or after the movers were made to look again."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {WAIT_S} s"
        meanwhile()


@pytest.mark.parametrize("count", [1, 2, 3, 31])
def test_every_block_of_a_prompt_arrives_though_staging_holds_only_a_part(count: int) -> None:
    taken, placed = (
        random.Random(count).sample(range(BLOCKS), count),
        random.Random(-count).sample(range(BLOCKS), count),
    )
    with pair(staging_blocks=4) as (sender, receiver):
        plan_receive(receiver, placed)
        push(sender, target_of(receiver.reports.take(ReceiveOpened)), taken)
        ended = receiver.reports.take(ReceiveEnded)
        assert ended.cause == ""
        assert ended.blocks == count
        assert ended.bytes == count * receiver.planes.block_bytes
        assert same(sender, taken, receiver, placed)
        assert sender.reports.take(PushEnded).cause == ""
        receiver.mover.wait(5)
        sender.mover.wait(5)
        assert receiver.mover.ended(set()).received == {"r-engine"}
        assert sender.mover.ended({"r-engine"}).sent == {"r-engine"}


def test_pieces_leave_while_later_blocks_are_still_to_be_computed() -> None:
    with pair() as (sender, receiver):
        plan_receive(receiver, [10, 11, 12, 13])
        target = target_of(receiver.reports.take(ReceiveOpened))
        push(sender, target, [1, 2], first=0)
        push(sender, target, [3, 4], first=2)
        assert receiver.reports.take(ReceiveEnded).pieces == 2
        assert same(sender, [1, 2, 3, 4], receiver, [10, 11, 12, 13])


def test_more_receives_than_staging_has_slots_wait_their_turn() -> None:
    with pair(staging_blocks=4) as (sender, receiver):
        for number in range(6):
            plan_receive(receiver, [number * 4, number * 4 + 1], f"r{number}", (number + 1) << 8)
        for number in range(6):
            opened = receiver.reports.take(ReceiveOpened)
            assert opened.request_id == f"r{number}"
            push(sender, target_of(opened), [number, 40 + number], request_id=opened.request_id)
            assert receiver.reports.take(ReceiveEnded).cause == ""
            assert same(sender, [number, 40 + number], receiver, [number * 4, number * 4 + 1])


def test_vllm_hears_of_a_push_only_after_it_has_finished_the_request() -> None:
    with pair() as (sender, receiver):
        plan_receive(receiver, [5])
        push(sender, target_of(receiver.reports.take(ReceiveOpened)), [9])
        sender.reports.take(PushEnded)
        sender.mover.wait(5)
        assert sender.mover.ended(set()).sent == set()
        assert sender.mover.ended({"r-engine", "another"}).sent == {"r-engine"}


def test_a_request_given_up_is_handed_back_with_its_blocks_marked_invalid() -> None:
    with pair() as (_, receiver):
        plan_receive(receiver, [5, 6])
        opened = receiver.reports.take(ReceiveOpened)
        receiver.mover.command(Settle(opened.transfer_id, "p", closed=True))
        receiver.mover.command(GiveUp("r", opened.transfer_id))
        assert receiver.reports.take(ReceiveEnded).cause == "given up"
        receiver.mover.wait(5)
        ended = receiver.mover.ended(set())
        assert (ended.received, ended.invalid_blocks) == ({"r-engine"}, {5, 6})
        assert receiver.held("quarantine") == 0


def test_a_request_given_up_makes_room_for_the_next_that_waits_for_staging() -> None:
    with pair(staging_blocks=2) as (sender, receiver):
        plan_receive(receiver, [5], "first", 256)
        plan_receive(receiver, [6], "second", 512)
        opened = receiver.reports.take(ReceiveOpened)
        receiver.mover.command(Settle(opened.transfer_id, "p", closed=True))
        receiver.mover.command(GiveUp("first", opened.transfer_id))
        again = receiver.reports.take(ReceiveOpened)
        assert again.request_id == "second"
        receiver.mover.command(Settle(again.transfer_id, "p", closed=True))
        plan_receive(receiver, [7], "third", 768)
        receiver.mover.plan(StepPlan(cancelled_receives=["second-engine"]))
        last = receiver.reports.take(ReceiveOpened)
        push(sender, target_of(last), [1], request_id="third")
        while receiver.reports.take(ReceiveEnded).cause:
            pass
        assert same(sender, [1], receiver, [7])


def test_a_request_that_waits_too_long_for_staging_is_handed_back_to_be_computed() -> None:
    with pair(staging_blocks=2, timeout_s=0.05) as (_, receiver):
        plan_receive(receiver, [5], "first", 256)
        receiver.reports.take(ReceiveOpened)
        plan_receive(receiver, [6], "second", 512)
        ended = receiver.reports.take(ReceiveEnded)
        assert (ended.request_id, ended.cause) == ("second", "no staging")
        receiver.mover.wait(5)
        back = receiver.mover.ended(set())
        assert (back.received, back.invalid_blocks) == ({"second-engine"}, {6})


def test_staging_of_a_silent_sender_stays_in_quarantine_until_its_process_is_gone() -> None:
    with pair(staging_blocks=2) as (sender, receiver):
        plan_receive(receiver, [5])
        opened = receiver.reports.take(ReceiveOpened)
        receiver.mover.command(GiveUp("r", opened.transfer_id))
        receiver.mover.command(Settle(opened.transfer_id, "p", closed=False))
        plan_receive(receiver, [7], "next", 512)  # the only slot is in quarantine
        receiver.mover.command(PeerGone("somebody else"))
        receiver.mover.command(PeerGone("p"))
        again = receiver.reports.take(ReceiveOpened)
        assert again.request_id == "next"
        push(sender, target_of(again), [1], request_id="next")
        assert receiver.reports.take(ReceiveEnded).cause == "given up"
        assert receiver.reports.take(ReceiveEnded).cause == ""
        assert same(sender, [1], receiver, [7])


def test_a_sender_known_to_be_gone_is_not_waited_for_again() -> None:
    with pair(staging_blocks=2) as (_, receiver):
        receiver.mover.command(PeerGone("p"))
        plan_receive(receiver, [5])
        opened = receiver.reports.take(ReceiveOpened)
        receiver.mover.command(Settle(opened.transfer_id, "p", closed=False))
        receiver.mover.command(GiveUp("r", opened.transfer_id))
        assert receiver.reports.take(ReceiveEnded).cause == "given up"
        assert receiver.held("quarantine") == 0


@pytest.mark.parametrize("begun", [True, False])
def test_a_sender_that_was_given_up_in_silence_closes_the_transfer_once_it_is_awake(begun: bool) -> None:
    with pair() as (sender, receiver):
        incarnation, _, _ = sender.name.partition(":")
        receiver.mover.command(Meet(incarnation, (sender.mover.agent,)))
        sender.mover.command(Meet("d", (receiver.mover.agent,)))
        plan_receive(receiver, [5, 6])
        target = target_of(receiver.reports.take(ReceiveOpened))
        if begun:
            push(sender, target, [1])  # the second block is never computed
        receiver.mover.command(Settle(target.transfer_id, incarnation, closed=False))
        receiver.mover.command(GiveUp("r", target.transfer_id))
        assert receiver.reports.take(ReceiveEnded).cause == "given up"
        receiver.look()
        until(lambda: not receiver.reports.holding("quarantine"), sender.look)
        if not begun:
            push(sender, target, [1])
        assert sender.reports.take(PushEnded).cause in ("unwanted", "in_flight")  # the latter: its write goes on
        assert sender.held("push") == 0
        before = receiver.blocks([5, 6])
        sender.mover.wait(5)
        assert sender.mover.ended({"r-engine"}).sent == {"r-engine"}
        assert all(torch.equal(old, new) for old, new in zip(before, receiver.blocks([5, 6]), strict=True))


def test_staging_of_a_sender_that_came_back_is_quarantined_like_that_of_any_other() -> None:
    with pair() as (sender, receiver):
        incarnation, _, _ = sender.name.partition(":")
        receiver.mover.command(PeerGone(incarnation))
        receiver.mover.command(Meet(incarnation, (sender.mover.agent,)))
        plan_receive(receiver, [5])
        opened = receiver.reports.take(ReceiveOpened)
        receiver.mover.command(Settle(opened.transfer_id, incarnation, closed=False))
        receiver.mover.command(GiveUp("r", opened.transfer_id))
        assert receiver.reports.take(ReceiveEnded).cause == "given up"
        receiver.look()
        assert receiver.reports.holding("quarantine") == 1


def test_a_late_piece_of_an_earlier_attempt_changes_nothing() -> None:
    with pair() as (sender, receiver):
        plan_receive(receiver, [5, 6])
        late = target_of(receiver.reports.take(ReceiveOpened))
        receiver.mover.command(Reopen("r", late.transfer_id))
        current = target_of(receiver.reports.take(ReceiveOpened))
        assert current.transfer_id != late.transfer_id
        assert not set(current.ranks[0].slots) & set(late.ranks[0].slots)
        before = receiver.blocks([5, 6])
        push(sender, late, [1, 2], request_id="late")
        assert sender.reports.take(PushEnded).cause == ""
        push(sender, current, [3, 4])
        while receiver.reports.take(ReceiveEnded).cause:
            pass
        assert same(sender, [3, 4], receiver, [5, 6])
        assert not all(torch.equal(old, new) for old, new in zip(before, receiver.blocks([5, 6]), strict=True))


def test_an_aborted_receive_gives_its_blocks_back_at_once() -> None:
    with pair() as (_, receiver):
        plan_receive(receiver, [5])
        receiver.reports.take(ReceiveOpened)
        receiver.mover.plan(StepPlan(cancelled_receives=["r-engine"]))
        assert receiver.reports.take(ReceiveEnded).cause == "cancelled"
        receiver.mover.wait(5)
        assert receiver.mover.ended(set()).received == {"r-engine"}
        assert receiver.held("receive") == 0


def test_a_stopped_push_is_confirmed_even_if_it_never_began_and_ignores_later_steps() -> None:
    with pair() as (sender, receiver):
        plan_receive(receiver, [5])
        target = target_of(receiver.reports.take(ReceiveOpened))
        sender.mover.command(StopPush("r"))
        assert sender.reports.take(PushEnded).cause == "cancelled"
        before = receiver.blocks([5])
        push(sender, target, [1])  # a step that vLLM was computing meanwhile
        sender.mover.wait(5)
        assert sender.mover.ended({"r-engine"}).sent == {"r-engine"}, "its blocks must be freed all the same"
        assert all(torch.equal(old, new) for old, new in zip(before, receiver.blocks([5]), strict=True))


def test_a_preempted_prompt_is_never_read_again_and_not_reported_to_vllm() -> None:
    with pair(staging_blocks=4) as (sender, receiver):
        plan_receive(receiver, [5, 6, 7])
        target = target_of(receiver.reports.take(ReceiveOpened))
        push(sender, target, [1])
        push(sender, target, [2], first=1)  # the third block is never computed
        sender.mover.cancel_pushes(["r-engine"])
        assert sender.reports.take(PushEnded).cause == "preempted"
        assert sender.mover.ended({"r-engine"}).sent == set()


def test_a_receiver_that_gives_no_credit_ends_the_push_at_its_deadline() -> None:
    with pair(staging_blocks=4, timeout_s=0.3) as (sender, receiver):
        plan_receive(receiver, [5, 6, 7, 8, 9, 10])
        target = target_of(receiver.reports.take(ReceiveOpened))
        receiver.mover.close()  # its memory is still there, but nobody empties the slots
        push(sender, target, [1, 2, 3, 4, 5, 6])
        assert sender.reports.take(PushEnded).cause in ("receiver_silent", "in_flight", "peer_lost", "error")
        assert sender.held("push") == 0


def test_a_prefill_asked_for_twice_frees_the_blocks_of_both() -> None:
    with pair() as (sender, receiver):
        plan_receive(receiver, [5])
        target = target_of(receiver.reports.take(ReceiveOpened))
        push(sender, target, [1])
        sender.mover.plan(StepPlan(pushes=[PushStep("twin", "r", target, whole([2]), 0)]))
        sender.reports.take(PushEnded)
        sent = sender.mover.ended({"r-engine", "twin"}).sent
        while len(sent) < 2:
            sender.mover.wait(5)
            fresh = sender.mover.ended(set()).sent
            assert fresh, f"only {sent} came"
            sent |= fresh


def test_a_piece_with_another_checksum_is_refused_and_its_slots_wait_for_the_senders_word() -> None:
    with pair(verify=True) as (sender, receiver):
        plan_receive(receiver, [10, 11, 12, 13])
        target = target_of(receiver.reports.take(ReceiveOpened))
        push(sender, target, [1, 2], first=0)  # the transfer stays open: two blocks are still to come
        until(lambda: sender.reports.holding("push") == 2 and same(sender, [1, 2], receiver, [10, 11]))
        tell(target, Piece(target.transfer_id, target.ranks[0].slots[-1], 2, 2, 0, 1, 0, LAYERS, checksum=1))
        assert receiver.reports.take(ReceiveEnded).cause == "corrupt"
        assert sender.reports.take(PushEnded).cause == "corrupt"
        receiver.mover.command(Reopen("r", target.transfer_id))
        again = target_of(receiver.reports.take(ReceiveOpened))
        assert again.transfer_id == target.transfer_id + 1
        push(sender, again, [1, 2, 3, 4], request_id="again")
        assert receiver.reports.take(ReceiveEnded).cause == "retried"
        assert receiver.reports.take(ReceiveEnded).cause == ""
        assert same(sender, [1, 2, 3, 4], receiver, [10, 11, 12, 13])
        assert receiver.held("quarantine") == 0


def test_a_verified_transfer_brings_the_same_blocks() -> None:
    with pair(verify=True, staging_blocks=4) as (sender, receiver):
        plan_receive(receiver, list(range(20, 31)))
        push(sender, target_of(receiver.reports.take(ReceiveOpened)), list(range(11)))
        assert receiver.reports.take(ReceiveEnded).cause == ""
        assert same(sender, list(range(11)), receiver, list(range(20, 31)))


def test_from_the_second_piece_on_a_worker_of_the_same_host_is_written_to_directly() -> None:
    with pair() as (sender, receiver):
        plan_receive(receiver, list(range(12)))
        push(sender, target_of(receiver.reports.take(ReceiveOpened)), list(range(12)))
        ended = receiver.reports.take(ReceiveEnded)
        assert (ended.path, ended.pieces) == ("shm", 6)
        pushed = sender.reports.take(PushEnded)
        assert (pushed.path, pushed.pieces, pushed.bytes) == ("shm", 6, ended.bytes)
        assert same(sender, list(range(12)), receiver, list(range(12)))
