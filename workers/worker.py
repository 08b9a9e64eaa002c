"""One worker process, from its spec to its exit.

Load → probe → connect → subscribe → register (only now can anybody find it) → serve. On SIGTERM: deregister, drain
to a deadline, abort the rest, close in reverse order.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import uuid
from contextlib import AsyncExitStack, aclosing

import uvloop

from dynamo_lite.config import ProcessSpec
from dynamo_lite.errors import DynamoError, StartError
from dynamo_lite.plane import discovery_set
from dynamo_lite.plane.bus import Bus
from dynamo_lite.plane.wire import Incarnation, RequestId, Role, Sampling
from dynamo_lite.status import Phase, Status
from dynamo_lite.tasks import background, scope
from dynamo_lite.telemetry import metrics_server, setup_logging, tracing
from workers.engine import Engine, Job
from workers.metrics import WorkerMetrics
from workers.service import Service, instance_record

log = logging.getLogger(__name__)

_PROBE_DEADLINE_S = 120.0  # a first forward pass may still compile something


def run(spec: ProcessSpec) -> None:
    """Serve until SIGTERM. Exits with 1, and one sentence as its status, when it cannot."""
    setup_logging(spec.config.telemetry.log_level, spec.name)
    status = Status()
    incarnation = Incarnation(uuid.uuid4().hex)
    try:
        status.phase("loading")
        engine = make_engine(spec, incarnation)
        engine.prepare()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(Worker(spec, incarnation, engine, status).run())
    except Exception as error:
        sentence = _sentence(error)
        if not isinstance(error, DynamoError):
            log.exception("%s", sentence)
        log.error("%s", sentence)
        status.phase("failed", sentence)
        sys.exit(1)


def make_engine(spec: ProcessSpec, incarnation: Incarnation) -> Engine:
    """The engine the configuration asks for; the other one's libraries are not imported."""
    role = Role(spec.role)
    if spec.config.engine == "sim":
        from workers.sim_engine import SimEngine  # noqa: PLC0415

        return SimEngine(spec, role, incarnation)
    from workers.vllm_engine import VllmEngine  # noqa: PLC0415

    return VllmEngine(spec, role, incarnation)


def _sentence(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) if isinstance(error, DynamoError) else f"a bug: {error!r}"


class Worker:
    """Ties one engine to the control plane."""

    def __init__(self, spec: ProcessSpec, incarnation: Incarnation, engine: Engine, status: Status) -> None:
        self._spec, self._incarnation, self._engine, self._status = spec, incarnation, engine, status
        self._role = Role(spec.role)
        self._stop = asyncio.Event()
        self._loading = True

    async def run(self) -> None:
        """Returns after SIGTERM; raises when loading failed or the engine died."""
        loop, main = asyncio.get_running_loop(), asyncio.current_task()
        assert main is not None, "runs as a task"

        def stop() -> None:
            self._stop.set()
            if self._loading:
                main.cancel()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        try:
            async with background(self._status.beat()):
                await self._live()
        except asyncio.CancelledError:
            if not self._stop.is_set():
                raise

    async def _live(self) -> None:
        config = self._spec.config
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._engine.close)
            info = await self._engine.start()
            await self._probe()
            metrics = WorkerMetrics(self._role)
            stack.enter_context(tracing(config.telemetry.traces, self._spec.name))
            url = await stack.enter_async_context(metrics_server()) if config.telemetry.metrics else ""
            bus = await stack.enter_async_context(Bus.connect(self._spec.nats, self._spec.name))
            discovery = await stack.enter_async_context(discovery_set.connect(self._spec.etcd, config.namespace))
            async with scope() as group:
                service = Service(
                    self._spec,
                    instance_record(self._spec, self._incarnation, info, url),
                    self._engine,
                    bus,
                    metrics,
                    group,
                )
                await service.run(discovery, self._stop, self._phase)

    def _phase(self, phase: Phase) -> None:
        self._loading = False
        log.info("%s", phase)
        self._status.phase(phase)

    async def _probe(self) -> None:
        """Generate one token, as clients will have it done. The prompt is too short to leave a block in the cache."""
        job = Job(RequestId(f"probe-{self._incarnation}"), [1, 2, 3], Sampling(max_tokens=1, temperature=0.0))
        try:
            async with asyncio.timeout(_PROBE_DEADLINE_S), aclosing(self._engine.generate(job)) as outputs:
                async for _ in outputs:
                    pass
        except TimeoutError:
            raise StartError(self._spec.name, f"no first token within {_PROBE_DEADLINE_S:.0f} s") from None
