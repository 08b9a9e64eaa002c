"""Our own deployment on one GPU: a prefill and a decode worker that share it, as `dynamo-lite serve` starts them."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.deployment import serve
from benchmarks.gpu.client import Client, Stream
from benchmarks.gpu.model import MAX_LENGTH, VOCAB, make
from dynamo_lite.plane.wire import InstanceRecord

LENGTHS = (512, 2048, 4096, 8192, 16384)
BATCH = 64
BACKGROUND_PROMPT, BACKGROUND_TOKENS = 256, 4000
IDENTITY_TOKENS = 24
CUDA_GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 72]}
# Both workers share one GPU, so each is told how much of it is its own.
ENGINE: dict[str, Any] = {"load_format": "dummy", "compilation_config": CUDA_GRAPHS, "max_num_batched_tokens": 4096}


def prompt(length: int, seed: int) -> list[int]:
    numbers = random.Random(f"{length} {seed}")
    return [numbers.randrange(256, VOCAB - 300) for _ in range(length)]


def config(folder: Path, verify: bool) -> Path:
    """The deployment's file."""
    worker = {"count": 1, "gpu_type": "auto", "max_num_seqs": 96, "args": ENGINE}
    content = {
        "model": str(make(folder / "model")),
        "served_model_name": "llama-8b-shape",
        "dtype": "bfloat16",
        "max_model_len": MAX_LENGTH,
        "workers": {
            "prefill": {**worker, "kv_cache": "8GiB"},
            "decode": {**worker, "kv_cache": "20GiB"},
        },
        "kv_transfer": {"verify": verify},
    }
    file = folder / "gpu.yaml"
    file.write_text(json.dumps(content))  # JSON is YAML
    return file


async def timed(client: Client, length: int, seed: int, *prefill: InstanceRecord) -> float:
    """Seconds to the first token of a prompt nobody has seen."""
    stream = await client.send(prompt(length, seed), 1, client.worker("decode-0"), *prefill)
    seconds = await stream.until_first()
    await stream.until_end()
    return seconds


async def idle_ttft(client: Client, lengths: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Remote prefill beside computing the prompt on the decode worker, alternating, nothing else running."""
    prefill = client.worker("prefill-0")
    found: dict[str, Any] = {}
    for length in lengths:
        remote, local = [], []
        for turn in range(rounds + 1):
            remote.append(await timed(client, length, 2 * turn, prefill))
            local.append(await timed(client, length, 2 * turn + 1))
        found[str(length)] = {"remote_s": remote[1:], "local_s": local[1:]}  # the first of each warms up
        print(
            f"{length:6d} tokens: remote {statistics.median(remote[1:]) * 1e3:7.1f} ms, "
            f"local {statistics.median(local[1:]) * 1e3:7.1f} ms", flush=True,
        )  # fmt: skip
    return found


async def busy_ttft(client: Client, length: int, rounds: int) -> dict[str, Any]:
    """The same while the decode worker generates for a batch, and what that does to the batch's tokens."""
    worker, prefill = client.worker("decode-0"), client.worker("prefill-0")
    streams = [
        await client.send(prompt(BACKGROUND_PROMPT, 1000 + number), BACKGROUND_TOKENS, worker)
        for number in range(BATCH)
    ]
    for stream in streams:
        await stream.until_first()
    found: dict[str, Any] = {"batch": BATCH, "length": length}
    found["alone_itl_s"] = await steps_during(client, asyncio.sleep(2))
    for turn, (name, helpers) in enumerate([("remote", (prefill,)), ("local", ())] * 2):
        times: list[float] = []

        async def requests(helpers: tuple[InstanceRecord, ...] = helpers, base: int = turn, to: Any = times) -> None:
            for number in range(rounds):
                to.append(await timed(client, length, 10_000 + base * 100 + number, *helpers))

        gaps = await steps_during(client, requests())
        found.setdefault(f"{name}_s", []).extend(times)
        found.setdefault(f"{name}_itl_s", []).extend(gaps)
    for stream in streams:
        await client.cancel(stream, worker)
    print("busy:", {key: summary(value) for key, value in found.items() if key.endswith("_s")}, flush=True)
    return found


async def steps_during(client: Client, work: Any) -> list[float]:
    """Seconds between the decode worker's steps while `work` is done."""
    client.steps.clear()
    await work
    times = list(client.steps)
    return [after - before for before, after in itertools.pairwise(times)]


def summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median_ms": round(statistics.median(ordered) * 1e3, 2),
        "p99_ms": round(ordered[int(len(ordered) * 0.99)] * 1e3, 2),
        "max_ms": round(ordered[-1] * 1e3, 2),
        "count": len(ordered),
    }


