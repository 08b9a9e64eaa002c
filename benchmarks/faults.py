"""What clients see of a worker that is killed, frozen or drained under their streams.

    .venv/bin/python benchmarks/faults.py [--engine sim|vllm] [--json FILE] [--rival FOLDER --rival-python PYTHON]

Two workers serve twelve streams of 150 tokens, and 1.2 s later one of the two is hit. While they go on, a new request
comes every quarter of a second. With `sim` a step takes 15 ms, so that every stream is hit in its middle; `vllm` serves
the quickstart's model on two CPU workers. All other settings are the defaults. `--rival` runs the same case on NVIDIA
Dynamo's simulated workers: FOLDER has a `faults.py` that takes the signal's number. Other work of the machine is
recorded, and not asked to end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script, which is not in a package

from benchmarks import report
from benchmarks.deployment import ROOT, BenchmarkError, Deployment, serve
from benchmarks.report import Bar

STREAMS, TOKENS, WORDS, HIT_S = 12, 150, 64, 1.2
PROBE_S, PROBES = 0.25, 20
READ_S = 90.0  # the longest silence of a stream that is waited for
RECOVERY_S = 180.0
VOCABULARY = ["alpha", "beta", "gamma", "delta", "omega", "sigma"]
FAULTS = {"SIGKILL": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP, "drain": signal.SIGTERM}
GAP_S = {"SIGKILL": 2.0, "SIGSTOP": 2.0, "drain": 0.3}
THEIRS = re.compile(r"full ok (\d+) of (\d+) max dur [\d.]+ maxgap ([\d.]+)")


@dataclass(frozen=True, slots=True)
class Stream:
    """One answer, as its client got it."""

    status: int
    complete: bool  # as many tokens as were asked for, a finish reason and [DONE]
    error: str
    gap_s: float  # the longest, between bytes of the answer
    seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one fault did."""

    fault: str
    streams: list[Stream]
    refused: int  # of the new requests meanwhile
    migrations: dict[str, float]  # prompts that went on elsewhere, by cause
    other_cores: float

    @property
    def complete(self) -> int:
        return sum(one.complete for one in self.streams)

    @property
    def gap_s(self) -> float:
        return max(one.gap_s for one in self.streams)


async def request(url: str, model: str, tokens: int, numbers: random.Random) -> Stream:
    address, began = urlsplit(url), time.perf_counter()
    body = json.dumps({
        "model": model, "prompt": " ".join(numbers.choices(VOCABULARY, k=WORDS)), "max_tokens": tokens,
        "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True,
    }).encode()  # fmt: skip
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    data, status, gap_s, error, last = b"", 0, 0.0, "", began
    try:
        async with asyncio.timeout(READ_S):
            status = int((await reader.readuntil(b"\r\n\r\n"))[9:12])
            last = time.perf_counter()  # the wait for the first token is none of a stream
            while part := await reader.read(65536):
                now = time.perf_counter()
                gap_s, last = max(gap_s, now - last) if data else gap_s, now
                data += part
    except (TimeoutError, OSError, asyncio.IncompleteReadError) as failure:
        error, gap_s = repr(failure), max(gap_s, time.perf_counter() - last)
    finally:
        writer.close()
    counted = re.search(rb'"completion_tokens":(\d+)', data)
    whole = b"[DONE]" in data and counted is not None and int(counted[1]) == tokens
    if failed := re.search(rb'"message":"([^"]*)"', data):
        error = failed[1].decode()
    return Stream(status, whole and not error, error, gap_s, time.perf_counter() - began)


async def under_streams(deployment: Deployment, pid: int, number: signal.Signals) -> tuple[list[Stream], int]:
    """The streams, and how many of the new requests were not answered."""
    numbers, url, model = random.Random(time.time_ns()), deployment.run["frontend"], deployment.run["model"]
    async with asyncio.TaskGroup() as group:
        streams = [group.create_task(request(url, model, TOKENS, numbers)) for _ in range(STREAMS)]
        await asyncio.sleep(HIT_S)
        os.kill(pid, number)
        probes = []
        for _ in range(PROBES):
            await asyncio.sleep(PROBE_S)
            probes.append(group.create_task(request(url, model, 1, numbers)))
    return [one.result() for one in streams], sum(not one.result().complete for one in probes)


def outcome(deployment: Deployment, fault: str) -> Outcome:
    number, name = FAULTS[fault], min(workers(deployment))
    pid, before, load = workers(deployment)[name], migrations(deployment), report.OtherLoad()
    try:
        streams, refused = asyncio.run(under_streams(deployment, pid, number))
    finally:
        if number is signal.SIGSTOP:
            with suppress(ProcessLookupError):  # the supervisor has ended it by now
                os.kill(pid, signal.SIGCONT)
    moved = {cause: count - before.get(cause, 0.0) for cause, count in migrations(deployment).items()}
    return Outcome(fault, streams, refused, {cause: count for cause, count in moved.items() if count}, load.cores())


