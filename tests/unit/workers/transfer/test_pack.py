from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamo_lite.plane.layout import KvLayout, parts
from tests.unit.workers.transfer.kv import ORDERS, Rank
from workers.transfer.layout import Planes, planes_of
from workers.transfer.pack import Copier
from workers.transfer.ready import Ready
from workers.transfer.span import Span

CPU = torch.device("cpu")
READY = Ready(CPU)


def some_planes(blocks: int, layers: int, seed: int) -> Planes:
    generator = torch.Generator().manual_seed(seed)
    caches = {f"layer{i}": torch.randn(blocks, 2, 3, generator=generator) for i in range(layers)}
    return planes_of(caches, blocks)


@given(st.data(), st.integers(1, 4), st.integers(1, 12))
def test_scattering_what_was_gathered_copies_the_blocks_and_nothing_else(
    data: st.DataObject, layers: int, blocks: int
) -> None:
    source, target = some_planes(blocks, layers, 1), some_planes(blocks, layers, 2)
    before = [plane.clone() for plane in target.planes]
    some = st.lists(st.integers(0, blocks - 1), min_size=1, max_size=blocks, unique=True)
    taken = data.draw(some)
    placed = data.draw(st.permutations(range(blocks)))[: len(taken)]
    piece = torch.zeros(source.block_bytes * blocks, dtype=torch.uint8)

    used = Copier(source).gather(taken, piece, READY).size
    Copier(target).scatter(np.array(placed), piece)

    assert used == source.block_bytes * len(taken)
    for mine, theirs, old in zip(source.planes, target.planes, before, strict=True):
        assert torch.equal(theirs[placed], mine[taken])
        untouched = [block for block in range(blocks) if block not in placed]
        assert torch.equal(theirs[untouched], old[untouched])


@st.composite
def layouts(draw: st.DrawFn) -> tuple[KvLayout, KvLayout]:
    """A prefill and a decode worker's layout of one model."""
    heads = draw(st.sampled_from([1, 2, 4]))
    layers, size = draw(st.integers(1, 3)), draw(st.sampled_from([2, 3]))
    made = []
    for _ in range(2):
        keys, values = ORDERS[draw(st.sampled_from(list(ORDERS)))]
        dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
        ranks, block_size = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([2, 3, 4]))
        made.append(KvLayout(layers, block_size, heads, ranks, size, size, dtype, keys, values))
    return made[0], made[1]


