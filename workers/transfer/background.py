"""Transfers that threads of their engine carry out, and host memory as those threads see it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import threading
import time
from abc import abstractmethod
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from workers.errors import Mismatch, TransferError, TransferTimeout
from workers.transfer.engine import Memory, Region, Spans, Target, Transfer

CLOSE_S = 1.0  # how long `close` waits for what cannot be stopped


class BackgroundTransfer(Transfer):
    """A transfer that other threads carry out and settle; whoever waits for it sleeps."""

    def __init__(self, deadline: float) -> None:
        super().__init__(deadline)
        self._changed = threading.Condition()
        self._settled = False
        self._error: TransferError | None = None
        self._listeners: list[Callable[[], None]] = []

    @abstractmethod
    def stop(self) -> None:
        """Cancel it without waiting: no more memory is touched than is being touched."""

    @abstractmethod
    def _quiet(self) -> bool:
        """Whether nothing of it touches memory any more, nor will. Called with `_changed` held."""

    def close(self) -> None:
        """Cancel what is under way. Its memory may be reused once this returned; raises TransferError after 1 s.

        May be called again after it raised.
        """
        self.stop()
        with self._changed:
            if not self._changed.wait_for(self._quiet, CLOSE_S):
                raise TransferError(f"the transfer could not be stopped within {CLOSE_S:g} s")

    @property
    def quiet(self) -> bool:
        """Whether it has ended and its memory may be reused: what `close` waits for."""
        with self._changed:
            return self._settled and self._quiet()

    def wait(self) -> None:
        """Block until it is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._settled, max(0.0, self._deadline - time.monotonic()))
        self._end()

    async def _done(self) -> None:
        loop, settled = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(settled.set)

        with self._changed:
            self._listeners.append(wake)
            if self._settled:
                settled.set()
        try:
            with contextlib.suppress(TimeoutError):  # `_end` says so, or has the transfer's own error by now
                async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                    await settled.wait()
        finally:
            with self._changed:  # the loop may be closed from here on
                self._listeners.remove(wake)
        self._end()

    def _end(self) -> None:
        """Raises unless it is done by now."""
        if not self._advance():
            raise TransferTimeout("the transfer was not done by its deadline")

    def _advance(self) -> bool:
        with self._changed:
            if self._error is not None:
                raise self._error
            return self._settled

    def _settle(self, error: TransferError | None = None) -> None:
        """End it, the first call counts."""
        with self._changed:
            if self._settled:
                return
            self._settled, self._error = True, error
            self._changed.notify_all()
            for listener in self._listeners:
                listener()


def host_region(address: int, size: int, memory: Memory, device: int, of: str) -> Region:
    """What a storage engine's `register` returns. Raises Mismatch for device memory."""
    if memory != "DRAM":
        raise Mismatch(f"{of} are written from host memory: stage {memory} there first")
    return Region(address, size, device, memory)


def check_spans(region: Region, here: Spans, target: Target, there: Spans) -> None:
    """Raises Mismatch unless both sides have the same spans, within bounds."""
    if len(here.offsets) != len(there.offsets) or here.size != there.size:
        raise Mismatch(
            f"{len(here.offsets)} spans of {here.size} bytes here, {len(there.offsets)} of {there.size} there"
        )
    if here.size <= 0:
        raise Mismatch(f"spans of {here.size} bytes")
    here.check(region.size, "the region")
    there.check(target.size, target.where)


def bytes_of(region: Region) -> NDArray[np.uint8]:
    """The region's memory, `[size]`; whoever registered it keeps it alive."""
    return np.frombuffer(memoryview((ctypes.c_uint8 * region.size).from_address(region.address)), dtype=np.uint8)
