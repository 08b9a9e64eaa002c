"""Gather blocks of some layers into one contiguous piece, and scatter a piece back.

A piece is always in the receiver's own form, for the heads that both ranks have: it holds, plane after plane of its
layers, the rows of its blocks. Where the two layouts agree that is a copy of rows; where not, the sender converts.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch

from dynamo_lite.plane.layout import KvLayout, Runs, runs
from workers.transfer.checksum import checksum
from workers.transfer.convert import Conversion
from workers.transfer.layout import Planes
from workers.transfer.ready import Ready
from workers.transfer.rows import Rows, TorchRows
from workers.transfer.span import BlockIds, Span

_NOTHING = nullcontext()
Ids: TypeAlias = Sequence[int] | BlockIds | torch.Tensor


class Copy:
    """A copy that was begun. On the CPU it is over at once; CUDA goes on by itself."""

    def __init__(self, size: int, stream: torch.cuda.Stream | None) -> None:
        """Of `size` bytes of a piece; the last thing put on the stream."""
        self.size = size
        self._event = torch.cuda.Event(blocking=True) if stream is not None else None  # who waits sleeps
        if self._event is not None:
            self._event.record(stream)

    @property
    def done(self) -> bool:
        """Whether every byte is in place. Raises RuntimeError when the GPU failed."""
        return self._event is None or self._event.query()

    def wait(self) -> Copy:
        """Block until it is done: as long as the copy itself takes, once what it was to wait for has happened."""
        if self._event is not None:
            self._event.synchronize()
        return self


class Outlet:
    """What one rank sends to one rank of a peer: gathers pieces in the peer's form."""

    def __init__(self, copier: Copier, rows: Rows | Conversion, layout: KvLayout, heads: range) -> None:
        self._copier, self._rows = copier, rows
        self.layers = layout.layers
        self.layer_bytes = layout.part_bytes(len(heads), 1)  # of one block of the peer's, in one layer of a piece
        self.block_size = layout.block_size  # the peer's, in tokens

    @property
    def block_bytes(self) -> int:
        """Of one block of the peer's in a piece of all layers."""
        return self.layers * self.layer_bytes

    def brought(self, span: Span) -> Span:
        """With its ids where the blocks are, for pieces of it."""
        return replace(span, block_ids=self._copier.index(span.block_ids))

    def gather(self, span: Span, layers: range, piece: torch.Tensor) -> Copy:
        """Begin to copy these layers of a span, which starts where a block of the peer's does, and may be read."""
        with self._copier.after():
            ids = self._copier.index(span.block_ids)
            if isinstance(self._rows, Conversion):
                self._rows.gather(span, ids, piece, layers)
            else:
                self._rows.gather(ids, piece, self._copier.planes(layers))
        return self._copier.begun(self.layer_bytes * len(layers) * -(-span.tokens // self.block_size))


class Copier:
    """Copies between a rank's planes and pieces, in the order asked for, on a CUDA stream of its own.

    That stream goes before the model's: what is copied is little, and a whole request waits for it.
    """

    def __init__(self, planes: Planes, rank: int = 0) -> None:
        self._planes, self._rank, self._device = planes, rank, planes.device
        self._stream = torch.cuda.Stream(planes.device, priority=-1) if planes.device.type == "cuda" else None
        self._thread = 0  # the one of which that is the current stream
        self._parts: dict[range, Rows] = {}
        self._outlets: dict[tuple[KvLayout, range], Outlet] = {}
        self.layout = planes.layout
        self.heads = planes.layout.heads(rank)  # of the model
        self.block_bytes = planes.block_bytes

    def outlet(self, peer: KvLayout, heads: range) -> Outlet:
        """Towards a rank of a peer that takes these of our heads. No `exchange_problem` stands between the layouts."""
        found = self._outlets.get((peer, heads))
        if found is None:
            own = self.layout
            alike = (own.block_size, own.dtype, own.keys, own.values) == (
                peer.block_size, peer.dtype, peer.keys, peer.values,
            )  # fmt: skip
            rows = self._part(heads) if alike else Conversion(self._planes, self._rank, peer, heads)
            found = self._outlets[peer, heads] = Outlet(self, rows, peer, heads)
        return found

    def gather(self, block_ids: Ids, piece: torch.Tensor, ready: Ready) -> Copy:
        """Begin to copy the blocks' rows into `piece` (uint8, long enough), once `ready`."""
        with self.after(ready):
            self._part(self.heads).gather(self.index(block_ids), piece)
        return self.begun(self.block_bytes * len(block_ids))

    def scatter(
        self, block_ids: Ids, piece: torch.Tensor, heads: range | None = None, layers: range | None = None,
        ready: Ready | None = None,
    ) -> Copy:  # fmt: skip
        """Begin to copy a piece of these heads and layers (None: all of this rank's) into the blocks, once `ready`."""
        heads, layers = heads or self.heads, layers or range(self.layout.layers)
        with self.after(ready):
            self._part(heads).scatter(self.index(block_ids), piece, self.planes(layers))
        return self.begun(self.layout.part_bytes(len(heads), len(layers)) * len(block_ids))

    def gather_each(self, block_ids: Ids, pieces: torch.Tensor, ready: Ready) -> Copy:
        """Begin to copy each block into a piece of its own, one behind the other in `pieces`, once `ready`."""
        with self.after(ready):
            self._part(self.heads).gather_each(self.index(block_ids), pieces)
        return self.begun(self.block_bytes * len(block_ids))

    def scatter_each(self, block_ids: Ids, pieces: torch.Tensor, ready: Ready | None = None) -> Copy:
        """The reverse."""
        with self.after(ready):
            self._part(self.heads).scatter_each(self.index(block_ids), pieces)
        return self.begun(self.block_bytes * len(block_ids))

    def checksum(self, piece: torch.Tensor) -> int:
        """See `workers.transfer.checksum`; not held up by what the model computes. Blocks until it is known."""
        with self.after():
            return checksum(piece)

    def warm(self) -> None:
        """Have the kernels compiled now, rather than in the first transfer; block 0 keeps its content."""
        piece = torch.empty(self.block_bytes, dtype=torch.uint8, device=self._device)
        self.gather([0], piece, Ready(self._device))
        self.scatter([0], piece).wait()

    def live(self) -> None:
        """The calling thread copies from now on, and nothing else: what it does on the GPU goes on this stream."""
        if self._stream is not None:
            torch.cuda.set_device(self._device)  # a new thread starts on device 0, whatever its rank
            torch.cuda.set_stream(self._stream)
            self._thread = threading.get_ident()

    def index(self, block_ids: Ids) -> torch.Tensor:
        """Where the blocks are, for this copier's methods: what takes several of them is to bring its ids there once.

        CUDA takes a copy of pageable memory before this returns, for which it may wait for what is on the stream.
        """
        if isinstance(block_ids, torch.Tensor):
            return block_ids
        with self.after():
            return self._brought(block_ids)

    def _brought(self, block_ids: Sequence[int] | BlockIds) -> torch.Tensor:
        ids = torch.from_numpy(np.ascontiguousarray(block_ids, dtype=np.int64))
        return ids if self._stream is None else ids.to(self._device, non_blocking=True)

    def planes(self, layers: range) -> slice:
        """Where the planes of these layers are among all planes."""
        each = len(self._planes.planes) // self.layout.layers
        return slice(layers.start * each, layers.stop * each)

    def after(self, ready: Ready | None = None) -> AbstractContextManager[object]:
        """What is done inside goes on this copier's stream, after `ready`. Without CUDA it simply is done."""
        if self._stream is None:
            return _NOTHING
        if ready is not None:
            ready.before(self._stream)
        if self._thread == threading.get_ident():
            return _NOTHING
        stream: AbstractContextManager[object] = torch.cuda.stream(self._stream)
        return stream

    def begun(self, size: int) -> Copy:
        """What was put on this copier's stream so far, as one copy of that many bytes."""
        return Copy(size, self._stream)

    def _part(self, heads: range) -> Rows:
        found = self._parts.get(heads)
        if found is None:
            each = runs(self.layout, self._rank, heads)
            found = self._parts[heads] = _rows(self._planes, each * self.layout.layers)
        return found


def _rows(planes: Planes, where: Sequence[Runs]) -> Rows:
    if planes.device.type == "cuda":
        from workers.transfer import triton_pack  # noqa: PLC0415  # CPU installs have no Triton

        if triton_pack.fits(planes.planes, where):
            return triton_pack.TritonRows(planes.planes, where)
        return TorchRows(planes.planes, where)
    from workers.transfer.native_rows import NativeRows  # noqa: PLC0415  # GPU hosts need no compiler for the CPU

    return NativeRows(planes.planes, where)
