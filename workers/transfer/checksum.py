"""End-to-end checksums of pieces, computed where the bytes are, also on a GPU.

Multilinear hashing (Lemire and Kaser, "Strongly universal string hashing is fast", 2014): 32-bit words times random
64-bit weights, summed modulo 2^64. Two different pieces collide with a probability of 2^-32.
"""

from __future__ import annotations

import functools

import torch

_SEED = 0x6479_6E61_6D6F  # both sides must use the same weights


@functools.cache
def _weights(words: int, device: torch.device) -> torch.Tensor:
    """`[words]` odd int64: a single changed word then always shows."""
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randint(-(2**63), 2**63 - 1, (words,), generator=generator, dtype=torch.int64)
    return (drawn | 1).to(device)


def checksum(piece: torch.Tensor) -> int:
    """Of a contiguous uint8 piece, whose length is a multiple of 4 bytes."""
    words = piece.view(torch.int32)
    length = 1 << (words.numel() - 1).bit_length()  # few sizes, so that few weights are kept
    return int((words.to(torch.int64) * _weights(length, piece.device)[: words.numel()]).sum().item())
