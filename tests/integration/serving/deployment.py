"""A whole deployment, started as a user starts it: `dynamo-lite serve FILE` in a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from dynamo_lite.config import EtcdAddress
from dynamo_lite.plane import discovery_set
from dynamo_lite.plane.wire import InstanceRecord
from dynamo_lite.tasks import scope

READY_S = 240.0  # two engines on two busy cores; an idle machine needs 20 s
STOP_S = 60.0
POLL_S = 0.05


@dataclass
class Deployment:
    """A running deployment."""

    process: subprocess.Popen[str]
    folder: Path
    namespace: str

    @property
    def run(self) -> dict[str, Any]:
        content = json.loads((self.folder / "state" / "run.json").read_text())
        assert isinstance(content, dict)
        return content

    @property
    def url(self) -> str:
        return str(self.run["frontend"])

    def process_of(self, name: str) -> dict[str, Any]:
        return next(process for process in self.run["processes"] if process["name"] == name)

    def pid(self, name: str) -> int:
        return int(self.process_of(name)["pid"])

    def engine_pid(self, name: str) -> int:
        """Of a worker's EngineCore."""
        worker = self.pid(name)
        children = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()
        return next(int(pid) for pid in children if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes())

    @contextmanager
    def frozen(self, *pids: int) -> Iterator[None]:
        """These processes stand still during the block."""
        try:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid(name), number)

    def restarted(self, name: str, starts: int) -> bool:
        """Whether the process has been started that often, and is ready."""
        process = self.process_of(name)
        return bool(process["ready"]) and int(process["starts"]) >= starts

    def instances(self, etcd: EtcdAddress | None = None) -> dict[str, InstanceRecord]:
        """The live workers by name, as the discovery service has them, or one of several."""

        async def listing() -> dict[str, InstanceRecord]:
            address = etcd or EtcdAddress.model_validate(self.run["etcd"])
            async with (
                asyncio.timeout(10),
                discovery_set.connect(address, self.namespace) as discovery,
                scope() as group,
            ):
                membership = await discovery.membership(group)
                return {record.name: record for record in membership.instances.values()}

        return asyncio.run(listing())

    def metrics(self, name: str) -> dict[str, float]:
        """Every sample of one worker, as `name{label="value"}` → value."""
        return scrape(self.instances()[name].metrics_url)

    def spans(self) -> list[dict[str, Any]]:
        file = self.folder / "traces.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def log(self, name: str) -> str:
        return (self.folder / "state" / "logs" / f"{name}.log").read_text()


def scrape(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return samples


def total(samples: Mapping[str, float], name: str, *having: str) -> float:
    """Sum of all samples of a metric whose labels contain every one of `having`."""
    return sum(
        value for key, value in samples.items() if key.partition("{")[0] == name and all(part in key for part in having)
    )


def until(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Wait for something that only another process knows."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(POLL_S)


@contextmanager
def serve(folder: Path, config: Mapping[str, Any]) -> Iterator[Deployment]:
    """Serve `config` (state folder, free port and trace file are added) until the end of the block.

    Unless it says otherwise, no request but a test's own is sent, and where a prompt is computed depends on no timing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole: dict[str, Any] = {
        **config,
        "namespace": "test",
        "state_dir": str(folder / "state"),
        "frontend": {"port": 0, **config.get("frontend", {})},
        "router": {"self_test": False, "remote_prefill": "always", **config.get("router", {})},
        "telemetry": {"traces": {"file": str(folder / "traces.jsonl")}},
    }
    file = folder / "test.yaml"
    file.write_text(yaml.safe_dump(whole))
    process = subprocess.Popen(
        [sys.executable, "-m", "dynamo_lite.cli", "serve", str(file)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said: list[str] = []
    ready = threading.Event()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if line.startswith("Ready "):
                ready.set()
        ready.set()

    reader = threading.Thread(target=listen)
    reader.start()
    deployment = Deployment(process, folder, "test")
    try:
        assert ready.wait(READY_S), f"not ready within {READY_S} s:\n{''.join(said)}"
        assert process.poll() is None, f"ended with {process.returncode}:\n{''.join(said)}"
        yield deployment
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            reader.join()
            if process.stdout is not None:
                process.stdout.close()
