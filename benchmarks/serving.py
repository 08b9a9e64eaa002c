"""The serving path beside NVIDIA Dynamo's: the same requests to both, whose engines are simulated and take no time.

    .venv/bin/python benchmarks/serving.py --rival FOLDER --rival-home FOLDER [--json FILE] [--rounds N]

`--rival` has the scripts that run the other system (stack.py) and the client (load.py); `--rival-home` is where its
environment and the model folder are, whose tokenizer both use. In each round both are started, one after the other, and
sent the same: 128 tokens in, 16 out, streamed, by 32 clients and by one; and prompts of 2,048 tokens with 16 shared
prefixes to four workers. The 32 clients acknowledge at once, which spares the other system stalls of 40 ms; the one
does as clients ordinarily do. Then tokens are timed that an engine makes every 5 ms, and starts of configs/sim.yaml.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script, which is not in a package

from benchmarks import report
from benchmarks.deployment import ROOT, BenchmarkError, serve
from benchmarks.report import Bar

MODEL = "smol"
SECONDS, WARM_UP_S = 6, 2
STEP_MS = 5.0  # of the engine whose tokens are timed
PACED_TOKENS, PACED_REQUESTS = 64, 4
POLL_S = 0.02
START_S, STOP_S, LOAD_S = 120.0, 60.0, 120.0
FRONTEND = "frontend"
CASES: dict[str, tuple[int, tuple[str, ...]]] = {  # by name: workers, the client's options
    "32 clients": (2, ("-c", "32", "--qa")),
    "1 client": (2, ("-c", "1")),
    "long prompts": (4, ("-c", "32", "--isl", "2048", "--groups", "16", "--qa")),
}


@dataclass(frozen=True, slots=True)
class Load:
    """What a client saw in one run, and what the system used for it."""

    req_s: float
    p50_ms: float
    p99_ms: float
    chunks: float  # events of a stream
    cpu_ms: float  # of all of the system's processes, by request
    cpu_cores: dict[str, float]  # by process
    other_cores: float  # that neither the system nor the client used


@dataclass(frozen=True, slots=True)
class Run:
    """One start of a system, and all that it was sent."""

    start_s: float  # until a first request was answered; ours until it says so
    loads: dict[str, Load]
    frontend_mib: float  # after the load


@dataclass(frozen=True, slots=True)
class Running:
    port: int
    pids: dict[str, int]
    start_s: float


@dataclass(frozen=True, slots=True)
class Rival:
    """Where the other system, its client and the model are."""

    scripts: Path
    home: Path

    @property
    def environment(self) -> dict[str, str]:
        return environment() | {"RIVAL_HOME": str(self.home)}

    @contextmanager
    def serve(self, workers: int) -> Iterator[Running]:
        """Until the end of the body."""
        port = free_port()
        script = [str(self.home / "venv/bin/python"), str(self.scripts / "stack.py")]
        command = [*script, "--workers", str(workers), "--port", str(port)]
        with subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                first = json.loads(process.stdout.readline())
                pids = json.loads(process.stdout.readline().removeprefix("pids ").replace("'", '"'))
                yield Running(port, pids, first["first_200_s"])
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(STOP_S)

    def load(self, running: Running, options: Sequence[str], folder: Path) -> Load:
        """Send requests, by a process of its own."""
        pids = folder / "pids.json"
        pids.write_text(json.dumps(running.pids), encoding="utf-8")
        command = [sys.executable, str(self.scripts / "load.py"), "--port", str(running.port), "--pids", str(pids)]
        command += ["-d", str(SECONDS), "--warm", str(WARM_UP_S), *options]
        answer = subprocess.run(command, env=self.environment, stdout=subprocess.PIPE, timeout=LOAD_S, check=True)
        found = json.loads(answer.stdout)
        if found["errs"] or not found["rps"]:
            raise BenchmarkError(f"requests failed: {found}")
        cpu_ms = sum(found["cpu"].values()) / found["rps"] * 1e3
        return Load(
            found["rps"], found["p50"], found["p99"], found["chunks_per_req"], cpu_ms, found["cpu"], found["other"]
        )


def environment() -> dict[str, str]:
    """As a user has it: Python keeps what it has compiled."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def configuration(model: Path, workers: int, step_ms: float) -> dict[str, Any]:
    """Ours, with the limits that the other system's simulated engine has."""
    return {
        "model": str(model),
        "served_model_name": MODEL,
        "engine": "sim",
        "max_model_len": 8192,
        "workers": {"both": {"count": workers, "max_num_seqs": 256}},
        "sim": {"kv_blocks": 16384, "block_size": 16, "prefill_ms_per_token": 0, "decode_step_ms": step_ms},
    }


