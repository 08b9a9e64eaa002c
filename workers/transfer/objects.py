"""Objects of an S3-compatible store as transfer targets, through obstore.

One thread with an event loop drives all requests. Only that thread touches registered memory, and only between two
awaits: it copies into and out of buffers that the requests own. So a request that lingers after a cancel harms nothing.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import obstore
from numpy.typing import NDArray
from obstore.exceptions import BaseError

from workers.errors import Corrupt, Mismatch, NotFound, TransferError, TransferTimeout
from workers.transfer.background import CLOSE_S, BackgroundTransfer, bytes_of, check_spans, host_region
from workers.transfer.engine import Memory, Region, Spans, Target
from workers.transfer.stores import failure

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

T = TypeVar("T")
Work = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Part:
    """Spans of memory that are one run of the object's content."""

    offsets: NDArray[np.int64]  # in the region
    size: int  # of each
    start: int  # in the object

    @property
    def bytes(self) -> int:
        return len(self.offsets) * self.size

    def gathered(self, memory: NDArray[np.uint8]) -> memoryview:
        """A copy of them, one after another."""
        if (run := self._run) is not None:
            return memory[run].copy().data
        return self._windows(memory)[self.offsets].view(np.uint8).data

    def scatter(self, content: NDArray[np.uint8], memory: NDArray[np.uint8]) -> None:
        if (run := self._run) is not None:
            memory[run] = content
        else:
            self._windows(memory)[self.offsets] = content.view(f"V{self.size}")

    @property
    def _run(self) -> slice | None:
        """Where they are, if contiguous in memory too."""
        if (np.diff(self.offsets) != self.size).any():
            return None
        return slice(int(self.offsets[0]), int(self.offsets[0]) + self.bytes)

    def _windows(self, memory: NDArray[np.uint8]) -> NDArray[np.void]:
        """All runs of `size` bytes as one value each, so that numpy copies without a loop of ours."""
        return np.ndarray((len(memory) - self.size + 1,), dtype=f"V{self.size}", buffer=memory, strides=(1,))


