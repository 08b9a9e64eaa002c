"""Workers of another tensor-parallel size, block size, order or dtype, all of whose ranks share one GPU."""

from __future__ import annotations

import pytest
import torch

from dynamo_lite.plane.layout import KvLayout
from tests.unit.workers.connector.layouts import Case, compare
from tests.unit.workers.transfer.kv import ORDERS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def layout(ranks: int, order: str = "nhd", block_size: int = 16, dtype: str = "bfloat16") -> KvLayout:
    return KvLayout(2, block_size, 4, ranks, 64, 64, dtype, *ORDERS[order])


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        (layout(4), layout(2)),
        (layout(2), layout(4)),
        (layout(1), layout(4)),
        (layout(4), layout(1)),
        (layout(4), layout(2, "hnd", 32)),
        (layout(2, "apart", 32), layout(4, "nhd", 16)),
        (layout(2, dtype="float16"), layout(1, "pairs", 64, "bfloat16")),
    ],
    ids=lambda side: f"{side.tensor_parallel} {side.keys} {side.block_size} {side.dtype}",
)
@pytest.mark.parametrize("by_layer", [False, True], ids=["whole steps", "by layer"])
def test_every_byte_arrives_where_it_belongs_whatever_the_two_layouts(
    prefill: KvLayout, decode: KvLayout, by_layer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Agents of one process that connect at once may crash in UCX's cuda_ipc; a worker's process has one.
    monkeypatch.setenv("UCX_TLS", "^cuda_ipc")
    tokens = 250
    taken = list(range(-(-tokens // prefill.block_size)))[::-1]
    placed = list(range(3, 2 + -(-tokens // decode.block_size)))
    case = Case(tokens, 1, taken, placed, [70, 200, tokens])
    compare(prefill, decode, case, torch.device("cuda", 0), by_layer=by_layer)
