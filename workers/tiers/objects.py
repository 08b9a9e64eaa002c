"""The object tier's store: objects in and out of the host tier's slots, through the object engine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from dynamo_lite.config import ObjectTier
from kvbm.errors import TierFailed, TierRefused
from kvbm.events import Tier
from kvbm.tiers.host import HostMemory
from kvbm.tiers.object import Blob
from kvbm.tiers.record import TRAILER_BYTES, Records
from workers.errors import Corrupt, Mismatch, NoBucket, NotFound, TransferError
from workers.transfer.engine import Region, Spans
from workers.transfer.objects import ObjectEngine, ObjectTransfer
from workers.transfer.stores import StoreOptions, open_store

_log = logging.getLogger(__name__)
_REQUESTS = 32  # more than the tier ever has under way, so that no deadline is spent on waiting for a turn
_PAGE = 1000  # objects of a listing at a time: as many as S3 gives by one request
_PART = 8 * 2**20  # at least: records are written by one request each
_CONNECT = 0.5  # of the deadline, for a connection


class StoreBlobs:
    """See `kvbm.tiers.object.Blobs`."""

    def __init__(self, engine: ObjectEngine, url: str, memory: HostMemory, records: Records, timeout_s: float) -> None:
        """`engine`: ours from here on. `url`: what its store is called in errors. `timeout_s`: for each request.

        `memory`: the host tier's, with a slot every `records.stride` bytes.
        """
        self._engine, self._url, self._records, self._timeout_s = engine, url, records, timeout_s
        self._memory = np.frombuffer(memory.view(0, memory.size), dtype=np.uint8)
        self._region = self._registered(self._memory)

    # ---- records ----

    async def put(self, key: str, slot: int) -> None:
        await self._write(key, self._region, slot * self._records.stride, self._records.bytes)

    async def get(self, key: str, slot: int) -> bool:
        start, size = slot * self._records.stride, self._records.bytes
        try:
            await self._read(key, self._region, start, size)
        except Corrupt:
            self._memory[start + size - TRAILER_BYTES : start + size] = 0
        except NoBucket as error:
            raise self._failed(error) from None
        except NotFound:
            return False
        except TransferError as error:
            raise self._failed(error) from None
        return True

    # ---- small things ----

    async def put_bytes(self, key: str, content: bytes) -> None:
        await self._write(key, self._registered(np.frombuffer(content, dtype=np.uint8)), 0, len(content))

    async def get_bytes(self, key: str, size: int) -> bytes | None:
        content = np.zeros(size, dtype=np.uint8)
        try:
            await self._read(key, self._registered(content), 0, size)
        except (NotFound, Corrupt) as error:
            if isinstance(error, NoBucket):
                raise self._failed(error) from None
            return None
        except TransferError as error:
            raise self._failed(error) from None
        return content.tobytes()

    async def has(self, key: str) -> bool:
        with self._failures():
            lookup = self._engine.head(key, self._deadline())
            await _over(lookup)
        return lookup.size is not None

    async def delete(self, key: str) -> None:
        with self._failures():
            await _over(self._engine.delete(key, self._deadline()))

    async def page(self, folder: str, after: str) -> Sequence[Blob]:
        with self._failures():
            page = self._engine.page(folder, after, _PAGE, self._deadline())
            await _over(page)
        return [Blob(each.key, each.size) for each in page.objects]

    async def close(self) -> None:
        try:
            await asyncio.to_thread(self._engine.close)
        except TransferError as error:  # its thread is a daemon: it ends with the process
            _log.warning("the object tier's requests did not end: %s", error)

    # ---- requests ----

    async def _write(self, key: str, region: Region, start: int, size: int) -> None:
        with self._failures():
            target, whole = self._engine.object(key, size), Spans.one(0, size)
            await _over(self._engine.write(region, Spans.one(start, size), target, whole, self._deadline()))

    async def _read(self, key: str, region: Region, start: int, size: int) -> None:
        """Raises TransferError."""
        target, whole = self._engine.object(key, size), Spans.one(0, size)
        await _over(self._engine.read(region, Spans.one(start, size), target, whole, self._deadline()))

    def _registered(self, memory: NDArray[np.uint8]) -> Region:
        return self._engine.register(memory.ctypes.data, memory.size, "DRAM", 0)

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout_s

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except TransferError as error:
            raise self._failed(error) from None

    def _failed(self, error: TransferError) -> TierFailed:
        return TierFailed(Tier.OBJECT, error.cause, f"{self._url}: {error}")


def object_blobs(settings: ObjectTier, memory: HostMemory, records: Records) -> StoreBlobs:
    """The store of the configuration; does not contact it. Raises TierRefused for a URL that cannot be one."""
    timeout_s = settings.timeout_ms / 1000  # ours; the store's client's is longer, so that it is always ours that ends
    options = StoreOptions(
        settings.endpoint, settings.region, settings.access_key_id, settings.secret_access_key,
        connect_timeout_s=timeout_s * _CONNECT, request_timeout_s=timeout_s * 2, retry_s=timeout_s,
    )  # fmt: skip
    try:
        engine = ObjectEngine(open_store(settings.url, options), _REQUESTS, max(records.bytes, _PART))
    except Mismatch as error:
        raise TierRefused(f"kv_tiers.object: {error}") from None
    return StoreBlobs(engine, settings.url, memory, records, timeout_s)


async def _over(transfer: ObjectTransfer) -> None:
    """Until it is done or has failed, and in any case touches its memory no more. Raises TransferError."""
    try:
        await transfer
    finally:
        await transfer.stopped()