@contextmanager
def ours(model: Path, workers: int, folder: Path, step_ms: float = 0.0) -> Iterator[Running]:
    """Until the end of the body."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "serving.yaml"
    file.write_text(yaml.safe_dump(configuration(model, workers, step_ms)), encoding="utf-8")
    with serve(file, folder, traces=False) as deployment:
        run = deployment.run
        pids = {process["name"]: process["pid"] for process in run["processes"]} | run["servers"]
        port = urlsplit(run["frontend"]).port
        assert port is not None
        yield Running(port, pids | {"supervisor": run["pid"]}, deployment.ready_s)


def run_of(system: str, rival: Rival, folder: Path) -> Run:
    """Both deployments of one system under all of their loads."""
    loads: dict[str, Load] = {}
    starts, memory = [], []
    for workers in sorted({workers for workers, _ in CASES.values()}):
        starting = rival.serve(workers) if system == "theirs" else ours(rival.home / "model", workers, folder / "ours")
        with starting as running:
            starts.append(running.start_s)
            for name, (wanted, options) in CASES.items():
                if wanted == workers:
                    loads[name] = rival.load(running, options, folder)
            memory.append(max(resident_mib(pid) for name, pid in running.pids.items() if name.startswith(FRONTEND)))
    return Run(starts[0], loads, memory[0])


def resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def gaps_ms(rival: Rival, folder: Path) -> list[float]:
    """Between what arrives of a stream whose engine makes a token every `STEP_MS`."""
    body = {"model": MODEL, "prompt": "hello world " * 64, "max_tokens": PACED_TOKENS, "stream": True}
    data = json.dumps(body | {"ignore_eos": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    gaps: list[float] = []
    with (
        ours(rival.home / "model", 2, folder / "paced", STEP_MS) as running,
        socket.create_connection(("127.0.0.1", running.port), timeout=LOAD_S) as connection,
    ):
        for _ in range(PACED_REQUESTS):
            connection.sendall(head % len(data) + data)
            reply, arrivals = b"", []
            while not reply.endswith(b"0\r\n\r\n"):
                part = connection.recv(65536)
                if not part:
                    raise BenchmarkError("the server closed a stream")
                reply += part
                arrivals.append(time.perf_counter())
            gaps += [(after - before) * 1e3 for before, after in pairwise(arrivals)]
    return gaps


def first_answer_s(folder: Path) -> float:
    """From `dynamo-lite serve configs/sim.yaml` to the first answer to a request."""
    port = free_port()
    command = [sys.executable, "-m", "dynamo_lite.cli", "serve", str(ROOT / "configs" / "sim.yaml")]
    command += ["--set", f"frontend.port={port}", "--set", f"state_dir={folder / 'start'}"]
    started = time.perf_counter()
    output = subprocess.DEVNULL
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=output, stderr=output) as process:
        try:
            while not answered(port):
                if process.poll() is not None or time.perf_counter() - started > START_S:
                    raise BenchmarkError("configs/sim.yaml did not start")
                time.sleep(POLL_S)
            return time.perf_counter() - started
        finally:
            process.terminate()
            process.wait(STOP_S)


def answered(port: int) -> bool:
    """Whether a completion is answered with 200."""
    body = json.dumps({"model": "smollm2-135m-instruct", "prompt": "hi there", "max_tokens": 2})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def measure(rival: Rival, rounds: int, folder: Path, console: Console) -> tuple[dict[str, list[Run]], list[float]]:
    """Runs by system, interleaved, each system first in turn; and starts of configs/sim.yaml."""
    runs: dict[str, list[Run]] = {"ours": [], "theirs": []}
    starts = []
    first_answer_s(folder)  # the model may have to be converted, and modules compiled
    with Progress(console=console, transient=True) as progress:
        for turn in progress.track(range(rounds), description="rounds"):
            for system in ("ours", "theirs") if turn % 2 else ("theirs", "ours"):
                runs[system].append(run_of(system, rival, folder))
            starts.append(first_answer_s(folder))
    return runs, starts


def bars_of(runs: Mapping[str, Sequence[Run]], gaps: Sequence[float], starts: Sequence[float]) -> list[Bar]:
    def median(system: str, case: str, field: str) -> float:
        return statistics.median(getattr(run.loads[case], field) for run in runs[system])

    def ratio(case: str, field: str) -> float:
        both = zip(runs["ours"], runs["theirs"], strict=True)
        return statistics.median(
            getattr(mine.loads[case], field) / getattr(other.loads[case], field) for mine, other in both
        )

    bars = []
    for case in ("32 clients", "long prompts"):
        bars += [Bar.of(f"{case}: {system}", median(system, case, "req_s"), "req/s") for system in runs]
        bars.append(Bar.of(f"{case}: requests, ours / theirs", ratio(case, "req_s"), "", ">= 1.2"))
        bars += [Bar.of(f"{case}: {system}, CPU", median(system, case, "cpu_ms"), "ms/req") for system in runs]
        limit = "<= 0.85" if case == "32 clients" else None
        bars.append(Bar.of(f"{case}: CPU, ours / theirs", ratio(case, "cpu_ms"), "", limit))
        bars += [Bar.of(f"{case}: {system}, p50", median(system, case, "p50_ms"), "ms") for system in runs]
    bars.append(Bar.of("1 client: ours, p50", median("ours", "1 client", "p50_ms"), "ms", "<= 3.6"))
    bars.append(Bar.of("1 client: theirs, p50", median("theirs", "1 client", "p50_ms"), "ms"))
    off = abs(statistics.median(gaps) - STEP_MS)
    bars.append(Bar.of(f"gap between tokens: off the step of {STEP_MS:g} ms by", off, "ms", "<= 1"))
    for system, bar in (("ours", "<= 190"), ("theirs", None)):
        memory = statistics.median(run.frontend_mib for run in runs[system])
        bars.append(Bar.of(f"frontend's memory after the load: {system}", memory, "MiB", bar))
    bars.append(Bar.of("start of configs/sim.yaml to a first answer", statistics.median(starts), "s", "<= 2"))
    theirs = statistics.median(run.start_s for run in runs["theirs"])
    bars.append(Bar.of("start of theirs to a first answer", theirs, "s"))
    return bars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rival", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--rival-home", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    console, machine = Console(stderr=True), report.machine()
    rival = Rival(options.rival.resolve(), options.rival_home.resolve())
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory(prefix="dynamo-lite-bench-") as folder:
        runs, starts = measure(rival, options.rounds, Path(folder), console)
        gaps = gaps_ms(rival, Path(folder))
    bars = bars_of(runs, gaps, starts)
    others = [load.other_cores for each in runs.values() for run in each for load in run.loads.values()]
    busy = statistics.median(others)
    report.show(f"{options.rounds} rounds of {SECONDS} s a load, other load {busy:.2f} cores", bars, Console())
    if options.json:
        raw = {system: [asdict(run) for run in each] for system, each in runs.items()}
        raw |= {"gaps_ms": report.spread(gaps), "first_answer_s": starts, "other_cores_busy": report.spread(others)}
        report.write(options.json, machine, bars, raw)


if __name__ == "__main__":
    main()
