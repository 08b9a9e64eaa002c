"""The two processes that bytes move between, seen from their parent. Each has UCX settings of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, TypeVar

import msgspec

from dynamo_lite.processes import describe_exit
from workers.bench.protocol import (
    Agent,
    Answer,
    Arrival,
    Collect,
    Command,
    Compare,
    Connect,
    Copy,
    Done,
    Failed,
    Listen,
    Moment,
    Opened,
    OpenEngine,
    OpenMover,
    Port,
    Push,
    Receive,
    Received,
    Stream,
    Took,
    Wires,
    Work,
    Worked,
    Write,
    Wrote,
)

_ROOT = Path(__file__).resolve().parents[2]
_END_S = 5.0
_encode = msgspec.msgpack.Encoder().encode
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
A = TypeVar("A", bound=Answer)


class BenchError(Exception):
    """The measurement cannot go on."""


class Process:
    """One child. It does one thing at a time; an answer that does not come in time ends the run."""

    def __init__(self, name: str, core: int, env: Mapping[str, str], deadline_s: float) -> None:
        self._name, self._deadline_s = name, deadline_s
        ours, theirs = socket.socketpair()
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `end`
        with theirs:
            os.set_inheritable(theirs.fileno(), True)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "workers.bench.side", str(theirs.fileno()), str(core)],
                env={**env, "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), env.get("PYTHONPATH"))))},
                stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, pass_fds=(theirs.fileno(),),
            )  # fmt: skip
        self._connection = Connection(ours.detach())

    def ask(self, command: Command, kind: type[A]) -> A:
        self.tell(command)
        return self.answer(kind)

    def tell(self, command: Command) -> None:
        try:
            self._connection.send_bytes(_encode(command))
        except OSError as error:
            raise BenchError(self._end_text()) from error

    def answer(self, kind: type[A]) -> A:
        try:
            if not self._connection.poll(self._deadline_s):
                raise BenchError(f"the {self._name} did not answer within {self._deadline_s:g} s{self._said()}")
            answer = _answers.decode(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise BenchError(self._end_text()) from error
        if isinstance(answer, Failed):
            raise BenchError(f"the {self._name} failed: {answer.why}")
        assert isinstance(answer, kind), f"{answer} for {kind.__name__}"
        return answer

    def _end_text(self) -> str:
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return f"the {self._name} closed its connection{self._said()}"
        return f"the {self._name} {describe_exit(code)}{self._said()}"

    def _said(self) -> str:
        """The end of what it wrote, after a colon."""
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return ":\n" + "\n".join(lines[-10:]) if lines else ""

    def end(self) -> None:
        self._connection.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


@dataclass(frozen=True, slots=True)
class Moved:
    """One transfer through the movers, from the sender's plan to the receiver's ReceiveEnded."""

    seconds: float
    path: str
    pieces: int


class Pair:
    """A sender and a receiver that reach each other by one transport."""

    def __init__(self, sender: Process, receiver: Process, wires: Wires) -> None:
        self.sender, self.receiver, self.wires = sender, receiver, wires
        self._transfers = 0
        self._agent: Agent | None = None

    def both(self, command: Command, kind: type[A]) -> tuple[A, A]:
        """(sender's, receiver's), done at the same time."""
        self.sender.tell(command)
        self.receiver.tell(command)
        return self.sender.answer(kind), self.receiver.answer(kind)

    def open_mover(self, command: OpenMover) -> None:
        self.both(command, Done)

    def move(self, case: str, sent: list[int], received: list[int]) -> Moved:
        """Blocks `sent` of the sender into blocks `received` of the receiver."""
        self._transfers += 1
        opened = self.receiver.ask(Receive(case, self._transfers << 8, received), Opened)
        self.receiver.tell(Received(case))
        began = self.sender.ask(Push(case, opened.target, sent), Moment).at
        arrival = self.receiver.answer(Arrival)
        return Moved(arrival.at - began, arrival.path, arrival.pieces)

    def compare(self, case: str, sent: list[int], received: list[int]) -> None:
        self.receiver.ask(Compare(case, received, sent), Done)

    def open_engine(self, size: int) -> None:
        _, self._agent = self.both(OpenEngine(self.wires, size), Agent)

    def write(self, count: int, size: int, in_flight: int) -> tuple[float, Sequence[float]]:
        """Seconds until the receiver had the last one's notification; and each one's from post to done."""
        assert self._agent is not None
        self.receiver.tell(Collect(count))
        wrote = self.sender.ask(Write(self._agent, count, size, in_flight), Wrote)
        return self.receiver.answer(Moment).at - wrote.began, wrote.each_s

    def copy(self, size: int) -> float:
        """Seconds of a copy in one process."""
        return self.sender.ask(Copy(size, self.wires.device), Took).seconds

    def connect(self) -> None:
        """A plain TCP connection between the two."""
        port = self.receiver.ask(Listen(), Port)
        self.sender.ask(Connect(port.number), Done)

    def stream(self, size: int) -> float:
        """Seconds of that many bytes through the plain TCP connection."""
        began, end = self.both(Stream(size), Moment)
        return end.at - began.at

    def idle(self, seconds: float) -> float:
        """The processor time that both take together while nothing moves, as a share of one core."""
        before = self.both(Work(), Worked)
        time.sleep(seconds)
        after = self.both(Work(), Worked)
        spent = sum(now.cpu_s - then.cpu_s for now, then in zip(after, before, strict=True))
        return spent / (after[0].at - before[0].at)


@contextmanager
def started(
    wires: Wires, ucx: Mapping[str, str], deadline_s: float, gpus: tuple[str, str] | None = None
) -> Iterator[Pair]:
    """On a core each where there are two and the bytes are in host memory. The user's own UCX settings win.

    `gpus`: the only one that the sender, and the receiver, sees, as with workers.
    """
    cores = sorted(os.sched_getaffinity(0))
    pinned = len(cores) > 1 and wires.device == "cpu"
    env = {"NIXL_LOG_LEVEL": "WARN", **ucx, **os.environ}
    with ExitStack() as stack:
        processes = []
        for index, name in enumerate(("sender", "receiver")):
            own = env if gpus is None else env | {"CUDA_VISIBLE_DEVICES": gpus[index]}
            process = Process(name, cores[index] if pinned else -1, own, deadline_s)
            stack.callback(process.end)
            processes.append(process)
        for process in processes:
            process.answer(Done)  # torch is imported
        yield Pair(processes[0], processes[1], wires)