def move(senders: list[Rank], taken: list[int], receivers: list[Rank], placed: list[int], start: int, end: int) -> None:
    """Every part of tokens `start` … `end` from every sender's rank to every receiver's, in pieces of two blocks.

    One holds their first layer, and another one the others.
    """
    prefill, decode = senders[0].layout, receivers[0].layout
    for target_rank, receiver in enumerate(receivers):
        scattered = Copier(receiver.planes, target_rank)
        for rank, sender in enumerate(senders):
            heads = parts(prefill, rank, decode, target_rank)
            if heads is None:
                continue
            outlet = Copier(sender.planes, rank).outlet(decode, heads)
            assert outlet.block_bytes == decode.part_bytes(len(heads))
            first, skipped = divmod(start, prefill.block_size)
            rest, done = Span(np.array(taken[first:]), prefill.block_size, skipped, end - start), 0
            while rest.tokens:
                head, rest = rest.head(2 * decode.block_size), rest.rest(2 * decode.block_size)
                count = -(-head.tokens // decode.block_size)
                for layers in filter(len, (range(1), range(1, decode.layers))):
                    piece = torch.full((2 * outlet.block_bytes,), 255, dtype=torch.uint8)
                    assert outlet.gather(head, layers, piece).size == count * len(layers) * outlet.layer_bytes
                    scattered.scatter(placed[done : done + count], piece, heads, layers)
                done += count


@given(st.data(), layouts(), st.integers(1, 17))
def test_every_layout_arrives_in_every_other(data: st.DataObject, pair: tuple[KvLayout, KvLayout], tokens: int) -> None:
    prefill, decode = pair
    blocks = 10
    generator = torch.Generator().manual_seed(tokens)
    shape = (prefill.layers, 2, tokens, prefill.kv_heads, prefill.key_size)
    prompt = torch.randint(0, 200, shape, generator=generator).float()
    first = data.draw(st.integers(0, (tokens - 1) // decode.block_size))
    taken = data.draw(st.permutations(range(blocks)))
    placed = data.draw(st.permutations(range(blocks)))[: -(-tokens // decode.block_size) - first]
    senders = [Rank(prefill, rank, blocks, rank) for rank in range(prefill.tensor_parallel)]
    for sender in senders:
        sender.write(taken, prompt)
    receivers = [Rank(decode, rank, blocks, 10 + rank) for rank in range(decode.tensor_parallel)]
    before = [receiver.logical() for receiver in receivers]

    move(senders, taken, receivers, placed, first * decode.block_size, tokens)

    for receiver, old in zip(receivers, before, strict=True):
        now = receiver.logical()
        heads = prompt[:, :, first * decode.block_size :, receiver.heads.start : receiver.heads.stop]
        got = now[:, :, placed].flatten(2, 3)[:, :, : heads.shape[2]]
        assert torch.equal(got.float(), heads)
        untouched = [block for block in range(blocks) if block not in placed]
        assert torch.equal(now[:, :, untouched], old[:, :, untouched])


def test_the_rest_of_a_converted_last_block_is_zero() -> None:
    prefill = KvLayout(1, 2, 1, 1, 2, 2, "float32", "NHKD", "NHKD")
    sender = Rank(prefill, 0, 4)
    receiver = Rank(msgspec.structs.replace(prefill, block_size=4), 0, 2)
    move([sender], [0, 1, 2, 3], [receiver], [1], 0, 3)
    assert not receiver.logical()[:, :, 1, 3:].any()


def test_values_beyond_the_range_of_float16_stay_finite() -> None:
    prefill = KvLayout(1, 2, 1, 1, 2, 2, "bfloat16", "NHKD", "NHKD")
    sender, receiver = Rank(prefill, 0, 1), Rank(msgspec.structs.replace(prefill, dtype="float16"), 0, 1)
    sender.caches[0].fill_(-1e30)
    move([sender], [0], [receiver], [0], 0, 2)
    assert receiver.logical().unique().tolist() == [-65504.0]


@pytest.mark.parametrize("ranks", [(4, 2), (2, 4), (1, 4)])
def test_fp8_is_cut_into_heads_and_other_blocks_without_being_touched(ranks: tuple[int, int]) -> None:
    layouts = [
        KvLayout(2, size, 4, tensor_parallel, 4, 4, "fp8_e4m3", *ORDERS["nhd"])
        for size, tensor_parallel in zip((4, 6), ranks, strict=True)
    ]
    prompt = torch.randint(0, 255, (2, 2, 12, 4, 4)).to(torch.uint8)
    senders = [Rank(layouts[0], rank, 3) for rank in range(ranks[0])]
    receivers = [Rank(layouts[1], rank, 2) for rank in range(ranks[1])]
    for sender in senders:
        sender.write([2, 0, 1], prompt)
    move(senders, [2, 0, 1], receivers, [1, 0], 0, 12)
    for receiver in receivers:
        got = receiver.logical()[:, :, [1, 0]].flatten(2, 3)
        assert torch.equal(got, prompt[:, :, :, receiver.heads.start : receiver.heads.stop])


def test_packed_rows_are_cut_into_heads_as_they_are() -> None:
    layouts = [KvLayout(2, 4, 4, ranks, 2, 2, "bfloat16", "HKDN", "HKND", "amx") for ranks in (1, 2)]
    prompt = torch.randint(0, 99, (2, 2, 8, 4, 2)).float()
    sender, receivers = Rank(layouts[0], 0, 2), [Rank(layouts[1], rank, 2) for rank in range(2)]
    sender.write([1, 0], prompt)
    move([sender], [1, 0], receivers, [0, 1], 0, 8)
    for receiver in receivers:
        got = receiver.logical().flatten(2, 3).float()
        assert torch.equal(got, prompt[:, :, :, receiver.heads.start : receiver.heads.stop])
