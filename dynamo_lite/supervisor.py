"""Starts a deployment, keeps it running, ends it: `dynamo-lite serve`.

Embedded servers → model → all processes at once → one line that says it is ready. A part that fails during the start
ends everything; afterwards it is restarted. SIGTERM drains: frontends first, then workers. Whatever happens to this
process, the kernel ends its children with it.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from dynamo_lite import embedded, model_store
from dynamo_lite.config import EtcdAddress, NatsAddress, ProcessSpec
from dynamo_lite.embedded import Address, EmbeddedServer
from dynamo_lite.environment import environment
from dynamo_lite.errors import DynamoError, StartError
from dynamo_lite.keeper import Backoff, Keeper
from dynamo_lite.listening import Port
from dynamo_lite.model_shape import ModelShape
from dynamo_lite.plan import Plan, PlannedProcess, resolve
from dynamo_lite.processes import Child
from dynamo_lite.progress import Progress
from dynamo_lite.state import StateFolder
from dynamo_lite.status import STATUS_FD, Phase
from dynamo_lite.tasks import background

REACH_DEADLINE_S = 5.0
ANSWER_DEADLINE_S = 30.0
FRONTEND_GRACE_S = 35.0  # a little over their own drain deadlines
WORKER_GRACE_S = 45.0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every process is told."""

    nats: NatsAddress
    etcd: EtcdAddress
    port: Port
    model: Path
    embedded: bool  # NATS and etcd are ours


