"""Small volumes of real file systems, for tests of what goes wrong with them. They need root."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN
_LIKE_A_POWER_CUT = 2  # without writing the journal out


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


@contextmanager
def tmpfs(at: Path, options: str) -> Iterator[None]:
    at.mkdir(exist_ok=True)
    _mount("-t", "tmpfs", "-o", options, "tmpfs", at)
    try:
        yield
    finally:
        run("umount", "-l", at)


class Ext4:
    """A loop device over a file, mounted."""

    def __init__(self, at: Path, backing: Path, size: int) -> None:
        self.at, self._backing = at, backing
        at.mkdir()
        with backing.open("wb") as file:
            file.truncate(size)
        run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", backing)
        self.mount()

    def mount(self) -> None:
        _mount("-o", "loop,errors=remount-ro", self._backing, self.at)

    def unmount(self, lazily: bool = False) -> None:
        run("umount", *(["-l"] if lazily else []), self.at)

    def shut_down(self) -> None:
        """As if the power were cut: everything fails with EIO, and what was not synced is lost."""
        folder = os.open(self.at, os.O_RDONLY)
        try:
            fcntl.ioctl(folder, _SHUTDOWN, struct.pack("I", _LIKE_A_POWER_CUT))
        finally:
            os.close(folder)

    def find_an_error(self) -> None:
        """What the kernel does when it finds the file system damaged: it becomes read-only."""
        device = Path(run("findmnt", "-no", "SOURCE", self.at)).name
        Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("a test", encoding="utf-8")


@contextmanager
def ext4(folder: Path, size: int = 32 * 2**20) -> Iterator[Ext4]:
    volume = Ext4(folder / "mnt", folder / "volume", size)
    try:
        yield volume
    finally:
        while os.path.ismount(volume.at):
            volume.unmount(lazily=True)


def _mount(*arguments: str | Path) -> None:
    try:
        run("mount", *arguments)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"mounting is not permitted here: {getattr(error, 'stderr', error)}")
