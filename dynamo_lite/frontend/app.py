"""One frontend process, from its spec to its exit.

Tokenizer → NATS, etcd → the workers that are there → listen. On SIGTERM: accept nothing, let streams finish up to a
deadline, end the rest with an error event, close in reverse order.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import NoReturn

import uvicorn
import uvloop
from fastapi import FastAPI

from dynamo_lite.config import ProcessSpec
from dynamo_lite.errors import DynamoError, NoInstance, PlaneError
from dynamo_lite.frontend.endpoint import Service
from dynamo_lite.frontend.generate import Backend
from dynamo_lite.frontend.metrics import ModelMetrics
from dynamo_lite.frontend.routes import Application, build_app
from dynamo_lite.frontend.self_test import self_test
from dynamo_lite.frontend.tokens import load_tokens
from dynamo_lite.listening import Port
from dynamo_lite.plane import discovery_set
from dynamo_lite.plane.bus import Bus
from dynamo_lite.plane.wire import Role, Subjects
from dynamo_lite.router.fleet import Fleet
from dynamo_lite.router.router import Router
from dynamo_lite.status import Status
from dynamo_lite.tasks import background, scope
from dynamo_lite.telemetry import setup_logging, tracing

DRAIN_DEADLINE_S = 30.0  # streams that take longer after SIGTERM end with an error event
LAST_EVENTS_S = 2.0  # for those events to leave
KEEP_ALIVE_S = 75  # longer than clients and proxies keep idle connections, so that it is they who close them
DECODES = (Role.DECODE, Role.BOTH)
FIRST = "frontend-0"  # of several it is the one that tests

log = logging.getLogger(__name__)


def run(spec: ProcessSpec) -> None:
    """Serve until SIGTERM. Exits with 1, and one sentence as its status, when it cannot."""
    setup_logging(spec.config.telemetry.log_level, spec.name)
    status = Status()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_main(spec, status))
    except Exception as error:
        cause: BaseException = error
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        known = isinstance(cause, DynamoError)
        sentence = str(cause) if known else f"a bug: {cause!r}"
        log.error("%s", sentence, exc_info=None if known else error)
        status.phase("failed", sentence)
        sys.exit(1)


async def _main(spec: ProcessSpec, status: Status) -> None:
    status.phase("starting")
    stop, started, main = asyncio.Event(), asyncio.Event(), asyncio.current_task()

    def end() -> None:
        stop.set()
        if main is not None and not started.is_set():
            main.cancel()  # nothing is served yet, so there is nothing to drain

    def ready() -> None:
        started.set()
        status.phase("ready")

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, end)
    try:
        with tracing(spec.config.telemetry.traces, spec.name), _listening(spec) as listening:
            async with background(status.beat()), serving(spec) as (app, backend), scope() as group:
                server = Server(app, ready)
                if spec.config.router.self_test and spec.config.router.mode == "kv" and spec.name == FIRST:
                    group.create_task(_prove(backend, started, stop.is_set, status))
                async with background(_drain(stop, server, backend, status)):
                    await server.serve([listening])
    except asyncio.CancelledError:
        if not stop.is_set():
            raise


@contextmanager
def _listening(spec: ProcessSpec) -> Iterator[socket.socket]:
    """The bound socket the supervisor handed over, or an own one; it listens once the server starts."""
    if spec.listen_fd is not None:
        with socket.socket(fileno=spec.listen_fd) as inherited:
            yield inherited
        return
    with Port.reserve(spec.config.frontend.host, spec.config.frontend.port) as port, port.socket() as own:
        yield own


@asynccontextmanager
async def serving(spec: ProcessSpec) -> AsyncIterator[tuple[Application, Backend]]:
    """The application, connected to everything it needs."""
    config = spec.config
    subjects = Subjects(config.namespace)
    tokens = load_tokens(spec.model_path, config.frontend.chat_template)
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(Bus.connect(spec.nats, spec.name))
        discovery = await stack.enter_async_context(discovery_set.connect(spec.etcd, config.namespace))
        group = await stack.enter_async_context(asyncio.TaskGroup())
        fleet = await stack.enter_async_context(Fleet.open(bus, discovery, subjects, group, config.router.index_memory))
        router = Router(fleet, config.router)
        backend = await stack.enter_async_context(Backend.open(bus, subjects, fleet, router, spec.name))

        def max_model_len() -> int:
            decoding = fleet.usable(DECODES)
            if not decoding:
                raise NoInstance("decode")
            return min(each.record.max_model_len for each in decoding)

        service = Service(
            model=config.model_name,
            tokens=tokens,
            backend=backend,
            series=ModelMetrics(config.model_name),
            max_body=config.frontend.max_body,
            timeout_s=config.frontend.request_timeout_s,
            max_model_len=max_model_len,
        )
        yield build_app(service, with_metrics=config.telemetry.metrics, connected=lambda: bus.connected), backend


async def _prove(backend: Backend, started: asyncio.Event, ending: Callable[[], bool], status: Status) -> None:
    """Once requests are served, and beside them: that prefixes are seen."""
    await started.wait()
    sentence = await self_test(backend)
    if not ending():
        status.phase("ready", sentence)


async def _drain(stop: asyncio.Event, server: uvicorn.Server, backend: Backend, status: Status) -> NoReturn:
    """From SIGTERM on: no new connection, and a deadline for the streams that go on."""
    await stop.wait()
    status.phase("draining")
    server.should_exit = True
    await asyncio.sleep(DRAIN_DEADLINE_S)
    while True:  # until the server has seen its last connection off
        backend.fail_all(PlaneError("the server is stopping"))
        await asyncio.sleep(LAST_EVENTS_S)


class Server(uvicorn.Server):
    """uvicorn's, in a loop that is ours, without its signal handlers; `ready` is called once it listens."""

    def __init__(self, app: Application | FastAPI, ready: Callable[[], None]) -> None:
        settings = uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            proxy_headers=False,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(DRAIN_DEADLINE_S + LAST_EVENTS_S),
        )
        super().__init__(settings)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Not taken over: uvicorn would end the process with the signal it caught."""
        yield
