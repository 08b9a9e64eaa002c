"""The object tier: records in an S3-compatible store, one object each, shared by all who use its namespace.

Nobody owns the store. What can be found is what this worker has written, and what a listing showed that others have;
a background task lists it again and again (`ObjectTier.run`). So what is known may be a while behind the store, either
way: a read finds out, and every record proves by itself what it is.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn, Protocol

from kvbm.errors import TierFailed
from kvbm.events import Tier
from kvbm.hashing import FullHash
from kvbm.tiers.base import Changes, HostRecord
from kvbm.tiers.catalog import Catalog, Listing
from kvbm.tiers.record import Records

_log = logging.getLogger(__name__)
_AT_ONCE = 8  # requests of a kind: reads, writes, deletions


@dataclass(frozen=True, slots=True)
class Blob:
    """An object that the store has."""

    key: str
    size: int  # bytes


class Blobs(Protocol):
    """The store, as the tier needs it. Keys are paths relative to the tier's URL.

    Every method ends by a deadline of its own, with what it was asked for or TierFailed; those that get a host slot end
    only once it is not touched any more.
    """

    async def put(self, key: str, slot: int) -> None:
        """Store a host slot's record."""
        ...

    async def get(self, key: str, slot: int) -> bool:
        """Read an object into a host slot. False: there is none. One that is too short leaves a record there that
        proves nothing."""
        ...

    async def put_bytes(self, key: str, content: bytes) -> None: ...

    async def get_bytes(self, key: str, size: int) -> bytes | None:
        """The first `size` bytes; None: there is no such object, or a shorter one."""
        ...

    async def has(self, key: str) -> bool: ...

    async def delete(self, key: str) -> None:
        """One that is not there is no error."""
        ...

    async def page(self, folder: str, after: str) -> Sequence[Blob]:
        """The next objects in a folder, by key, after that one ("": from the first); none: that was all."""
        ...

    async def close(self) -> None:
        """Never raises."""
        ...


