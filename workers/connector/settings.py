"""What a mover is told of `kv_transfer`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MoverSettings:
    """From `kv_transfer`, resolved."""

    rank: int
    staging: int  # bytes, each direction
    piece: int  # bytes
    window: int
    timeout_s: float
    verify: bool = False  # checksum every piece, end to end
    arena: str = ""  # path of the host tier's memory; empty without one
    ranks: int = 1  # of this worker
