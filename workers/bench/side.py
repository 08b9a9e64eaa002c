"""One of the benchmark's two processes: does what its parent asks, one thing at a time, and ends with it.

python -m workers.bench.side FD CORE     (CORE: the one it stays on, or -1)
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from contextlib import ExitStack
from multiprocessing.connection import Connection

import msgspec
import torch

from dynamo_lite.processes import die_with_parent
from workers.bench.engine_side import EngineSide
from workers.bench.mover_side import MoverSide
from workers.bench.protocol import (
    Answer,
    Collect,
    Command,
    Compare,
    Connect,
    Copy,
    Done,
    Failed,
    Listen,
    OpenEngine,
    OpenMover,
    Push,
    Receive,
    Received,
    Stream,
    Work,
    Worked,
    Write,
)
from workers.bench.raw_side import RawSide


class Side:
    """Everything this process has for the measurements."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._movers: dict[str, MoverSide] = {}
        self._engine: EngineSide | None = None
        self._raw = RawSide()
        stack.callback(self._raw.close)

    def obey(self, command: Command) -> Answer:
        match command:
            case OpenMover():
                mover = self._movers[command.case] = MoverSide(command)
                self._stack.callback(mover.close)
                return Done()
            case Receive() | Push() | Received() | Compare():
                return self._movers[command.case].obey(command)
            case OpenEngine():
                self._engine = EngineSide(command)
                self._stack.callback(self._engine.close)
                return self._engine.agent()
            case Write():
                return self._opened.write(command)
            case Collect():
                return self._opened.collect(command)
            case Copy() | Listen() | Connect() | Stream():
                return self._raw.obey(command)
            case Work():
                return Worked(time.process_time(), time.monotonic())

    @property
    def _opened(self) -> EngineSide:
        assert self._engine is not None
        return self._engine


def main() -> None:
    die_with_parent()
    parent, core = Connection(int(sys.argv[1])), int(sys.argv[2])
    if core >= 0:
        os.sched_setaffinity(0, {core})
        torch.set_num_threads(1)
    commands = msgspec.msgpack.Decoder(Command)
    encode = msgspec.msgpack.Encoder().encode
    with ExitStack() as stack:
        side = Side(stack)
        parent.send_bytes(encode(Done()))
        while True:
            try:
                command: Command = commands.decode(parent.recv_bytes())
            except EOFError:
                return
            try:
                answer = side.obey(command)
            except Exception as error:  # told to the parent, which ends the run with it
                traceback.print_exc()
                answer = Failed(f"{type(error).__name__}: {error}")
            parent.send_bytes(encode(answer))


if __name__ == "__main__":
    main()
