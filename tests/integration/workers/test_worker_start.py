"""What a worker process tells its supervisor when it starts, and when it cannot."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from dynamo_lite.config import NatsAddress, ProcessSpec
from dynamo_lite.processes import Child, running
from dynamo_lite.status import STATUS_FD, StatusLine, parse_line
from tests.integration.workers.conftest import Fleet

MakeSpec = Callable[[str, dict[str, object]], ProcessSpec]


class Launched:
    """A worker process with a status pipe."""

    def __init__(self, spec: ProcessSpec, folder: Path) -> None:
        file = folder / "spec.json"
        file.write_text(spec.model_dump_json())
        self._status, writing = os.pipe()
        environment = os.environ | {STATUS_FD: str(writing)}
        command = [sys.executable, "-m", "dynamo_lite.process", str(file)]
        self.child = Child.start("worker", command, folder / "log", env=environment, pass_fds=(writing,))
        os.close(writing)
        self._pipe = os.fdopen(self._status, "rb")
        self._said: list[StatusLine] = []

    def until(self, phase: str) -> None:
        """Blocks until it has said so, or ended."""
        for line in map(parse_line, self._pipe):
            self._said.append(line)
            if line.phase == phase:
                return

    def phases(self) -> list[StatusLine]:
        """All it said, after its end."""
        with self._pipe:
            self._said += map(parse_line, self._pipe)
        return [line for line in self._said if line.phase]


async def test_a_worker_tells_its_phases_until_it_is_drained(fleet: Fleet, spec: MakeSpec, tmp_path: Path) -> None:
    launched = Launched(spec("decode-0", {}), tmp_path)
    async with running(launched.child, grace_s=10):
        await asyncio.to_thread(launched.until, "ready")
        assert await fleet.record("decode-0")
        launched.child.signal(signal.SIGTERM)
        assert await launched.child.wait() == 0
    assert [line.phase for line in launched.phases()] == ["loading", "ready", "draining"]


async def test_an_engine_that_cannot_start_is_one_sentence_and_exit_code_1(spec: MakeSpec, tmp_path: Path) -> None:
    broken = spec("decode-0", {}).model_copy(update={"model_path": tmp_path / "nowhere"})
    launched = Launched(broken, tmp_path)
    async with running(launched.child, grace_s=10):
        assert await launched.child.wait() == 1
    last = launched.phases()[-1]
    assert last.phase == "failed"
    assert "config.json is not a model configuration" in last.detail


async def test_a_worker_that_finds_no_nats_says_so(spec: MakeSpec, tmp_path: Path) -> None:
    lonely = spec("decode-0", {}).model_copy(update={"nats": NatsAddress(url="nats://127.0.0.1:1")})
    launched = Launched(lonely, tmp_path)
    async with running(launched.child, grace_s=10):
        assert await launched.child.wait() == 1
    assert "NATS at nats://127.0.0.1:1" in launched.phases()[-1].detail
