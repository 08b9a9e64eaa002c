"""The disk tier's file, moved by a FileEngine from and to the host tier's memory."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from kvbm.errors import TierFailed
from kvbm.events import Tier
from kvbm.tiers.host import HostMemory
from workers.errors import TransferError
from workers.transfer.engine import Region, Spans, Target
from workers.transfer.files import FileEngine, FileTransfer

_log = logging.getLogger(__name__)
_POLL_S = 0.02
_PATIENCE = 10  # times `timeout_s` is waited for a write: nobody waits for it but host memory


class TierFiles:
    """Opens files of records whose other side is the host tier's memory. See `kvbm.tiers.volume.OpenFile`."""

    def __init__(self, memory: HostMemory, stride: int, timeout_s: float) -> None:
        """`stride`: bytes from one record to the next, there and here. `timeout_s`: longest wait for a read."""
        self._bytes = np.frombuffer(memory.view(0, memory.size), dtype=np.uint8)  # keeps the memory while it is used
        self._engine = FileEngine()
        self._region = self._engine.register(self._bytes.ctypes.data, self._bytes.size, "DRAM", 0)
        self._stride, self._timeout_s = stride, timeout_s

    def open(self, path: Path, size: int) -> RecordFile:
        """See OpenFile."""
        try:
            target = self._engine.open(path, size)
        except TransferError as error:
            raise _failed(error) from error
        return RecordFile(self._engine, self._region, target, self._stride, self._timeout_s)

    def close(self) -> None:
        """Once the tier is closed. Waits 1 s at most."""
        try:
            self._engine.close()
        except TransferError as error:
            _log.warning("disk tier: %s", error)


class RecordFile:
    """See `kvbm.tiers.volume.SlotFile`."""

    def __init__(self, engine: FileEngine, region: Region, target: Target, stride: int, timeout_s: float) -> None:
        self._engine, self._region, self._target = engine, region, target
        self._stride, self._timeout_s = stride, timeout_s

    async def write(self, slots: Sequence[int], places: Sequence[int]) -> None:
        """See SlotFile."""
        deadline = time.monotonic() + self._timeout_s * _PATIENCE
        here, there = self._spans(slots), self._spans(places)
        await _carried_out(lambda: self._engine.write(self._region, here, self._target, there, deadline))

    async def read(self, slots: Sequence[int], places: Sequence[int]) -> None:
        """See SlotFile."""
        deadline = time.monotonic() + self._timeout_s
        here, there = self._spans(slots), self._spans(places)
        await _carried_out(lambda: self._engine.read(self._region, here, self._target, there, deadline))

    async def sync(self) -> None:
        """See SlotFile."""
        deadline = time.monotonic() + self._timeout_s * _PATIENCE
        try:
            await self._engine.sync(self._target, deadline)
        except TransferError as error:
            raise _failed(error) from error

    def close(self) -> None:
        """See SlotFile."""
        self._engine.forget(self._target)

    def _spans(self, numbers: Sequence[int]) -> Spans:
        return Spans(np.array(numbers, dtype=np.int64) * self._stride, self._stride)


async def _carried_out(start: Callable[[], FileTransfer]) -> None:
    """Raises TierFailed; returns or raises only once nothing is touched any more, though the task is cancelled."""
    try:
        transfer = start()
        try:
            await transfer
        finally:
            transfer.stop()
            await _quiet(transfer)
    except TransferError as error:
        raise _failed(error) from error


async def _quiet(transfer: FileTransfer) -> None:
    cancelled: asyncio.CancelledError | None = None
    while not transfer.quiet:  # a transfer that is done is; another may hang in a system call for as long as it likes
        try:
            await asyncio.sleep(_POLL_S)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


def _failed(error: TransferError) -> TierFailed:
    return TierFailed(Tier.DISK, error.cause, str(error))
