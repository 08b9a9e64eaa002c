"""The embedded nats-server and etcd as processes."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import stat
import sys
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from dynamo_lite import embedded
from dynamo_lite.config import EtcdAddress, NatsAddress
from dynamo_lite.embedded import EmbeddedServer
from dynamo_lite.errors import ConfigError, StartError
from dynamo_lite.plane.discovery import Discovery
from dynamo_lite.processes import Child, running, tail

DEADLINE_S = 20.0

OWNER = """
import asyncio, sys
from pathlib import Path
from dynamo_lite.embedded import etcd_server, nats_server

async def main():
    folder = Path(sys.argv[1])
    async with (
        nats_server(folder / "nats", folder / "nats.log") as nats,
        etcd_server(folder / "etcd", folder / "etcd.log", 5) as etcd,
    ):
        print(nats.pid, etcd.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""

METADATA_SERVER = """
import asyncio, sys
from pathlib import Path
from dynamo_lite.embedded import run_metadata_server

asyncio.run(run_metadata_server("localhost", int(sys.argv[1]), Path(sys.argv[2]), lambda url: print(url, flush=True)))
"""


async def test_both_servers_listen_on_loopback_only(
    nats_server: EmbeddedServer[NatsAddress], etcd_server: EmbeddedServer[EtcdAddress]
) -> None:
    for server in (nats_server, etcd_server):
        sockets = [each for each in psutil.Process(server.pid).net_connections() if each.status == psutil.CONN_LISTEN]
        assert sockets
        assert {each.laddr.ip for each in sockets} == {"127.0.0.1"}


async def test_nats_credentials_are_generated_and_only_in_a_private_file(
    nats_server: EmbeddedServer[NatsAddress], tmp_path: Path
) -> None:
    password = nats_server.address.password
    assert password is not None
    assert len(password) >= 24
    config = tmp_path / "nats" / "nats.conf"
    assert password in config.read_text()
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert stat.S_IMODE(config.parent.stat().st_mode) == 0o700
    assert not any(password in argument for argument in psutil.Process(nats_server.pid).cmdline())
    assert password not in nats_server.log.read_text()


async def test_a_server_that_died_says_how_and_comes_back_at_its_address(
    nats_server: EmbeddedServer[NatsAddress],
) -> None:
    before, pid = nats_server.address, nats_server.pid
    nats_server.kill()
    async with asyncio.timeout(DEADLINE_S):
        assert await nats_server.died() == "killed by SIGKILL"
        await nats_server.restart()
    assert nats_server.address == before
    assert nats_server.pid != pid
    assert before.url in f"nats://127.0.0.1:{port_of(nats_server)}"


async def test_a_data_folder_of_an_earlier_run_is_emptied(tmp_path: Path) -> None:
    stale = tmp_path / "nats" / "stale"
    stale.mkdir(parents=True)
    async with embedded.nats_server(tmp_path / "nats", tmp_path / "nats.log"):
        assert not stale.exists()


async def test_both_servers_die_with_a_killed_owner(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", OWNER, str(tmp_path)]
    async with running(Child.start("owner", argv, tmp_path / "owner.log"), DEADLINE_S) as owner:
        pids = [int(word) for word in (await first_line(owner)).split()]
        pidfds = [os.pidfd_open(pid) for pid in pids]
        os.kill(owner.pid, signal.SIGKILL)
        for pidfd in pidfds:
            readable, _, _ = await asyncio.to_thread(select.select, [pidfd], [], [], DEADLINE_S)
            os.close(pidfd)
            assert readable


async def test_a_server_that_cannot_start_is_named_with_its_reason_and_log(tmp_path: Path) -> None:
    async with embedded.etcd_server(tmp_path / "etcd", tmp_path / "etcd.log", 5) as etcd:
        taken = port_of(etcd)
        with pytest.raises(StartError, match=r"etcd: exited with 1.*address already in use.*other/etcd\.log"):
            await embedded.run_metadata_server("127.0.0.1", taken, tmp_path / "other", print)


async def test_a_metadata_server_takes_an_address_of_this_machine_not_a_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"coordination-node"):
        await embedded.run_metadata_server("coordination-node", 0, tmp_path, print)


async def test_a_metadata_server_serves_until_sigterm_and_again_with_its_data(tmp_path: Path) -> None:
    port = 0
    for turn in range(2):
        argv = [sys.executable, "-c", METADATA_SERVER, str(port), str(tmp_path / "data")]
        child = Child.start("metadata-server", argv, tmp_path / f"{turn}.log")
        async with running(child, DEADLINE_S) as server:
            url = await first_line(server)
            assert port in (0, urlsplit(url).port)
            port = urlsplit(url).port or 0
            async with Discovery.connect(EtcdAddress(endpoints=(url,)), "ns") as discovery:
                listing = await discovery._client.kv.get("/kept", timeout=DEADLINE_S)
                assert [pair.value for pair in listing.kvs] == [b"value"] * turn
                await discovery._client.kv.put("/kept", "value", timeout=DEADLINE_S)
            server.signal(signal.SIGTERM)
            assert await server.wait() == 0, tail(server.log, 20)


async def test_a_metadata_server_reports_an_etcd_that_died(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", METADATA_SERVER, "0", str(tmp_path / "data")]
    async with running(Child.start("metadata-server", argv, tmp_path / "log"), DEADLINE_S) as server:
        await first_line(server)
        (etcd,) = psutil.Process(server.pid).children()
        etcd.kill()
        assert await server.wait() == 1
        assert "etcd: killed by SIGKILL" in tail(server.log)


def port_of(server: EmbeddedServer[NatsAddress] | EmbeddedServer[EtcdAddress]) -> int:
    address = server.address
    url = address.url if isinstance(address, NatsAddress) else address.endpoints[0]
    return urlsplit(url).port or 0


async def first_line(child: Child) -> str:
    async with asyncio.timeout(DEADLINE_S):
        while not (found := tail(child.log)):
            assert child.exit_code is None
            await asyncio.sleep(0.005)
    return found
