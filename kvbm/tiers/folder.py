"""A tier's folder: claimed by one process at a time, watched for being taken away, tried out. All of it waits for the
volume."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvbm.errors import TierFailed, TierRefused
from kvbm.events import Tier

_LOCK = "lock"
_SPARE = "spare"
_SPARE_BYTES = 4096
_CAUSES = {
    errno.ENOSPC: "no_space",
    errno.EDQUOT: "no_space",
    errno.EFBIG: "no_space",
    errno.EACCES: "denied",
    errno.EPERM: "denied",
    errno.EROFS: "denied",
    errno.ENOENT: "not_found",
    errno.ENOTDIR: "not_found",
}


@contextmanager
def volume_errors(tier: Tier, where: Path) -> Iterator[None]:
    """OSErrors as TierFailed: "/mnt/kv: No space left on device (ENOSPC)"."""
    try:
        yield
    except OSError as error:
        code = error.errno or 0
        text = f"{error.filename or where}: {os.strerror(code)} ({errno.errorcode.get(code, code)})"
        raise TierFailed(tier, _CAUSES.get(code, "error"), text) from error


Identity = tuple[int, int, int]  # device, inode, bytes


def identity(path: Path) -> Identity:
    """Which file a path leads to, and of what length. Raises OSError."""
    return _identity(path.stat())


def _identity(found: os.stat_result) -> Identity:
    return found.st_dev, found.st_ino, found.st_size


class Claim:
    """This process's hold on a folder, until it is closed or the process ends.

    A process that was forked while it is held, and goes on without exec, keeps the folder claimed as long as it lives.
    """

    def __init__(self, folder: Path) -> None:
        """Makes the folder where it is missing. Raises TierRefused when it is claimed or no folder; OSError."""
        self._path = folder / _LOCK
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise TierRefused(f"kv_tiers.disk.path: {folder} is not a folder") from error
        while True:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                self._take(folder)
                if self.held():
                    return
            except (OSError, TierRefused):
                os.close(self._file)
                raise
            os.close(self._file)  # somebody deleted it in between: this is not the folder's lock any more

    def _take(self, folder: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.pread(self._file, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise TierRefused(
                f"{folder} is in use by process {pid}: two workers cannot share a folder: "
                "give each deployment its own kv_tiers.disk.path"
            ) from error
        os.pwrite(self._file, f"{os.getpid():<31}\n".encode(), 0)  # in place, for a full volume lets us do that

    def held(self) -> bool:
        """Whether the lock is still the folder's: nobody deleted or replaced it."""
        try:
            return identity(self._path) == _identity(os.fstat(self._file))
        except OSError:
            return False

    def close(self) -> None:
        os.close(self._file)


def try_out(folder: Path) -> None:
    """Write, read back and remove something small. Raises OSError."""
    path = folder / _SPARE
    content = os.urandom(_SPARE_BYTES)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        if os.pwrite(file, content, 0) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)  # read it from the volume, not from memory
        if os.pread(file, len(content), 0) != content:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
    finally:
        os.close(file)
        with suppress(OSError):
            path.unlink()


def free_bytes(folder: Path) -> int:
    """What this user may still write there. Raises OSError."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
