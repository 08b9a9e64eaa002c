"""Movers of two workers in one process, over real NIXL agents, each with KV memory of its own."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import msgspec
import numpy as np
import torch

from dynamo_lite.plane.layout import KvLayout, slot_bytes
from dynamo_lite.plane.wire import Incarnation, PushTarget
from tests.unit.workers.connector.reports import WAIT_S, Reports
from tests.unit.workers.transfer.kv import Rank
from workers.connector.forward import Forward
from workers.connector.mover import Mover
from workers.connector.protocol import (
    Alive,
    Meet,
    Note,
    Peers,
    Probe,
    PushStep,
    ReceiveOpened,
    ReceivePlan,
    StepPlan,
)
from workers.connector.settings import MoverSettings
from workers.transfer.engine import Spans, Target
from workers.transfer.layout import Planes, planes_of
from workers.transfer.span import Span

os.environ.setdefault("UCX_RNDV_THRESH", "inf")  # as the supervisor sets it, before UCX starts
from workers.transfer.fabric import Fabric

CPU = torch.device("cpu")
BLOCKS, LAYERS = 64, 3
LAYOUT = KvLayout(LAYERS, 2, 1, 1, 16, 0, "float32", "HND", "HND")  # of `pair`


@dataclass
class Side:
    """One worker's rank 0."""

    name: str  # of its agent: incarnation and rank
    mover: Mover
    planes: Planes
    reports: Reports
    late: list[PushStep] = field(default_factory=list)  # what the present step pushes at its end

    @cached_property
    def forward(self) -> Forward:
        """What tells the mover of layers that are computed."""
        layout = self.planes.layout
        names = [f"layer{layer}" for layer in range(layout.layers)]
        return Forward(self.mover, layout, int(self.name.rpartition(":")[2]), names)

    def begin(self, *steps: PushStep) -> None:
        """As vLLM does before a forward pass; `forward` is then told of layers, and `end` follows."""
        self.late = self.forward.begin(steps)

    def end(self) -> None:
        self.forward.end()
        self.mover.plan(StepPlan(pushes=self.late))

    def blocks(self, ids: list[int]) -> list[torch.Tensor]:
        return [plane[ids].clone() for plane in self.planes.planes]

    def held(self, reason: str) -> int:
        """Waits until nothing is held for that reason; returns what is left."""
        with self.reports.changed:
            self.reports.changed.wait_for(lambda: not self.reports.holding(reason), WAIT_S)
        return self.reports.holding(reason)

    def look(self) -> None:
        """Have it read its notifications, as the worker process's probes make an idle mover do."""
        self.mover.command(Probe())
        self.reports.take(Alive)


def side(
    seed: int, staging_blocks: int = 8, timeout_s: float = 5.0, verify: bool = False, arena: str = ""
) -> Side:  # fmt: skip
    """With a host tier at `arena`, if given."""
    generator = torch.Generator().manual_seed(seed)
    caches = {f"layer{i}": torch.randn(BLOCKS, 2, 16, generator=generator) for i in range(LAYERS)}
    planes = planes_of(caches, BLOCKS)
    assert planes.layout == LAYOUT
    settings = MoverSettings(
        rank=0,
        staging=staging_blocks * planes.block_bytes,
        piece=2 * planes.block_bytes,
        window=2,
        timeout_s=timeout_s,
        verify=verify,
        arena=arena,
    )
    reports = Reports()
    name = f"{uuid.uuid4().hex}:0"
    return Side(name, Mover(Fabric(name), planes, settings, reports), planes, reports)


@contextmanager
def pair(staging_blocks: int = 8, timeout_s: float = 5.0, verify: bool = False) -> Iterator[tuple[Side, Side]]:
    """(sender, receiver), closed at the end."""
    sender, receiver = (side(seed, staging_blocks, timeout_s, verify) for seed in (1, 2))
    try:
        yield sender, receiver
    finally:
        sender.mover.close()
        receiver.mover.close()


def plan_receive(
    receiver: Side, ids: list[int], request_id: str = "r", transfer_id: int = 256, *, first_token: bool = False
) -> None:
    tokens = len(ids) * receiver.planes.layout.block_size
    plan = ReceivePlan(f"{request_id}-engine", request_id, ids, 0, tokens, transfer_id, first_token=first_token)
    receiver.mover.plan(StepPlan(receives=[plan]))


