"""Files as transfer targets: a few threads that call preadv and pwritev, past the page cache where alignment allows.

Also for a mounted NVMe-oF or network volume. A thread stuck in a dead volume cannot be stopped: then `close` says so.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

from workers.errors import Denied, Mismatch, NoSpace, NotFound, TransferError, TransferTimeout
from workers.transfer.background import CLOSE_S, BackgroundTransfer, check_spans, host_region
from workers.transfer.batches import Batch, pieces_of
from workers.transfer.engine import Memory, Region, Spans, Target

ALIGNMENT = 4096  # bytes; what O_DIRECT asks for at most on the usual volumes

_libc = ctypes.CDLL(None, use_errno=True)
Call = Callable[[int, int, int, int], int]  # file, iovecs, how many, offset → bytes moved or -1
_preadv: Call = _libc.preadv
_pwritev: Call = _libc.pwritev
for _call in (_libc.preadv, _libc.pwritev):
    _call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong]
    _call.restype = ctypes.c_ssize_t

_KINDS: dict[int, type[TransferError]] = {
    errno.ENOSPC: NoSpace,
    errno.EDQUOT: NoSpace,
    errno.EFBIG: NoSpace,
    errno.EACCES: Denied,
    errno.EPERM: Denied,
    errno.EROFS: Denied,
    errno.ENOENT: NotFound,
    errno.ENOTDIR: NotFound,
}


def failure(error: OSError, path: str) -> TransferError:
    """The kernel's error as ours, e.g. "/mnt/kv/0.bin: No space left on device (ENOSPC)"."""
    code = error.errno or 0
    kind = _KINDS.get(code, TransferError)
    return kind(f"{path}: {os.strerror(code)} ({errno.errorcode.get(code, code)})")


class OpenFile:
    """An open file. It stays open as long as something holds it."""

    def __init__(self, path: str, size: int, direct: bool) -> None:
        """Raises OSError; then a new file is gone again, and one that was there has its old size."""
        self.path, self.size = path, size
        self.buffered = _opened(path, size)
        self.direct: int | None = None  # a second descriptor, with O_DIRECT, where the file system has that
        if direct:
            with suppress(OSError):  # through /proc: surely the same file
                self.direct = os.open(f"/proc/self/fd/{self.buffered}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        self._lock = threading.Lock()
        self._holders = 1

    def hold(self) -> None:
        with self._lock:
            self._holders += 1

    def release(self) -> None:
        """The last one to call this closes the file."""
        with self._lock:
            self._holders -= 1
            if self._holders:
                return
        for descriptor in (self.buffered, self.direct):
            if descriptor is not None:
                os.close(descriptor)

    def move(self, call: Call, batch: Batch, direct: bool) -> None:
        """Read or write a batch. Raises OSError, and TransferError when the file ends before the batch does."""
        descriptor = self.direct if direct and self.direct is not None else self.buffered
        while (moved := call(descriptor, batch.iovecs.ctypes.data, len(batch.iovecs), batch.offset)) != batch.size:
            if moved == 0:
                raise TransferError(f"{self.path} ends at byte {batch.offset}")
            if moved > 0:
                batch = batch.after(moved)
            elif (code := ctypes.get_errno()) == errno.EINVAL and descriptor != self.buffered:
                descriptor = self.buffered  # larger sectors than ours, or what was left of a partial write
            elif code != errno.EINTR:
                raise OSError(code, os.strerror(code))


def _opened(path: str, size: int) -> int:
    """A descriptor of the file, with room for `size` bytes. A new one's name is on disk too."""
    flags = os.O_RDWR | os.O_CLOEXEC
    fresh = not Path(path).exists()
    descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL if fresh else flags, 0o600)
    before = os.fstat(descriptor)
    try:
        if before.st_size < size or before.st_blocks * 512 < size:
            os.posix_fallocate(descriptor, 0, size)
        if fresh:
            _sync_folder(path)
    except OSError:
        os.ftruncate(descriptor, before.st_size)
        os.close(descriptor)
        if fresh:
            Path(path).unlink()
        raise
    return descriptor


def _sync_folder(path: str) -> None:
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class FileTransfer(BackgroundTransfer):
    """Batches that the engine's threads take one by one."""

    def __init__(self, file: OpenFile, steps: Sequence[Callable[[], None]], threads: int, deadline: float) -> None:
        """`threads`: how many will call `step`, each until it says that it is not needed any more."""
        super().__init__(deadline)
        self._file, self._steps = file, steps
        self._threads = threads
        self._next, self._left, self._running = 0, len(steps), 0
        if threads:
            file.hold()
        else:
            self._settle()

    def step(self) -> bool:
        """Carry out one batch; False when the calling thread is not needed any more."""
        step = self._taken()
        if step is not None:
            error: TransferError | None = None
            try:
                step()
            except TransferError as failed:
                error = failed
            except OSError as failed:
                error = failure(failed, self._file.path)
            self._finished(error)
        with self._changed:
            needed = not self._settled and self._next < len(self._steps)
            self._threads -= not needed
            last = not self._threads
        if last:
            self._file.release()
        return needed

    def _taken(self) -> Callable[[], None] | None:
        with self._changed:
            if time.monotonic() > self._deadline:
                self._settle(TransferTimeout(f"{self._file.path}: not done by the deadline"))
            if self._settled or self._next == len(self._steps):
                return None
            self._next += 1
            self._running += 1
            return self._steps[self._next - 1]

    def _finished(self, error: TransferError | None) -> None:
        with self._changed:
            self._running -= 1
            self._left -= 1
            if error is not None or not self._left:
                self._settle(error)
            self._changed.notify_all()

    def stop(self) -> None:
        self._settle(TransferError(f"{self._file.path}: cancelled"))

    def _quiet(self) -> bool:
        return not self._running


