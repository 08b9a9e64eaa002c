"""The worker's half of the connector: one per tensor-parallel rank, beside the model. It feeds the mover."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

import torch

from workers.connector.channel import ConnectorEnd
from workers.connector.forward import Forward
from workers.connector.mover import Ended, Mover
from workers.connector.protocol import Hello, PushStep, StepPlan
from workers.connector.settings import MoverSettings
from workers.transfer.engine import PeerEngine
from workers.transfer.layout import ModelKv, planes_of

# How long an engine with nothing to compute sleeps in a step, unless a transfer ends; it would spin otherwise.
_IDLE_STEP_S = 0.002
_HURRIED_STEPS = 2  # vLLM plans up to two steps before it hears what one has brought


def _end_process(error: BaseException) -> None:
    """Without its mover an engine would hold requests for ever; dead, it is noticed and started again."""
    logging.getLogger(__name__).critical("the mover ended by a bug", exc_info=error)
    os._exit(1)


class WorkerSide:
    """Called by vLLM's model runner, on its one thread."""

    def __init__(self, settings: MoverSettings, start_engine: Callable[[], PeerEngine], channel: ConnectorEnd) -> None:
        self._settings, self._start_engine, self._channel = settings, start_engine, channel
        self._mover: Mover | None = None
        self._forward: Forward | None = None
        self._late: list[PushStep] = []  # pushes that leave with the end of the step
        self._plan, self._planned = StepPlan(), False
        self._invalid: set[int] = set()
        self._hurried = 0  # steps that do not wait

    def register(
        self, kv_caches: dict[str, torch.Tensor], num_blocks: int, model: ModelKv, layers: Sequence[str]
    ) -> None:
        """The engine's KV memory exists: start the transfer engine and say hello. Raises Mismatch, TransferError.

        `layers`: see `Forward`.
        """
        planes = planes_of(kv_caches, num_blocks, model)
        engine = self._start_engine()
        self._mover = Mover(engine, planes, self._settings, self._channel.report, _end_process)
        self._forward = Forward(self._mover, planes.layout, self._settings.rank, layers)
        self._channel.listen(self._mover.command, self._mover.close)
        self._channel.report(
            Hello(
                rank=self._settings.rank,
                pid=os.getpid(),
                kv_blocks=num_blocks,
                layout=planes.layout,
                device=planes.device.type,
                backend=engine.backend,
                agent=self._mover.agent,
            )
        )

    def bind(self, plan: StepPlan) -> None:
        """Before the forward pass: receives need not wait for it to be launched, as it leaves their blocks alone.

        Pushes that take several pieces leave while it computes.
        """
        self._plan, self._planned = plan, False
        if self._mover is not None and self._forward is not None:
            self._late = self._forward.begin(plan.pushes)
            self._mover.plan(
                StepPlan(
                    receives=plan.receives, cancelled_receives=plan.cancelled_receives, onboards=plan.onboards
                )
            )  # fmt: skip

    def before_forward(self, plan: StepPlan) -> None:
        """Blocks of preempted prompts are about to be overwritten by this step."""
        if self._mover is None:
            return
        if plan.preempted_pushes:
            self._mover.cancel_pushes(plan.preempted_pushes)
        if plan.preempted_offloads:
            self._mover.cancel_offloads(plan.preempted_offloads)

    def computed(self, layer: str) -> None:
        """Within the forward pass: that layer holds the KV of all the step's tokens."""
        if self._forward is not None:
            self._forward.computed(layer)

    def after_forward(self) -> None:
        """Hand the mover what leaves with the step. vLLM's V2 runner leaves this out of one without a forward pass."""
        if self._mover is not None and self._forward is not None and not self._planned:
            self._planned = True
            plan, late, self._late = self._plan, self._late, []
            self._forward.end()
            self._mover.plan(StepPlan(pushes=late, cancelled_pushes=plan.cancelled_pushes, offloads=plan.offloads))

    def ended(self, finished: set[str]) -> Ended:
        if self._mover is None:
            return Ended(set(), set(), set())
        self.after_forward()
        if self._plan.idle and not self._hurried:
            self._mover.wait(_IDLE_STEP_S)
        ended = self._mover.ended(finished)
        self._hurried = _HURRIED_STEPS if ended.received or ended.sent else max(0, self._hurried - 1)
        self._invalid |= ended.invalid_blocks
        return ended

    def take_invalid_blocks(self) -> set[int]:
        invalid, self._invalid = self._invalid, set()
        return invalid

    def close(self) -> None:
        if self._mover is not None:
            self._mover.close()
        self._channel.close()
