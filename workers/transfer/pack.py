"""Gather blocks of all planes into one contiguous piece, and scatter a piece back.

A piece holds, plane after plane, the rows of its blocks: `[planes][count][row_bytes]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch

from workers.transfer.layout import Planes


class Ready:
    """A point in the engine's work after which the blocks it computed may be read (CUDA runs behind the CPU)."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()

    def before(self, stream: torch.cuda.Stream) -> None:
        if self._event is not None:
            stream.wait_event(self._event)


class Copier:
    """Copies between planes and pieces, on a CUDA stream of its own; every call returns with the copy done."""

    def __init__(self, planes: Planes) -> None:
        # Words of 8 bytes where rows divide into them: torch scatters element by element, 6 × slower with bytes.
        self._word = torch.int64 if all(plane.shape[1] % 8 == 0 for plane in planes.planes) else torch.uint8
        self._planes = [plane.view(self._word) for plane in planes.planes]
        self._device = planes.device
        self.block_bytes = planes.block_bytes
        self._stream = torch.cuda.Stream(planes.device) if planes.device.type == "cuda" else None

    def gather(self, block_ids: Sequence[int], piece: torch.Tensor, ready: Ready) -> int:
        """Copy the blocks' rows into `piece` (uint8, long enough), once `ready`; returns the bytes used."""
        with self._on_stream():
            if self._stream is not None:
                ready.before(self._stream)
            ids = self._index(block_ids)
            for plane, part in zip(self._planes, self._parts(piece, len(block_ids)), strict=True):
                torch.index_select(plane, 0, ids, out=part)
        self._wait()
        return self.block_bytes * len(block_ids)

    def scatter(self, block_ids: Sequence[int], piece: torch.Tensor) -> None:
        """Copy a piece that `gather` made into the blocks' rows."""
        with self._on_stream():
            ids = self._index(block_ids)
            for plane, part in zip(self._planes, self._parts(piece, len(block_ids)), strict=True):
                plane.index_copy_(0, ids, part)
        self._wait()

    def _parts(self, piece: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
        """The piece's bytes, as one `[count, row]` tensor of words per plane."""
        offset = 0
        for plane in self._planes:
            size = count * plane.shape[1] * plane.element_size()
            yield piece[offset : offset + size].view(self._word).view(count, -1)
            offset += size

    def _index(self, block_ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(block_ids, dtype=torch.int64, device=self._device)

    def _on_stream(self) -> torch.cuda.StreamContext | nullcontext[None]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
