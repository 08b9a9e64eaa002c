"""Two movers in one process, over real NIXL agents, each with KV memory of its own."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
import torch

from dynamo_lite.plane.wire import Incarnation, PushTarget
from workers.connector.mover import Mover
from workers.connector.protocol import (
    Alive,
    Holds,
    Note,
    Probe,
    PushStep,
    ReceiveOpened,
    ReceivePlan,
    Report,
    StepPlan,
)
from workers.connector.settings import MoverSettings
from workers.transfer.engine import Spans, Target
from workers.transfer.layout import Planes, planes_of

os.environ.setdefault("UCX_RNDV_THRESH", "inf")  # as the supervisor sets it, before UCX starts
from workers.transfer.fabric import Fabric

BLOCKS, LAYERS = 64, 3
WAIT_S = 10.0
R = TypeVar("R", bound=Report)


@dataclass
class Reports:
    """What a mover told its worker process."""

    seen: list[Report] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, report: Report) -> None:
        with self.changed:
            self.seen.append(report)
            self.changed.notify_all()

    def take(self, kind: type[R]) -> R:
        """The oldest report of that kind that was not taken yet; waits for it."""

        def there() -> bool:
            return any(isinstance(report, kind) for report in self.seen)

        with self.changed:
            assert self.changed.wait_for(there, WAIT_S), f"no {kind.__name__} came; seen: {self.seen}"
            report = next(report for report in self.seen if isinstance(report, kind))
            self.seen.remove(report)
            return report

    def latest(self, kind: type[R]) -> R | None:
        with self.changed:
            return next((report for report in reversed(self.seen) if isinstance(report, kind)), None)


@dataclass
class Side:
    """One worker's rank 0."""

    name: str  # of its agent: incarnation and rank
    mover: Mover
    planes: Planes
    reports: Reports

    def blocks(self, ids: list[int]) -> list[torch.Tensor]:
        return [plane[ids].clone() for plane in self.planes.planes]

    def holding(self, reason: str) -> int:
        latest = self.reports.latest(Holds)
        return latest.blocks.get(reason, 0) if latest is not None else 0

    def held(self, reason: str) -> int:
        """Waits until nothing is held for that reason; returns what is left."""
        with self.reports.changed:
            self.reports.changed.wait_for(lambda: not self.holding(reason), WAIT_S)
        return self.holding(reason)

    def look(self) -> None:
        """Have it read its notifications, as the worker process's probes make an idle mover do."""
        self.mover.command(Probe())
        self.reports.take(Alive)


def _side(seed: int, staging_blocks: int, timeout_s: float, verify: bool) -> Side:
    generator = torch.Generator().manual_seed(seed)
    caches = {f"layer{i}": torch.randn(BLOCKS, 2, 16, generator=generator) for i in range(LAYERS)}
    planes = planes_of(caches, BLOCKS)
    settings = MoverSettings(
        rank=0,
        staging=staging_blocks * planes.block_bytes,
        piece=2 * planes.block_bytes,
        window=2,
        timeout_s=timeout_s,
        verify=verify,
    )
    reports = Reports()
    name = f"{uuid.uuid4().hex}:0"
    return Side(name, Mover(Fabric(name), planes, settings, reports), planes, reports)


@contextmanager
def pair(staging_blocks: int = 8, timeout_s: float = 5.0, verify: bool = False) -> Iterator[tuple[Side, Side]]:
    """(sender, receiver), closed at the end."""
    sender, receiver = (_side(seed, staging_blocks, timeout_s, verify) for seed in (1, 2))
    try:
        yield sender, receiver
    finally:
        sender.mover.close()
        receiver.mover.close()


def plan_receive(
    receiver: Side, ids: list[int], request_id: str = "r", transfer_id: int = 256, *, first_token: bool = False
) -> None:
    plan = ReceivePlan(f"{request_id}-engine", request_id, ids, 0, transfer_id, first_token=first_token)
    receiver.mover.plan(StepPlan(receives=[plan]))


def target_of(opened: ReceiveOpened) -> PushTarget:
    return PushTarget(opened.transfer_id, Incarnation("d"), opened.first_block, opened.num_blocks, (opened.target,))


def push(sender: Side, target: PushTarget, ids: list[int], first: int = 0, request_id: str = "r") -> None:
    step = PushStep(f"{request_id}-engine", request_id, target, ids, first)
    sender.mover.plan(StepPlan(pushes=[step]))


def tell(target: PushTarget, note: Note) -> None:
    """Notify the receiver of a transfer from an agent of our own, as a sender that is not what it should be."""
    (rank,) = target.ranks
    agent = Fabric(f"{uuid.uuid4().hex}:0")
    peer = agent.connect(rank.agent)
    _, region = agent.allocate(8, torch.device("cpu"))
    spot = Target(peer, rank.slot_bytes, rank.address + target.ranks[0].slots[-1] * rank.slot_bytes)
    agent.write(
        region, Spans.one(0, 8), spot, Spans.one(0, 8), time.monotonic() + WAIT_S, msgspec.msgpack.encode(note)
    ).wait()  # fmt: skip
    agent.close()
