from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_lite.plane.layout import KvLayout, exchange_problem, parts, runs

CUDA = KvLayout(32, 16, 8, 4, 128, 128, "bfloat16", "NHKD", "NHKD")
CPU = KvLayout(4, 32, 8, 2, 32, 32, "bfloat16", "HKDN", "HKND", packed="amx")
CONTENTS = {
    "layers": (32, 30),
    "kv_heads": (8, 4),
    "key_size": (128, 64),
    "value_size": (128, 64),
}


def changed(layout: KvLayout, **fields: object) -> KvLayout:
    return msgspec.structs.replace(layout, **fields)


@st.composite
def tensor_parallel(draw: st.DrawFn, kv_heads: int) -> int:
    """What vLLM allows: the one divides into the other."""
    return draw(st.sampled_from([n for n in range(1, 17) if kv_heads % n == 0 or n % kv_heads == 0]))


@given(st.data(), st.integers(1, 12))
def test_every_head_of_every_receiving_rank_is_sent_exactly_once(data: st.DataObject, kv_heads: int) -> None:
    prefill, decode = (
        changed(CUDA, kv_heads=kv_heads, tensor_parallel=data.draw(tensor_parallel(kv_heads))) for _ in range(2)
    )
    for rank in range(decode.tensor_parallel):
        sent: list[int] = []
        for source in range(prefill.tensor_parallel):
            heads = parts(prefill, source, decode, rank)
            if heads is not None:
                assert set(heads) <= set(prefill.heads(source))
                sent += heads
        assert sorted(sent) == list(decode.heads(rank))


def test_equal_ranks_send_to_the_same_rank_only() -> None:
    for layout in (CUDA, changed(CUDA, kv_heads=2)):
        pairs = {(i, j) for i in range(4) for j in range(4) if parts(layout, i, layout, j)}
        assert pairs == {(i, i) for i in range(4)}


def test_four_ranks_send_to_two_and_two_to_four() -> None:
    two = changed(CUDA, tensor_parallel=2)
    assert [parts(CUDA, rank, two, 0) for rank in range(4)] == [range(2), range(2, 4), None, None]
    assert [parts(two, 1, CUDA, rank) for rank in range(4)] == [None, None, range(4, 6), range(6, 8)]


def test_the_same_head_on_several_ranks_is_sent_by_all_of_them_in_turn() -> None:
    many = changed(CUDA, kv_heads=1, tensor_parallel=4)
    sources = [[rank for rank in range(4) if parts(many, rank, many, target)] for target in range(4)]
    assert sources == [[0], [1], [2], [3]]


def test_sizes_are_those_of_one_rank() -> None:
    assert CUDA.rank_heads == 2
    assert CUDA.block_bytes == 32 * 16 * 2 * 256 * 2
    assert CUDA.part_bytes(1) * 2 == CUDA.block_bytes
    assert CUDA.plane_sizes == (256,)
    assert changed(CUDA, keys="NHD", values="NHD").plane_sizes == (128, 128)
    assert changed(CUDA, kv_heads=1, keys="NHD", values="NHD", value_size=0).plane_sizes == (128,)


@pytest.mark.parametrize("order", ["NHKD", "HNKD", "HKND", "KNHD", "KHND", "NHD", "HND"])
@given(data=st.data())
def test_runs_are_the_bytes_of_the_heads_and_nothing_else(order: str, data: st.DataObject) -> None:
    layout = changed(CUDA, block_size=2, key_size=2, value_size=2, tensor_parallel=2, keys=order, values=order)
    first = data.draw(st.integers(4, 7))
    heads = range(first, data.draw(st.integers(first + 1, 8)))
    sizes = {"N": 2, "H": 4, "K": 2, "D": 2}
    dims = [sizes[letter] for letter in order]
    expected = set()
    for index in range(layout.block_bytes // layout.layers // len(layout.plane_sizes) // 2):
        rest, at = index, []
        for dim in reversed(dims):
            rest, here = divmod(rest, dim)
            at.append(here)
        if at[::-1][order.index("H")] + 4 in heads:
            expected |= {2 * index, 2 * index + 1}
    for each in runs(layout, 1, heads):
        covered = [each.start + n * each.pitch + byte for n in range(each.count) for byte in range(each.size)]
        assert len(covered) == len(set(covered)) == each.total
        assert set(covered) == expected


def test_all_heads_of_a_rank_are_one_run() -> None:
    (run,) = runs(CUDA, 0, CUDA.heads(0))
    assert (run.start, run.count, run.size) == (0, 1, CUDA.block_bytes // CUDA.layers)


@pytest.mark.parametrize(
    "fields",
    [
        {"tensor_parallel": 2},
        {"block_size": 64},
        {"dtype": "float16"},
        {"dtype": "float32", "block_size": 32, "tensor_parallel": 8},
        {"keys": "HNKD", "values": "HNKD"},
        {"keys": "NHD", "values": "NHD"},
        {"keys": "HKDN", "values": "HKND"},
    ],
)
def test_what_can_be_converted_is_no_obstacle(fields: dict[str, object]) -> None:
    assert exchange_problem(CUDA, changed(CUDA, **fields)) is None
    assert exchange_problem(changed(CUDA, **fields), CUDA) is None


@pytest.mark.parametrize("field", CONTENTS)
def test_models_of_another_shape_are_refused_by_both_figures(field: str) -> None:
    mine, theirs = CONTENTS[field]
    problem = exchange_problem(CUDA, changed(CUDA, **{field: theirs}))
    assert problem is not None
    assert str(mine) in problem
    assert str(theirs) in problem


def test_fp8_is_only_exchanged_with_the_same_fp8() -> None:
    fp8 = changed(CUDA, dtype="fp8_e4m3")
    assert exchange_problem(fp8, changed(fp8, block_size=32, tensor_parallel=2)) is None
    assert exchange_problem(fp8, CUDA) == "the prefill worker stores KV as fp8_e4m3, the decode worker as bfloat16"
    assert exchange_problem(fp8, changed(fp8, dtype="fp8_e5m2")) is not None


def test_packed_kv_is_only_exchanged_with_its_like() -> None:
    assert exchange_problem(CPU, CPU) is None
    assert exchange_problem(CPU, changed(CPU, tensor_parallel=4)) is None, "heads lie apart and can be told apart"
    assert exchange_problem(CPU, changed(CPU, packed="neon")) == (
        "KV is packed (amx) at the prefill worker, KV is packed (neon) at the decode worker"
    )
    assert exchange_problem(changed(CPU, packed=""), CPU) == (
        "KV is not packed at the prefill worker, KV is packed (amx) at the decode worker"
    )
    assert exchange_problem(changed(CPU, block_size=64), CPU) == (
        "KV is packed (amx), which only fits an equal block_size: 64 at the prefill worker, 32 at the decode worker"
    )
    flat = changed(CPU, keys="NHKD", values="NHKD")
    assert exchange_problem(flat, flat) is None
    assert exchange_problem(flat, changed(flat, tensor_parallel=4)) == (
        "KV is packed (amx), which cannot be cut into heads: 4 a rank at the prefill worker, 2 at the decode worker"
    )


@pytest.mark.parametrize(
    "fields", [{"keys": "NHKD", "values": "HNKD"}, {"keys": "KNHD", "values": "KNHD", "value_size": 64}]
)
def test_orders_without_rows_of_heads_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="no row"):
        changed(CUDA, **fields)
