"""Blocks between a GPU and the host tier's memory: every byte, in whatever order and however many are under way."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from dynamo_lite.plane.layout import KvLayout
from kvbm.tiers.host import HostMemory
from kvbm.tiers.record import stride_bytes
from tests.unit.workers.transfer.kv import ORDERS, Rank
from workers.connector.arena import Arena
from workers.transfer.pack import Copier
from workers.transfer.ready import Ready

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda", 0)
BLOCKS = 200  # of which half go to the tier, and come back into the other half
LAYOUT = KvLayout(32, 16, 8, 1, 128, 128, "bfloat16", *ORDERS["nhd"])  # blocks of 2 MiB, of which a copy takes eight
RANKS = KvLayout(3, 16, 4, 2, 48, 48, "bfloat16", *ORDERS["nhd"])  # shares of slots that end between pages


class Tier:
    """A rank's KV with its arena over some host memory."""

    def __init__(self, layout: KvLayout, rank: int, memory: HostMemory) -> None:
        with DEVICE:
            self.kv = Rank(layout, rank, BLOCKS, seed=rank)
        self.copier = Copier(self.kv.planes, rank)
        self.arena = Arena(memory.path, rank, layout.tensor_parallel, self.copier, DEVICE, lambda: None)

    def blocks(self, ids: list[int]) -> torch.Tensor:
        return self.kv.logical()[:, :, ids]

    def put(self, ids: list[int], slots: list[int], ready: Ready) -> None:
        """As many copies as it takes, none of which is waited for."""
        index, batch = self.arena.index(ids), self.arena.batch
        for first in range(0, len(ids), batch):
            self.arena.put(index[first : first + batch], slots[first : first + batch], ready)

    def get(self, slots: list[int], ids: list[int], ready: Ready | None = None) -> None:
        index, batch = self.arena.index(ids), self.arena.batch
        for first in range(0, len(ids), batch):
            copy = self.arena.get(slots[first : first + batch], index[first : first + batch], ready)
        copy.wait()


def memory_of(layout: KvLayout) -> HostMemory:
    return HostMemory(BLOCKS * stride_bytes(layout.block_bytes * layout.tensor_parallel))


@pytest.fixture(params=["in a row", "scattered"])
def slots(request: pytest.FixtureRequest) -> list[int]:
    count = BLOCKS // 2
    return list(range(7, 7 + count)) if request.param == "in a row" else random.Random(3).sample(range(BLOCKS), count)


@pytest.fixture(params=[LAYOUT, RANKS], ids=["one rank", "two ranks"])
def tiers(request: pytest.FixtureRequest) -> Iterator[list[Tier]]:
    layout: KvLayout = request.param
    memory = memory_of(layout)
    made = [Tier(layout, rank, memory) for rank in range(layout.tensor_parallel)]
    yield made
    for tier in made:
        tier.arena.close()
    memory.close()


def test_blocks_come_back_as_they_went_with_many_copies_under_way(tiers: list[Tier], slots: list[int]) -> None:
    ids = random.Random(1).sample(range(BLOCKS), BLOCKS)
    gone, back = ids[: len(slots)], ids[len(slots) :]
    for tier in tiers:
        tier.put(gone, slots, Ready(DEVICE))
    for tier in tiers:  # begun while the others are still on their way out
        before = tier.blocks(gone)
        tier.get(slots, back)
        assert torch.equal(tier.blocks(back), before)
        assert torch.equal(tier.blocks(gone), before)


@pytest.fixture
def tier() -> Iterator[Tier]:
    memory = memory_of(LAYOUT)
    made = Tier(LAYOUT, 0, memory)
    made.copier.warm()  # compiling would take longer than what the model is busy with below
    yield made
    made.arena.close()
    memory.close()


def test_what_the_model_has_yet_to_compute_is_what_is_copied(tier: Tier) -> None:
    gone, back, slots = [3, 4, 5], [60, 61, 62], [9, 10, 30]
    busy(tier, 5)
    ready = Ready(DEVICE)
    tier.put(gone, slots, ready)
    assert not ready.passed, "it was begun before the model was done"
    tier.get(slots, back)
    assert bool((tier.blocks(back) == 5).all())


def test_a_block_is_not_written_before_the_model_is_done_with_it(tier: Tier) -> None:
    tier.put([1], [0], Ready(DEVICE))
    expected = tier.blocks([1])
    torch.cuda.synchronize()
    busy(tier, 0)
    ready = Ready(DEVICE)
    assert not ready.passed
    tier.get([0], [8], ready)
    assert torch.equal(tier.blocks([8]), expected)
    assert not bool(tier.blocks([1]).any())


def busy(tier: Tier, value: int) -> None:
    """The model computes for a tenth of a second, and then fills all blocks."""
    torch.cuda._sleep(200_000_000)
    for cache in tier.kv.caches:
        cache.fill_(value)
