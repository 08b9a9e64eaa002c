"""The transfer engine's interface: registered memory, peers, writes with notifications. Knows nothing of KV.

Every call is non-blocking and meant for one thread (the connector's mover); nothing here waits.
Errors are typed below; deadlines are the caller's, since a frozen peer or a cut link may never show.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from workers.errors import TransferError

Memory = Literal["DRAM", "VRAM"]
Progress = Literal["pending", "done"]


@dataclass(frozen=True, slots=True)
class Region:
    """Registered memory: `[address, address + size)` in bytes, on `device` (0 for DRAM)."""

    address: int
    size: int
    device: int
    memory: Memory


@dataclass(frozen=True, slots=True)
class Notification:
    """Bytes a peer attached to a finished write, or sent alone."""

    peer: str  # agent name
    payload: bytes


class Write(Protocol):
    """One write in flight."""

    def poll(self) -> Progress:
        """Raises TransferError (PeerLost, …) when the write failed."""
        ...

    def close(self) -> None:
        """Release it; one still in flight is given up, or TransferError says that it could not be yet."""
        ...


class TransferEngine(Protocol):
    name: str  # unique: incarnation and rank
    backend: str  # for traces, e.g. "nixl/UCX"

    def register(self, address: int, size: int, memory: Memory, device: int) -> Region: ...

    def metadata(self) -> bytes:
        """What a peer needs to connect; stable after the last `register`."""
        ...

    def connect(self, metadata: bytes) -> str:
        """Make a peer known; returns its agent name. Idempotent. Raises TransferError."""
        ...

    def disconnect(self, peer: str) -> None: ...

    def write(self, peer: str, local: tuple[Region, int, int], remote: tuple[int, int, Memory], notify: bytes) -> Write:
        """Write `(region, offset, size)` to `(address, device, memory)` at the peer, then notify it."""
        ...

    def notify(self, peer: str, payload: bytes) -> None: ...

    def notifications(self) -> list[Notification]: ...

    def close(self) -> None: ...


__all__ = ["Memory", "Notification", "Progress", "Region", "TransferEngine", "TransferError", "Write"]
