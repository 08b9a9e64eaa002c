from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.connector.arrivals import Arrivals
from workers.connector.protocol import Piece

HEADS, LAYERS, BLOCKS = range(4, 7), 5, 4


def piece(blocks: range, heads: range, layers: range) -> Piece:
    return Piece(1, 0, blocks.start, len(blocks), heads.start, len(heads), layers.start, len(layers))


@st.composite
def pieces(draw: st.DrawFn) -> Piece:
    found = []
    for whole in (range(BLOCKS), HEADS, range(LAYERS)):
        first = draw(st.sampled_from(whole))
        found.append(range(first, draw(st.integers(first + 1, whole.stop))))
    return piece(*found)


@given(st.lists(pieces(), max_size=30))
def test_a_transfer_is_complete_once_every_layer_of_every_head_and_block_has_come(some: list[Piece]) -> None:
    arrivals, there = Arrivals(HEADS, LAYERS, BLOCKS), np.zeros((BLOCKS, len(HEADS), LAYERS), dtype=bool)
    for one in some:
        assert arrivals.expects(one)
        arrivals.add(one)
        head = one.first_head - HEADS.start
        there[one.first :][: one.count, head:][:, : one.heads, one.first_layer :][..., : one.layers] = True
        assert arrivals.complete == there.all()


def test_a_piece_that_came_twice_does_not_stand_for_one_that_is_missing() -> None:
    arrivals = Arrivals(HEADS, LAYERS, BLOCKS)
    most, last = (piece(range(BLOCKS), HEADS, layers) for layers in (range(4), range(4, 5)))
    for _ in range(5):
        arrivals.add(most)
    assert not arrivals.complete
    arrivals.add(last)
    assert arrivals.complete


@pytest.mark.parametrize(
    ("blocks", "heads", "layers"),
    [
        (range(BLOCKS + 1), HEADS, range(LAYERS)),
        (range(-1, 2), HEADS, range(LAYERS)),
        (range(2, 2), HEADS, range(LAYERS)),
        (range(BLOCKS), range(3, 5), range(LAYERS)),
        (range(BLOCKS), range(5, 8), range(LAYERS)),
        (range(BLOCKS), HEADS, range(1, LAYERS + 1)),
        (range(BLOCKS), HEADS, range(-1, 1)),
        (range(BLOCKS), HEADS, range(0)),
    ],
)
def test_what_lies_outside_of_what_is_to_come_is_not_expected(blocks: range, heads: range, layers: range) -> None:
    assert not Arrivals(HEADS, LAYERS, BLOCKS).expects(piece(blocks, heads, layers))