def workers(deployment: Deployment) -> dict[str, int]:
    """Pids by name, once all are ready."""
    file, deadline = deployment.folder / "state" / "run.json", time.monotonic() + RECOVERY_S
    while time.monotonic() < deadline:
        found = [one for one in json.loads(file.read_text(encoding="utf-8"))["processes"] if one["role"] != "frontend"]
        if all(one["ready"] and Path(f"/proc/{one['pid']}").exists() for one in found) and routed(deployment):
            return {one["name"]: one["pid"] for one in found}
        time.sleep(PROBE_S)
    raise BenchmarkError(f"the workers were not ready again within {RECOVERY_S:.0f} s")


def routed(deployment: Deployment) -> bool:
    """Whether the frontend gives requests to both: each is listed once, and what was dead is not."""
    count = sum(value for name, value in samples(deployment).items() if name.startswith("dynamo_lite_router_workers"))
    return count == 2


def migrations(deployment: Deployment) -> dict[str, float]:
    pattern = re.compile(r'dynamo_lite_migrations_total\{cause="(\w+)"\}')
    return {found[1]: value for name, value in samples(deployment).items() if (found := pattern.fullmatch(name))}


def samples(deployment: Deployment) -> dict[str, float]:
    with urllib.request.urlopen(f"{deployment.run['frontend']}/metrics", timeout=10) as answer:
        lines = [line.rpartition(" ") for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def config(engine: str) -> dict[str, Any]:
    if engine == "vllm":
        base = yaml.safe_load((ROOT / "configs" / "aggregated.yaml").read_text(encoding="utf-8"))
        base["workers"]["both"]["count"] = 2
        return dict(base)
    base = yaml.safe_load((ROOT / "configs" / "sim.yaml").read_text(encoding="utf-8"))
    base["workers"], base["sim"]["decode_step_ms"] = {"decode": {"count": 2}}, 15.0
    return dict(base)


@contextmanager
def deployed(engine: str) -> Iterator[Deployment]:
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        file = Path(name) / "faults.yaml"
        file.write_text(yaml.safe_dump(config(engine) | {"namespace": "faults"}), encoding="utf-8")
        with serve(file, Path(name)) as deployment:
            yield deployment


def rival(folder: Path, python: str) -> dict[str, dict[str, float]]:
    """Complete streams and the longest gap, by fault."""
    told = {}
    for fault in ("SIGKILL", "SIGSTOP"):
        command = [python, str(folder / "faults.py"), str(int(FAULTS[fault]))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        found = THEIRS.search(done.stdout)
        if found is None:
            raise BenchmarkError(f"the rival's case did not run: {done.stdout[-500:]}{done.stderr[-500:]}")
        told[fault] = {"complete": float(found[1]), "longest_gap_s": float(found[3])}
    return told


def bars(engine: str, outcomes: list[Outcome], theirs: dict[str, dict[str, float]]) -> list[Bar]:
    found = []
    for one in outcomes:
        name = f"{engine}: {one.fault} of one of two workers"
        found += [
            Bar.of(f"{name}, streams complete of {STREAMS}", one.complete, "", f">= {STREAMS}"),
            Bar.of(f"{name}, longest gap", one.gap_s, "s", f"<= {GAP_S[one.fault]}"),
            Bar.of(f"{name}, new requests refused of {PROBES}", one.refused, "", "<= 0"),
        ]
    for fault, numbers in theirs.items():
        found.append(Bar.of(f"rival: {fault}, streams complete of {STREAMS}", numbers["complete"], ""))
        found.append(Bar.of(f"rival: {fault}, longest gap", numbers["longest_gap_s"], "s"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["sim", "vllm"], action="append", help="default: both")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rival", type=Path, metavar="FOLDER")
    parser.add_argument("--rival-python", default=sys.executable, metavar="PYTHON")
    given = parser.parse_args()
    figures: list[Bar] = []
    raw: dict[str, Any] = {}
    theirs = rival(given.rival, given.rival_python) if given.rival else {}
    for engine in given.engine or ["sim", "vllm"]:
        with deployed(engine) as deployment:
            outcomes = []
            for fault in FAULTS:
                outcomes.append(outcome(deployment, fault))
                print(f"{engine}, {fault}: {outcomes[-1].complete} of {STREAMS}", flush=True)
        figures += bars(engine, outcomes, {})
        raw[engine] = [asdict(one) for one in outcomes]
    figures += bars("", [], theirs)
    report.show("A worker is hit under streams", figures, Console())
    if given.json:
        report.write(given.json, report.machine(), figures, raw | ({"rival": theirs} if theirs else {}))


if __name__ == "__main__":
    main()
