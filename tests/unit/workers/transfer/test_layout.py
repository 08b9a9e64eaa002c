from __future__ import annotations

import msgspec
import pytest
import torch

from dynamo_lite.plane.layout import KvLayout
from tests.unit.workers.transfer.kv import ORDERS, Rank
from workers.errors import Mismatch
from workers.transfer.layout import ModelKv, planes_of


def test_keys_and_values_that_lie_together_make_one_plane_a_layer() -> None:
    caches = {f"layer{i}": torch.zeros(10, 2, 4, 8) for i in range(3)}
    planes = planes_of(caches, 10)
    assert [tuple(plane.shape) for plane in planes.planes] == [(10, 2 * 4 * 8 * 4)] * 3
    assert planes.block_bytes == planes.layout.block_bytes == 3 * 256


def test_keys_and_values_that_lie_apart_make_two_planes_a_layer() -> None:
    planes = planes_of({"layer": torch.zeros(2, 10, 4, 8, 2, dtype=torch.bfloat16)}, 10)
    assert [tuple(plane.shape) for plane in planes.planes] == [(10, 128), (10, 128)]


def test_planes_are_views_of_the_engine_s_memory() -> None:
    cache = torch.zeros(4, 2, 8, dtype=torch.int32)
    planes = planes_of({"layer": cache}, 4)
    cache[3] = 7
    assert planes.planes[0][3].view(torch.int32).unique().tolist() == [7]


@pytest.mark.parametrize("name", [name for name in ORDERS if name != "cpu"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_order_of_a_row_is_read_from_shape_and_strides(name: str, ranks: int) -> None:
    layout = KvLayout(2, 16, 4, ranks, 8, 8, "bfloat16", *ORDERS[name])
    assert Rank(layout, 0, 3).planes.layout == layout


def test_the_order_inside_cpu_rows_is_the_attention_s_own() -> None:
    layout = KvLayout(2, 32, 4, 2, 8, 8, "float32", *ORDERS["cpu"])
    assert Rank(layout, 1, 3).planes.layout == layout


def test_one_head_a_rank_keeps_the_order_that_more_heads_would_have() -> None:
    one = planes_of({"layer": torch.zeros(3, 16, 1, 8).permute(0, 2, 1, 3)}, 3, ModelKv(4, 4)).layout
    two = planes_of({"layer": torch.zeros(3, 16, 2, 8).permute(0, 2, 1, 3)}, 3, ModelKv(4, 2)).layout
    assert msgspec.structs.replace(one, tensor_parallel=2) == two


def test_latent_keys_have_no_values_and_one_head_on_every_rank() -> None:
    layout = planes_of({"layer": torch.zeros(3, 16, 576)}, 3, ModelKv(128, 4)).layout
    assert (layout.kv_heads, layout.rank_heads, layout.key_size, layout.value_size) == (1, 1, 576, 0)


def test_keys_and_values_may_be_of_different_sizes() -> None:
    layout = planes_of({"layer": torch.zeros(3, 2, 16, 192 + 128)}, 3, ModelKv(key_size=192)).layout
    assert (layout.key_size, layout.value_size) == (192, 128)


def test_bytes_are_what_the_engine_says_they_are() -> None:
    caches = {"layer": torch.zeros(3, 2, 16, 64, dtype=torch.uint8)}
    assert planes_of(caches, 3, ModelKv(dtype="fp8_e4m3")).layout.packed == ""
    scaled = planes_of({"layer": torch.zeros(3, 2, 16, 72, dtype=torch.int8)}, 3, ModelKv(key_size=32)).layout
    assert (scaled.packed, scaled.key_size, scaled.value_size) == ("int8", 72, 0), "scales lie beside the values"


@pytest.mark.parametrize(
    ("cache", "problem"),
    [
        (torch.zeros(8, 4, 2).permute(1, 0, 2), "not one run of bytes"),
        (torch.zeros(5, 8), "no known shape of 4 blocks"),
        (torch.zeros(5, 2, 16, 8), "no known shape of 4 blocks"),
        (torch.zeros(4, 2, 16, 8), "2 KV heads on a rank, where 4 were expected"),
    ],
)
def test_what_has_no_rows_of_blocks_and_heads_is_refused(cache: torch.Tensor, problem: str) -> None:
    with pytest.raises(Mismatch, match=problem):
        planes_of({"layer": cache}, 4, ModelKv(kv_heads=4))


def test_layers_that_differ_are_refused() -> None:
    with pytest.raises(Mismatch, match="layers of one shape"):
        planes_of({"a": torch.zeros(4, 2, 16, 8), "b": torch.zeros(4, 2, 16, 4)}, 4)
