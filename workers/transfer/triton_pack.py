"""Rows of all planes copied to or from a piece by one CUDA kernel. Imported only where there is a GPU, and Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from dynamo_lite.plane.layout import Runs
from workers.transfer.rows import ALL_PLANES

_WORD = 8  # bytes; a thread copies two at once where everything is aligned to 16
_CHUNK = 2048  # words a program copies


@triton.jit(do_not_specialize=["ids", "first", "plane_step", "block_step"], do_not_specialize_on_alignment=["ids"])
def _copy(  # type: ignore[no-untyped-def]  # noqa: ANN202, PLR0913, PLR0917
    bases,  # noqa: ANN001  # int64 [planes]: address of the first run of each plane's row 0
    strides,  # noqa: ANN001  # int64 [planes]: bytes from one row to the next
    ids,  # noqa: ANN001  # int64 [count]
    piece,  # noqa: ANN001  # int64 [planes that are copied, count, ROW], or [count, planes, ROW]
    first,  # noqa: ANN001  # of the planes that are copied
    plane_step,  # noqa: ANN001  # words from one plane's part of a block to the next one's
    block_step,  # noqa: ANN001  # words from one block's part in a plane to the next one's
    ROW: tl.constexpr,  # noqa: N803  # words of a block in each plane
    RUN: tl.constexpr,  # noqa: N803  # words of a run
    PITCH: tl.constexpr,  # noqa: N803  # words from one run to the next
    CHUNK: tl.constexpr,  # noqa: N803
    SCATTER: tl.constexpr,  # noqa: N803
):
    chunks: tl.constexpr = (ROW + CHUNK - 1) // CHUNK
    block = tl.program_id(0) // chunks
    plane = tl.program_id(1)
    word = (tl.program_id(0) % chunks) * CHUNK + tl.arange(0, CHUNK)
    there = word < ROW
    at = word if RUN == ROW else (word // RUN) * PITCH + word % RUN
    row = tl.load(bases + first + plane) + tl.load(ids + block) * tl.load(strides + first + plane)
    rows = row.to(tl.pointer_type(tl.int64)) + at
    rows = tl.max_contiguous(tl.multiple_of(rows, 16), 2)
    pieces = piece + plane.to(tl.int64) * plane_step + block.to(tl.int64) * block_step + word
    pieces = tl.max_contiguous(tl.multiple_of(pieces, 16), 2)
    if SCATTER:
        tl.store(rows, tl.load(pieces, mask=there), mask=there)
    else:
        tl.store(pieces, tl.load(rows, mask=there), mask=there)


def fits(planes: Sequence[torch.Tensor], where: Sequence[Runs]) -> bool:
    """Whether the kernel can copy these: one shape of row in all planes, everything aligned to 16 bytes."""
    shapes = {(runs.size, runs.pitch, runs.count) for runs in where}
    numbers = [(plane.data_ptr() + runs.start, plane.stride(0)) for plane, runs in zip(planes, where, strict=True)]
    return len(shapes) == 1 and all(number % 16 == 0 for pair in [*numbers, *shapes] for number in pair[:2])


class TritonRows:
    """See `workers.transfer.rows.Rows`. Works on torch's current stream."""

    def __init__(self, planes: Sequence[torch.Tensor], where: Sequence[Runs]) -> None:
        """What `fits`. The planes must outlive this."""
        device = planes[0].device
        addresses = [plane.data_ptr() + runs.start for plane, runs in zip(planes, where, strict=True)]
        self._bases = torch.tensor(addresses, dtype=torch.int64, device=device)
        self._strides = torch.tensor([plane.stride(0) for plane in planes], dtype=torch.int64, device=device)
        self._run, self._pitch = where[0].size // _WORD, where[0].pitch // _WORD
        self._row = self._run * where[0].count
        self._chunk = min(_CHUNK, triton.next_power_of_2(self._row))
        self._chunks = triton.cdiv(self._row, self._chunk)
        self._kernels: dict[bool, Any] = {}  # compiled, by whether it scatters
        self.block_bytes = len(planes) * self._row * _WORD

    def gather(self, ids: torch.Tensor, piece: torch.Tensor, planes: slice = ALL_PLANES) -> None:
        self._launch(ids, piece, planes, scatter=False, each=False)

    def scatter(self, ids: torch.Tensor, piece: torch.Tensor, planes: slice = ALL_PLANES) -> None:
        self._launch(ids, piece, planes, scatter=True, each=False)

    def gather_each(self, ids: torch.Tensor, pieces: torch.Tensor) -> None:
        self._launch(ids, pieces, ALL_PLANES, scatter=False, each=True)

    def scatter_each(self, ids: torch.Tensor, pieces: torch.Tensor) -> None:
        self._launch(ids, pieces, ALL_PLANES, scatter=True, each=True)

    def _launch(self, ids: torch.Tensor, piece: torch.Tensor, which: slice, *, scatter: bool, each: bool) -> None:
        first, stop, _ = which.indices(len(self._bases))
        count, planes = len(ids), stop - first
        assert piece.data_ptr() % 16 == 0, "a piece begins at a multiple of 16 bytes"
        assert piece.numel() >= planes * self._row * _WORD * count, "the piece is too short"
        constants = (self._row, self._run, self._pitch, self._chunk, scatter)
        kernel = self._kernels.get(scatter)
        if kernel is None:
            words = torch.int64
            # Launched as compiled, not through the JIT, which looks at every argument again: 70 µs a launch.
            kernel = _copy.warmup(words, words, words, words, 1, 1, 1, *constants, grid=(1,))
            self._kernels[scatter] = kernel = kernel or _copy  # TRITON_INTERPRET=1 compiles nothing
        if kernel is _copy:
            piece = piece.view(torch.int64)  # which is compiled in, but not interpreted
        steps = (self._row, planes * self._row) if each else (count * self._row, self._row)
        grid = (count * self._chunks, planes, 1)
        kernel[grid](self._bases, self._strides, ids, piece, first, *steps, *constants)
