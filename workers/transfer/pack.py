"""Gather blocks of all planes into one contiguous piece, and scatter a piece back.

A piece is always in the receiver's own form, for the heads that both ranks have: it holds, plane after plane, the rows
of its blocks. Where the two layouts agree that is a copy of rows; where they do not, the sender converts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch

from dynamo_lite.plane.layout import KvLayout, Runs, runs
from workers.transfer.convert import Conversion
from workers.transfer.layout import Planes
from workers.transfer.ready import Ready
from workers.transfer.rows import Rows, TorchRows
from workers.transfer.span import BlockIds, Span


class Outlet:
    """What one rank sends to one rank of a peer: gathers pieces in the peer's form."""

    def __init__(self, copier: Copier, rows: Rows | Conversion, layout: KvLayout) -> None:
        self._copier, self._rows = copier, rows
        self.block_bytes = rows.block_bytes  # of one block of the peer's in a piece
        self.block_size = layout.block_size  # the peer's, in tokens

    def gather(self, span: Span, piece: torch.Tensor, ready: Ready) -> int:
        """Copy the span, which begins where a block of the peer's does, once `ready`; returns the bytes used."""
        with self._copier.copying(ready):
            ids = self._copier.index(span.block_ids)
            if isinstance(self._rows, Conversion):
                self._rows.gather(span, ids, piece)
            else:
                self._rows.gather(ids, piece)
        return self.block_bytes * -(-span.tokens // self.block_size)


class Copier:
    """Copies between a rank's planes and pieces, on a CUDA stream of its own; every call returns with the copy done."""

    def __init__(self, planes: Planes, rank: int = 0) -> None:
        self._planes, self._rank, self._device = planes, rank, planes.device
        self._stream = torch.cuda.Stream(planes.device) if planes.device.type == "cuda" else None
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
            found = self._outlets[peer, heads] = Outlet(self, rows, peer)
        return found

    def gather(self, block_ids: Sequence[int] | BlockIds, piece: torch.Tensor, ready: Ready) -> int:
        """Copy the blocks' rows into `piece` (uint8, long enough), once `ready`; returns the bytes used."""
        with self.copying(ready):
            self._part(self.heads).gather(self.index(block_ids), piece)
        return self.block_bytes * len(block_ids)

    def scatter(
        self, block_ids: Sequence[int] | BlockIds, piece: torch.Tensor, heads: range | None = None,
        ready: Ready | None = None,
    ) -> None:  # fmt: skip
        """Copy a piece of these heads (all of this rank's, if not given) into the blocks' rows, once `ready`."""
        with self.copying(ready):
            self._part(heads or self.heads).scatter(self.index(block_ids), piece)

    def warm(self) -> None:
        """Have the kernels compiled now, rather than in the first transfer; block 0 keeps its content."""
        if self._stream is not None:
            piece = torch.empty(self.block_bytes, dtype=torch.uint8, device=self._device)
            self.gather([0], piece, Ready(self._device))
            self.scatter([0], piece)

    def index(self, block_ids: Sequence[int] | BlockIds) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(block_ids, dtype=np.int64)).to(self._device)

    def copying(self, ready: Ready | None = None) -> _Copying | nullcontext[None]:
        """What is done inside happens after `ready`, and is over at the end."""
        return nullcontext() if self._stream is None else _Copying(self._stream, ready)

    def _part(self, heads: range) -> Rows:
        found = self._parts.get(heads)
        if found is None:
            each = runs(self.layout, self._rank, heads)
            found = self._parts[heads] = _rows(self._planes, each * self.layout.layers)
        return found


class _Copying:
    """A stream as a context, waited for at the end."""

    def __init__(self, stream: torch.cuda.Stream, ready: Ready | None) -> None:
        self._stream, self._ready = stream, ready
        self._context = torch.cuda.stream(stream)

    def __enter__(self) -> None:
        self._context.__enter__()
        if self._ready is not None:
            self._ready.before(self._stream)

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)
        self._stream.synchronize()


def _rows(planes: Planes, where: Sequence[Runs]) -> Rows:
    if planes.device.type == "cuda":
        from workers.transfer import triton_pack  # noqa: PLC0415  # CPU installs have no Triton

        if triton_pack.fits(planes.planes, where):
            return triton_pack.TritonRows(planes.planes, where)
    return TorchRows(planes.planes, where)
