"""Rows of planes, or some heads' parts of them, copied to and from pieces as they are. By torch; see triton_pack."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from dynamo_lite.plane.layout import Runs

ALL_PLANES = slice(None)
_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


class Rows(Protocol):
    """The same runs of every block's row in each plane. A piece holds them plane after plane, block after block."""

    block_bytes: int  # of one block in a piece, over all planes

    def gather(self, ids: torch.Tensor, piece: torch.Tensor, planes: slice = ALL_PLANES) -> None:
        """Copy rows `ids` (int64, on the planes' device), of these planes alone, into the piece (uint8)."""
        ...

    def scatter(self, ids: torch.Tensor, piece: torch.Tensor, planes: slice = ALL_PLANES) -> None:
        """The reverse. No id twice."""
        ...

    def gather_each(self, ids: torch.Tensor, pieces: torch.Tensor) -> None:
        """Copy each of these rows into a piece of its own, one behind the other (uint8)."""
        ...

    def scatter_each(self, ids: torch.Tensor, pieces: torch.Tensor) -> None:
        """The reverse. No id twice."""
        ...


class OneByOne:
    """The latter two by the former two."""

    def gather_each(self: Rows, ids: torch.Tensor, pieces: torch.Tensor) -> None:
        for number, piece in enumerate(pieces.view(len(ids), -1)):
            self.gather(ids[number : number + 1], piece)

    def scatter_each(self: Rows, ids: torch.Tensor, pieces: torch.Tensor) -> None:
        for number, piece in enumerate(pieces.view(len(ids), -1)):
            self.scatter(ids[number : number + 1], piece)


class TorchRows(OneByOne):
    """One call of torch a plane."""

    def __init__(self, planes: Sequence[torch.Tensor], where: Sequence[Runs]) -> None:
        """`planes` as uint8 `[blocks, row]`; `where` for each of them."""
        self.block_bytes = sum(runs.total for runs in where)
        # In the largest words that everything divides into: torch scatters word by word, 6 × slower with bytes.
        pairs = list(zip(planes, where, strict=True))
        size, self._word = next((size, word) for size, word in _WORDS if all(_divides(size, *pair) for pair in pairs))
        self._views = [_view(plane.view(self._word), runs, size) for plane, runs in pairs]

    def gather(self, ids: torch.Tensor, piece: torch.Tensor, planes: slice = ALL_PLANES) -> None:
        for view, part in self._parts(piece, len(ids), planes):
            torch.index_select(view, 0, ids, out=part)

    def scatter(self, ids: torch.Tensor, piece: torch.Tensor, planes: slice = ALL_PLANES) -> None:
        for view, part in self._parts(piece, len(ids), planes):
            view.index_copy_(0, ids, part)

    def _parts(self, piece: torch.Tensor, count: int, planes: slice) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each plane's view, and the piece's bytes of it as a `[count, …]` tensor of words."""
        offset = 0
        for view in self._views[planes]:
            size = count * view[0].numel() * view.element_size()
            yield view, piece[offset : offset + size].view(self._word).view(count, *view.shape[1:])
            offset += size


def _divides(size: int, plane: torch.Tensor, runs: Runs) -> bool:
    numbers = (plane.data_ptr(), plane.stride(0), plane.shape[1], runs.start, runs.size, runs.pitch)
    return all(number % size == 0 for number in numbers)


def _view(plane: torch.Tensor, runs: Runs, word: int) -> torch.Tensor:
    """The runs of every row: `[blocks, words]`, or `[blocks, runs, words]`."""
    if runs.count == 1:
        return plane.narrow(1, runs.start // word, runs.size // word)
    return plane.as_strided(
        (plane.shape[0], runs.count, runs.size // word),
        (plane.stride(0), runs.pitch // word, 1),
        plane.storage_offset() + runs.start // word,
    )
