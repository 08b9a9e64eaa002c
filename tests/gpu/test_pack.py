"""The kernels of `workers.transfer.triton_pack` against torch, bit for bit, and their speed.

Without a GPU but with Triton, TRITON_INTERPRET=1 runs all but the speed on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import torch

from dynamo_lite.plane.layout import KvLayout, runs
from tests.unit.workers.transfer.kv import ORDERS, Rank
from workers.transfer.layout import planes_of
from workers.transfer.pack import Copier
from workers.transfer.rows import TorchRows
from workers.transfer.span import Span

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not (GPU or INTERPRETED), reason="needs a CUDA device")]
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
LAYOUT = KvLayout(3, 16, 4, 1, 64, 64, "bfloat16", *ORDERS["nhd"])


def on_gpu(layout: KvLayout, rank: int, blocks: int, seed: int) -> Rank:
    with DEVICE:
        return Rank(layout, rank, blocks, seed)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("ranks", "heads"), [(1, range(4)), (1, range(1, 3)), (2, range(2, 4)), (2, range(3, 4))])
@pytest.mark.parametrize("size", [64, 80])
@pytest.mark.parametrize("layers", [range(3), range(1), range(1, 3)])
def test_the_kernels_copy_what_torch_copies(order: str, ranks: int, heads: range, size: int, layers: range) -> None:
    from workers.transfer.triton_pack import TritonRows, fits

    keys, values = ORDERS[order]
    layout = msgspec.structs.replace(
        LAYOUT, tensor_parallel=ranks, keys=keys, values=values, key_size=size, value_size=size
    )
    rank = ranks - 1
    source, one, other = (on_gpu(layout, rank, 40, seed) for seed in (1, 2, 2))
    where = runs(layout, rank, heads) * layout.layers
    assert fits(source.planes.planes, where)
    taken, placed = (torch.randperm(40, device=DEVICE)[:17] for _ in range(2))
    length = 17 * layout.part_bytes(len(heads), len(layers))
    pieces = [torch.zeros(length, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    planes = Copier(source.planes, rank).planes(layers)

    TritonRows(source.planes.planes, where).gather(taken, pieces[0], planes)
    TorchRows(source.planes.planes, where).gather(taken, pieces[1], planes)
    assert torch.equal(*pieces)

    TritonRows(one.planes.planes, where).scatter(placed, pieces[0], planes)
    TorchRows(other.planes.planes, where).scatter(placed, pieces[1], planes)
    assert torch.equal(one.logical(), other.logical())
    before = on_gpu(layout, rank, 40, 2).logical()
    changed = [layer for layer in range(3) if not torch.equal(one.logical()[layer], before[layer])]
    assert changed == list(layers)


@pytest.mark.parametrize("order", ORDERS)
def test_conversion_on_the_gpu_gives_what_it_gives_on_the_cpu(order: str) -> None:
    keys, values = ORDERS[order]
    peer = msgspec.structs.replace(LAYOUT, block_size=24, tensor_parallel=2, dtype="float16", keys=keys, values=values)
    span = Span(np.array([7, 2, 9, 0]), 16, 8, 50)
    pieces = []
    for device in (torch.device("cpu"), DEVICE):
        with torch.device("cpu"):
            rank = Rank(LAYOUT, 0, 10, 3)
        planes = planes_of({f"layer{i}": each.to(device) for i, each in enumerate(rank.caches)}, 10)
        outlet = Copier(planes).outlet(peer, range(2, 4))
        piece = torch.zeros(3 * 2 * outlet.layer_bytes, dtype=torch.uint8, device=device)
        assert outlet.gather(span, range(1, 3), piece).wait().size == piece.numel()
        pieces.append(piece.cpu())
    assert torch.equal(*pieces)


def milliseconds(copy: Callable[[], object], rounds: int = 30) -> float:
    """The shortest of some rounds, on the GPU's clock."""
    times: list[float] = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        copy()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)


@pytest.mark.parametrize("heads", [range(8), range(4)])
def test_half_a_gibibyte_is_gathered_and_scattered_in_half_a_millisecond(heads: range) -> None:
    """An 8B model's shape: 64 planes with rows of 32 KiB, whole, or half of the heads of twice as many blocks."""
    if not (GPU and torch.cuda.get_device_name().startswith(("NVIDIA H100", "NVIDIA H200"))):
        pytest.skip("the bound is an H100's")
    from workers.transfer.triton_pack import TritonRows

    layout = KvLayout(32, 16, 8, 1, 128, 128, "bfloat16", "NHD", "NHD")
    caches = {f"layer{i}": torch.zeros(2, 1024, 16, 8, 128, dtype=torch.bfloat16, device=DEVICE) for i in range(32)}
    planes = planes_of(caches, 1024)
    assert planes.layout == layout
    rows = TritonRows(planes.planes, runs(layout, 0, heads) * 32)
    ids = torch.randperm(1024, device=DEVICE)[: 2**29 // rows.block_bytes]
    piece = torch.zeros(2**29, dtype=torch.uint8, device=DEVICE)
    for copy in (rows.gather, rows.scatter):
        took = milliseconds(lambda copy=copy: copy(ids, piece))  # type: ignore[misc]
        print(f"{copy.__name__} {len(heads)} of 8 heads, {len(ids)} blocks, 512 MiB: {took:.3f} ms")
        assert took < 0.5
