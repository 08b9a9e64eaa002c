"""One side of transfers by the engine alone: writes between registered memories, no gather, no scatter."""

from __future__ import annotations

import time
import uuid
from collections import deque
from typing import cast

import torch

from workers.bench.protocol import Agent, Collect, Moment, OpenEngine, Write, Wrote
from workers.errors import TransferTimeout
from workers.transfer.engine import Memory, Spans, Target, Transfer
from workers.transfer.fabric import Fabric

TIMEOUT_S = 10.0


class EngineSide:
    """An engine, used by this thread alone."""

    def __init__(self, command: OpenEngine) -> None:
        wires = command.wires
        self._engine = Fabric(f"{uuid.uuid4().hex}:0", transport=wires.transport, rdma=wires.rdma)
        self._memory, self._region = self._engine.allocate(command.size, torch.device(wires.device))
        self._memory.fill_(1)

    def agent(self) -> Agent:
        region = self._region
        return Agent(self._engine.metadata(), region.address, region.size, region.device, region.memory)

    def write(self, command: Write) -> Wrote:
        """Piece after piece, over the whole memory again and again."""
        theirs = command.peer
        peer = self._engine.connect(theirs.metadata)
        target = Target(peer, theirs.size, theirs.address, theirs.device, cast(Memory, theirs.memory))
        fitting = self._region.size // command.size
        flights: deque[tuple[float, Transfer]] = deque()
        each_s: list[float] = []
        began = time.monotonic()
        for turn in range(command.count):
            spans = Spans.one(turn % fitting * command.size, command.size)
            posted = time.monotonic()
            deadline = posted + TIMEOUT_S
            flights.append((posted, self._engine.write(self._region, spans, target, spans, deadline, b"written")))
            if len(flights) == command.in_flight:
                each_s.append(_ended(*flights.popleft()))
        each_s += [_ended(*flight) for flight in flights]
        return Wrote(began, each_s, self._engine.path(peer))

    def collect(self, command: Collect) -> Moment:
        """Whoever polls makes UCX's progress: the receiver has to, as the mover does while transfers are open."""
        missing, deadline = command.count, time.monotonic() + TIMEOUT_S
        while missing:
            missing -= len(self._engine.notifications())
            if time.monotonic() > deadline:
                raise TransferTimeout(f"{missing} of {command.count} notifications did not come")
        return Moment(time.monotonic())

    def close(self) -> None:
        self._engine.close()


def _ended(posted: float, flight: Transfer) -> float:
    """Seconds from post to done; waits for it without sleeping."""
    while flight.poll() == "pending":
        pass
    took = time.monotonic() - posted
    flight.close()
    return took
