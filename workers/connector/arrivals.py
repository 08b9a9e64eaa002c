"""One attempt at one request's blocks: its slots, its senders, and what of it is in place."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from workers.connector.protocol import Piece, ReceivePlan
from workers.transfer.pack import Copy


class Arrivals:
    """Which layers of which heads of which blocks are in place; pieces bring them in any order."""

    def __init__(self, heads: range, layers: int, blocks: int) -> None:
        """`heads` of the model, that lie on this rank."""
        self._heads = heads
        self._there = np.zeros((blocks, len(heads), layers), dtype=np.bool_)
        self._missing = self._there.size

    @property
    def complete(self) -> bool:
        return not self._missing

    def expects(self, piece: Piece) -> bool:
        """Whether a piece says what can be; in place or not."""
        blocks, heads, layers = self._there.shape
        return (
            _within(piece.first, piece.count, blocks)
            and _within(piece.first_head - self._heads.start, piece.heads, heads)
            and _within(piece.first_layer, piece.layers, layers)
        )

    def add(self, piece: Piece) -> None:
        """Of those expected, one that is in place now. What comes twice counts once."""
        head = piece.first_head - self._heads.start
        part = self._there[
            piece.first : piece.first + piece.count,
            head : head + piece.heads,
            piece.first_layer : piece.first_layer + piece.layers,
        ]
        self._missing -= part.size - int(np.count_nonzero(part))
        part[...] = True


def _within(first: int, count: int, size: int) -> bool:
    return first >= 0 and 0 < count <= size - first


@dataclass(slots=True)
class Landing:
    """A piece that is being scattered."""

    sender: str  # agent name
    piece: Piece
    copy: Copy


@dataclass(slots=True)
class Receive:
    """One attempt at one request's blocks."""

    plan: ReceivePlan
    transfer_id: int
    slots: tuple[int, ...]
    arrivals: Arrivals
    senders: set[str] = field(default_factory=set)  # agents that can be answered, from their first pieces
    closers: set[str] = field(default_factory=set)  # agents that write nothing more
    corrupt: bool = False
    landings: list[Landing] = field(default_factory=list)
    early: list[tuple[str, Piece]] = field(default_factory=list)  # with their senders: came before the plan
    uncredited: dict[str, list[int]] = field(default_factory=dict)  # slots emptied before their sender was known
    pieces: int = 0
    started_ns: int = 0
