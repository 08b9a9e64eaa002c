"""A mover in a process of its own, over real NIXL, that a test may kill, freeze or cut off. The test is its worker.

Movers are forked off a server that has imported torch, NIXL and compiled code, which takes seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynamo_lite.config import Config
from dynamo_lite.plane.layout import KvLayout
from dynamo_lite.plane.wire import Incarnation, PushTarget
from dynamo_lite.transfer_plan import TransferPlan
from dynamo_lite.transports import Transport
from tests.integration.workers.cable import enter
from tests.unit.workers.connector.reports import Reports
from workers.connector.protocol import (
    Alive,
    Command,
    Meet,
    Peers,
    Probe,
    PushEnded,
    PushStep,
    ReceiveOpened,
    ReceivePlan,
    StepPlan,
)
from workers.transfer.span import Span

BLOCKS = 96
LAYOUT = KvLayout(1, 8192, 2, 1, 8, 8, "float32", "KNHD", "KNHD")  # blocks of 1 MiB
TIMEOUT_S = 1.0  # kv_transfer.timeout_ms
SLACK_S = 1.0  # of a machine that is busy with other tests
WAIT_S = 15.0
START_S = 60.0
_COMPILED = "workers.transfer.native_rows"  # as it is imported
_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload(["__main__", "workers.connector.mover", "workers.transfer.fabric", _COMPILED])


@dataclass(frozen=True)
class Start:
    """How to build the mover. Every word of its block b is `fill` + b."""

    name: str
    transport: Transport
    fill: int
    verify: bool
    namespace: str  # of the network; empty: the test's own
    env: Mapping[str, str]


class MoverProcess:
    """The test's end."""

    def __init__(self, start: Start) -> None:
        self.name, self.fill, self.reports = start.name, start.fill, Reports()
        self._connection, theirs = _FORKING.Pipe()
        with theirs:
            self._process = _FORKING.Process(target=_main, args=(theirs, start), daemon=True)
            self._process.start()
        self._answers: queue.Queue[Any] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @cached_property
    def agent(self) -> bytes:
        """Its metadata, once it has started."""
        metadata: bytes | None = self._answers.get(timeout=START_S)
        assert metadata is not None, f"{self.name} has ended"
        return metadata

    @property
    def incarnation(self) -> str:
        return self.name.partition(":")[0]

    def _read(self) -> None:
        try:
            while True:
                what, value = self._connection.recv()
                self.reports(value) if what == "report" else self._answers.put(value)
        except (EOFError, OSError):
            self._answers.put(None)  # it has ended, or the test has

    def _ask(self, what: str, value: object) -> Any:
        assert self.agent  # the first of its answers
        self._connection.send((what, value))
        return self._answers.get(timeout=WAIT_S)

    # ---- as vLLM and the worker process ----

    def receive(self, ids: list[int], request_id: str, transfer_id: int) -> PushTarget:
        """Open a receive; returns what a sender is to be told."""
        assert self.agent  # it has started
        plan = ReceivePlan(f"{request_id}-engine", request_id, ids, 0, len(ids) * LAYOUT.block_size, transfer_id)
        self._connection.send(("plan", StepPlan(receives=[plan])))
        return self.opened()

    def opened(self) -> PushTarget:
        opened = self.reports.take(ReceiveOpened)
        return PushTarget(opened.transfer_id, Incarnation(self.incarnation), LAYOUT, 0, opened.tokens, (opened.target,))

    def abort(self, request_id: str) -> None:
        """vLLM's word that a request it receives for was aborted."""
        self._connection.send(("plan", StepPlan(cancelled_receives=[f"{request_id}-engine"])))

    def push(self, target: PushTarget, ids: list[int], request_id: str, first: int = 0) -> None:
        span = Span(np.array(ids, dtype=np.int64), LAYOUT.block_size, 0, len(ids) * LAYOUT.block_size)
        step = PushStep(f"{request_id}-engine", request_id, target, span, first)
        self._connection.send(("plan", StepPlan(pushes=[step])))

    def meet(self, other: MoverProcess) -> None:
        self.command(Meet(other.incarnation, (other.agent,)))

    def command(self, command: Command) -> None:
        self._connection.send(("command", command))

    def values(self, ids: list[int]) -> list[set[int]]:
        """The different words that each block holds."""
        found: list[set[int]] = self._ask("values", ids)
        return found

    def expected(self, ids: list[int]) -> list[set[int]]:
        """What each block holds that was filled from these of its own."""
        return [{self.fill + index} for index in ids]

    def tells_vllm(self, *, received: set[str], invalid: set[int] | None = None) -> None:
        """Wait until vLLM has heard of the end of these prompts, and of blocks that it is to compute, and no others."""
        heard: tuple[set[str], set[int]] = (set(), set())

        def told() -> bool:
            _, more, wrong = self._ask("ended", set())
            heard[0].update(more)
            heard[1].update(wrong)
            return heard == (received, invalid or set())

        until(told, f"{self.name} tells vLLM of {received}; it told of {heard}")

    def lets_go(self, engine_id: str) -> None:
        """Wait until vLLM, which has finished that prompt, may free its blocks."""
        until(lambda: engine_id in self._ask("ended", {engine_id})[0], f"{self.name} lets go of {engine_id}")

    def push_ends_with(self, *causes: str) -> None:
        """Within the deadline of a transfer, and a second for slow machines."""
        with within(TIMEOUT_S):
            cause = self.reports.take(PushEnded).cause
        assert cause in causes, f"{cause!r}, not one of {causes}"

    # ---- holds ----

    def look(self) -> None:
        """Have it read its notifications, as the worker process's probes make an idle mover do.

        What it holds is reported at the end of a turn, so the reports are as of the first of these at least.
        """
        for _ in range(2):
            self.command(Probe())
            self.reports.take(Alive)

    def releases(self, *reasons: str, within: float = WAIT_S) -> None:
        """Wait until nothing is held for these reasons, for so many seconds at most."""

        def released() -> bool:
            self.look()
            return not any(map(self.reports.holding, reasons))

        until(released, f"{self.name} releases {', '.join(reasons)}", within)

    def check(self) -> None:
        self._ask("check", None)  # one that fails ends the mover

    def stages_nothing(self) -> bool:
        """As of this call, not of what it last reported."""
        self.look()
        return not self.reports.staged()

    # ---- what befalls it ----

    def signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        self.signal(signal.SIGSTOP)
        until(self._stopped, "all of its threads stand still")
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    def _stopped(self) -> bool:
        states = [file.read_text().rpartition(")")[2].split()[0] for file in self._threads()]
        return set(states) == {"T"}

    def _threads(self) -> Iterator[Path]:
        return Path(f"/proc/{self._process.pid}/task").glob("*/stat")

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def end(self) -> None:
        self.kill()
        self._reader.join()
        self._connection.close()


