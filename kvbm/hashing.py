"""vLLM's chained block hashes (`sha256_cbor`), computed without vLLM.

The hash of a block is sha256 over the canonical CBOR of `(parent, tokens, extra keys)`, so it names the block
and every block before it. That of long prompts is written here, vectorised, since every value has one of four shapes; a
test holds it against `cbor2`, another against vLLM itself.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import NewType, overload

import cbor2
import numpy as np

from kvbm.seed import SEED

FullHash = NewType("FullHash", bytes)  # all 32 bytes of a block hash

# The "parent" of a prompt's first block.
ROOT = FullHash(hashlib.sha256(cbor2.dumps(SEED, canonical=True)).digest())

_MANY = 512  # tokens from which on numpy is faster
_PARENT = b"\x83\x58\x20"  # an array of three, the first a string of 32 bytes


class HashedPrompt(Sequence[int]):
    """A prompt of which only the length and the hashes of its full blocks are known, for simulations."""

    __slots__ = ("_length", "block_size", "full", "low")

    def __init__(self, length: int, block_size: int, full: list[FullHash]) -> None:
        assert len(full) == length // block_size, f"{len(full)} hashes for {length} tokens in blocks of {block_size}"
        self._length, self.block_size, self.full = length, block_size, full
        self.low = [low64(block_hash) for block_hash in full]

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        raise TypeError("this prompt's tokens are not known")


def low64(full: bytes) -> int:
    """The part of a full hash that KV events and the index carry."""
    return int.from_bytes(full[-8:], "big")


def block_hashes(
    token_ids: Sequence[int],
    block_size: int,
    cache_salt: str | None = None,
    lora: tuple[str, str] | None = None,
) -> list[int]:
    """The low 64 bits of the hash of each full block; a trailing partial block has none."""
    if isinstance(token_ids, HashedPrompt):
        assert block_size == token_ids.block_size, "it is hashed in blocks of another size"
        return token_ids.low
    joined = b"".join(full_block_hashes(token_ids, block_size, cache_salt, lora))
    low: list[int] = np.frombuffer(joined, dtype=">u8")[3::4].tolist()
    return low


def full_block_hashes(
    token_ids: Sequence[int],
    block_size: int,
    cache_salt: str | None = None,
    lora: tuple[str, str] | None = None,
    *,
    after: FullHash | None = None,
) -> list[FullHash]:
    """All 32 bytes of the hash of each full block.

    `lora` is an adapter's name and path. `after` continues a chain: it is the hash of the block before
    `token_ids[0]`; the salt then has no part any more, as it is mixed into a prompt's first block only.
    """
    count = len(token_ids) // block_size
    if not count:
        return []
    bodies = _token_arrays(token_ids[: count * block_size], block_size)
    adapter: list[tuple[str, ...]] = [("lora", *lora)] if lora else []
    salt: list[tuple[str, ...]] = [("cache_salt", cache_salt)] if cache_salt and after is None else []
    first, rest = _extra_keys(adapter + salt), _extra_keys(adapter)
    sha256, parent = hashlib.sha256, after or ROOT
    hashes = []
    extra = first
    for body in bodies:
        parent = FullHash(sha256(_PARENT + parent + body + extra).digest())
        hashes.append(parent)
        extra = rest
    return hashes


def _extra_keys(keys: list[tuple[str, ...]]) -> bytes:
    return cbor2.dumps(tuple(keys) if keys else None, canonical=True)


def _token_arrays(token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """The CBOR array of each block's token ids (unsigned, below 2³²)."""
    checked = array("I", token_ids)
    if len(token_ids) < _MANY:
        cbor = cbor2.dumps
        return [cbor(token_ids[at : at + block_size]) for at in range(0, len(token_ids), block_size)]
    ids = np.frombuffer(checked, dtype=np.uint32)
    # One row an id: head, then four bytes, most significant first, of which small ids keep only the last.
    rows = np.empty((len(ids), 5), dtype=np.uint8)
    rows[:, 1:] = ids.astype(">u4").view(np.uint8).reshape(-1, 4)
    wide, middle, narrow = ids >= 0x10000, ids >= 0x100, ids >= 24
    rows[:, 0] = np.where(narrow, 0x18 + middle.view(np.uint8) + wide, ids.astype(np.uint8))
    kept = np.empty(rows.shape, dtype=bool)
    kept[:, 0] = True
    kept[:, 1] = kept[:, 2] = wide
    kept[:, 3] = middle
    kept[:, 4] = narrow
    encoded = rows[kept].tobytes()
    ends = np.cumsum(kept.reshape(-1, block_size * 5).sum(axis=1)).tolist()
    head = _array_head(block_size)
    return [head + encoded[start:end] for start, end in pairwise([0, *ends])]


def _array_head(length: int) -> bytes:
    if length < 24:
        return bytes([0x80 + length])
    size = 1 if length < 0x100 else 2 if length < 0x10000 else 4
    return bytes([0x98 + size.bit_length() - 1]) + length.to_bytes(size, "big")
