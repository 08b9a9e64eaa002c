"""Two network namespaces joined by one cable that a test may cut and mend. Needs root."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

DEVICE = "cable"  # the cable's end, in either namespace
_TIMEOUT_S = 10
_NEW_NETWORK, _NEW_MOUNTS = 0x40000000, 0x00020000  # CLONE_NEWNET, CLONE_NEWNS
_FOR_US_ALONE = 0x4000 | 0x80000  # MS_REC | MS_SLAVE


@dataclass
class Cable:
    """`ends`: the names of the namespaces."""

    ends: tuple[str, str]

    def cut(self) -> None:
        """The second end goes down: what the first one sends is dropped without a word."""
        _ip("-n", self.ends[1], "link", "set", DEVICE, "down")

    def mend(self) -> None:
        _ip("-n", self.ends[1], "link", "set", DEVICE, "up")

    def replace_second_end(self) -> None:
        """Another namespace with the same address, which knows nothing of the first one's connections."""
        one, old = self.ends
        new = f"{old}-again"
        _ip("netns", "add", new)
        self.ends = (one, new)
        _ip("-n", old, "link", "set", DEVICE, "netns", new)
        _ip("netns", "del", old)
        self._bring_up(1)
        self._wait()

    def join(self) -> None:
        _ip("-n", self.ends[0], "link", "add", DEVICE, "type", "veth", "peer", "name", DEVICE, "netns", self.ends[1])
        for end in range(2):
            self._bring_up(end)
        self._wait()

    def _bring_up(self, end: int) -> None:
        _ip("-n", self.ends[end], "address", "add", f"10.83.0.{end + 1}/24", "dev", DEVICE)
        for device in ("lo", DEVICE):
            _ip("-n", self.ends[end], "link", "set", device, "up")

    def _wait(self) -> None:
        """Until both ends run: UCX passes over a device that does not."""
        for end in self.ends:
            deadline = time.monotonic() + _TIMEOUT_S
            while " state UP " not in _ip("-n", end, "link", "show", "dev", DEVICE):
                assert time.monotonic() < deadline, f"{end} is not up"


def enter(namespace: str) -> None:
    """Move this process, which has one thread, into a network namespace; its `/sys` shows only that one's devices."""
    libc = ctypes.CDLL(None, use_errno=True)
    found = os.open(f"/run/netns/{namespace}", os.O_RDONLY | os.O_CLOEXEC)
    _done(libc.setns(found, _NEW_NETWORK))
    os.close(found)
    _done(libc.unshare(_NEW_MOUNTS))
    _done(libc.mount(b"none", b"/", None, _FOR_US_ALONE, None))
    _done(libc.mount(b"sysfs", b"/sys", b"sysfs", 0, None))


def _done(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _ip(*arguments: str) -> str:
    """Returns what it prints."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def _why_not() -> str:
    """Empty where namespaces can be made."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    name = f"dynamo-lite-{uuid.uuid4().hex[:8]}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=_TIMEOUT_S, check=False)
    return f"no network namespaces here: {made.stderr.strip()}" if made.returncode else ""


@contextmanager
def cable() -> Iterator[Cable]:
    """Gone after the block, with everything that was connected over it."""
    stem = f"dynamo-lite-{uuid.uuid4().hex[:8]}"
    made = Cable((f"{stem}-a", f"{stem}-b"))
    try:
        for end in made.ends:
            _ip("netns", "add", end)
        made.join()
        yield made
    finally:
        for end in made.ends:
            subprocess.run(["ip", "netns", "del", end], capture_output=True, timeout=_TIMEOUT_S, check=False)


WHY_NOT = _why_not()
NEEDS_NAMESPACES = pytest.mark.skipif(bool(WHY_NOT), reason=f"needs network namespaces: {WHY_NOT}")