def until(condition: Callable[[], bool], what: str, within: float = WAIT_S) -> None:
    """Wait for something that another process does; asking it takes a while."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {within} s"


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """What is done inside takes no longer, give or take what slow machines add."""
    started = time.monotonic()
    yield
    taken = time.monotonic() - started
    assert taken < seconds + SLACK_S, f"{taken:.1f} s"


def rest(*processes: MoverProcess) -> None:
    """Wait until they hold nothing at all; each may have to hear from another first."""

    def resting() -> bool:
        for process in processes:
            process.look()
        return not any(process.reports.holding() or process.reports.staged() for process in processes)

    until(resting, "nothing is held")
    for process in processes:
        process.check()


def know(*processes: MoverProcess, **workers: int) -> None:
    """Wait until each of them knows so many other workers as "met", "meeting" and "silent"."""

    def known() -> bool:
        for process in processes:
            process.look()
        latest = [process.reports.latest(Peers) for process in processes]
        return all(
            one is not None and {state: count for state, count in one.workers.items() if count} == workers
            for one in latest
        )

    until(known, f"all know {workers}")


@contextmanager
def movers(transport: Transport, *, verify: bool = True) -> Iterator[Callable[..., MoverProcess]]:
    """Starts movers that reach each other by `transport`; ends them after the block."""
    started: list[MoverProcess] = []
    transfer = {"transport": transport, "timeout_ms": TIMEOUT_S * 1000}
    ours = TransferPlan(Config.model_validate({"kv_transfer": transfer}), ()).environment("cpu")

    def start(fill: int, *, within: str = "", **env: str) -> MoverProcess:
        ucx = {**ours, "UCX_NET_DEVICES": "lo", **env}
        started.append(MoverProcess(Start(f"{uuid.uuid4().hex}:0", transport, fill, verify, within, ucx)))
        return started[-1]

    try:
        yield start
    finally:
        for process in started:
            process.end()


def _words(block: torch.Tensor) -> set[int]:
    """The different words in it. Sorting them takes long, and mostly there is one."""
    least, most = block.aminmax()
    return {int(least)} if least == most else set(block.unique().tolist())


def _main(connection: Connection, start: Start) -> None:
    from dynamo_lite.processes import die_with_parent
    from workers.connector.mover import Mover
    from workers.connector.settings import MoverSettings
    from workers.transfer.fabric import Fabric
    from workers.transfer.layout import planes_of

    die_with_parent()
    os.environ.update(start.env)  # before UCX is loaded
    if start.namespace:
        enter(start.namespace)
    words = torch.arange(BLOCKS, dtype=torch.int32)[:, None].expand(BLOCKS, LAYOUT.block_bytes // 4) + start.fill
    cache = words.contiguous().view(torch.float32).view(BLOCKS, 2, LAYOUT.block_size, 2, 8)
    sending = threading.Lock()

    def send(what: str, value: object) -> None:
        with sending:
            connection.send((what, value))

    def check() -> None:
        mover._receiver.check()
        send("answer", "every slot is where it belongs")

    planes = planes_of({"layer": cache}, BLOCKS)
    assert planes.layout == LAYOUT
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
            case "ended":
                ended = mover.ended(value)
                send("answer", (ended.sent, ended.received, ended.invalid_blocks))
            case "check":
                mover._do(check)  # on its thread
            case "values":
                send("answer", [_words(cache[block].view(torch.int32)) for block in value])
