"""How a step's blocks are cut into pieces: by blocks, each with all of its layers, once the step is computed; before
that by layers, whenever those that are computed fill a piece. So what is left to send at its end is one piece.
"""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_lite.plane.layout import KvLayout, exchange_problem, parts, share
from dynamo_lite.plane.wire import PushTarget
from workers.transfer.ready import StepReady
from workers.transfer.span import Span


@dataclass(frozen=True, slots=True)
class PieceSize:
    """The most that a piece from one rank to one rank holds."""

    layers: int  # of the model
    block_size: int  # tokens, of the receiver's
    block_layers: int  # blocks of the receiver's, each layer of them counted

    @classmethod
    def between(cls, own_slot: int, layout: KvLayout, rank: int, heads: range, slot: int) -> PieceSize:
        """`own_slot`, bytes: of the sender. The others are of the receiver's rank; `heads` are those it is sent."""
        room = min(own_slot, len(share(layout, rank, heads, slot)))
        return cls(layout.layers, layout.block_size, room // layout.part_bytes(len(heads), 1))

    def blocks_of(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def layers_at_once(self, tokens: int) -> int:
        """How many layers of so many tokens one piece takes; at least one, though it may take several pieces."""
        return min(self.layers, max(1, self.block_layers // self.blocks_of(tokens)))


def piece_size(own: KvLayout, rank: int, own_slot: int, target: PushTarget) -> PieceSize | None:
    """The smallest of those from this rank to the target's; None where it sends nothing there."""
    if exchange_problem(own, target.layout) is not None:
        return None
    sizes = [
        PieceSize.between(own_slot, target.layout, number, heads, each.slot_bytes)
        for number, each in enumerate(target.ranks)
        if (heads := parts(own, rank, target.layout, number)) is not None
    ]
    return min(sizes, key=lambda size: size.block_layers, default=None)


@dataclass(frozen=True, slots=True)
class Cut:
    """What one piece holds: some layers of some blocks."""

    first: int  # block of the transfer
    count: int  # blocks of the receiver's
    span: Span
    layers: range


class StepCuts:
    """What is still to be cut of a step's tokens."""

    def __init__(self, first: int, span: Span, ready: StepReady, size: PieceSize) -> None:
        """`first`: block of the transfer in which the span begins."""
        self.ready, self.stop = ready, first + size.blocks_of(span.tokens)
        self._first, self._span, self._size = first, span, size
        self._layer = 0  # those before it are cut
        self._begun = range(0)  # layers of which some blocks are cut
        self._next, self._rest = first, span  # of the blocks of these

    @property
    def over(self) -> bool:
        return self._layer == self._size.layers

    @property
    def sendable(self) -> bool:
        """Whether enough may be read for the next piece."""
        return bool(self._begun or self._readable())

    def next(self) -> Cut:
        """What the next piece is to hold, as it is `sendable`."""
        layers = self._begun or self._readable()
        assert layers, "there is enough for a piece"
        blocks = max(1, self._size.block_layers // len(layers))
        span = self._rest.head(blocks * self._size.block_size)
        return Cut(self._next, self._size.blocks_of(span.tokens), span, layers)

    def _readable(self) -> range:
        """The layers to go on with: all that are left of a step that is computed, or as many as fill a piece."""
        readable = self.ready.readable
        if readable == self._size.layers:
            return range(self._layer, readable)
        enough = self._layer + self._size.layers_at_once(self._span.tokens)
        return range(self._layer, enough) if enough <= readable else range(0)

    def take(self, cut: Cut) -> None:
        """`cut` is what `next` said."""
        self._begun, self._next, self._rest = cut.layers, self._next + cut.count, self._rest.rest(cut.span.tokens)
        if not self._rest.tokens:
            self._layer, self._begun = cut.layers.stop, range(0)
            self._next, self._rest = self._first, self._span
