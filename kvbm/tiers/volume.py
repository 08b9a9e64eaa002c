"""What a disk tier has open: its folder, the file of records, and the manifest. All of it waits for the volume.

<folder>/lock      held by the one process that may use the folder
<folder>/blocks    records side by side
<folder>/manifest  an entry a place
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from kvbm.errors import TierFailed, TierRefused
from kvbm.events import Tier
from kvbm.hashing import FullHash
from kvbm.tiers.folder import Claim, Identity, free_bytes, identity, volume_errors
from kvbm.tiers.manifest import Entry, Header, Manifest
from kvbm.tiers.manifest import read as read_manifest
from kvbm.tiers.slots import Eviction, SlotTable

_log = logging.getLogger(__name__)


class SlotFile(Protocol):
    """The file of records, moved between its places and the host tier's slots; both are numbers of one stride.

    `write` and `read` raise TierFailed; they return or raise, also when they are cancelled, only once neither the
    slots nor the places are touched any more.
    """

    async def write(self, slots: Sequence[int], places: Sequence[int]) -> None: ...

    async def read(self, slots: Sequence[int], places: Sequence[int]) -> None: ...

    async def sync(self) -> None:
        """What is written survives a power cut. Raises TierFailed."""
        ...

    def close(self) -> None:
        """Does not wait: what is under way ends as usual."""
        ...


# Path, bytes: with room for so many; a missing file is made, a shorter one grows. Waits. Raises TierFailed.
OpenFile = Callable[[Path, int], SlotFile]


@dataclass(frozen=True, slots=True)
class DiskSettings:
    """Of one worker's disk tier."""

    folder: Path  # this worker's alone
    size: int  # bytes of records
    stride: int  # bytes from one record to the next
    namespace: bytes  # what the blocks' meaning depends on: those of another are not found
    eviction: Eviction = "lru"
    timeout_s: float = 2.0  # for the manifest, which is next to nothing to write: ten times as long is waited

    @property
    def header(self) -> Header:
        return Header(self.namespace, self.stride, self.size // self.stride)


@dataclass(slots=True)
class Volume:
    """What is open. An operation that began on one ends on it, though another may have been opened meanwhile."""

    claim: Claim
    manifest: Manifest
    blocks: SlotFile
    table: SlotTable
    files: dict[Path, Identity]  # as they were when they were opened
    number: int  # of the latest entry
    used: dict[FullHash, int] = field(default_factory=dict)  # later numbers than the manifest has

    def intact(self) -> bool:
        """Whether nobody has deleted, replaced or cut a file."""
        try:
            return self.claim.held() and all(identity(path) == found for path, found in self.files.items())
        except OSError:
            return False

    def entry(self, place: int, block_hash: FullHash) -> Entry:
        """The latest so far."""
        self.number += 1
        self.used.pop(block_hash, None)
        return Entry(place, block_hash, self.number)

    def touch(self, hashes: Sequence[FullHash]) -> None:
        """As SlotTable's; the manifest follows later."""
        self.table.touch(hashes)
        for block_hash in reversed(hashes):
            if self.table.find(block_hash) is not None:
                self.number += 1
                self.used[block_hash] = self.number

    def touched(self) -> list[Entry]:
        """What the manifest does not know yet of use. It will: this forgets it."""
        found = [(self.table.find(block_hash), number) for block_hash, number in self.used.items()]
        self.used = {}
        return [Entry(block.slot, block.hash, number) for block, number in found if block is not None]

    def close(self) -> None:
        self.blocks.close()
        self.manifest.close()
        self.claim.close()


def open_volume(settings: DiskSettings, open_file: OpenFile) -> Volume:
    """What is there from before is found again, if it is of this namespace and stride and the file has its length.

    The order of the steps is such that any of them may be the last. Raises TierFailed, TierRefused.
    """
    folder, header = settings.folder, settings.header
    path, blocks_path, size = folder / "manifest", folder / "blocks", header.count * header.stride
    if not header.count:
        raise TierRefused(f"kv_tiers.disk.size: {settings.size} bytes do not hold one block of {settings.stride}")
    with volume_errors(Tier.DISK, folder), ExitStack() as undo:
        claim = Claim(folder)
        undo.callback(claim.close)
        before, entries = _found(path, blocks_path, header)
        fits = [entry for entry in entries if entry.place < header.count]
        blocks = _blocks(blocks_path, size, open_file)  # grows first, and the manifest after it
        undo.callback(blocks.close)
        whole = before == header.count and path.stat().st_size == header.size
        manifest = Manifest(path) if whole else Manifest.replace(path, header, fits)
        undo.callback(manifest.close)
        if blocks_path.stat().st_size > size:  # shrinks last
            os.truncate(blocks_path, size)
        files = {one: identity(one) for one in (path, blocks_path)}
        undo.pop_all()
        number = fits[-1].number if fits else 0
        return Volume(claim, manifest, blocks, _table(settings, fits), files, number)


def _found(path: Path, blocks_path: Path, header: Header) -> tuple[int | None, list[Entry]]:
    """Under how many places the manifest was written, and what they hold; None, when that is worth nothing."""
    try:
        found = read_manifest(path, header)
    except FileNotFoundError:
        return None, []
    if found is None:
        _log.warning("disk tier: %s is of another model or layout, or damaged: starting empty", path)
        return None, []
    count, entries = found
    there = blocks_path.stat().st_size if blocks_path.exists() else 0
    if there < count * header.stride:
        _log.warning("disk tier: %s is shorter than its manifest says: starting empty", blocks_path)
        return None, []
    return count, entries


def _blocks(path: Path, size: int, open_file: OpenFile) -> SlotFile:
    try:
        return open_file(path, size)
    except TierFailed as failed:
        if failed.cause != "no_space":
            raise
        there = path.stat().st_size if path.exists() else 0
        wanted, free = size - there, free_bytes(path.parent)
        text = f"{path}: kv_tiers.disk.size wants {wanted} bytes more of the volume, and {free} are free there"
        raise TierFailed(Tier.DISK, failed.cause, text) from failed


def _table(settings: DiskSettings, entries: Sequence[Entry]) -> SlotTable:
    """`entries`: the least recently used first."""
    table = SlotTable(settings.header.count, settings.eviction)
    free = set(table.grant(table.count)[0])
    for entry in entries:
        table.store(entry.place, entry.hash, 0)  # its checksum is in the record
        free.remove(entry.place)
    for place in sorted(free, reverse=True):
        table.give_back(place)
    return table
