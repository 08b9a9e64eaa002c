"""A deployment for a benchmark, started as a user starts it and measured from outside."""

from __future__ import annotations

import asyncio
import http.client
import json
import secrets
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from dynamo_lite.config import EtcdAddress
from dynamo_lite.plane.discovery import Discovery
from dynamo_lite.tasks import scope

ROOT = Path(__file__).resolve().parents[1]
READY_S = 300.0  # the first start converts the model, on a machine that may be busy
STOP_S = 60.0
REQUEST_S = 120.0
SPANS_S = 10.0
POLL_S = 0.05
NEW_TOKENS = 4
WORKERS = ("prefill", "decode", "both")
SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")


class BenchmarkError(Exception):
    """What was to be measured did not happen."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One streamed completion."""

    ttft_s: float  # from sending the request to its first token's event
    cached_tokens: int
    trace_id: str


@dataclass(frozen=True, slots=True)
class Deployment:
    """A running deployment."""

    folder: Path
    ready_s: float  # from the command to its "Ready" line
    run: dict[str, Any]

    def complete(self, token_ids: Sequence[int]) -> Answered:
        """A few tokens after this prompt. With logprobs each is an event, even one that ends inside a character."""
        address = urlsplit(self.run["frontend"])
        trace_id = secrets.token_hex(16)
        headers = {"Content-Type": "application/json", "traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"}
        body = {
            "model": self.run["model"],
            "prompt": list(token_ids),
            "max_tokens": NEW_TOKENS,
            "logprobs": 0,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        data = json.dumps(body).encode()
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=REQUEST_S)
        try:
            connection.connect()
            started = time.perf_counter()
            connection.request("POST", "/v1/completions", data, headers)
            response = connection.getresponse()
            if response.status != 200:
                raise BenchmarkError(f"{response.status}: {response.read().decode()}")
            first = response.readline()
            ttft_s = time.perf_counter() - started
            rest = response.read()
        finally:
            connection.close()
        events = [json.loads(event[6:]) for event in (first + rest).decode().split("\n\n")[:-2]]
        usage = events[-1].get("usage")
        if not usage or usage["completion_tokens"] != NEW_TOKENS:
            raise BenchmarkError(f"not {NEW_TOKENS} tokens and their usage: {events}")
        return Answered(ttft_s, usage["prompt_tokens_details"]["cached_tokens"], trace_id)

    def metrics_urls(self) -> dict[str, str]:
        """Of the live workers, by name, as the discovery service has them."""

        async def listing() -> dict[str, str]:
            address = EtcdAddress.model_validate(self.run["etcd"])
            async with (
                asyncio.timeout(10),
                Discovery.connect(address, self.run["namespace"]) as discovery,
                scope() as group,
            ):
                membership = await discovery.membership(group)
                return {record.name: record.metrics_url for record in membership.instances.values()}

        return asyncio.run(listing())

    def spans(self, name: str, trace_ids: Sequence[str]) -> list[dict[str, Any]]:
        """The span of that name of each trace. They are written some time after they ended."""
        file = self.folder / "traces.jsonl"
        deadline = time.monotonic() + SPANS_S
        while True:
            spans = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            found = {span["trace_id"]: span for span in spans if span["name"] == name}
            if all(trace_id in found for trace_id in trace_ids):
                return [found[trace_id] for trace_id in trace_ids]
            if time.monotonic() > deadline:
                raise BenchmarkError(f"a request left no span {name!r}")
            time.sleep(POLL_S)


def prompt_sources(metrics_url: str) -> dict[str, float]:
    """Prompt tokens so far, by where their KV came from, as vLLM counts them."""
    with urllib.request.urlopen(metrics_url, timeout=10) as answer:
        text = answer.read().decode()
    counts = dict.fromkeys(SOURCES, 0.0)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "vllm:prompt_tokens_by_source_total":
                counts[sample.labels["source"]] += sample.value
    return counts


def grown(metrics_url: str, before: dict[str, float], tokens: int) -> dict[str, float]:
    """What was added to `before` by a prompt of so many tokens; vLLM counts them just after it answers."""
    deadline = time.monotonic() + SPANS_S
    while True:
        after = prompt_sources(metrics_url)
        added = {source: after[source] - before[source] for source in SOURCES}
        if sum(added.values()) >= tokens:
            return added
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{tokens} prompt tokens were sent, vLLM counted {added}")
        time.sleep(POLL_S)


@contextmanager
def serve(config: Path, folder: Path, *, traces: bool = True) -> Iterator[Deployment]:
    """`dynamo-lite serve CONFIG` on a free port, until the end of the body; its state and traces are in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    overrides = {"frontend.port": "0", "state_dir": str(folder / "state")}
    if traces:
        overrides["telemetry.traces.file"] = str(folder / "traces.jsonl")
    command = [sys.executable, "-m", "dynamo_lite.cli", "serve", str(config)]
    for key, value in overrides.items():
        command += ["--set", f"{key}={value}"]
    started = time.perf_counter()
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        listener = Listener(process)
        try:
            if (ready_at := listener.ready(READY_S)) is None:
                raise BenchmarkError(f"the deployment did not become ready:\n{listener.text}\n{_last_lines(folder)}")
            ready_s = ready_at - started
            run = json.loads((folder / "state" / "run.json").read_text(encoding="utf-8"))
            yield Deployment(folder, ready_s, run)
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
            finally:
                listener.join()


class Listener(threading.Thread):
    """Reads what a deployment says, so that it never waits for a reader, and notes when it said that it is ready."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        super().__init__(name="listener")
        self._process = process
        self._said: list[str] = []
        self._ready_at: float | None = None
        self._decided = threading.Event()
        self.start()

    def run(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.append(line)
            if line.startswith("Ready "):
                self._ready_at = time.perf_counter()
                self._decided.set()
        self._decided.set()

    def ready(self, timeout_s: float) -> float | None:
        """When it was, on the clock of `time.perf_counter`; None when it ended, or was not within the time."""
        self._decided.wait(timeout_s)
        return self._ready_at

    @property
    def text(self) -> str:
        return "".join(self._said)


def _last_lines(folder: Path, count: int = 30) -> str:
    """Of each worker's log, which is deleted with its folder."""
    logs = [log for log in (folder / "state" / "logs").glob("*.log") if log.stem.rpartition("-")[0] in WORKERS]
    return "\n".join(line for log in logs for line in log.read_text(encoding="utf-8").splitlines()[-count:])
