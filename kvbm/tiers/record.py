"""A block as the tiers keep it: its bytes, and behind them a trailer that says which block they are.

The host tier's slots, the disk tier's places and the object tier's objects all hold the same record, so a block moves
between tiers as it is, and whatever comes back proves by itself that it is whole and the one that was asked for.
"""

from __future__ import annotations

import struct

import xxhash

from kvbm.hashing import FullHash

_PAGE = 4096  # records begin on pages, as direct I/O wants it
_MAGIC = b"dlkvblk1"  # and version
_FIELDS = struct.Struct("<8s32sQQQ")  # magic, block hash, namespace, bytes of the block, their checksum
_OWN = struct.Struct("<Q")  # checksum of the fields
TRAILER_BYTES = _FIELDS.size + _OWN.size


def stride_bytes(block_bytes: int) -> int:
    """From one record to the next where they lie side by side; `block_bytes`: of a block, all ranks together."""
    return -(-(block_bytes + TRAILER_BYTES) // _PAGE) * _PAGE


class Records:
    """The layout of one worker's records: blocks of equal size under one namespace."""

    def __init__(self, block_bytes: int, namespace: int) -> None:
        """`block_bytes`: of all ranks together. `namespace`: 64 bits of what the blocks' meaning depends on."""
        self.block_bytes, self._namespace = block_bytes, namespace
        self.bytes = block_bytes + TRAILER_BYTES
        self.stride = stride_bytes(block_bytes)

    def checksum(self, record: memoryview) -> int:
        """xxh3 of the block's bytes."""
        return xxhash.xxh3_64_intdigest(record[: self.block_bytes])

    def seal(self, record: memoryview, block_hash: FullHash) -> int:
        """Write the trailer behind the block's bytes; returns their checksum."""
        checksum = self.checksum(record)
        fields = _FIELDS.pack(_MAGIC, block_hash, self._namespace, self.block_bytes, checksum)
        record[self.block_bytes : self.bytes] = fields + _OWN.pack(xxhash.xxh3_64_intdigest(fields))
        return checksum

    def proven(self, record: memoryview, block_hash: FullHash) -> int | None:
        """The checksum of a record that holds exactly that block, whole; None for anything else."""
        trailer = bytes(record[self.block_bytes : self.bytes])
        fields, own = trailer[: _FIELDS.size], trailer[_FIELDS.size :]
        if len(trailer) < TRAILER_BYTES or _OWN.unpack(own)[0] != xxhash.xxh3_64_intdigest(fields):
            return None
        magic, found, namespace, size, checksum = _FIELDS.unpack(fields)
        named = (magic, found, namespace, size) == (_MAGIC, block_hash, self._namespace, self.block_bytes)
        return checksum if named and checksum == self.checksum(record) else None
