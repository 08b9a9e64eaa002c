from __future__ import annotations

import msgspec
import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamo_lite.plane.layout import KvLayout
from dynamo_lite.plane.wire import Incarnation, PushTarget, RankTarget
from workers.connector.cut import Cut, PieceSize, StepCuts, piece_size
from workers.transfer.ready import Ready, StepReady
from workers.transfer.span import Span

READY = Ready(torch.device("cpu"))
LAYOUT = KvLayout(8, 4, 4, 1, 16, 16, "bfloat16", "NHKD", "NHKD")  # a layer of a block is 1 KiB


def span(tokens: int, block_size: int = 4) -> Span:
    return Span(np.arange(-(-tokens // block_size)), block_size, 0, tokens)


def all_of(cuts: StepCuts) -> list[Cut]:
    """What can be sent now."""
    found = []
    while not cuts.over and cuts.sendable:
        found.append(cuts.next())
        cuts.take(found[-1])
    return found


@given(st.data(), st.integers(1, 12), st.integers(1, 6), st.integers(1, 60), st.integers(1, 200))
def test_every_layer_of_every_block_is_in_one_piece_and_none_is_read_too_early(
    data: st.DataObject, layers: int, block_size: int, tokens: int, block_layers: int
) -> None:
    size, ready, first = PieceSize(layers, block_size, block_layers), StepReady(layers), data.draw(st.integers(0, 9))
    cuts, blocks = StepCuts(first, span(tokens), ready, size), -(-tokens // block_size)
    seen = np.zeros((blocks, layers), dtype=np.int64)
    for reached in sorted(data.draw(st.sets(st.integers(1, layers))) | {layers}):
        ready.reach(reached, READY)
        for cut in all_of(cuts):
            assert cut.layers.stop <= reached
            assert cut.span.skipped + 4 * int(cut.span.block_ids[0]) == (cut.first - first) * block_size
            assert cut.count == -(-cut.span.tokens // block_size)
            assert cut.count * len(cut.layers) <= max(block_layers, len(cut.layers)), "a block at least"
            seen[cut.first - first : cut.first - first + cut.count, cut.layers.start : cut.layers.stop] += 1
    assert cuts.over
    assert (seen == 1).all()
    assert cuts.stop == first + blocks


@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 400))
def test_at_the_end_of_a_step_one_piece_is_left_if_a_layer_of_it_fits_one(
    layers: int, blocks: int, block_layers: int
) -> None:
    size, ready = PieceSize(layers, 4, block_layers), StepReady(layers)
    cuts = StepCuts(0, span(4 * blocks), ready, size)
    sent = 0
    for reached in range(1, layers):
        ready.reach(reached, READY)
        sent += len(all_of(cuts))
    ready.reach(layers, READY)
    left = len(all_of(cuts))
    if block_layers >= blocks:
        assert left == 1
        assert sent + left == -(-layers // size.layers_at_once(4 * blocks))
    else:
        assert left == -(-blocks // block_layers), "those of the last layer"


def test_a_step_that_fits_one_piece_is_one_piece_once_it_is_computed() -> None:
    ready = StepReady(8)
    cuts = StepCuts(3, span(10), ready, PieceSize(8, 4, 24))
    ready.reach(7, READY)
    assert all_of(cuts) == []
    ready.reach(8, READY)
    (cut,) = all_of(cuts)
    assert (cut.first, cut.count, cut.layers) == (3, 3, range(8))


def test_a_step_of_which_nothing_was_told_before_its_end_is_cut_by_blocks() -> None:
    cuts = StepCuts(0, span(40), StepReady.whole(8, READY), PieceSize(8, 4, 32))
    assert [(cut.first, cut.count, cut.layers) for cut in all_of(cuts)] == [
        (0, 4, range(8)), (4, 4, range(8)), (8, 2, range(8)),
    ]  # fmt: skip


def test_what_the_receiver_was_too_slow_for_is_cut_by_blocks_once_the_step_is_computed() -> None:
    ready = StepReady(8)
    cuts = StepCuts(0, span(40), ready, PieceSize(8, 4, 20))
    ready.reach(2, READY)
    cuts.take(cuts.next())
    ready.reach(8, READY)
    assert [(cut.count, cut.layers) for cut in all_of(cuts)] == [(3, range(2, 8))] * 3 + [(1, range(2, 8))]


def target(layout: KvLayout, *slots: int) -> PushTarget:
    ranks = tuple(RankTarget(b"", "d:0", 0, 0, "DRAM", slot, (0,)) for slot in slots)
    return PushTarget(256, Incarnation("d"), layout, 0, 40, ranks)


def test_the_smallest_of_all_slots_decides_how_much_a_piece_holds() -> None:
    size = piece_size(LAYOUT, 0, 64 * 1024, target(LAYOUT, 32 * 1024))
    assert size == PieceSize(8, 4, 32)
    assert size.layers_at_once(4 * 10) == 3
    assert size.layers_at_once(4 * 33) == 1, "though it takes two pieces"
    assert size.layers_at_once(4) == 8
    assert piece_size(LAYOUT, 0, 16 * 1024, target(LAYOUT, 32 * 1024)) == PieceSize(8, 4, 16)


def test_a_rank_fills_its_share_of_a_slot_with_its_heads_of_as_many_blocks() -> None:
    prefill = msgspec.structs.replace(LAYOUT, tensor_parallel=2)
    for rank in range(2):
        assert piece_size(prefill, rank, 64 * 1024, target(LAYOUT, 32 * 1024)) == PieceSize(8, 4, 32)
    decode = msgspec.structs.replace(LAYOUT, tensor_parallel=4)
    assert piece_size(prefill, 1, 64 * 1024, target(decode, 8192, 8192, 8192, 8192)) == PieceSize(8, 4, 32)


def test_nothing_is_sent_to_where_it_cannot_be_used_or_others_send_it() -> None:
    other = msgspec.structs.replace(LAYOUT, layers=9)
    assert piece_size(LAYOUT, 0, 64 * 1024, target(other, 32 * 1024)) is None
    one_head = msgspec.structs.replace(LAYOUT, kv_heads=1)
    copies = msgspec.structs.replace(one_head, tensor_parallel=2)
    assert piece_size(copies, 1, 64 * 1024, target(one_head, 32 * 1024)) is None