async def identity(client: Client, lengths: tuple[int, ...]) -> dict[str, bool]:
    """Whether the tokens after a remote prefill are those after a local one."""
    worker, prefill = client.worker("decode-0"), client.worker("prefill-0")
    same = {}
    for length in lengths:
        token_ids = prompt(length, 77)
        remote = await (await client.send(token_ids, IDENTITY_TOKENS, worker, prefill)).until_end()
        local = await (await client.send(token_ids, IDENTITY_TOKENS, worker)).until_end()
        same[str(length)] = remote == local
    print("identical:", same, "distinct tokens:", len(set(remote)), flush=True)
    return same


async def faults(client: Client) -> dict[str, Any]:
    """The prefill worker is frozen, woken, and killed while it computes."""
    worker, prefill = client.worker("decode-0"), client.worker("prefill-0")
    found: dict[str, Any] = {}
    for name in ("freeze", "kill"):
        token_ids = prompt(16_000, 88)
        expected = await (await client.send(token_ids, IDENTITY_TOKENS, worker)).until_end()
        stream = await client.send(token_ids, IDENTITY_TOKENS, worker, prefill)
        await asyncio.sleep(0.15)  # into the prefill, which takes several times as long
        with stopped(prefill.pid, signal.SIGKILL if name == "kill" else signal.SIGSTOP):
            started = time.perf_counter()
            tokens = await stream.until_end()
            found[name] = {"same_tokens": tokens == expected, "seconds": time.perf_counter() - started}
        if name == "freeze":
            await asyncio.sleep(3)
            again: Stream = await client.send(token_ids, IDENTITY_TOKENS, worker, prefill)
            found["after thaw"] = {"same_tokens": await again.until_end() == expected}
        print(name, found, flush=True)
    return found


@contextmanager
def stopped(pid: int, how: signal.Signals) -> Iterator[None]:
    """The worker and its engine, for the length of the body."""
    process = psutil.Process(pid)
    everyone = [process, *process.children(recursive=True)]
    for one in everyone:
        os.kill(one.pid, how)
    try:
        yield
    finally:
        if how == signal.SIGSTOP:
            for one in everyone:
                os.kill(one.pid, signal.SIGCONT)


async def measure(run: dict[str, Any], quick: bool) -> dict[str, Any]:
    rounds = 2 if quick else 7
    async with Client.connect(run) as client:
        found: dict[str, Any] = {"idle": await idle_ttft(client, LENGTHS[:3] if quick else LENGTHS, rounds)}
        found["identical"] = await identity(client, (1, 15, 16, 17, 500, 4096, 5000))
        found["busy"] = await busy_ttft(client, 4096, rounds)
        found["faults"] = await faults(client)
    return found


def stages(spans: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Where a remotely prefilled request's time went, in milliseconds, in the order of the requests."""
    traces: dict[str, dict[str, dict[str, Any]]] = {}
    for span in spans:
        traces.setdefault(span["trace_id"], {})[span["name"]] = span
    found = []
    for trace in sorted(traces.values(), key=lambda trace: min(span["start_ns"] for span in trace.values())):
        if not trace.keys() >= {"decode", "prefill", "kv.transfer"}:
            continue
        decode, prefill, transfer = (trace[name] for name in ("decode", "prefill", "kv.transfer"))
        marks = [decode["start_ns"], prefill["start_ns"], transfer["start_ns"], transfer["end_ns"], decode["end_ns"]]
        names = ("until prefill", "until first piece", "transfer", "until end")
        steps = {
            name: (after - before) / 1e6 for name, (before, after) in zip(names, itertools.pairwise(marks), strict=True)
        }
        found.append({"tokens": prefill["attributes"]["prompt_tokens"], **steps})
    return found


def main(folder: Path, quick: bool, verify: bool) -> dict[str, Any]:
    with serve(config(folder, verify), folder / "run") as deployment:
        print(f"ready after {deployment.ready_s:.1f} s", flush=True)
        found = asyncio.run(measure(deployment.run, quick))
        found["ready_s"] = deployment.ready_s
    spans = [json.loads(line) for line in (folder / "run" / "traces.jsonl").read_text().splitlines()]
    found["stages"] = stages(spans)
    found["transfers"] = [span["attributes"] for span in spans if span["name"] == "kv.transfer"]
    return found