class FileEngine:
    """See `workers.transfer.engine.TransferEngine`. May be called from any thread."""

    def __init__(self, threads: int = 4, batch_bytes: int = 2 * 2**20, direct: bool = True) -> None:
        """`batch_bytes`: what a system call moves, about; a multiple of 4096. `direct`: use O_DIRECT if possible."""
        if batch_bytes <= 0 or batch_bytes % ALIGNMENT:
            raise Mismatch(f"batches of {batch_bytes} bytes: must be a multiple of {ALIGNMENT}")
        self._batch_bytes, self._direct = batch_bytes, direct
        self._lock = threading.Lock()
        self._files: dict[str, OpenFile] = {}
        self._work: SimpleQueue[FileTransfer | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._serve, name=f"files-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    # ---- files ----

    def open(self, path: Path | str, size: int) -> Target:
        """Open a file with room for `size` bytes, making it where it is missing. Waits for the disk.

        Raises Mismatch when it is open already, NoSpace, Denied, NotFound (no such folder), TransferError.
        """
        where = str(path)
        with self._lock:
            if where in self._files:
                raise Mismatch(f"{where} is open already")
            try:
                self._files[where] = OpenFile(where, size, self._direct)
            except OSError as error:
                raise failure(error, where) from error
        return Target(where, size)

    def forget(self, target: Target) -> None:
        """Close the file once the transfers under way have ended. Nothing else can be started on it."""
        with self._lock:
            file = self._files.pop(target.where, None)
        if file is not None:
            file.release()

    def backend(self, target: Target) -> str:
        """For traces: "files/direct" where aligned spans bypass the page cache, else "files/buffered"."""
        return "files/buffered" if self._file(target).direct is None else "files/direct"

    def _file(self, target: Target) -> OpenFile:
        with self._lock:
            file = self._files.get(target.where)
        if file is None:
            raise NotFound(f"{target.where} is not open")
        return file

    # ---- transfers ----

    def register(self, address: int, size: int, memory: Memory, device: int) -> Region:
        """Nothing is pinned: this names the memory. Raises Mismatch for VRAM."""
        return host_region(address, size, memory, device, "files")

    def write(self, region: Region, here: Spans, target: Target, there: Spans, deadline: float) -> FileTransfer:
        """Copy spans of the region into the file; durable after a `sync`. Spans of the file must not overlap.

        Raises Mismatch, NotFound (not open); the transfer raises NoSpace, Denied, TransferError.
        """
        return self._start(_pwritev, region, here, target, there, deadline)

    def read(self, region: Region, here: Spans, target: Target, there: Spans, deadline: float) -> FileTransfer:
        """Copy spans of the file into the region, whose spans must not overlap. Raises as `write` does.

        The transfer raises TransferError when the file is shorter than it was.
        """
        return self._start(_preadv, region, here, target, there, deadline)

    def sync(self, target: Target, deadline: float) -> FileTransfer:
        """fdatasync: what writes that are done by now have written survives a power cut."""
        file = self._file(target)
        return self._post(file, [partial(os.fdatasync, file.buffered)], deadline)

    def close(self) -> None:
        """Cancel the transfers under way, end the threads, close the files.

        Raises TransferError when a thread is still in a system call after 1 s; the files then stay open.
        """
        deadline = time.monotonic() + CLOSE_S
        cancelled = self._queued()
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        stuck = [thread.name for thread in self._threads if thread.is_alive()]
        if stuck:
            raise TransferError(f"{', '.join(stuck)} still in a system call after {CLOSE_S:g} s")
        for transfer in cancelled + self._queued():
            transfer.stop()
            transfer.step()
        with self._lock:
            files, self._files = self._files, {}
        for file in files.values():
            file.release()

    def _queued(self) -> list[FileTransfer]:
        found = []
        with suppress(Empty):
            while True:
                transfer = self._work.get_nowait()
                found += [transfer] if transfer is not None else []
        return found

    def _start(
        self, call: Call, region: Region, here: Spans, target: Target, there: Spans, deadline: float
    ) -> FileTransfer:
        check_spans(region, here, target, there)
        file = self._file(target)
        if not len(here.offsets):
            return self._post(file, [], deadline)
        pieces = pieces_of(region.address, here, there, self._batch_bytes)
        direct = pieces.aligned(ALIGNMENT)
        return self._post(
            file, [partial(file.move, call, batch, direct) for batch in pieces.batches(self._batch_bytes)], deadline
        )

    def _post(self, file: OpenFile, steps: Sequence[Callable[[], None]], deadline: float) -> FileTransfer:
        threads = min(len(self._threads), len(steps))
        transfer = FileTransfer(file, steps, threads, deadline)
        for _ in range(threads):
            self._work.put(transfer)
        return transfer

    def _serve(self) -> None:
        """A thread's life. Transfers take turns, a batch each, so that a small one need not wait for a large one."""
        while (transfer := self._work.get()) is not None:
            if transfer.step():
                self._work.put(transfer)
