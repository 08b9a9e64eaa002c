"""Rows of planes in host memory, copied by one compiled loop: torch's own calls cost as much as a 64 KiB row each.

Compiled by Numba when this module is imported, in half a second; nothing is cached on disk. The loop runs without the
interpreter, so the thread that computes the model goes on meanwhile. It writes past the caches: blocks do not fit into
them, and a staging slot that another core has just read is in that core's. Where the two cores share no cache (a
line took 165 ns from one to the other, not 33), stores into what the other had just read ran at 2 GB/s instead of 12.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from dynamo_lite.plane.layout import Runs
from workers.transfer.rows import ALL_PLANES, OneByOne

_Words = npt.NDArray[np.int64]
_LINE = 64  # bytes: a line of the caches of every processor that we know of
_AHEAD = 1024  # bytes: processors fetch ahead by themselves, but not from one page of 4 KiB into the next


@intrinsic
def _memcpy(context: Any, target: Any, source: Any, size: Any) -> Any:
    """LLVM's memcpy between two addresses; Numba itself only copies arrays element by element."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        to, origin = (builder.inttoptr(argument, pointer) for argument in arguments[:2])
        cgutils.raw_memcpy(builder, to, origin, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def _stream_line(context: Any, target: Any, source: Any) -> Any:
    """Copy `_LINE` bytes to an aligned address past the caches: a plain store would first read what it overwrites."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = ir.VectorType(ir.IntType(8), _LINE).as_pointer()
        to, origin = (builder.inttoptr(argument, pointer) for argument in arguments)
        store = builder.store(builder.load(origin, align=1), to, align=_LINE)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _fetch_line(context: Any, source: Any) -> Any:
    """Have a line read that is needed soon, and only once. Any address will do."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = ir.IntType(32)
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        read, once, data = number(0), number(0), number(1)
        builder.call(fetch, [builder.inttoptr(arguments[0], pointer), read, once, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _fence(context: Any) -> Any:
    """Stores past the caches keep no order by themselves: after this, whoever sees a later store sees them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@njit("b1(i8[:,::1], i8[::1], i8, i8, b1)", nogil=True)
def _copy(where: _Words, ids: _Words, blocks: int, piece: int, scatter: bool) -> bool:
    """False, and nothing is copied, unless every id is one of `blocks`.

    `where`, `[planes, 5]`: address of row 0's first run, bytes between rows, of a run, between runs; runs.
    """
    for block in ids:
        if not 0 <= block < blocks:
            return False
    for plane in range(where.shape[0]):
        first, stride, size, pitch, count = where[plane]
        for block in ids:
            row = first + block * stride
            for _ in range(count):
                target, source = (row, piece) if scatter else (piece, row)
                if target % _LINE or size % _LINE:
                    _memcpy(target, source, size)
                else:
                    for byte in range(0, size, _LINE):
                        _fetch_line(source + byte + _AHEAD)
                        _stream_line(target + byte, source + byte)
                row += pitch
                piece += size
    _fence()
    return True


class NativeRows(OneByOne):
    """See `workers.transfer.rows.Rows`."""

    def __init__(self, planes: Sequence[torch.Tensor], where: Sequence[Runs]) -> None:
        """`planes` as uint8 `[blocks, row]`, which must outlive this; `where` for each of them."""
        self.block_bytes = sum(runs.total for runs in where)
        self._blocks = planes[0].shape[0]
        self._where = np.array(
            [
                (plane.data_ptr() + runs.start, plane.stride(0), runs.size, runs.pitch, runs.count)
                for plane, runs in zip(planes, where, strict=True)
            ],
            dtype=np.int64,
        )

    def gather(self, ids: torch.Tensor, piece: torch.Tensor, planes: slice = ALL_PLANES) -> None:
        self._move(ids, piece, planes, scatter=False)

    def scatter(self, ids: torch.Tensor, piece: torch.Tensor, planes: slice = ALL_PLANES) -> None:
        self._move(ids, piece, planes, scatter=True)

    def _move(self, ids: torch.Tensor, piece: torch.Tensor, planes: slice, *, scatter: bool) -> None:
        """Raises IndexError rather than touch memory that is not ours."""
        numbers, where = ids.numpy(), self._where[planes]
        block_bytes = int(where[:, 2] @ where[:, 4])
        if not piece.is_contiguous() or piece.numel() < len(numbers) * block_bytes:
            raise IndexError(f"{piece.numel()} bytes do not hold {len(numbers)} blocks of {block_bytes}")
        if not _copy(where, numbers, self._blocks, piece.data_ptr(), scatter):
            raise IndexError(f"blocks {numbers.min()}…{numbers.max()} are not all among {self._blocks}")