def parts_of(here: Spans, there: Spans, limit: int) -> list[Part]:
    """The spans in the object's order, in parts of at most `limit` bytes; a longer span is cut."""
    order = np.argsort(there.offsets, kind="stable")
    mine, theirs = here.offsets[order], there.offsets[order]
    if here.size > limit:
        cuts = range(0, here.size, limit)
        return [
            Part(np.array([a + cut], dtype=np.int64), min(limit, here.size - cut), b + cut)
            for a, b in zip(mine.tolist(), theirs.tolist(), strict=True)
            for cut in cuts
        ]
    apart = np.flatnonzero(np.diff(theirs, prepend=-1 - here.size) != here.size)
    since = np.arange(len(theirs)) - np.repeat(apart, np.diff(np.append(apart, len(theirs))))
    starts = np.flatnonzero(since % (limit // here.size) == 0).tolist()
    ends = [*starts, len(mine)][1:]
    return [Part(mine[a:b], here.size, int(theirs[a])) for a, b in zip(starts, ends, strict=True)]


class ObjectTransfer(BackgroundTransfer):
    """Requests that the engine's loop carries out."""

    def __init__(self, key: str, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        super().__init__(deadline)
        self.key = key
        self._loop = loop
        self._task: asyncio.Task[None] | None = None
        self._ended: Future[None] = Future()

    @property
    def settled(self) -> bool:
        """Then its memory must not be touched any more."""
        return self._settled

    async def run(self, work: Work) -> None:
        """Its task."""
        with self._changed:
            self._task = asyncio.current_task()
            left = self._deadline - time.monotonic()
        try:
            if not self._settled:
                async with asyncio.timeout(max(0.0, left)):
                    await asyncio.sleep(0)  # past the deadline this is where it ends
                    await work()
                self._settle()
        except TimeoutError:
            self._settle(TransferTimeout(f"{self.key}: not done by the deadline"))
        except TransferError as error:
            self._settle(error)
        except asyncio.CancelledError:
            self._settle(TransferError(f"{self.key}: cancelled"))
        finally:
            self.end()

    def end(self) -> None:
        """Nothing of it goes on any more."""
        self._settle(TransferError(f"{self.key}: the engine ended"))
        with self._changed:
            if not self._ended.done():
                self._ended.set_result(None)
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._settle(TransferError(f"{self.key}: cancelled"))
            if self._task is not None and not self._ended.done():
                self._loop.call_soon_threadsafe(self._task.cancel)

    async def stopped(self) -> None:
        """Cancel what is under way, and return once its memory may be reused: `close`, for a loop, and however long it
        takes. A task that is cancelled meanwhile waits all the same."""
        self.stop()
        cancelled = None
        while not self._ended.done():
            try:
                await asyncio.shield(asyncio.wrap_future(self._ended))
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled

    def _quiet(self) -> bool:
        return self._ended.done()


class Lookup(ObjectTransfer):
    """Asks for an object's size."""

    size: int | None = None  # bytes, once done; None: there is no such object


@dataclass(frozen=True, slots=True)
class Listed:
    """An object in a listing."""

    key: str
    size: int  # bytes


class Page(ObjectTransfer):
    """Asks for the next objects of a listing."""

    objects: Sequence[Listed] = ()  # once done, by key; empty: there are no more


class ObjectEngine:
    """See `workers.transfer.engine.TransferEngine`. May be called from any thread."""

    def __init__(self, store: ObjectStore, requests: int = 8, part_bytes: int = 8 * 2**20) -> None:
        """`store`: see `workers.transfer.stores.open_store`. At most `requests` are under way.

        Objects larger than `part_bytes` are written in such parts (S3 wants 5 MiB at least) and read in such ranges.
        """
        self._store, self._requests, self._part_bytes = store, requests, part_bytes
        self._lock = threading.Lock()  # of the next three
        self._fresh: list[tuple[ObjectTransfer, Work]] = []
        self._open: set[ObjectTransfer] = set()
        self._closing = False
        self._loop = asyncio.new_event_loop()
        self._wake = asyncio.Event()
        self._slots = asyncio.Semaphore(requests)
        self._large = asyncio.Lock()  # one upload in parts at a time, so that its buffers are bounded
        self._thread = threading.Thread(target=self._serve, name="objects", daemon=True)
        self._thread.start()

    def register(self, address: int, size: int, memory: Memory, device: int) -> Region:
        """Nothing is pinned: this names the memory. Raises Mismatch for VRAM."""
        return host_region(address, size, memory, device, "objects")

    def object(self, key: str, size: int) -> Target:
        """An object of `size` bytes, which need not exist yet. `key` is relative to the store's prefix."""
        return Target(key, size)

    # ---- transfers: each raises NotFound, Denied, Unreachable, TransferTimeout, TransferError when it fails ----

    def write(self, region: Region, here: Spans, target: Target, there: Spans, deadline: float) -> ObjectTransfer:
        """Make the object of spans of the region; `there` says where in it each goes. It appears whole or not at all.

        Raises Mismatch unless `there` covers the object exactly, TransferError when the engine is closed.
        A cancelled upload of several parts may leave parts in the bucket that only its lifecycle rules remove.
        """
        check_spans(region, here, target, there)
        covered = np.sort(there.offsets)
        if there.bytes != target.size or not np.array_equal(covered, np.arange(len(covered)) * there.size):
            raise Mismatch(
                f"an object is written whole: the spans do not cover the {target.size} bytes of {target.where}"
            )
        parts, memory = parts_of(here, there, self._part_bytes), bytes_of(region)
        transfer = self._transfer(target.where, deadline)
        return self._post(transfer, partial(self._put, transfer, parts, memory))

    def read(self, region: Region, here: Spans, target: Target, there: Spans, deadline: float) -> ObjectTransfer:
        """Copy spans of the object into the region, whose spans must not overlap; contiguous ones by one request.

        Raises Mismatch, TransferError when the engine is closed.
        """
        check_spans(region, here, target, there)
        parts, memory = parts_of(here, there, self._part_bytes), bytes_of(region)
        transfer = self._transfer(target.where, deadline)
        return self._post(transfer, partial(self._get, transfer.key, parts, memory))

    def delete(self, key: str, deadline: float) -> ObjectTransfer:
        """Remove an object; one that is not there is no error."""
        transfer = self._transfer(key, deadline)
        return self._post(transfer, partial(self._delete, key))

    def head(self, key: str, deadline: float) -> Lookup:
        """Ask for the object's size: `Lookup.size` once it is done."""
        lookup = Lookup(key, self._loop, deadline)
        self._post(lookup, partial(self._look, lookup))
        return lookup

    def page(self, prefix: str, after: str, count: int, deadline: float) -> Page:
        """Ask for up to `count` objects under the folder `prefix` whose keys come after `after`: `Page.objects`.

        A listing is read page after page, each from the last key of the one before; it holds only one in memory. One
        request each, for a `count` of at most 1,000. Not for stores that list in no order (S3 directory buckets).
        """
        page = Page(prefix, self._loop, deadline)
        self._post(page, partial(self._list, page, after, count))
        return page

    def close(self) -> None:
        """Cancel what is under way and end the thread. Raises TransferError when it does not end within 1 s."""
        with self._lock:
            self._closing = True
            under_way = list(self._open)
        for transfer in under_way:
            transfer.stop()
        with suppress(RuntimeError):  # the loop ended before
            self._loop.call_soon_threadsafe(self._wake.set)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            raise TransferError(f"the objects' thread did not end within {CLOSE_S:g} s")

    # ---- on the loop's thread ----

    def _serve(self) -> None:
        """The thread's life. Should the loop end by a bug, what is under way fails."""
        try:
            self._loop.run_until_complete(self._run())
        finally:
            with self._lock:
                self._closing = True
                under_way = list(self._open)
            for transfer in under_way:
                transfer.end()
            self._loop.close()

    async def _run(self) -> None:
        closing = False
        async with asyncio.TaskGroup() as group:
            while not closing:
                await self._wake.wait()
                self._wake.clear()
                with self._lock:
                    fresh, self._fresh, closing = self._fresh, [], self._closing
                for transfer, work in fresh:
                    group.create_task(self._carry_out(transfer, work))

    async def _carry_out(self, transfer: ObjectTransfer, work: Work) -> None:
        try:
            await transfer.run(work)
        finally:
            with self._lock:
                self._open.discard(transfer)

    async def _request(self, key: str, call: Callable[[], Awaitable[T]]) -> T:
        async with self._slots:
            try:
                return await call()
            except (BaseError, OSError, ValueError) as error:
                raise failure(error, key) from None  # the cause holds the store's answer, with our access key

    async def _put(self, transfer: ObjectTransfer, parts: Sequence[Part], memory: NDArray[np.uint8]) -> None:
        put = partial(obstore.put_async, self._store, transfer.key)
        if len(parts) <= 1:
            content = parts[0].gathered(memory) if parts else b""
            await self._request(transfer.key, partial(put, content, use_multipart=False))
            return

        async def contents() -> AsyncIterator[memoryview]:
            for part in parts:
                if transfer.settled:  # obstore may ask once more after a cancel; an early end would look complete
                    raise TransferError(f"{transfer.key}: cancelled")
                yield part.gathered(memory)

        async with self._large:
            sized = partial(put, chunk_size=self._part_bytes, max_concurrency=self._requests)
            await self._request(transfer.key, lambda: sized(contents()))

    async def _get(self, key: str, parts: Sequence[Part], memory: NDArray[np.uint8]) -> None:
        left = iter(parts)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._requests, len(parts))):
                    group.create_task(self._fetch(key, left, memory))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _fetch(self, key: str, parts: Iterator[Part], memory: NDArray[np.uint8]) -> None:
        for part in parts:
            get = partial(obstore.get_range_async, self._store, key, start=part.start, length=part.bytes)
            content = np.frombuffer(memoryview(await self._request(key, get)), dtype=np.uint8)
            if len(content) != part.bytes:
                raise Corrupt(f"{key} ends at byte {part.start + len(content)}")
            part.scatter(content, memory)

    async def _delete(self, key: str) -> None:
        with suppress(NotFound):
            await self._request(key, partial(obstore.delete_async, self._store, key))

    async def _look(self, lookup: Lookup) -> None:
        with suppress(NotFound):
            lookup.size = (await self._request(lookup.key, partial(obstore.head_async, self._store, lookup.key)))[
                "size"
            ]

    async def _list(self, page: Page, after: str, count: int) -> None:
        async def first() -> Sequence[ObjectMeta]:
            found = obstore.list(self._store, page.key, offset=after or None, chunk_size=count)
            try:
                return await anext(found)
            except StopAsyncIteration:
                return ()

        found = await self._request(page.key, first)
        page.objects = [Listed(each["path"], each["size"]) for each in found]

    # ---- posting ----

    def _transfer(self, key: str, deadline: float) -> ObjectTransfer:
        return ObjectTransfer(key, self._loop, deadline)

    def _post(self, transfer: ObjectTransfer, work: Work) -> ObjectTransfer:
        with self._lock:
            if self._closing:
                raise TransferError("the engine is closed")
            self._fresh.append((transfer, work))
            self._open.add(transfer)
            self._loop.call_soon_threadsafe(self._wake.set)
        return transfer
