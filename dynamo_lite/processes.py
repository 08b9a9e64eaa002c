"""Starting and ending child processes that never outlive their parent."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_TIMERSLACK = 29

# Runs in the child and becomes the command. Not a `preexec_fn`: Python code between fork and exec crashes, now and
# then, in a process with gRPC's threads. Takes 10 ms. Python ignores SIGPIPE, the command must not inherit that.
_LAUNCH = """
import ctypes, os, sys, _signal
if ctypes.CDLL(None).prctl(1, 9) or os.getppid() != int(sys.argv[1]):
    os._exit(126)
_signal.signal(_signal.SIGPIPE, _signal.SIG_DFL)
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]}: {error.strerror}")
"""


def die_with_parent() -> None:
    """The kernel kills this process when the *thread* that forked it ends. For children we did not start ourselves."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def wake_precisely() -> None:
    """Let this thread's short sleeps end when asked to; the kernel adds 50 µs to them otherwise."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)


class Child:
    """A running child process in a session of its own, so that Ctrl-C reaches the supervisor alone."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name, self.log = name, log
        self._process = process
        self._pidfd = os.pidfd_open(process.pid)

    @classmethod
    def start(
        cls,
        name: str,
        argv: Sequence[str],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> Child:
        """Start `argv` with stdout and stderr appended to `log`. The caller must `stop()` the child.

        The kernel kills the child when the starting thread ends, hence only the main thread may start one.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(f"{name} must be started from the main thread: it dies with the starting thread")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                pass_fds=pass_fds,
                start_new_session=True,
            )
        return cls(name, process, log)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative when a signal ended it. What it left running is killed with it."""
        if self._process.returncode is None:
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return None
            # Not reaped yet, so the group id is still ours: nobody else can be hit.
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        return self._process.wait()

    async def wait(self) -> int:
        """The exit code, once the process has ended. Safe to call from several tasks."""
        while (code := self.exit_code) is None:
            loop = asyncio.get_running_loop()
            ended = asyncio.Event()
            watched = os.dup(self._pidfd)  # one per waiter: a loop watches a descriptor only once
            loop.add_reader(watched, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(watched)
                os.close(watched)
        return code

    def signal(self, number: int) -> None:
        """Send a signal to this process; one that has ended already is left alone."""
        if self.exit_code is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL this process and every descendant still in its group."""
        if self.exit_code is None:
            os.killpg(self.pid, signal.SIGKILL)

    async def stop(self, grace_s: float) -> int:
        """SIGTERM, then SIGKILL after `grace_s`; returns the exit code and frees what the child held here."""
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await self.wait()
        except TimeoutError:
            self.kill()
        code = await self.wait()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        return code


@asynccontextmanager
async def running(child: Child, grace_s: float) -> AsyncIterator[Child]:
    """Stop `child` at the end of the body, also when the body is cancelled."""
    try:
        yield child
    finally:
        # Shielded from a second cancellation by SIGKILL: stop() is bounded by grace_s and the kernel.
        await child.stop(grace_s)


def describe_exit(code: int) -> str:
    """`exited with 3` or `killed by SIGKILL`."""
    return f"exited with {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def tail(log: Path, lines: int = 1) -> str:
    """The last non-empty lines of a log, for error messages."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])