def target_of(opened: ReceiveOpened) -> PushTarget:
    return PushTarget(opened.transfer_id, Incarnation("d"), LAYOUT, 0, opened.tokens, (opened.target,))


def whole(ids: list[int]) -> Span:
    """All tokens of these blocks."""
    return Span(np.array(ids, dtype=np.int64), LAYOUT.block_size, 0, len(ids) * LAYOUT.block_size)


def step_of(target: PushTarget, ids: list[int], first: int = 0, request_id: str = "r") -> PushStep:
    return PushStep(f"{request_id}-engine", request_id, target, whole(ids), first)


def push(sender: Side, target: PushTarget, ids: list[int], first: int = 0, request_id: str = "r") -> None:
    sender.mover.plan(StepPlan(pushes=[step_of(target, ids, first, request_id)]))


def tell(target: PushTarget, note: Note) -> None:
    """Notify rank 0 of a transfer's receiver from an agent of our own, as a sender that is not what it should be."""
    rank = target.ranks[0]
    agent = Fabric(f"{uuid.uuid4().hex}:0")
    peer = agent.connect(rank.agent)
    _, region = agent.allocate(8, CPU)
    spot = Target(peer, rank.slot_bytes, rank.address + rank.slots[-1] * rank.slot_bytes)
    agent.write(
        region, Spans.one(0, 8), spot, Spans.one(0, 8), time.monotonic() + WAIT_S, msgspec.msgpack.encode(note)
    ).wait()  # fmt: skip
    agent.close()


@dataclass
class Worker:
    """All ranks of one worker."""

    layout: KvLayout
    ranks: list[Rank]
    sides: list[Side]

    def open(self, ids: list[int], first_block: int, tokens: int, transfer_id: int = 256) -> PushTarget:
        """Have every rank ready to receive so many tokens into these blocks."""
        plan = ReceivePlan("r-engine", "r", ids, first_block, tokens, transfer_id)
        for side in self.sides:
            side.mover.plan(StepPlan(receives=[plan]))
        targets = tuple(side.reports.take(ReceiveOpened).target for side in self.sides)
        first_token = first_block * self.layout.block_size
        return PushTarget(transfer_id, Incarnation("d"), self.layout, first_token, tokens, targets)

    @property
    def incarnation(self) -> str:
        return self.sides[0].name.partition(":")[0]

    def meet(self, other: Worker) -> None:
        """Each rank of one knows every rank of the other."""
        for mine, theirs in ((self, other), (other, self)):
            for side in mine.sides:
                side.mover.command(Meet(theirs.incarnation, tuple(each.mover.agent for each in theirs.sides)))
        for side in (*self.sides, *other.sides):
            while not side.reports.take(Peers).workers.get("met"):
                pass

    def push(self, steps: list[PushStep]) -> None:
        for side in self.sides:
            side.mover.plan(StepPlan(pushes=list(steps)))

    def compute(self, steps: list[PushStep], layer: Callable[[int], None]) -> None:
        """One step after the other, of which all ranks compute one layer after the other by `layer`."""
        for step in steps:
            for side in self.sides:
                side.begin(step)
            for number in range(self.layout.layers):
                layer(number)
                for side in self.sides:
                    side.forward.computed(f"layer{number}")
            for side in self.sides:
                side.end()


@contextmanager
def worker(
    layout: KvLayout, blocks: int, seed: int = 0, slots: int = 4, timeout_s: float = 5.0, verify: bool = True,
    device: torch.device = CPU,
) -> Iterator[Worker]:  # fmt: skip
    """A worker of that layout whose blocks are random; its pieces have two blocks. All ranks share the device."""
    with device:
        ranks = [Rank(layout, rank, blocks, seed + rank) for rank in range(layout.tensor_parallel)]
    piece = 2 * layout.block_bytes
    incarnation, sides = uuid.uuid4().hex, []
    for number, rank in enumerate(ranks):
        size = slots * slot_bytes(layout, piece)
        settings = MoverSettings(number, size, piece, window=2, timeout_s=timeout_s, verify=verify)
        reports, name = Reports(), f"{incarnation}:{number}"
        sides.append(Side(name, Mover(Fabric(name), rank.planes, settings, reports), rank.planes, reports))
    try:
        yield Worker(layout, ranks, sides)
    finally:
        for side in sides:
            side.mover.close()
