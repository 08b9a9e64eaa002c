from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamo_lite.plane.layout import Runs
from workers.transfer.native_rows import NativeRows
from workers.transfer.rows import TorchRows

BLOCKS = 9


@st.composite
def runs_of_a_row(draw: st.DrawFn) -> tuple[int, Runs]:
    """Bytes of a row, and runs in it."""
    size, count = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    pitch = size if count == 1 else size + draw(st.integers(0, 9))
    start = draw(st.integers(0, 9))
    unit = draw(st.sampled_from([1, 64]))  # whole lines of the cache are written by other instructions
    row = start + pitch * count + draw(st.integers(0, 9))
    return row * unit, Runs(start * unit, size * unit, pitch * unit, count)


def planes(rows: list[tuple[int, Runs]], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (BLOCKS, row), dtype=torch.uint8, generator=generator) for row, _ in rows]


@given(st.lists(runs_of_a_row(), min_size=1, max_size=3), st.permutations(range(BLOCKS)), st.data())
def test_any_runs_of_any_blocks_and_planes_are_copied_as_torch_copies_them(
    rows: list[tuple[int, Runs]], order: list[int], data: st.DataObject
) -> None:
    count, first = data.draw(st.integers(0, BLOCKS)), data.draw(st.integers(0, len(rows) - 1))
    some = slice(first, data.draw(st.integers(first + 1, len(rows))))
    ids, where = torch.tensor(order[:count], dtype=torch.int64), [runs for _, runs in rows]
    source, one, other = (planes(rows, seed) for seed in (1, 2, 2))
    native, plain = NativeRows(source, where), TorchRows(source, where)
    assert native.block_bytes == plain.block_bytes
    pieces = [torch.zeros(count * plain.block_bytes, dtype=torch.uint8) for _ in range(2)]

    native.gather(ids, pieces[0], some)
    plain.gather(ids, pieces[1], some)
    assert torch.equal(*pieces)

    NativeRows(one, where).scatter(ids, pieces[0], some)
    TorchRows(other, where).scatter(ids, pieces[0], some)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))
    untouched = planes(rows, 2)
    assert all(torch.equal(one[at], untouched[at]) for at in range(len(rows)) if not some.start <= at < some.stop)


@pytest.mark.parametrize("ids", [[-1], [BLOCKS], [0, 1, 2]])
def test_memory_outside_of_blocks_and_piece_is_never_touched(ids: list[int]) -> None:
    (plane,) = planes([(8, Runs(0, 8, 8, 1))], 1)
    rows = NativeRows([plane], [Runs(0, 8, 8, 1)])
    piece = torch.zeros(16, dtype=torch.uint8)
    with pytest.raises(IndexError):
        rows.gather(torch.from_numpy(np.array(ids)), piece)
    with pytest.raises(IndexError):
        rows.scatter(torch.from_numpy(np.array(ids)), piece)