class ObjectTier:
    """See `kvbm.tiers.base.StorageTier`.

    Nothing is evicted: how long blocks stay is up to the bucket's lifecycle rules, which go by when they were written.
    """

    tier = Tier.OBJECT
    evicted = 0
    size_bytes = 0

    def __init__(
        self, blobs: Blobs, records: Records, namespace: bytes, description: bytes, refresh_s: float = 60.0,
        entries: int = 4_000_000,
    ) -> None:  # fmt: skip
        """`namespace`: 32 bytes, the same for all who may share blocks; `description` says in JSON what it is of.

        At most `entries` blocks are known of at a time, at about 150 bytes of memory each.
        """
        assert len(namespace) == 32
        self._blobs, self._records = blobs, records
        self._folder, self._description, self._refresh_s = namespace.hex(), description, refresh_s
        self._catalog = Catalog(entries)
        self._described = False
        self._listing_fails = self._said_there_are_more = False
        self._reads, self._writes = asyncio.Semaphore(_AT_ONCE), asyncio.Semaphore(_AT_ONCE)
        self._deletions = asyncio.Semaphore(_AT_ONCE)
        self._woken = asyncio.Event()  # list now

    # ---- what is there ----

    async def open(self) -> None:
        """Takes one page of the listing: `run` reads the others. Raises TierFailed."""
        await self._page(Listing(self._catalog), "")
        await self._describe()

    async def probe(self) -> None:
        # Never the same: a request that a store was slow to carry out may still come to its end.
        key, content = f"{self._folder}/probe-{os.urandom(8).hex()}", os.urandom(64)
        await self._blobs.put_bytes(key, content)
        back = await self._blobs.get_bytes(key, len(content))
        await self._blobs.delete(key)
        if back != content:
            raise TierFailed(self.tier, "corrupt", "the store does not give back what was written to it")
        await self._describe()
        self._woken.set()

    def loops(self, changed: Callable[[], None]) -> list[Coroutine[object, object, NoReturn]]:
        return [self.run(changed)]

    async def run(self, changed: Callable[[], None] = lambda: None) -> NoReturn:
        """List what others have stored and deleted: now, `refresh_s` after each listing's end, and after a probe."""
        while True:
            try:
                await self.refresh(changed)
                self._listing_fails = False
            except TierFailed as failed:  # what was known stays known; the tier's user learns it from reads and writes
                if not self._listing_fails:
                    _log.warning("the object tier was not listed, and will be later: %s", failed)
                self._listing_fails = True
            try:
                async with asyncio.timeout(self._refresh_s):
                    await self._woken.wait()
            except TimeoutError:
                pass
            self._woken.clear()

    async def refresh(self, changed: Callable[[], None] = lambda: None) -> None:
        """List everything once. Raises TierFailed: what was listed by then counts, the rest is as it was before.

        `changed` is called after each page: all that a store of millions has at once would be too much to tell.
        """
        listing, after, doomed = Listing(self._catalog), "", set[FullHash]()
        while page := await self._page(listing, after):
            after = page[-1].key
            hashes = [block_hash for blob in page if (block_hash := self._hash(blob.key)) is not None]
            doomed |= {block_hash for block_hash in hashes if self._catalog.doomed(block_hash)}
            changed()
        listing.end()
        changed()
        await _all(self._delete_at_last(block_hash) for block_hash in doomed)

    async def _page(self, listing: Listing, after: str) -> Sequence[Blob]:
        listing.ask()
        page = await self._blobs.page(self._folder, after)
        for blob in page:
            block_hash = self._hash(blob.key)
            if block_hash is not None and blob.size == self._records.bytes:  # an incomplete one is as good as none
                listing.found(block_hash)
        if not listing.complete and not self._said_there_are_more:
            self._said_there_are_more = True
            _log.warning("the object tier holds more than the %d blocks that are kept track of", self._catalog.limit)
        return page

    def __contains__(self, block_hash: FullHash) -> bool:
        return block_hash in self._catalog

    def hashes(self) -> tuple[FullHash, ...]:
        return self._catalog.hashes()

    def changes(self) -> Changes:
        return self._catalog.changes()

    @property
    def blocks(self) -> int:
        """Of all who use the namespace, as far as known."""
        return len(self._catalog)

    @property
    def used_bytes(self) -> int:
        return self.blocks * self._records.bytes

    # ---- blocks ----

    async def write(self, records: Sequence[HostRecord]) -> int:
        if any(record.hash not in self for record in records):
            await self._describe()
        await _all(self._write(record) for record in records)
        return sum(record.hash in self for record in records)

    async def _write(self, record: HostRecord) -> None:
        async with self._writes:
            if record.hash not in self:  # by now
                await self._blobs.put(self._key(record.hash), record.slot)
                self._catalog.wrote(record.hash)

    async def read(self, records: Sequence[HostRecord], *, use: bool = True) -> list[bool]:
        here = [False] * len(records)

        async def read(index: int, record: HostRecord) -> None:
            async with self._reads:
                here[index] = await self._blobs.get(self._key(record.hash), record.slot)
                if not here[index]:
                    self._catalog.missed(record.hash)

        await _all(read(index, record) for index, record in enumerate(records))
        return here

    def used(self, hashes: Sequence[FullHash]) -> None:
        """The store does not ask."""

    async def forget(self, block_hash: FullHash) -> None:
        """Others must not find it either: it is deleted, and as long as that fails, again with every listing."""
        self._catalog.doom(block_hash)
        try:
            await self._delete(block_hash)
        except TierFailed as failed:
            _log.warning("a block that is not what was stored could not be deleted yet: %s", failed)

    async def _delete_at_last(self, block_hash: FullHash) -> None:
        with suppress(TierFailed):  # the next listing shows it again
            await self._delete(block_hash)

    async def _delete(self, block_hash: FullHash) -> None:
        async with self._deletions:
            self._catalog.doom(block_hash)
            await self._blobs.delete(self._key(block_hash))
            self._catalog.deleted(block_hash)

    async def purge(self, progress: Callable[[int], None] | None = None) -> int:
        """All of the namespace, whoever stored it; other folders stay. `progress` is told how many are gone so far."""
        blocks, after, self._described = 0, "", False

        async def delete(key: str) -> None:
            nonlocal blocks
            block_hash = self._hash(key)
            if block_hash is not None:
                await self._delete(block_hash)
                blocks += 1
            else:
                async with self._deletions:
                    await self._blobs.delete(key)

        while page := await self._blobs.page(self._folder, after):
            await _all(delete(blob.key) for blob in page)
            after = page[-1].key
            _log.info("the object tier is being purged: %d blocks are gone", blocks)
            if progress is not None:
                progress(blocks)
        self._woken.set()
        return blocks

    async def sync(self) -> None:
        """A store that says it has an object has it."""

    async def close(self) -> None:
        await self._blobs.close()

    # ---- keys ----

    def _key(self, block_hash: FullHash) -> str:
        name = block_hash.hex()
        return f"{self._folder}/{name[:2]}/{name}"

    def _hash(self, key: str) -> FullHash | None:
        """None for what is not a block."""
        try:
            block_hash = FullHash(bytes.fromhex(key[-64:]))
        except ValueError:
            return None
        return block_hash if self._key(block_hash) == key else None

    async def _describe(self) -> None:
        """Let people see what the folder is. Raises TierFailed."""
        if self._described:
            return
        key = f"{self._folder}/namespace.json"
        if not await self._blobs.has(key):
            await self._blobs.put_bytes(key, self._description)
        self._described = True


async def _all(calls: Iterable[Coroutine[None, None, None]]) -> None:
    """Concurrently; the first that fails cancels the others, and its error is raised once all have ended."""
    try:
        async with asyncio.TaskGroup() as group:
            for call in calls:
                group.create_task(call)
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
