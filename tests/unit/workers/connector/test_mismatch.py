"""Workers of another tensor-parallel size, block size, order or dtype: real movers, every byte compared."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo_lite.plane.layout import KvLayout, parts, share, slot_bytes
from tests.unit.workers.connector.layouts import BLOCKS, Case, compare, steps_of
from tests.unit.workers.connector.pair import tell, worker
from tests.unit.workers.connector.prompt import Engine
from tests.unit.workers.transfer.kv import ORDERS
from workers.connector.protocol import (
    Closed,
    GiveUp,
    PeerGone,
    Piece,
    PushEnded,
    ReceiveEnded,
    Settle,
    StepPlan,
)


def plain(block_size: int, heads: int, ranks: int) -> KvLayout:
    return KvLayout(2, block_size, heads, ranks, 4, 4, "float32", "NHKD", "NHKD")


@st.composite
def layouts(draw: st.DrawFn) -> tuple[KvLayout, KvLayout]:
    """A prefill and a decode worker's layout of one model; the first is the second now and then."""
    heads = draw(st.sampled_from([1, 2, 4, 6]))
    layers, size = draw(st.integers(1, 4)), draw(st.sampled_from([2, 4]))
    made = []
    for _ in range(2):
        keys, values = ORDERS[draw(st.sampled_from(list(ORDERS)))]
        dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
        ranks = draw(st.sampled_from([n for n in (1, 2, 3, 4) if heads % n == 0 or n % heads == 0]))
        block_size = draw(st.sampled_from([2, 3, 4, 8, 16]))
        made.append(KvLayout(layers, block_size, heads, ranks, size, size, dtype, keys, values))
    return (made[1], made[1]) if draw(st.integers(0, 7)) == 0 else (made[0], made[1])


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), layouts(), st.integers(1, 60))
def test_every_byte_arrives_where_it_belongs_whatever_the_two_layouts(
    data: st.DataObject, pair: tuple[KvLayout, KvLayout], tokens: int
) -> None:
    prefill, decode = pair
    own_blocks, their_blocks = -(-tokens // prefill.block_size), -(-tokens // decode.block_size)
    first = data.draw(st.integers(0, their_blocks - 1))
    case = Case(
        tokens,
        first,
        taken=data.draw(st.permutations(range(BLOCKS)))[:own_blocks],
        placed=data.draw(st.permutations(range(BLOCKS)))[: their_blocks - first],
        cuts=sorted(data.draw(st.sets(st.integers(1, tokens), max_size=3)) | {tokens}),
    )
    compare(prefill, decode, case, torch.device("cpu"), by_layer=data.draw(st.booleans()))


@given(layouts(), st.integers(1, 5))
def test_the_shares_of_a_slot_are_apart_and_each_holds_its_part_of_as_many_blocks(
    pair: tuple[KvLayout, KvLayout], blocks: int
) -> None:
    prefill, decode = pair
    slot = slot_bytes(decode, blocks * decode.block_bytes)
    for rank in range(decode.tensor_parallel):
        found = [parts(prefill, sender, decode, rank) for sender in range(prefill.tensor_parallel)]
        heads = sorted((part for part in found if part is not None), key=lambda part: part.start)
        assert [head for part in heads for head in part] == list(decode.heads(rank))
        shares = [share(decode, rank, part, slot) for part in heads]
        assert shares[-1].stop <= slot
        assert all(one.stop <= other.start for one, other in pairwise(shares))
        for part, piece in zip(heads, shares, strict=True):
            assert piece.start % 64 == 0
            assert len(piece) >= blocks * decode.part_bytes(len(part))


@pytest.mark.parametrize(("own", "theirs"), [(2, 64), (64, 2)])
def test_blocks_larger_than_a_slot_of_the_sender_are_gathered_over_several(own: int, theirs: int) -> None:
    prefill, decode = plain(own, 2, 2), plain(theirs, 2, 1)
    prompt = torch.arange(2 * 2 * 128 * 2 * 4).remainder(251).float().view(2, 2, 128, 2, 4)
    with worker(prefill, 64, 1, slots=40) as senders, worker(decode, 64, 50) as receivers:
        for rank in senders.ranks:
            rank.write(list(range(128 // own)), prompt)
        placed = list(range(128 // theirs))
        engine = Engine(own, 100, receivers.open(placed[: -(-100 // theirs)], 0, 100), list(range(128 // own)))
        senders.push(steps_of(engine, [50, 100]))
        assert receivers.sides[0].reports.take(ReceiveEnded).cause == ""
        got = receivers.ranks[0].logical()[:, :, placed].flatten(2, 3)
        assert torch.equal(got[:, :, :100], prompt[:, :, :100])


def test_a_rank_that_has_only_copies_of_heads_has_nothing_to_send_and_says_so_at_once() -> None:
    prefill, decode = plain(4, 1, 2), plain(4, 1, 1)
    with worker(prefill, 8, 1) as senders, worker(decode, 8, 50) as receivers:
        engine = Engine(4, 8, receivers.open([3, 4], 0, 8), [1, 2])
        steps = steps_of(engine, [4, 8])
        idle = senders.sides[1]
        idle.mover.plan(StepPlan(pushes=steps))
        ended = idle.reports.take(PushEnded)
        assert (ended.cause, ended.bytes, ended.pieces) == ("", 0, 0)
        idle.mover.wait(5)
        assert idle.mover.ended({"e"}).sent == {"e"}
        senders.sides[0].mover.plan(StepPlan(pushes=steps))
        assert receivers.sides[0].reports.take(ReceiveEnded).cause == ""


def test_slots_stay_in_quarantine_until_every_rank_that_may_write_has_closed() -> None:
    prefill, decode = plain(4, 2, 2), plain(4, 2, 1)
    with worker(prefill, 8, 1) as senders, worker(decode, 8, 50) as receivers:
        (receiver,) = receivers.sides
        target = receivers.open([3, 4], 0, 8)
        receiver.mover.command(Settle(target.transfer_id, senders.incarnation, closed=False))
        receiver.mover.command(GiveUp("r", target.transfer_id))
        assert receiver.reports.take(ReceiveEnded).cause == "given up"
        tell(target, Closed(target.transfer_id, "cancelled", ranks=2))
        receiver.look()
        assert receiver.reports.holding("quarantine") == 1
        tell(target, Closed(target.transfer_id, "cancelled", ranks=2))
        assert receiver.held("quarantine") == 0


def test_a_sender_that_has_closed_stays_so_whatever_the_worker_process_knows_of_it() -> None:
    with worker(plain(4, 1, 1), 8, 50) as receivers:
        (receiver,) = receivers.sides
        target = receivers.open([3, 4], 0, 8)
        tell(target, Closed(target.transfer_id, "cancelled", ranks=1))
        receiver.look()
        receiver.mover.command(Settle(target.transfer_id, "silent", closed=False))
        receiver.mover.command(GiveUp("r", target.transfer_id))
        assert receiver.reports.take(ReceiveEnded).cause == "given up"
        assert receiver.held("quarantine") == 0


def test_every_rank_of_a_worker_that_came_back_can_be_reached_again() -> None:
    prefill, decode = plain(4, 2, 1), plain(4, 2, 2)
    with worker(prefill, 8, 1) as senders, worker(decode, 8, 50) as receivers:
        (sender,) = senders.sides
        for attempt in (256, 512):
            target = receivers.open([3, 4], 0, 8, attempt)
            sender.mover.plan(StepPlan(pushes=steps_of(Engine(4, 8, target, [1, 2]), [8])))
            assert [side.reports.take(ReceiveEnded).cause for side in receivers.sides] == ["", ""]
            assert sender.reports.take(PushEnded).cause == ""
            sender.mover.wait(5)
            assert sender.mover.ended({"e"}).sent == {"e"}
            sender.mover.command(PeerGone(receivers.incarnation))  # its lease ended; it did not


def test_every_rank_of_a_silent_worker_is_asked_to_close_whether_it_has_begun_or_not() -> None:
    prefill, decode = plain(4, 2, 4), plain(4, 2, 2)  # two ranks have copies only
    with worker(prefill, 8, 1) as senders, worker(decode, 8, 50) as receivers:
        senders.meet(receivers)
        target = receivers.open([3, 4], 0, 8)
        begun = senders.sides[0]
        begun.mover.plan(StepPlan(pushes=steps_of(Engine(4, 8, target, [1, 2]), [4])))
        for receiver in receivers.sides:
            receiver.mover.command(Settle(target.transfer_id, senders.incarnation, closed=False))
            receiver.mover.command(GiveUp("r", target.transfer_id))
            assert receiver.reports.take(ReceiveEnded).cause == "given up"
            receiver.look()
        for receiver in receivers.sides:
            assert receiver.held("quarantine") == 0
        assert begun.reports.take(PushEnded).cause in ("unwanted", "in_flight")


def test_a_corrupt_piece_of_one_rank_ends_the_push_of_all_its_ranks() -> None:
    prefill, decode = plain(4, 2, 2), plain(4, 2, 1)
    with worker(prefill, 8, 1) as senders, worker(decode, 8, 50) as receivers:
        (receiver,) = receivers.sides
        target = receivers.open([3, 4, 5], 0, 12)
        senders.push(steps_of(Engine(4, 12, target, [0, 1, 2]), [4]))  # the transfer stays open
        for side in senders.sides:
            while side.reports.holding("push") != 2:
                side.look()
        tell(target, Piece(target.transfer_id, target.ranks[0].slots[-1], 2, 1, 1, 1, 0, 2, checksum=1))
        assert receiver.reports.take(ReceiveEnded).cause == "corrupt"
        assert [side.reports.take(PushEnded).cause for side in senders.sides] == ["corrupt", "corrupt"]
        receiver.mover.command(GiveUp("r", target.transfer_id))
        assert receiver.held("quarantine") == 0, "both have said that they write nothing more"


@pytest.mark.parametrize(
    "fields",
    [
        {"first_head": 1},  # on the other rank
        {"first_head": -1},
        {"heads": 0},
        {"heads": 2},
        {"first": 4},
        {"first": -1},
        {"count": 0},
        {"count": 3},  # more than fits into the slot
        {"first_layer": -1},
        {"first_layer": 1},  # and the one behind the last
        {"layers": 0},
        {"layers": 3},
        {"slot": 99},
        {"transfer_id": 1},
    ],
)
def test_a_piece_that_says_what_cannot_be_is_ignored(fields: dict[str, int]) -> None:
    decode = plain(4, 2, 2)
    with worker(decode, 8, 50) as receivers:
        receiver = receivers.sides[0]
        before = receivers.ranks[0].logical()
        target = receivers.open([3, 4, 5, 6], 0, 16)
        slot = target.ranks[0].slots[0]
        right = Piece(target.transfer_id, slot, first=0, count=1, first_head=0, heads=1, first_layer=0, layers=2)
        tell(target, msgspec.structs.replace(right, **fields))
        receiver.look()
        assert torch.equal(receivers.ranks[0].logical(), before)
        assert receiver.reports.latest(ReceiveEnded) is None
