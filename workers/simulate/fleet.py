"""Simulated workers behind the router of a deployment, under a trace's requests.

The scheduler, the pools and tiers, the index and the router are those that serve. What is left out is what carries
their messages: a KV event, a load report and a request are there as soon as they are sent.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from dynamo_lite.config import Config
from dynamo_lite.errors import ConfigError
from dynamo_lite.plane.wire import Incarnation, Role
from dynamo_lite.router.roster import Roster
from dynamo_lite.router.router import Router
from workers.reports import INTERVAL_S
from workers.sim_storage import Bucket
from workers.simulate.call import Call, RemotePrefill
from workers.simulate.clock import VirtualTimeLoop
from workers.simulate.figures import Answer, Figures, Gaps, Slo, WorkerFigures, figures
from workers.simulate.settings import gpus
from workers.simulate.trace import Hashes, Request
from workers.simulate.worker import PlannedSequence, SimWorker

_TELL_EVERY = 64  # answers
_STUCK_S = 600.0  # without a step of any worker, though there are requests: that is a mistake of the simulator's

Told = Callable[[int], None]  # how many requests have been answered or refused


@dataclass(frozen=True, slots=True)
class Load:
    """What comes to a fleet, and what is expected of it."""

    requests: Sequence[Request]
    block: int  # tokens that a hash id stands for
    slo: Slo
    speed: float = 1.0  # requests come so many times as fast
    seed: int = 0  # of whatever a policy does at random


class Fleet:
    """On one event loop, from the start to the end of `replay`."""

    def __init__(self, config: Config, kv_bytes: int, load: Load, told: Told, clock: Callable[[], float]) -> None:
        """`config`: in the trace's blocks. `kv_bytes`: of a token. `clock`: of the loop. Raises ConfigError."""
        self.gaps, self.answers, self.refused = Gaps(), list[Answer](), 0
        self._load, self._told, self._hashes = load, told, Hashes(load.block)
        self._min_remote_tokens = config.kv_transfer.min_remote_tokens
        roster, bucket = Roster(lambda _: None, clock), Bucket()
        self._router = Router(roster, config.router, load.seed)
        self.workers: dict[Incarnation, SimWorker] = {}
        for role in Role:
            group = getattr(config.workers, role.value)
            for number in range(group.count if group else 0):
                try:
                    worker = SimWorker(config, role, number, kv_bytes, roster, bucket)
                except ValueError as error:
                    raise ConfigError(str(error), key="kv_tiers.host.size") from error
                self.workers[worker.record.incarnation] = worker
        self._all_came, self._steps, self._changed_at = False, 0, 0.0
        self._done = asyncio.Event()
        self._failure: BaseException | None = None

    async def replay(self) -> None:
        """Every request of the load, at its time, to its end."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._failed)
        for worker in self.workers.values():
            worker.open()
        self._report()
        self._arrive(0)
        await self._done.wait()
        for worker in self.workers.values():
            worker.close()
        if self._failure is not None:
            raise self._failure

    def _failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A timer's callback raised."""
        self._failure = self._failure or context.get("exception") or RuntimeError(context["message"])
        self._done.set()

    def _report(self) -> None:
        steps = 0
        for worker in self.workers.values():
            worker.report()
            steps += worker.counts.steps
        now = asyncio.get_running_loop().time()
        if steps != self._steps or not self._all_came:
            self._steps, self._changed_at = steps, now
        if now - self._changed_at > _STUCK_S:
            raise RuntimeError(f"nothing happens any more, and {len(self.answers)} requests are answered")
        asyncio.get_running_loop().call_later(INTERVAL_S, self._report)

    def _arrive(self, number: int) -> None:
        """The requests from that one on whose time has come."""
        loop, requests, speed = asyncio.get_running_loop(), self._load.requests, self._load.speed
        first_at = requests[0].at_s
        while number < len(requests):
            at = (requests[number].at_s - first_at) / speed
            if at > loop.time():
                loop.call_at(at, self._arrive, number)
                return
            self._begin(requests[number])
            number += 1
        self._all_came = True

    def _begin(self, request: Request) -> None:
        prompt = self._hashes.prompt(request)
        placement = self._router.place(prompt)
        worker = self.workers[placement.decode.incarnation]
        if len(prompt) >= worker.record.max_model_len:
            self.refused += 1
            self._count()
            return
        call = Call(self, request, placement)
        sequence = PlannedSequence(prompt, request.answer_tokens, call, self._hashes.answer)
        if placement.prefill:
            peer, least = self.workers[placement.prefill[0].incarnation], self._min_remote_tokens
            sequence.fetch = lambda cached: len(prompt) - cached >= least
            sequence.ask = partial(RemotePrefill, call, prompt, worker, peer)  # not the sequence: a circle would stay
        call.begin(sequence, worker)

    def answered(self, answer: Answer) -> None:
        self.answers.append(answer)
        self._count()

    def _count(self) -> None:
        count = len(self.answers) + self.refused
        if count == len(self._load.requests):
            self._done.set()
        if count % _TELL_EVERY == 0 or self._done.is_set():
            self._told(count)


def simulate(config: Config, kv_bytes: int, load: Load, told: Told = lambda _: None) -> Figures:
    """One run, in virtual time. `config`: in the trace's blocks. `kv_bytes`: of a token.

    The same arguments give the same figures. Raises ConfigError.
    """

    with _uncollected(), asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        fleet = Fleet(config, kv_bytes, load, told, runner.get_loop().time)
        runner.run(fleet.replay())
    workers = [_figures(worker) for worker in fleet.workers.values()]
    return figures(
        fleet.answers, fleet.refused, fleet.gaps, workers, load.slo, block=load.block, gpus=gpus(config.workers)
    )


@contextmanager
def _uncollected() -> Iterator[None]:
    """Looking for circles of objects, of which requests leave none behind, would take a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _figures(worker: SimWorker) -> WorkerFigures:
    counts = worker.counts
    return WorkerFigures(
        worker.name, counts.placed, counts.placed_tokens, counts.computed_tokens, counts.generated_tokens,
        counts.busy_s, counts.preempted, worker.tiers,
    )  # fmt: skip
