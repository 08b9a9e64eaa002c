"""The disk tier: records at places of one preallocated file, and a manifest that says which block each place holds.

Before a place is written its entry is wiped, and set once the record is whole; so whatever a crash leaves behind, an
entry claims only what was written out. That the volume has kept it, the record itself proves. `kvbm.tiers.volume` has
the files.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

from kvbm.errors import BlockError, TierFailed, TierRefused
from kvbm.events import Tier
from kvbm.hashing import FullHash
from kvbm.tiers.base import Changes, HostRecord
from kvbm.tiers.folder import try_out, volume_errors
from kvbm.tiers.slots import Stored
from kvbm.tiers.volume import DiskSettings, OpenFile, SlotFile, Volume, open_volume

__all__ = ["DiskSettings", "DiskTier", "OpenFile", "SlotFile"]
_log = logging.getLogger(__name__)
_PART_BYTES = 64 * 2**20  # moved at once: what a crash or a failure can cost a write
_PATIENCE = 10  # times `timeout_s` is waited for the folder
Result = TypeVar("Result")


class DiskTier:
    """See `kvbm.tiers.base.StorageTier`. What waits for the folder does so on one thread, in the order of the calls."""

    tier = Tier.DISK

    def __init__(self, settings: DiskSettings, open_file: OpenFile) -> None:
        self._settings, self._open_file = settings, open_file
        self._patience_s = _PATIENCE * settings.timeout_s
        self._thread = ThreadPoolExecutor(1, "disk-tier")
        self._volume: Volume | None = None
        self._opening: Future[Volume] | None = None
        self._closed = False
        self._writing = asyncio.Lock()
        self._stored: dict[FullHash, None] = {}
        self._removed: dict[FullHash, None] = {}
        self._evicted = 0

    # ---- open, close ----

    async def open(self) -> None:
        """See StorageTier. Where it takes too long it goes on, and `probe` finds it done."""
        if self._opening is None:
            self._opening = self._submit(lambda: open_volume(self._settings, self._open_file))
        try:
            self._volume = await self._wait(self._opening)
        except BlockError:
            if self._opening.done() and self._opening.exception() is not None:
                self._opening = None
            raise
        self._opening = None
        for block_hash in self._volume.table.hashes():
            self._stored[block_hash] = None

    def loops(self, changed: Callable[[], None]) -> list[Coroutine[object, object, NoReturn]]:
        """None: nobody else changes what is here."""
        return []

    async def probe(self) -> None:
        """See StorageTier. Opens what is not open, and anew what somebody took away; then it may be empty."""
        volume = self._volume
        if volume is not None and not await self._run(volume.intact):
            self._lose(volume)
        if self._volume is None:
            try:
                await self.open()
            except TierRefused as refused:  # while we run: somebody's slip, that may pass
                raise TierFailed(Tier.DISK, "refused", str(refused)) from refused
        await self._run(lambda: try_out(self._settings.folder))

    def _lose(self, volume: Volume) -> None:
        """Its files are not what they were."""
        _log.warning("disk tier: somebody took files of %s away: starting with what is there", self._settings.folder)
        self._volume = None
        self._gone(volume.table.hashes())
        self._submit(volume.close)

    async def close(self) -> None:
        """See StorageTier."""
        volume, self._volume = self._volume, None
        if self._opening is not None:
            self._opening.add_done_callback(_close_opened)
        if volume is not None:
            touched = volume.touched()
            closing = self._submit(lambda: _close(volume, lambda: volume.manifest.set(touched)))
            try:
                await self._wait(closing)
            except TierFailed as failed:
                _log.warning("disk tier: %s", failed)
        self._closed = True
        self._thread.shutdown(wait=False)

    # ---- what is there ----

    def __contains__(self, block_hash: FullHash) -> bool:
        """See StorageTier."""
        return self._volume is not None and self._volume.table.find(block_hash) is not None

    def hashes(self) -> tuple[FullHash, ...]:
        """See StorageTier."""
        return self._volume.table.hashes() if self._volume is not None else ()

    def used(self, hashes: Sequence[FullHash]) -> None:
        """See StorageTier. A restart knows of it after a `sync` or `close`."""
        if self._volume is not None and self._settings.eviction == "lru":
            self._volume.touch(hashes)

    def changes(self) -> Changes:
        """See StorageTier. The first has everything that `open` found."""
        changes = Changes(tuple(self._stored), tuple(self._removed))
        self._stored, self._removed = {}, {}
        return changes

    def _gone(self, hashes: Sequence[FullHash]) -> None:
        for block_hash in hashes:
            self._stored.pop(block_hash, None)
            self._removed[block_hash] = None

    @property
    def evicted(self) -> int:
        return self._evicted

    @property
    def blocks(self) -> int:
        return self._volume.table.stored if self._volume is not None else 0

    @property
    def used_bytes(self) -> int:
        return self.blocks * self._settings.stride

    @property
    def size_bytes(self) -> int:
        return self._settings.header.count * self._settings.stride

    def check(self) -> None:
        """Assert the invariants, while nothing is under way; for tests."""
        if self._volume is not None:
            self._volume.table.check()
            assert not self._volume.table.granted

    # ---- write, read ----

    async def write(self, records: Sequence[HostRecord]) -> int:
        """See StorageTier. One at a time; others wait."""
        async with self._turn() as volume:
            table = volume.table
            here = [block for record in records if (block := table.find(record.hash)) is not None]
            new = list({record.hash: record for record in records if record.hash not in self}.values())
            table.pin(here)  # not to be evicted for the others
            places, evicted = table.grant(len(new))
            table.unpin(here)
            self.used([block.hash for block in here])
            self._gone(evicted)
            self._evicted += len(evicted)
            filled: set[int] = set()
            try:
                await self._run(lambda: volume.manifest.clear(places))
                for part in self._parts(list(zip(new, places, strict=False))):
                    await self._write_part(volume, part)
                    filled.update(place for _, place in part)
            finally:
                for place in reversed(places):
                    if place not in filled:
                        table.give_back(place)
            return sum(record.hash in self for record in records)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[Volume]:
        """One write at a time. Raises TierFailed, also when the one before takes too long."""
        try:
            async with asyncio.timeout(self._patience_s):
                await self._writing.acquire()
        except TimeoutError:
            raise self._silent("the write before has not ended") from None
        try:
            yield self._open_volume()
        finally:
            self._writing.release()

    async def _write_part(self, volume: Volume, part: Sequence[tuple[HostRecord, int]]) -> None:
        self._check_same(volume)
        await volume.blocks.write([record.slot for record, _ in part], [place for _, place in part])
        self._check_same(volume)
        entries = [volume.entry(place, record.hash) for record, place in reversed(part)]  # a prefix's head goes last
        await self._run(lambda: volume.manifest.set(entries))
        self._check_same(volume)
        for entry in entries:
            volume.table.store(entry.place, entry.hash, 0)
            self._stored[entry.hash] = None

    async def read(self, records: Sequence[HostRecord], *, use: bool = True) -> list[bool]:
        """See StorageTier."""
        volume = self._open_volume()
        found = [(record, volume.table.find(record.hash)) for record in records]
        here = [(record, block) for record, block in found if block is not None]
        blocks = [block for _, block in here] if use else []
        volume.table.pin(blocks)
        try:
            for part in self._parts(here):
                await self._read_part(volume, part)
        finally:
            volume.table.unpin(blocks)
        if volume is self._volume:
            self.used([block.hash for block in blocks])
        # Those that were not pinned are themselves the proof that their places were not written to meanwhile.
        return [block is not None and (use or volume.table.find(record.hash) is block) for record, block in found]

    async def _read_part(self, volume: Volume, part: Sequence[tuple[HostRecord, Stored]]) -> None:
        self._check_same(volume)
        try:
            await volume.blocks.read([record.slot for record, _ in part], [block.slot for _, block in part])
        except TierFailed as failed:
            if failed.cause == "error":  # where the volume is bad it stays so: do not fail over the same ones again
                await self._forget(volume, [block for _, block in part])
            raise

    def _parts(self, items: Sequence[Result]) -> Iterator[Sequence[Result]]:
        step = max(1, _PART_BYTES // self._settings.stride)
        return (items[first : first + step] for first in range(0, len(items), step))

    # ---- forget, sync ----

    async def forget(self, block_hash: FullHash) -> None:
        """See StorageTier."""
        block = self._volume.table.find(block_hash) if self._volume is not None else None
        if self._volume is not None and block is not None:
            await self._forget(self._volume, [block])

    async def _forget(self, volume: Volume, blocks: Sequence[Stored]) -> None:
        """Those of them that have not been forgotten by now."""
        blocks = [block for block in blocks if volume.table.find(block.hash) is block]
        for block in blocks:
            volume.table.drop(block)
        if volume is self._volume:
            self._gone([block.hash for block in blocks])
        try:
            await self._run(lambda: volume.manifest.clear([block.slot for block in blocks]))
        except TierFailed as failed:
            _log.warning("disk tier: %s: blocks that were forgotten may be found again after a restart", failed)

    async def purge(self) -> int:
        """See StorageTier."""
        async with self._turn() as volume:
            blocks = [volume.table.find(block_hash) for block_hash in volume.table.hashes()]
            for block in blocks:
                assert block is not None
                volume.table.drop(block)
                self._gone([block.hash])
            await self._run(lambda: volume.manifest.wipe(volume.table.count))
            return len(blocks)

    async def sync(self) -> None:
        """See StorageTier. Also notices when somebody took the files away."""
        volume = self._open_volume()
        await volume.blocks.sync()
        touched = volume.touched()

        def settle() -> bool:
            volume.manifest.set(touched)
            volume.manifest.sync()
            return volume.intact()

        if not await self._run(settle):
            raise self._taken_away()

    # ---- the thread ----

    def _open_volume(self) -> Volume:
        if self._volume is None:
            raise TierFailed(Tier.DISK, "not_found", f"{self._settings.folder} is not open")
        return self._volume

    def _check_same(self, volume: Volume) -> None:
        """Before each part: the file that is open by now need not be the one whose places were meant."""
        if self._volume is not volume:
            raise self._taken_away()

    def _taken_away(self) -> TierFailed:
        return TierFailed(Tier.DISK, "not_found", f"{self._settings.folder}: somebody took files of it away")

    async def _run(self, call: Callable[[], Result]) -> Result:
        """On the thread. Raises TierFailed, also when it takes too long: then it is done late, but in its turn."""
        return await self._wait(self._submit(call))

    def _submit(self, call: Callable[[], Result]) -> Future[Result]:
        if self._closed:
            raise TierFailed(Tier.DISK, "not_found", f"{self._settings.folder} was closed")
        return self._thread.submit(_translated, self._settings.folder, call)

    async def _wait(self, future: Future[Result]) -> Result:
        try:
            async with asyncio.timeout(self._patience_s):
                return await asyncio.shield(asyncio.wrap_future(future))
        except TimeoutError:
            raise self._silent("no answer") from None

    def _silent(self, what: str) -> TierFailed:
        return TierFailed(Tier.DISK, "deadline", f"{self._settings.folder}: {what} within {self._patience_s:g} s")


def _translated(folder: Path, call: Callable[[], Result]) -> Result:
    with volume_errors(Tier.DISK, folder):
        return call()


def _close(volume: Volume, last: Callable[[], None]) -> None:
    try:
        last()
    finally:
        volume.close()


def _close_opened(opening: Future[Volume]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
