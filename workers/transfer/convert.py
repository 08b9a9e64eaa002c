"""Gather blocks in another worker's form: its block size, dtype and order of a row, some of its heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch

from dynamo_lite.plane.layout import KvLayout
from workers.transfer.layout import Planes, storage_dtype
from workers.transfer.span import Span

_FLOAT16_MAX = 65504.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where keys or values lie in a layer's rows, counted in values. `strides` are of token, head and value."""

    plane: int  # of the layer
    start: int
    strides: tuple[int, int, int]
    size: int  # values a head


def places(layout: KvLayout, heads: int) -> tuple[Place, ...]:
    """Of keys, and of values where there are any, in rows of that many heads."""
    keys = _place(layout, heads, 0, 0)
    if not layout.value_size:
        return (keys,)
    if not layout.together:
        return (keys, _place(layout, heads, 1, 0))
    inside = layout.keys.partition("K")[2]
    before = prod({"N": layout.block_size, "H": heads, "D": layout.key_size}[dim] for dim in inside)
    return (keys, _place(layout, heads, 0, before, values=True))


def _place(layout: KvLayout, heads: int, plane: int, start: int, *, values: bool = False) -> Place:
    values = values or plane == 1
    order, size = (layout.values, layout.value_size) if values else (layout.keys, layout.key_size)
    sizes = {"N": layout.block_size, "H": heads, "D": size}
    strides, step = {}, 1
    for dim in reversed(order):
        if dim == "K":
            step = step // size * (layout.key_size + layout.value_size)
        else:
            strides[dim] = step
            step *= sizes[dim]
    return Place(plane, start, (strides["N"], strides["H"], strides["D"]), size)


def view(rows: torch.Tensor, layout: KvLayout, heads: int, place: Place) -> torch.Tensor:
    """Keys or values in `rows` (`[blocks, values]`) as `[blocks, tokens, heads, values a head]`."""
    shape = (rows.shape[0], layout.block_size, heads, place.size)
    return rows.as_strided(shape, (rows.stride(0), *place.strides), rows.storage_offset() + place.start)


class Conversion:
    """From one rank's planes to pieces of `heads` (of the model, all on this rank) in `peer`'s form."""

    def __init__(self, planes: Planes, rank: int, peer: KvLayout, heads: range) -> None:
        own = planes.layout
        self._own, self._peer, self._heads = own, peer, len(heads)
        self._places = places(peer, len(heads))
        self._sources = [
            [view(layer[place.plane], own, own.rank_heads, place) for place in places(own, own.rank_heads)]
            for layer in _layers(planes)
        ]
        first = heads.start - own.heads(rank).start
        self._sources = [[each.narrow(2, first, len(heads)) for each in layer] for layer in self._sources]

    def gather(self, span: Span, ids: torch.Tensor, piece: torch.Tensor, layers: range) -> None:
        """The span's tokens in these layers, from the start of a block of the peer's on; what is left of its last
        block is zero.

        `ids` are the span's blocks, on the planes' device.
        """
        blocks = -(-span.tokens // self._peer.block_size)
        taken = self._sources[layers.start : layers.stop]
        for sources, rows in zip(taken, self._piece_rows(piece, blocks, len(layers)), strict=True):
            for source, place in zip(sources, self._places, strict=True):
                tokens = source.index_select(0, ids).flatten(0, 1)[span.skipped : span.skipped + span.tokens]
                self._put(tokens, view(rows[place.plane], self._peer, self._heads, place))

    def _put(self, tokens: torch.Tensor, target: torch.Tensor) -> None:
        """`[tokens, heads, values]` into `[blocks, tokens of one, heads, values]`."""
        if target.dtype is torch.float16 and tokens.dtype is not torch.float16:
            # An infinite key would spoil the whole attention.
            tokens = tokens.to(torch.float16).clamp(-_FLOAT16_MAX, _FLOAT16_MAX)
        size = self._peer.block_size
        whole, left = divmod(len(tokens), size)
        target[:whole].copy_(tokens[: len(tokens) - left].view(whole, size, *tokens.shape[1:]))
        if left:
            target[whole, :left].copy_(tokens[len(tokens) - left :])
            target[whole, left:].zero_()

    def _piece_rows(self, piece: torch.Tensor, blocks: int, layers: int) -> Iterator[list[torch.Tensor]]:
        """Per layer the piece's planes, as `[blocks, values]` each."""
        peer, offset = self._peer, 0
        for _ in range(layers):
            layer = []
            for size in peer.plane_sizes:
                total = blocks * peer.block_size * self._heads * size * peer.item_bytes
                layer.append(piece[offset : offset + total].view(storage_dtype(peer)).view(blocks, -1))
                offset += total
            yield layer


def _layers(planes: Planes) -> Iterator[list[torch.Tensor]]:
    """A rank's own planes by layer, as `[blocks, values]` each."""
    each = len(planes.planes) // planes.layout.layers
    typed = [plane.view(storage_dtype(planes.layout)) for plane in planes.planes]
    for first in range(0, len(typed), each):
        yield typed[first : first + each]
