"""One side of transfers through the movers, gather and scatter included: real KV memory, staging and engine."""

from __future__ import annotations

import threading
import time
import uuid
from typing import TypeVar

import numpy as np
import torch

from dynamo_lite.plane.wire import Incarnation, PushTarget
from workers.bench.protocol import Answer, Arrival, Compare, Done, Moment, Opened, OpenMover, Push, Receive, Received
from workers.connector.mover import Mover
from workers.connector.protocol import PushEnded, PushStep, ReceiveEnded, ReceiveOpened, ReceivePlan, Report, StepPlan
from workers.connector.settings import MoverSettings
from workers.errors import TransferError
from workers.transfer.fabric import Fabric
from workers.transfer.layout import planes_of
from workers.transfer.span import Span

TIMEOUT_S = 10.0
_ENGINE_ID = "bench"
R = TypeVar("R", bound=Report)


class Reports:
    """What a mover tells its worker process, and when."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, Report]] = []
        self._changed = threading.Condition()

    def __call__(self, report: Report) -> None:
        at = time.monotonic()
        with self._changed:
            self._seen.append((at, report))
            self._changed.notify_all()

    def take(self, kind: type[R]) -> tuple[float, R]:
        """The next report of that kind; those of other kinds before it are dropped."""

        def there() -> bool:
            return any(isinstance(report, kind) for _, report in self._seen)

        with self._changed:
            if not self._changed.wait_for(there, TIMEOUT_S):
                raise TransferError(f"no {kind.__name__} from the mover within {TIMEOUT_S:g} s")
            while True:
                at, report = self._seen.pop(0)
                if isinstance(report, kind):
                    return at, report


class MoverSide:
    """A worker's rank 0, as sender or receiver."""

    def __init__(self, command: OpenMover) -> None:
        wires, self._kv = command.wires, command.kv
        self._device = torch.device(wires.device)
        self._caches = {f"layer{index}": self._filled(index) for index in range(self._kv.layers)}
        settings = MoverSettings(
            rank=0, staging=command.staging, piece=command.piece, window=command.window, timeout_s=TIMEOUT_S
        )
        self._reports = Reports()
        engine = Fabric(f"{uuid.uuid4().hex}:0", transport=wires.transport, rdma=wires.rdma)
        planes = planes_of(self._caches, self._kv.blocks)
        self._layout = planes.layout
        self._mover = Mover(engine, planes, settings, self._reports)

    def _filled(self, layer: int) -> torch.Tensor:
        """A layer whose 8-byte words are numbered, so that both sides know what is where."""
        kv = self._kv
        words = torch.arange(kv.blocks * kv.row_bytes // 8, dtype=torch.int64, device=self._device) + (layer << 40)
        shape = (kv.blocks, 2, kv.tokens, kv.heads, kv.values)
        return words.view(torch.bfloat16).view(shape)

    def obey(self, command: Receive | Push | Received | Compare) -> Answer:
        match command:
            case Receive():
                return self._receive(command)
            case Push():
                return self._push(command)
            case Received():
                return self._received()
            case Compare():
                return self._compare(command)

    def _receive(self, command: Receive) -> Opened:
        tokens = len(command.block_ids) * self._kv.tokens
        plan = ReceivePlan(_ENGINE_ID, _ENGINE_ID, command.block_ids, 0, tokens, command.transfer_id)
        self._mover.plan(StepPlan(receives=[plan]))
        _, opened = self._reports.take(ReceiveOpened)
        return Opened(
            PushTarget(opened.transfer_id, Incarnation("d"), self._layout, 0, opened.tokens, (opened.target,))
        )

    def _received(self) -> Arrival:
        at, ended = self._reports.take(ReceiveEnded)
        _checked(ended.cause)
        self._collect()
        return Arrival(at, ended.path, ended.pieces)

    def _push(self, command: Push) -> Moment:
        block_ids, tokens = np.array(command.block_ids, dtype=np.int64), len(command.block_ids) * self._kv.tokens
        span = Span(block_ids, self._kv.tokens, 0, tokens)
        step = PushStep(_ENGINE_ID, _ENGINE_ID, command.target, span, 0)
        began = time.monotonic()
        self._mover.plan(StepPlan(pushes=[step]))
        _, ended = self._reports.take(PushEnded)
        _checked(ended.cause)
        self._collect()
        return Moment(began)

    def _collect(self) -> None:
        """As vLLM does at the end of a step."""
        self._mover.wait(TIMEOUT_S)
        self._mover.ended({_ENGINE_ID})

    def _compare(self, command: Compare) -> Done:
        words = self._kv.row_bytes // 8
        inside = torch.arange(words, dtype=torch.int64, device=self._device)
        for layer, cache in enumerate(self._caches.values()):
            rows = cache.view(torch.int64).view(self._kv.blocks, words)
            for mine, theirs in zip(command.block_ids, command.senders, strict=True):
                if not torch.equal(rows[mine], inside + theirs * words + (layer << 40)):
                    raise TransferError(f"block {mine} of layer {layer} is not what block {theirs} of the sender was")
        return Done()

    def close(self) -> None:
        self._mover.close()


def _checked(cause: str) -> None:
    if cause:
        raise TransferError(f"the transfer failed: {cause}")
