"""The host tier's memory as one rank sees it: shared with the worker process, which knows what lies where.

A slot holds one block of the whole worker, rank after rank. The memory is a memfd of the worker process, reached
through /proc: it outlives an engine that dies.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Sequence

import torch

from kvbm.tiers.record import stride_bytes
from workers.errors import TransferError
from workers.transfer.cuda_rows import rows_to_device, rows_to_host
from workers.transfer.pack import Copier, Copy, Ids
from workers.transfer.ready import Ready, ReadyWatch

_BATCH = {"cpu": 2**20, "cuda": 16 * 2**20}  # bytes of one copy, if a block is not more


class Arena:
    """Copies blocks between this rank's planes and its share of the slots, in the order asked for."""

    def __init__(
        self, path: str, rank: int, ranks: int, copier: Copier, device: torch.device, moved: Callable[[], None],
    ) -> None:  # fmt: skip
        """`copier`: of its own, so that transfers do not wait for these copies. `moved` is called after each of those
        that go on by themselves, on a thread of its own.

        Raises TransferError when the memory cannot be reached.
        """
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise TransferError(f"the host tier's memory cannot be reached at {path}: {error}") from error
        try:
            size = os.fstat(file).st_size
            self._bytes = torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8)
        finally:
            os.close(file)
        self._copier, self.block_bytes = copier, copier.block_bytes
        self._slot_bytes = stride_bytes(copier.block_bytes * ranks)
        self._start = rank * copier.block_bytes
        self.batch = max(1, _BATCH[device.type] // self.block_bytes)  # blocks that one copy takes at most
        self._scratch: torch.Tensor | None = None
        self._watch: ReadyWatch | None = None
        if device.type == "cuda":
            _pin(self._bytes)
            self._watch = ReadyWatch(moved)
            self._scratch = torch.empty(self.batch, self.block_bytes, dtype=torch.uint8, device=device)

    def index(self, block_ids: Sequence[int]) -> Ids:
        """Where the blocks are, for `put` and `get` of parts of them."""
        return self._copier.index(block_ids)

    def put(self, block_ids: Ids, slots: Sequence[int], ready: Ready) -> Copy:
        """Begin to copy up to `batch` blocks to their slots, once `ready`."""
        if self._scratch is None:
            for number, slot in enumerate(slots):
                self._copier.gather(block_ids[number : number + 1], self._share(slot), ready)
        else:  # the next copy's blocks come into the scratch behind this one's, on the same stream
            self._copier.gather_each(block_ids, self._scratch[: len(slots)], ready)
            with self._copier.after():
                for first, count in _runs(slots):
                    rows_to_host(self._scratch[first : first + count], self._shares(slots[first], count))
        return self._begun(slots)

    def get(self, slots: Sequence[int], block_ids: Ids, ready: Ready | None) -> Copy:
        """Begin to copy up to `batch` slots to their blocks, once `ready`."""
        if self._scratch is None:
            for number, slot in enumerate(slots):
                self._copier.scatter(block_ids[number : number + 1], self._share(slot), ready=ready)
        else:
            with self._copier.after():
                for first, count in _runs(slots):
                    rows_to_device(self._shares(slots[first], count), self._scratch[first : first + count])
            self._copier.scatter_each(block_ids, self._scratch[: len(slots)], ready)
        return self._begun(slots)

    def _begun(self, slots: Sequence[int]) -> Copy:
        copy = self._copier.begun(len(slots) * self.block_bytes)
        if self._watch is not None:
            self._watch.watch(copy)
        return copy

    def close(self) -> None:
        """Nothing is copied any more."""
        if self._watch is not None:
            self._watch.close()
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())

    def _share(self, slot: int) -> torch.Tensor:
        """This rank's bytes of a slot."""
        return self._bytes.narrow(0, slot * self._slot_bytes + self._start, self.block_bytes)

    def _shares(self, slot: int, count: int) -> torch.Tensor:
        """This rank's bytes of that slot and those behind it, `[count, block_bytes]`."""
        start = slot * self._slot_bytes + self._start
        return self._bytes.as_strided((count, self.block_bytes), (self._slot_bytes, 1), start)


def _runs(slots: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of those that lie one behind the other, so that one call copies them all."""
    first = 0
    for number in range(1, len(slots) + 1):
        if number == len(slots) or slots[number] != slots[number - 1] + 1:
            yield first, number - first
            first = number


def _pin(memory: torch.Tensor) -> None:
    """So that the GPU copies by itself. Raises TransferError."""
    code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(code):
        raise TransferError(f"CUDA cannot pin {memory.numel()} bytes of host memory (error {int(code)})")