class Supervisor:
    """One deployment's life."""

    def __init__(self, plan: Plan, progress: Progress, inherited: Mapping[str, str]) -> None:
        """`inherited` is the environment that the processes start from."""
        self._plan, self._progress, self._inherited = plan, progress, inherited
        self._ending = asyncio.Event()
        self._starting = True
        self._keepers: dict[str, Keeper] = {}
        self._servers: dict[str, EmbeddedServer[Any]] = {}
        self._running: tuple[StateFolder, Surroundings] | None = None  # once there are processes

    async def run(self) -> None:
        """Returns after SIGTERM or SIGINT. Raises StartError or ConfigError, when everything is down again."""
        if self._plan.problems:
            raise self._plan.problems[0]
        if self._plan.missing:
            raise StartError("this host", f"it lacks {', '.join(self._plan.missing)}")
        try:
            with self._signals(), StateFolder.claim(self._plan.state_dir) as state:
                await self._serve(state)
        except asyncio.CancelledError:
            if not self._ending.is_set():
                raise
        except BaseExceptionGroup as errors:
            raise _first(errors) from errors

    @contextmanager
    def _signals(self) -> Iterator[None]:
        loop, main = asyncio.get_running_loop(), asyncio.current_task()
        assert main is not None, "runs as a task"

        def end() -> None:
            if self._ending.is_set():
                for keeper in self._keepers.values():
                    keeper.kill()
                return
            self._ending.set()
            if self._starting:
                main.cancel()
            else:
                self._progress.note("ending; running requests may finish, a second Ctrl-C ends them now")

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    async def _serve(self, state: StateFolder) -> None:
        config = self._plan.config
        async with AsyncExitStack() as stack:
            port = stack.enter_context(Port.reserve(config.frontend.host, config.frontend.port))
            await stack.enter_async_context(background(self._progress.draw()))
            self._progress.expect("nats-server", "etcd", "model", *(process.name for process in self._plan.processes))
            nats, etcd = await self._nats(state, stack), await self._etcd(state, stack)
            ours = config.nats.url is None and not config.etcd_endpoints
            model = await self._model(state)
            await self._run_processes(state, Surroundings(nats, etcd, port, model, ours))

    async def _nats(self, state: StateFolder, stack: AsyncExitStack) -> NatsAddress:
        given = self._plan.config.nats
        if given.url is None:
            server = embedded.nats_server(state.path / "nats", state.log("nats-server"))
            return await self._embedded("nats-server", server, stack)
        await self._reachable("nats-server", given.url)
        return NatsAddress(url=given.url, user=given.user, password=given.password, token=given.token)

    async def _etcd(self, state: StateFolder, stack: AsyncExitStack) -> EtcdAddress:
        config = self._plan.config
        given, endpoints = config.etcd, config.etcd_endpoints
        if not endpoints:
            server = embedded.etcd_server(state.path / "etcd", state.log("etcd"), given.lease_ttl_s)
            return await self._embedded("etcd", server, stack)
        await self._reachable("etcd", *endpoints)
        return EtcdAddress(
            endpoints=endpoints,
            independent=config.etcds_are_independent,
            user=given.user,
            password=given.password,
            ca_cert=given.ca_cert,
            lease_ttl_s=given.lease_ttl_s,
        )

    async def _embedded(
        self, name: str, starting: AbstractAsyncContextManager[EmbeddedServer[Address]], stack: AsyncExitStack
    ) -> Address:
        """Start a server of ours and keep it running until the stack ends."""
        self._progress.phase(name, "starting")
        server = await stack.enter_async_context(starting)
        await stack.enter_async_context(background(self._keep_server(name, server)))
        self._servers[name] = server
        self._progress.phase(name, "ready")
        return server.address

    async def _keep_server(self, name: str, server: EmbeddedServer[Address]) -> NoReturn:
        backoff, began = Backoff(), time.monotonic()
        while True:
            reason = await server.died()
            while True:
                delay_s = backoff.next(time.monotonic() - began)
                self._tell(name, "failed", f"{reason}; starts again in {delay_s:g} s (log: {server.log})")
                await asyncio.sleep(delay_s)
                self._tell(name, "starting")
                try:
                    await server.restart()
                    break
                except StartError as error:
                    reason = error.reason
            began = time.monotonic()
            self._tell(name, "ready")

    async def _reachable(self, name: str, *urls: str) -> None:
        """An existing server that is not there is a failed start, not something to wait for. One of several will do."""
        self._progress.phase(name, "starting", urls[0])
        for url in urls:
            parts = urlsplit(url)
            try:
                async with asyncio.timeout(REACH_DEADLINE_S):
                    _, writer = await asyncio.open_connection(parts.hostname, parts.port)
            except (OSError, TimeoutError):
                continue
            writer.close()
            self._progress.phase(name, "ready", url)
            return
        raise StartError(name, f"nobody answers at {', '.join(urls)}")

    async def _model(self, state: StateFolder) -> Path:
        """The model's folder; now that the model is here, its memory is counted."""
        plan = self._plan
        self._progress.phase("model", "starting", plan.config.model)
        tell = partial(self._progress.phase, "model")
        folder = await model_store.prepare(plan.config, plan.cache, state.log("model"), tell)
        shape = ModelShape.read(folder)
        self._plan = resolve(plan.config, machine=plan.machine, shape=shape, cache=plan.cache)
        self._progress.phase("model", "ready", str(folder))
        return folder

    async def _run_processes(self, state: StateFolder, around: Surroundings) -> None:
        self._running = state, around
        for process in self._plan.processes:
            grace_s = FRONTEND_GRACE_S if process.role == "frontend" else WORKER_GRACE_S
            keeper = Keeper(process.name, partial(self._spawn, state, process, around), self._tell, grace_s)
            self._keepers[process.name] = keeper
        async with asyncio.TaskGroup() as group:
            tasks = {keeper.name: group.create_task(keeper.run()) for keeper in self._keepers.values()}
            try:
                for keeper in self._keepers.values():
                    await keeper.ready.wait()
                await self._answering(around.port)
                self._announce(around.port.url)
                await self._ending.wait()
            finally:
                frontends = [tasks[process.name] for process in self._plan.processes if process.role == "frontend"]
                await _end(frontends)
                await _end(list(tasks.values()))

    def _spawn(self, state: StateFolder, process: PlannedProcess, around: Surroundings, status: int) -> Child:
        with ExitStack() as stack:
            listening = stack.enter_context(around.port.socket()) if process.role == "frontend" else None
            spec = ProcessSpec(
                config=self._plan.config,
                role=process.role,
                name=process.name,
                model_path=around.model,
                nats=around.nats,
                etcd=around.etcd,
                state_dir=state.process_folder(process.name),
                threads=process.threads,
                kv_cache=process.kv_cache,
                embedded=around.embedded,
                listen_fd=listening.fileno() if listening else None,
            )
            return Child.start(
                process.name,
                [sys.executable, "-m", "dynamo_lite.process", str(state.write_spec(spec))],
                state.log(process.name),
                env=environment(self._plan, process, self._inherited) | {STATUS_FD: str(status)},
                pass_fds=[status, listening.fileno()] if listening else [status],
            )

    async def _answering(self, port: Port) -> None:
        """Until a request would be served: the frontends know of workers by now, or will in a moment."""
        try:
            async with asyncio.timeout(ANSWER_DEADLINE_S):
                while await _status_of(port) != 200:  # noqa: ASYNC110  # the event is in another process
                    await asyncio.sleep(0.05)
        except TimeoutError:
            name = next(process.name for process in self._plan.processes if process.role == "frontend")
            child = self._keepers[name].child
            log = str(child.log) if child else ""
            raise StartError(name, f"not ready to serve within {ANSWER_DEADLINE_S:.0f} s", log) from None

    def _announce(self, url: str) -> None:
        self._starting = False
        self._write_run()
        self._progress.close()
        model = self._plan.config.model_name
        question = {"role": "user", "content": "What is the capital of France?"}
        quoted = shlex.quote(json.dumps({"model": model, "messages": [question], "max_tokens": 64}))
        command = f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d {quoted}"
        print(f"Ready after {self._progress.seconds:.1f} s: {url}/v1 serves {model}. Try: {command}", flush=True)

    def _tell(self, name: str, phase: Phase, detail: str = "") -> None:
        """A part has come to `phase`: for people, and for programs that read the run file."""
        self._progress.phase(name, phase, detail)
        if phase != "starting":
            self._write_run()

    def _write_run(self) -> None:
        if self._running is None:
            return
        state, around = self._running
        processes = []
        for process in self._plan.processes:
            keeper = self._keepers[process.name]
            pid = keeper.child.pid if keeper.child is not None else None
            facts = {"ready": keeper.ready.is_set(), "starts": keeper.starts, "log": str(state.log(process.name))}
            processes.append({"name": process.name, "role": process.role, "pid": pid, **facts})
        state.write_run(
            {
                "pid": os.getpid(),
                "ready": not self._starting,
                "namespace": self._plan.config.namespace,
                "model": self._plan.config.model_name,
                "model_path": str(around.model),
                "frontend": around.port.url,
                "nats": around.nats.model_dump(mode="json"),
                "etcd": around.etcd.model_dump(mode="json"),
                "servers": {name: server.pid for name, server in self._servers.items()},
                "processes": processes,
            }
        )


async def _end(tasks: Sequence[asyncio.Task[NoReturn]]) -> None:
    """Cancel them and wait until their processes are gone, each within its grace."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


async def _status_of(port: Port) -> int:
    """Of GET /health/ready; 0 when nobody answers."""
    try:
        reader, writer = await asyncio.open_connection(port.host, port.number)
    except OSError:
        return 0
    try:
        writer.write(f"GET /health/ready HTTP/1.1\r\nHost: {port.host}\r\nConnection: close\r\n\r\n".encode())
        line = await reader.readline()
        return int(line.split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    finally:
        writer.close()


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """Of parts that failed together, the first to tell; a bug before anything else."""
    flat = [_first(error) if isinstance(error, BaseExceptionGroup) else error for error in errors.exceptions]
    bugs = [error for error in flat if not isinstance(error, DynamoError)]
    return (bugs or flat)[0]
