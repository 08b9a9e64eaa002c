"""Child processes: started, ended, and never outliving their parent."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
from pathlib import Path

import pytest

from dynamo_lite.processes import Child, describe_exit, running, tail

DEADLINE_S = 10.0

# Starts a child that starts a child; tells their pids, then waits to be killed.
PARENT = """
import asyncio, sys
from pathlib import Path
from dynamo_lite.processes import Child

child = Child.start("child", [sys.executable, "-c", "import time; time.sleep(60)"], Path(sys.argv[1]))
print(child.pid, flush=True)
asyncio.run(child.wait())
"""


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


async def test_output_and_exit_code_are_kept(tmp_path: Path) -> None:
    code = "import sys; print('to stdout'); print('to stderr', file=sys.stderr); sys.exit(3)"
    log = tmp_path / "new" / "child.log"
    async with running(Child.start("child", python(code), log), DEADLINE_S) as child:
        codes = await asyncio.gather(child.wait(), child.wait())
        assert set(codes) == {3}
    assert sorted(tail(log, 2).splitlines()) == ["to stderr", "to stdout"]
    assert describe_exit(3) == "exited with 3"


async def test_stop_asks_first_and_kills_who_does_not_listen(tmp_path: Path) -> None:
    polite = Child.start("polite", python("import signal; signal.pause()"), tmp_path / "polite.log")
    assert await polite.stop(DEADLINE_S) == -signal.SIGTERM
    deaf_code = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); signal.pause()"
    )
    deaf = Child.start("deaf", python(deaf_code), tmp_path / "deaf.log")
    await until_logged(deaf, "deaf")
    assert await deaf.stop(0.05) == -signal.SIGKILL
    assert describe_exit(-signal.SIGKILL) == "killed by SIGKILL"
    assert await deaf.stop(0.05) == -signal.SIGKILL  # again, harmlessly


async def test_cancelling_the_body_stops_the_child(tmp_path: Path) -> None:
    child = Child.start("child", python("import signal; signal.pause()"), tmp_path / "child.log")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01), running(child, DEADLINE_S):
            await asyncio.Event().wait()
    assert child.exit_code == -signal.SIGTERM


async def test_what_a_child_left_running_ends_with_it(tmp_path: Path) -> None:
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True)"
    async with running(Child.start("child", python(code), tmp_path / "child.log"), DEADLINE_S) as child:
        await child.wait()
        await ended(int(tail(child.log)))


async def test_a_child_dies_when_its_parent_is_killed(tmp_path: Path) -> None:
    argv = python(PARENT, str(tmp_path / "grandchild.log"))
    async with running(Child.start("parent", argv, tmp_path / "parent.log"), DEADLINE_S) as parent:
        grandchild = int(await until_logged(parent, ""))
        os.kill(parent.pid, signal.SIGKILL)  # only the parent: its session and group are not the grandchild's
        await ended(grandchild)


async def test_a_child_gets_its_environment_and_descriptors_and_an_unspoilt_sigpipe(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    code = (
        "import os, signal, sys; os.write(int(sys.argv[1]), os.environ['GREETING'].encode());"
        "print(open('/proc/self/status').read())"
    )
    log = tmp_path / "child.log"
    started = Child.start("child", ["cat", "/proc/self/status"], log)
    async with running(started, DEADLINE_S) as plain:
        await plain.wait()
    (ignored,) = [line for line in log.read_text().splitlines() if line.startswith("SigIgn")]
    assert not int(ignored.split()[1], 16) & 1 << (signal.SIGPIPE - 1)
    environment = {**os.environ, "GREETING": "hello"}
    started = Child.start("child", python(code, str(writing)), log, env=environment, pass_fds=[writing])
    async with running(started, DEADLINE_S) as child:
        os.close(writing)
        assert await child.wait() == 0, tail(log, 20)
    assert os.read(reading, 100) == b"hello"
    os.close(reading)


async def test_a_command_that_is_not_there_says_so_in_its_log(tmp_path: Path) -> None:
    async with running(Child.start("child", ["no-such-command"], tmp_path / "child.log"), DEADLINE_S) as child:
        assert await child.wait() == 1
    assert tail(child.log) == "no-such-command: No such file or directory"


async def test_a_child_cannot_be_started_from_a_thread_it_would_die_with(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="main thread"):
        await asyncio.to_thread(Child.start, "child", ["true"], tmp_path / "child.log")


async def until_logged(child: Child, text: str) -> str:
    """The log, once it has a line with `text`."""
    async with asyncio.timeout(DEADLINE_S):
        while not (found := tail(child.log)) or text not in found:
            assert child.exit_code is None, tail(child.log, 20)
            await asyncio.sleep(0.005)
    return found


async def ended(pid: int) -> None:
    """Wait for a process that is not ours to end."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        readable, _, _ = await asyncio.to_thread(select.select, [pidfd], [], [], DEADLINE_S)
        assert readable, f"process {pid} still runs"
    finally:
        os.close(pidfd)
