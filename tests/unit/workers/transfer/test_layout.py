from __future__ import annotations

import pytest
import torch

from workers.errors import Mismatch
from workers.transfer.layout import planes_of


def test_keys_and_values_that_lie_together_make_one_plane_a_layer() -> None:
    caches = {f"layer{i}": torch.zeros(10, 2, 4, 8) for i in range(3)}
    planes = planes_of(caches, 10)
    assert [tuple(plane.shape) for plane in planes.planes] == [(10, 2 * 4 * 8 * 4)] * 3
    assert planes.block_bytes == 3 * 256


def test_keys_and_values_that_lie_apart_make_two_planes_a_layer() -> None:
    planes = planes_of({"layer": torch.zeros(2, 10, 4, 8, dtype=torch.bfloat16)}, 10)
    assert [tuple(plane.shape) for plane in planes.planes] == [(10, 64), (10, 64)]


def test_planes_are_views_of_the_engine_s_memory() -> None:
    cache = torch.zeros(4, 2, 8, dtype=torch.int32)
    planes = planes_of({"layer": cache}, 4)
    cache[3] = 7
    assert planes.planes[0][3].view(torch.int32).unique().tolist() == [7]


def test_a_permuted_block_is_still_one_run_of_bytes_and_the_order_is_in_the_layout() -> None:
    plain = planes_of({"layer": torch.zeros(4, 2, 8)}, 4)
    permuted = planes_of({"layer": torch.zeros(4, 8, 2).permute(0, 2, 1)}, 4)
    assert permuted.planes[0].shape == plain.planes[0].shape
    assert permuted.layout != plain.layout, "raw bytes of the two cannot be exchanged"


def test_a_block_that_is_not_one_run_of_bytes_is_refused() -> None:
    with pytest.raises(Mismatch, match="not one run of bytes"):
        planes_of({"layer": torch.zeros(8, 4, 2).permute(1, 0, 2)}, 4)


def test_a_tensor_without_a_block_dimension_is_refused() -> None:
    with pytest.raises(Mismatch, match="counts the 5 blocks"):
        planes_of({"layer": torch.zeros(4, 8)}, 5)
