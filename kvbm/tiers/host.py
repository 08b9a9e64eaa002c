"""The host tier's memory: one memfd, cut into slots of one record each, shared with the engine's processes.

It belongs to the worker process, so it outlives an engine that is started again, and ends with its last user, also
after kill −9. Only this user's processes can open it.
"""

from __future__ import annotations

import mmap
import os


class HostMemory:
    """`size` bytes, zeroed; the kernel provides them when they are first used."""

    def __init__(self, size: int) -> None:
        """Raises OSError."""
        self.size = size
        self._fd = os.memfd_create("dynamo-lite-host-tier", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._fd, size)
            self._map = mmap.mmap(self._fd, size)
        except OSError:
            os.close(self._fd)
            raise
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"

    def view(self, offset: int, size: int) -> memoryview:
        """Bytes `[offset, offset + size)`."""
        return memoryview(self._map)[offset : offset + size]

    def close(self) -> None:
        """Views stay valid; nobody can open it any more."""
        os.close(self._fd)
