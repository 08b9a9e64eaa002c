"""The transfer engine's interface: registered memory, targets, writes and reads with deadlines. Knows nothing of KV.

Two protocols. `TransferEngine` moves bytes between registered memory and a target: a peer's memory, a file, an object.
`PeerEngine` adds what only another process offers: it has to be met, it can be notified, and its memory may be
addressable from here. `workers.transfer.fabric` is the PeerEngine, `files` and `objects` are TransferEngines.

Starting a transfer never waits; ending it is up to its `Transfer`: `poll` from a loop of one's own (the mover), `wait`
from synchronous code, `await` from asyncio. A PeerEngine belongs to the one thread that uses it.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dynamo_lite.transports import Path
from workers.errors import Mismatch, TransferError, TransferTimeout

Memory = Literal["DRAM", "VRAM"]
Progress = Literal["pending", "done"]
_POLL_S = 0.00005


@dataclass(frozen=True, slots=True)
class Region:
    """Registered memory of this process: `[address, address + size)` in bytes, on `device` (0 for DRAM)."""

    address: int
    size: int
    device: int
    memory: Memory


@dataclass(frozen=True, slots=True)
class Target:
    """Bytes elsewhere: a peer's registered memory, an open file, or an object's content.

    `where` is the peer's agent name, the file's path or the object's key; `address` is 0 for files and objects.
    """

    where: str
    size: int
    address: int = 0
    device: int = 0
    memory: Memory = "DRAM"


@dataclass(frozen=True, slots=True)
class Spans:
    """Equally long runs of bytes in a region or a target: `[offset, offset + size)` for each of `offsets`."""

    offsets: NDArray[np.int64]
    size: int

    @classmethod
    def one(cls, offset: int, size: int) -> Spans:
        return cls(np.array([offset], dtype=np.int64), size)

    @property
    def bytes(self) -> int:
        return len(self.offsets) * self.size

    def check(self, limit: int, of: str) -> None:
        """Raises Mismatch unless all lie within `[0, limit)`."""
        if len(self.offsets) and not 0 <= int(self.offsets.min()) <= int(self.offsets.max()) <= limit - self.size:
            raise Mismatch(f"bytes {int(self.offsets.min())}…{int(self.offsets.max()) + self.size} are not all in {of}")


@dataclass(frozen=True, slots=True)
class Notification:
    """Bytes a peer attached to a finished write, or sent alone."""

    peer: str  # agent name
    payload: bytes


class Transfer(ABC):
    """One write or read. Ends once: done, or with the TransferError that `poll`, `wait` and `await` then raise."""

    def __init__(self, deadline: float) -> None:
        """`deadline`: on time.monotonic's clock."""
        self._deadline = deadline

    @abstractmethod
    def _advance(self) -> bool:
        """Whether it is done. Raises TransferError when it failed."""

    @abstractmethod
    def close(self) -> None:
        """Release it, cancelling what is still under way; raises TransferError while that cannot be stopped."""

    def poll(self) -> Progress:
        """Raises TransferTimeout after the deadline; the bytes may still be moving until `close` returns."""
        if self._advance():
            return "done"
        if time.monotonic() > self._deadline:
            raise TransferTimeout("the transfer was not done by its deadline")
        return "pending"

    def wait(self) -> None:
        """Block until it is done."""
        while self.poll() == "pending":
            time.sleep(_POLL_S)

    async def _done(self) -> None:
        while self.poll() == "pending":  # noqa: ASYNC110  # NIXL offers no event
            await asyncio.sleep(_POLL_S)

    def __await__(self) -> Generator[object, None, None]:
        return self._done().__await__()


class TransferEngine(Protocol):
    """Moves bytes between registered memory and targets."""

    def register(self, address: int, size: int, memory: Memory, device: int) -> Region: ...

    def write(self, region: Region, here: Spans, target: Target, there: Spans, deadline: float) -> Transfer:
        """Copy spans of the region to as many spans of the target. Raises Mismatch, PeerLost, TransferError."""
        ...

    def read(self, region: Region, here: Spans, target: Target, there: Spans, deadline: float) -> Transfer:
        """Copy spans of the target to as many spans of the region. Raises Mismatch, PeerLost, TransferError."""
        ...

    def close(self) -> None: ...


class PeerEngine(TransferEngine, Protocol):
    """Moves bytes to and from the memory of other processes that run such an engine."""

    name: str  # of this agent, unique: incarnation and rank
    backend: str  # for traces, e.g. "nixl/UCX"

    def allocate(self, size: int, device: torch.device) -> tuple[torch.Tensor, Region]:
        """Registered memory that peers of the same host may address, `[size]` bytes."""
        ...

    def metadata(self) -> bytes:
        """What a peer needs to connect; stable after the last `register` or `allocate`."""
        ...

    def connect(self, metadata: bytes) -> str:
        """Make a peer known; returns its agent name. Idempotent; makes another connection where the last one broke.

        Raises TransferError, StaleIncarnation.
        """
        ...

    def renew(self, peer: str) -> None:
        """Make another connection to a peer that does not answer."""
        ...

    def lost(self) -> list[str]:
        """Peers whose connection was found to be broken since the last call: `connect` makes another."""
        ...

    def disconnect(self, peer: str) -> None:
        """Forget a peer. Transfers to it end, with PeerLost."""
        ...

    def path(self, peer: str) -> Path:
        """How bytes travel to a connected peer."""
        ...

    def window(self, target: Target, offset: int, size: int) -> torch.Tensor | None:
        """The target's bytes, `[size]`, where this process can address them; then nothing need be written."""
        ...

    def write(
        self, region: Region, here: Spans, target: Target, there: Spans, deadline: float, notify: bytes = b""
    ) -> Transfer:
        """As above; `notify` reaches the peer after the bytes have."""
        ...

    def notify(self, peer: str, payload: bytes) -> None: ...

    def notifications(self) -> list[Notification]: ...

    def fileno(self) -> int:
        """Readable when there are notifications, but for those that have to be polled for."""
        ...

    @property
    def polled(self) -> bool:
        """Whether those of some connected peer have to be polled for."""
        ...


__all__ = [
    "Memory", "Notification", "PeerEngine", "Progress", "Region", "Spans", "Target", "Transfer", "TransferEngine",
    "TransferError",
]  # fmt: skip
