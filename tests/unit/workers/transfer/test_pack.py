from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.transfer.layout import Planes, planes_of
from workers.transfer.pack import Copier, Ready

CPU = torch.device("cpu")


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

    used = Copier(source).gather(taken, piece, Ready(CPU))
    Copier(target).scatter(placed, piece)

    assert used == source.block_bytes * len(taken)
    for mine, theirs, old in zip(source.planes, target.planes, before, strict=True):
        assert torch.equal(theirs[placed], mine[taken])
        untouched = [block for block in range(blocks) if block not in placed]
        assert torch.equal(theirs[untouched], old[untouched])
