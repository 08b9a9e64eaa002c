"""Which block each place of a tier's file holds, on the same volume: an entry a place, so that a restart finds them.

An entry is a claim, proven only by the record itself. It is written once the record is whole and wiped before the
place is written again, so that after a crash at any moment whatever is claimed is there. Half-written entries, and any
other garbage, do not match their own checksums and count as none. Everything here waits for the volume.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import xxhash

from kvbm.hashing import FullHash

_MAGIC = b"dlkvman1"  # and version
_ENTRY_MAGIC = b"dlkvent1"
_FIELDS = struct.Struct("<8s32sQQ")  # magic; of the header: namespace, stride, places; of an entry: hash, number, place
_OWN = struct.Struct("<Q")  # checksum of the fields before
ENTRY_BYTES = 64
_EMPTY = bytes(ENTRY_BYTES)


@dataclass(frozen=True, slots=True)
class Header:
    """What a manifest and its records belong to."""

    namespace: bytes  # what the blocks' meaning depends on
    stride: int  # bytes from one record to the next
    count: int  # places

    @property
    def size(self) -> int:
        """Bytes of the whole manifest."""
        return (self.count + 1) * ENTRY_BYTES

    def pack(self) -> bytes:
        """64 bytes."""
        return _sealed(_MAGIC, hashlib.sha256(self.namespace).digest(), self.stride, self.count)


@dataclass(frozen=True, slots=True)
class Entry:
    """A place holds that block."""

    place: int
    hash: FullHash
    number: int  # the higher, the later it was of use

    def pack(self) -> bytes:
        """64 bytes."""
        return _sealed(_ENTRY_MAGIC, self.hash, self.number, self.place)


def _sealed(magic: bytes, name: bytes, first: int, second: int) -> bytes:
    fields = _FIELDS.pack(magic, name, first, second)
    return fields + _OWN.pack(xxhash.xxh3_64_intdigest(fields))


def _opened(raw: bytes, magic: bytes) -> tuple[bytes, int, int] | None:
    """The three fields; None unless they are whole and of that kind."""
    fields, own = raw[: _FIELDS.size], raw[_FIELDS.size :]
    if len(raw) < ENTRY_BYTES or own != _OWN.pack(xxhash.xxh3_64_intdigest(fields)):
        return None
    found, name, first, second = _FIELDS.unpack(fields)
    return (name, first, second) if found == magic else None


def read(path: Path, expected: Header) -> tuple[int, list[Entry]] | None:
    """Under how many places it was written, and every entry that holds, the least recently used first.

    `expected.count` does not matter. None for a manifest of something else, or of nothing. Raises OSError.
    """
    content = path.read_bytes()
    header = _opened(content[:ENTRY_BYTES], _MAGIC)
    if header is None:
        return None
    count = header[2]
    if Header(expected.namespace, expected.stride, count).pack() != content[:ENTRY_BYTES]:
        return None
    latest: dict[FullHash, Entry] = {}
    for entry in sorted(_entries(content, count), key=lambda entry: entry.number):
        latest.pop(entry.hash, None)
        latest[entry.hash] = entry
    return count, list(latest.values())


def _entries(content: bytes, count: int) -> Iterator[Entry]:
    for place in range(min(count, len(content) // ENTRY_BYTES - 1)):
        raw = content[ENTRY_BYTES * (place + 1) : ENTRY_BYTES * (place + 2)]
        fields = None if raw == _EMPTY else _opened(raw, _ENTRY_MAGIC)
        if fields is not None and fields[2] == place:
            yield Entry(place, FullHash(fields[0]), fields[1])


class Manifest:
    """An open manifest. One thread at a time."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    @classmethod
    def replace(cls, path: Path, header: Header, entries: Sequence[Entry]) -> Self:
        """Put one with these entries in the place of whatever is there, at once. Raises OSError."""
        content = bytearray(header.size)
        content[:ENTRY_BYTES] = header.pack()
        for entry in entries:
            content[(entry.place + 1) * ENTRY_BYTES : (entry.place + 2) * ENTRY_BYTES] = entry.pack()
        fresh = path.with_name(f"{path.name}.new")
        file = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write(file, content, 0)
            os.fsync(file)
        finally:
            os.close(file)
        fresh.rename(path)
        _sync_folder(path.parent)
        return cls(path)

    def set(self, entries: Sequence[Entry]) -> None:
        """Their records are whole. Raises OSError."""
        for entry in entries:
            _write(self._file, entry.pack(), (entry.place + 1) * ENTRY_BYTES)

    def clear(self, places: Sequence[int]) -> None:
        """Their records are not, or will not be. Raises OSError."""
        for place in places:
            _write(self._file, _EMPTY, (place + 1) * ENTRY_BYTES)

    def wipe(self, count: int) -> None:
        """Clear all `count` places. Raises OSError."""
        _write(self._file, bytes(count * ENTRY_BYTES), ENTRY_BYTES)

    def sync(self) -> None:
        """What was set by now survives a power cut. Raises OSError."""
        os.fdatasync(self._file)

    def close(self) -> None:
        """Every later call raises OSError."""
        os.close(self._file)
        self._file = -1


def _write(file: int, content: bytes | bytearray, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
