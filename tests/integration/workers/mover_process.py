"""A mover in a process of its own, over real NIXL, that a test may kill, freeze or cut off. The test is its worker.

python -m tests.integration.workers.mover_process FD     (FD: the socket to the test; `Start` comes first)
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dynamo_lite.plane.wire import PushTarget
from dynamo_lite.transports import Transport
from tests.unit.workers.connector.reports import Reports
from workers.connector.protocol import Alive, Command, Holds, Probe, PushStep, ReceiveOpened, ReceivePlan, StepPlan

ROOT = Path(__file__).resolve().parents[3]
BLOCKS, BLOCK_WORDS = 96, 2**17  # of 1 MiB
TIMEOUT_S = 1.0  # kv_transfer.timeout_ms
WAIT_S = 15.0


@dataclass(frozen=True)
class Start:
    """How to build the mover. Every word of its KV is `fill`."""

    name: str
    transport: Transport
    fill: int
    verify: bool


class MoverProcess:
    """The test's end."""

    def __init__(self, start: Start, env: Mapping[str, str], prefix: tuple[str, ...]) -> None:
        self.name, self.fill, self.reports = start.name, start.fill, Reports()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "tests.integration.workers.mover_process", str(theirs.fileno())],
                env={**os.environ, **env}, cwd=ROOT, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),),
            )  # fmt: skip
        self._connection = Connection(ours.detach())
        self._connection.send(start)
        self._answers: queue.Queue[Any] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.agent: bytes = self._answers.get(timeout=WAIT_S * 2)

    @property
    def incarnation(self) -> str:
        return self.name.partition(":")[0]

    def _read(self) -> None:
        try:
            while True:
                what, value = self._connection.recv()
                self.reports(value) if what == "report" else self._answers.put(value)
        except (EOFError, OSError):
            return  # it has ended, or the test has

    def _ask(self, what: str, value: object) -> Any:
        self._connection.send((what, value))
        return self._answers.get(timeout=WAIT_S)

    # ---- as vLLM and the worker process ----

    def receive(self, ids: list[int], request_id: str, transfer_id: int) -> PushTarget:
        """Open a receive; returns what a sender is to be told."""
        plan = ReceivePlan(f"{request_id}-engine", request_id, ids, 0, transfer_id)
        self._connection.send(("plan", StepPlan(receives=[plan])))
        return self.opened()

    def opened(self) -> PushTarget:
        opened = self.reports.take(ReceiveOpened)
        return PushTarget(opened.transfer_id, self.incarnation, opened.first_block, opened.num_blocks, (opened.target,))

    def push(self, target: PushTarget, ids: list[int], request_id: str, first: int = 0) -> None:
        step = PushStep(f"{request_id}-engine", request_id, target, ids, first)
        self._connection.send(("plan", StepPlan(pushes=[step])))

    def command(self, command: Command) -> None:
        self._connection.send(("command", command))

    def values(self, ids: list[int]) -> list[set[int]]:
        """The different words that each block holds."""
        found: list[set[int]] = self._ask("values", ids)
        return found

    # ---- holds ----

    def look(self) -> None:
        """Have it read its notifications, as the worker process's probes make an idle mover do."""
        self.command(Probe())
        self.reports.take(Alive)

    def holding(self, reason: str) -> int:
        latest = self.reports.latest(Holds)
        return latest.blocks.get(reason, 0) if latest is not None else 0

    def releases(self, *reasons: str) -> None:
        """Wait until nothing is held for these reasons."""
        until(lambda: (self.look(), not any(map(self.holding, reasons)))[1], f"{self.name} releases {reasons}")

    # ---- what befalls it ----

    def signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        self.kill()
        self._reader.join()
        self._connection.close()


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that another process does; asking it takes a while."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {WAIT_S} s"


@contextmanager
def movers(transport: Transport, *, verify: bool = True) -> Iterator[Callable[..., MoverProcess]]:
    """Starts movers that reach each other by `transport`; ends them after the block."""
    started: list[MoverProcess] = []
    transports = "tcp" if transport == "tcp" else "sm,tcp"

    def start(fill: int, *, prefix: tuple[str, ...] = (), **env: str) -> MoverProcess:
        ucx = {"UCX_RNDV_THRESH": "inf", "UCX_TLS": f"{transports},self", "UCX_NET_DEVICES": "lo", **env}
        started.append(MoverProcess(Start(f"{uuid.uuid4().hex}:0", transport, fill, verify), ucx, prefix))
        return started[-1]

    try:
        yield start
    finally:
        for process in started:
            process.end()


def _main(connection: Connection) -> None:
    import torch

    from dynamo_lite.processes import die_with_parent
    from workers.connector.mover import Mover
    from workers.connector.settings import MoverSettings
    from workers.transfer.fabric import Fabric
    from workers.transfer.layout import planes_of

    die_with_parent()
    start: Start = connection.recv()
    cache = torch.full((BLOCKS, 2, BLOCK_WORDS // 32, 2, 8), start.fill, dtype=torch.int32).view(torch.float32)
    sending = threading.Lock()

    def send(what: str, value: object) -> None:
        with sending:
            connection.send((what, value))

    planes = planes_of({"layer": cache}, BLOCKS)
    settings = MoverSettings(
        rank=0, staging=8 * planes.block_bytes, piece=planes.block_bytes, window=4, timeout_s=TIMEOUT_S,
        verify=start.verify,
    )  # fmt: skip
    mover = Mover(
        Fabric(start.name, transport=start.transport), planes, settings, lambda report: send("report", report)
    )
    send("answer", mover.agent)
    while True:
        what, value = connection.recv()
        match what:
            case "plan":
                mover.plan(value)
            case "command":
                mover.command(value)
            case "values":
                words = cache.view(torch.int32)
                send("answer", [set(words[block].unique().tolist()) for block in value])


if __name__ == "__main__":
    _main(Connection(int(sys.argv[1])))
