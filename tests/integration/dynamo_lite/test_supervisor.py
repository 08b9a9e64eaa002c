"""`dynamo-lite serve` with the simulated engine: its start, its failures, its end."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from dynamo_lite.config import EtcdAddress, NatsAddress
from tests.integration.serving.deployment import Deployment, serve, until
from tests.models import make_tiny_model

GROUPS: dict[str, Any] = {"prefill": {"count": 1}, "decode": {"count": 1}}
FAILED_START_S = 90.0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model = make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    return {"engine": "sim", "model": str(model), "served_model_name": "tiny", "max_model_len": 2048, "workers": GROUPS}


@pytest.fixture(scope="module")
def running(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with serve(tmp_path_factory.mktemp("deployment"), base | {"frontend": {"processes": 2}}) as deployment:
        yield deployment


def gone(pid: int) -> bool:
    """Whether a process is no more; one that nobody has reaped yet counts as gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def pids(deployment: Deployment) -> list[int]:
    run = deployment.run
    return [process["pid"] for process in run["processes"]] + list(run["servers"].values())


def answers(deployment: Deployment) -> str:
    """How a short completion, asked for on a connection of its own, finished."""
    body = json.dumps({"model": "tiny", "prompt": "Hello", "max_tokens": 4}).encode()
    request = urllib.request.Request(
        f"{deployment.url}/v1/completions", body, {"Content-Type": "application/json", "Connection": "close"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return str(json.load(response)["choices"][0]["finish_reason"])


def answers_now(deployment: Deployment) -> bool:
    try:
        return answers(deployment) == "length"
    except OSError:  # refused, reset, or an HTTP error
        return False


def start(folder: Path, config: dict[str, Any], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Serve something that does not start."""
    folder.mkdir(exist_ok=True)
    file = folder / "test.yaml"
    file.write_text(yaml.safe_dump({"state_dir": str(folder / "state"), "frontend": {"port": 0}, **config}))
    argv = [sys.executable, "-m", "dynamo_lite.cli", "serve", str(file), *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=FAILED_START_S, check=False)


def test_it_serves_and_tells_programs_what_runs_where(running: Deployment) -> None:
    assert answers(running) == "length"
    run = running.run
    assert run["ready"] is True
    assert run["pid"] == running.process.pid
    assert [process["name"] for process in run["processes"]] == ["frontend-0", "frontend-1", "prefill-0", "decode-0"]
    assert not any(gone(pid) for pid in pids(running))


def test_a_second_supervisor_of_the_same_state_folder_is_refused(running: Deployment, base: dict[str, Any]) -> None:
    refused = start(running.folder / "second", base | {"state_dir": str(running.folder / "state")})
    assert refused.returncode == 1
    assert f"another dynamo-lite (process {running.process.pid}) serves from" in refused.stderr
    assert answers(running) == "length"


def test_a_killed_worker_is_started_again(running: Deployment) -> None:
    starts = running.process_of("decode-0")["starts"]
    running.kill("decode-0")
    until(lambda: running.restarted("decode-0", starts + 1), "decode-0 is back")
    until(lambda: answers_now(running), "requests are served again")


def test_while_one_frontend_is_down_the_other_answers(running: Deployment) -> None:
    starts = running.process_of("frontend-0")["starts"]
    pid = running.pid("frontend-0")
    running.kill("frontend-0")
    until(lambda: gone(pid), "frontend-0 is gone")
    for _ in range(4):
        # A connection that the kernel had given to the dead one is reset; a client tries again, and so does this.
        until(lambda: answers_now(running), "the other one answers", 5)
    until(lambda: running.restarted("frontend-0", starts + 1), "frontend-0 is back")


@pytest.mark.parametrize("server", ["nats-server", "etcd"])
def test_a_killed_server_is_started_again_and_everybody_finds_it(running: Deployment, server: str) -> None:
    pid = running.run["servers"][server]
    os.kill(pid, signal.SIGKILL)
    until(lambda: running.run["servers"][server] != pid, f"{server} is back")
    until(lambda: answers_now(running), "requests are served again")


def test_sigterm_ends_everything_and_leaves_no_run_file(base: dict[str, Any], tmp_path: Path) -> None:
    with serve(tmp_path, base) as deployment:
        processes = pids(deployment)
    assert deployment.process.returncode == 0
    assert all(gone(pid) for pid in processes)
    assert not (tmp_path / "state" / "run.json").exists()


def test_kill_9_of_the_supervisor_ends_everything(base: dict[str, Any], tmp_path: Path) -> None:
    with serve(tmp_path, base) as deployment:
        processes = pids(deployment)
        deployment.process.kill()
        until(lambda: all(gone(pid) for pid in processes), "all children are gone", 10.0)


def test_a_taken_port_is_told_before_anything_starts(base: dict[str, Any], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = other.getsockname()[1]
        failed = start(tmp_path, base | {"frontend": {"port": number}})
    assert failed.returncode == 1
    assert f"Error: frontend: port {number} is taken by another program" in failed.stderr
    assert not (tmp_path / "state" / "logs").exists()


def test_a_part_that_fails_says_why_points_at_its_log_and_ends_the_rest(base: dict[str, Any], tmp_path: Path) -> None:
    failed = start(tmp_path, base | {"sim": {"kv_blocks": 8}})
    assert failed.returncode == 1
    last = failed.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert "max_model_len 2048 is over the 128 tokens of its KV" in last
    assert str(tmp_path / "state" / "logs") in last
    assert failed.stdout == ""


def test_an_existing_server_that_is_not_there_fails_the_start(base: dict[str, Any], tmp_path: Path) -> None:
    failed = start(tmp_path, base | {"nats": {"url": "nats://127.0.0.1:1"}})
    assert failed.returncode == 1
    assert "Error: nats-server: nobody answers at nats://127.0.0.1:1" in failed.stderr


def test_ctrl_c_during_the_start_ends_it_cleanly(base: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump(base | {"state_dir": str(tmp_path / "state"), "frontend": {"port": 0}}))
    argv = [sys.executable, "-m", "dynamo_lite.cli", "serve", str(file)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        for line in process.stderr:
            if "decode-0: starting" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        assert process.stdout.read() == ""
    assert process.returncode == 0
    assert "Traceback" not in rest


def test_existing_servers_are_used_and_left_running(
    base: dict[str, Any], nats: NatsAddress, etcd: EtcdAddress, tmp_path: Path
) -> None:
    given = {"nats": nats.model_dump(), "etcd": {"endpoints": list(etcd.endpoints)}}
    with serve(tmp_path, base | given) as deployment:
        assert answers(deployment) == "length"
        assert deployment.run["servers"] == {}
        assert deployment.run["nats"]["url"] == nats.url
    assert not (tmp_path / "state" / "nats").exists()
    for url in (nats.url, *etcd.endpoints):
        socket.create_connection((urlsplit(url).hostname or "", urlsplit(url).port or 0)).close()


def test_a_metadata_server_is_where_workers_and_frontends_meet(base: dict[str, Any], tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "dynamo_lite.cli", "metadata-server", "--port", "0"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        try:
            address = server.stdout.readline().partition("metadata_server: ")[2].strip()
            assert address.startswith("tcp://127.0.0.1:")
            with serve(tmp_path, base | {"kv_transfer": {"metadata_server": address}}) as deployment:
                assert answers(deployment) == "length"
                assert list(deployment.run["servers"]) == ["nats-server"]
        finally:
            server.terminate()
    assert server.returncode == 0


@contextmanager
def metadata_server(folder: Path, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and the address that it says."""
    argv = [sys.executable, "-m", "dynamo_lite.cli", "metadata-server", "--port", str(port), "--data-dir", str(folder)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server, server.stdout.readline().partition("metadata_server: ")[2].strip()
        finally:
            server.kill()


def test_of_two_metadata_servers_one_may_be_killed_and_come_back_empty(base: dict[str, Any], tmp_path: Path) -> None:
    with ExitStack() as stack:
        first, address = stack.enter_context(metadata_server(tmp_path / "a"))
        _, other = stack.enter_context(metadata_server(tmp_path / "b"))
        both = {"kv_transfer": {"metadata_server": [address, other]}}
        deployment = stack.enter_context(serve(tmp_path, base | both))
        assert answers(deployment) == "length"
        first.kill()
        assert answers(deployment) == "length"
        deployment.kill("decode-0")  # its successor finds one server, and is found by the frontend
        until(lambda: deployment.restarted("decode-0", 2), "a new decode worker")
        until(lambda: answers_now(deployment), "an answer of the new decode worker")
        stack.enter_context(metadata_server(tmp_path / "empty", urlsplit(address).port or 0))
        alone = EtcdAddress(endpoints=(address,))
        until(lambda: set(deployment.instances(alone)) == {"prefill-0", "decode-0"}, "everybody in the empty server")


def test_what_this_host_lacks_is_refused_by_serve(tmp_path: Path) -> None:
    failed = start(tmp_path, {"workers": {"decode": {"gpu_type": "h100", "count": 64}}})
    assert failed.returncode == 1
    assert "Error: this host: it lacks 64 GPUs" in failed.stderr


def test_a_configuration_error_ends_with_2_and_its_place(tmp_path: Path) -> None:
    failed = start(tmp_path, {"frontend": {"prot": 1}})
    assert failed.returncode == 2
    assert "unknown key 'prot' in frontend (did you mean 'port'?)" in failed.stderr
    assert f"{tmp_path / 'test.yaml'}:2:3" in failed.stderr


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_one_line_at_the_end_of_the_start_has_a_command_that_works(base: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump(base | {"state_dir": str(tmp_path / "state"), "frontend": {"port": 0}}))
    argv = [sys.executable, "-m", "dynamo_lite.cli", "serve", str(file)]
    errors = (tmp_path / "errors").open("w")
    with errors, subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line.startswith("Ready after ")
            command = shlex.split(line.partition("Try: ")[2])
            done = subprocess.run([*command, "-sS"], capture_output=True, text=True, timeout=60, check=True)
            assert json.loads(done.stdout)["choices"][0]["message"]["role"] == "assistant"
        finally:
            process.terminate()
            rest = process.stdout.read()
    assert rest == ""
    assert process.returncode == 0
