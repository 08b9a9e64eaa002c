"""Memory that other processes of this host can map: a piece is gathered straight into a peer's staging.

One copy less than writing it, and no system call per piece. The memory is a memfd, so it ends with the processes that
use it, also after kill −9; a peer opens it through /proc/<pid>/fd, which the kernel allows to processes of the same
user in the same PID namespace only. What cannot be opened is simply not shared, and UCX moves the bytes.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from workers.errors import StaleIncarnation

_NONCE_BYTES = 16


class SharedBytes(msgspec.Struct, frozen=True, array_like=True):
    """Where to find one shared allocation. `host` is the kernel's boot id: a pid means nothing elsewhere."""

    host: str
    pid: int
    fd: int
    address: int  # in the owner's address space
    size: int  # bytes, without the nonce that follows
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Window:
    """A peer's allocation, mapped here."""

    address: int  # in the peer's address space
    bytes: torch.Tensor  # [size]
    close: Callable[[], object]  # once nothing of it is used any more


def host_id() -> str:
    """The same for all processes under one kernel, another one after every boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Shared:
    """An allocation of our own."""

    def __init__(self, size: int) -> None:
        self._fd = os.memfd_create("dynamo-lite-staging", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, size + _NONCE_BYTES)
        nonce = secrets.token_bytes(_NONCE_BYTES)
        os.pwrite(self._fd, nonce, size)
        self._map = mmap.mmap(self._fd, size + _NONCE_BYTES)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8, count=size)
        self.bytes.zero_()  # touch every page now, not in the first transfer
        self.card = SharedBytes(host_id(), os.getpid(), self._fd, self.bytes.data_ptr(), size, nonce)

    def close(self) -> None:
        """Our mapping lasts as long as a tensor uses it; the name under /proc ends here."""
        os.close(self._fd)


def open_shared(card: SharedBytes) -> Window | None:
    """A peer's allocation, or None where it cannot be reached from here.

    Raises StaleIncarnation when that pid is another process by now.
    """
    if card.host != host_id():
        return None
    try:
        fd = os.open(f"/proc/{card.pid}/fd/{card.fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None  # another PID namespace or user, or it has just ended
    try:
        if os.fstat(fd).st_size != card.size + _NONCE_BYTES or os.pread(fd, _NONCE_BYTES, card.size) != card.nonce:
            raise StaleIncarnation(f"process {card.pid} is not the worker that offered its memory")
        mapped = torch.frombuffer(mmap.mmap(fd, card.size + _NONCE_BYTES), dtype=torch.uint8, count=card.size)
        return Window(card.address, mapped, lambda: None)  # the mapping lasts as long as a tensor uses it
    finally:
        os.close(fd)
