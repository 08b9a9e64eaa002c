"""The host tier's memory as one rank sees it: shared with the worker process, which knows what lies where.

A slot holds one block of the whole worker, rank after rank. The memory is a memfd of the worker process, reached
through /proc: it outlives an engine that dies.
"""

from __future__ import annotations

import mmap
import os

import torch

from kvbm.tiers.record import stride_bytes
from workers.errors import TransferError
from workers.transfer.pack import Copier, Copy
from workers.transfer.ready import Ready


class Arena:
    """Copies blocks between this rank's planes and its share of the slots."""

    def __init__(self, path: str, rank: int, ranks: int, copier: Copier, device: torch.device) -> None:
        """Raises TransferError when the memory cannot be reached."""
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise TransferError(f"the host tier's memory cannot be reached at {path}: {error}") from error
        try:
            size = os.fstat(file).st_size
            self._bytes = torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8)
        finally:
            os.close(file)
        self._copier, self._block_bytes = copier, copier.block_bytes
        self._slot_bytes = stride_bytes(copier.block_bytes * ranks)
        self._start = rank * copier.block_bytes
        self._scratch: torch.Tensor | None = None
        if device.type == "cuda":
            _pin(self._bytes)
            self._scratch = torch.empty(copier.block_bytes, dtype=torch.uint8, device=device)

    def put(self, block_id: int, slot: int, ready: Ready) -> Copy:
        """Begin to copy a block to its slot, once `ready`."""
        if self._scratch is None:
            return self._copier.gather([block_id], self._share(slot), ready)
        self._copier.gather([block_id], self._scratch, ready)
        with self._copier.after():  # the next gather into the scratch comes behind it on the same stream
            self._share(slot).copy_(self._scratch, non_blocking=True)
        return self._copier.begun(self._block_bytes)

    def get(self, slot: int, block_id: int, ready: Ready | None) -> Copy:
        """Begin to copy a slot to its block, once `ready`."""
        if self._scratch is None:
            return self._copier.scatter([block_id], self._share(slot), ready=ready)
        with self._copier.after(ready):
            self._scratch.copy_(self._share(slot), non_blocking=True)
        return self._copier.scatter([block_id], self._scratch)

    @property
    def block_bytes(self) -> int:
        return self._block_bytes

    def _share(self, slot: int) -> torch.Tensor:
        return self._bytes.narrow(0, slot * self._slot_bytes + self._start, self._block_bytes)


def _pin(memory: torch.Tensor) -> None:
    """So that the GPU copies by itself. Raises TransferError."""
    code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(code):
        raise TransferError(f"CUDA cannot pin {memory.numel()} bytes of host memory (error {int(code)})")
