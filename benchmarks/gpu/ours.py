"""Our own deployment, as `dynamo-lite serve` starts it: a prefill and a decode worker, on one GPU or one each."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
from pathlib import Path
from typing import Any

from benchmarks.deployment import serve
from benchmarks.gpu.client import Client
from benchmarks.gpu.model import MAX_LENGTH, VOCAB, make
from dynamo_lite.plane.wire import InstanceRecord

LENGTHS = (512, 2048, 4096, 8192, 16384)
BATCH = 64
BACKGROUND_PROMPT, BACKGROUND_TOKENS = 256, 4000
NEW_TOKENS = 4
# On a GPU shared by MPS a whole prompt goes before a batch's next tokens, as it does where one worker does both.
LATER = {"CUDA_MPS_CLIENT_PRIORITY": "1"}
CUDA_GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 72]}
# Where both workers share one GPU each has to be told how much of it is its own.
ENGINE: dict[str, Any] = {"load_format": "dummy", "compilation_config": CUDA_GRAPHS, "max_num_batched_tokens": 4096}


def prompt(length: int, seed: int) -> list[int]:
    numbers = random.Random(f"{length} {seed}")
    return [numbers.randrange(256, VOCAB - 300) for _ in range(length)]


def config(folder: Path, model: Path, engine: dict[str, Any], verify: bool, dtype: str = "bfloat16") -> Path:
    """The deployment's file."""
    worker = {"count": 1, "gpu_type": "auto", "max_num_seqs": 96, "args": engine}
    content = {
        "model": str(model),
        "served_model_name": model.name,
        "dtype": dtype,
        "max_model_len": MAX_LENGTH,
        "workers": {
            "prefill": {**worker, "kv_cache": "8GiB"},
            "decode": {**worker, "kv_cache": "20GiB", "env": LATER},
        },
        "kv_transfer": {"verify": verify},
    }
    file = folder / "gpu.yaml"
    file.write_text(json.dumps(content))  # JSON is YAML
    return file


async def timed(client: Client, length: int, seed: int, *prefill: InstanceRecord) -> tuple[float, float]:
    """Seconds to the first token of a prompt nobody has seen, and to the second."""
    stream = await client.send(prompt(length, seed), NEW_TOKENS, client.worker("decode-0"), *prefill)
    await stream.until_end()
    return stream.token_s[0], stream.token_s[1]


async def idle_ttft(client: Client, lengths: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Remote prefill beside computing the prompt on the decode worker, alternating, nothing else running."""
    prefill = client.worker("prefill-0")
    found: dict[str, Any] = {}
    for length in lengths:
        times: dict[str, list[float]] = {}
        for turn in range(rounds + 1):
            for way, seed, helpers in (("remote", 2 * turn, (prefill,)), ("local", 2 * turn + 1, ())):
                first, second = await timed(client, length, seed, *helpers)
                if turn:  # the first of each warms up
                    times.setdefault(f"{way}_s", []).append(first)
                    times.setdefault(f"{way}_second_s", []).append(second)
        found[str(length)] = times
        medians = {name: round(statistics.median(values) * 1e3, 1) for name, values in times.items()}
        print(f"{length:6d} tokens, ms: {medians}", flush=True)
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
    client.watched = {stream.request_id for stream in streams}
    found: dict[str, Any] = {"batch": BATCH, "length": length}
    found["alone_itl_s"] = await steps_during(client, asyncio.sleep(2))
    for turn, (name, helpers) in enumerate([("remote", (prefill,)), ("local", ())] * 2):
        times: list[float] = []

        async def requests(helpers: tuple[InstanceRecord, ...] = helpers, base: int = turn, to: Any = times) -> None:
            for number in range(rounds):
                first, _ = await timed(client, length, 10_000 + base * 100 + number, *helpers)
                to.append(first)

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


async def measure(run: dict[str, Any], quick: bool) -> dict[str, Any]:
    rounds = 2 if quick else 7
    async with Client.connect(run) as client:
        found: dict[str, Any] = {"idle": await idle_ttft(client, LENGTHS[:3] if quick else LENGTHS, rounds)}
        found["busy"] = await busy_ttft(client, 4096, rounds)
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
        attributes = prefill["attributes"]
        sent = {name: attributes[name] for name in ("pieces", "late_pieces") if name in attributes}
        found.append({"tokens": attributes["prompt_tokens"], **steps, **sent})
    return found


def late_pieces(stages: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """By the prompt's tokens: pieces of a transfer, and those still to be written after its last prefill step."""
    found: dict[str, dict[str, float]] = {}
    for tokens in sorted({stage["tokens"] for stage in stages}):
        mine = [stage for stage in stages if stage["tokens"] == tokens and "pieces" in stage]
        if mine:
            found[str(tokens)] = {
                "pieces": statistics.median(stage["pieces"] for stage in mine),
                "late_median": statistics.median(stage["late_pieces"] for stage in mine),
                "late_max": max(stage["late_pieces"] for stage in mine),
            }
    return found


def main(folder: Path, quick: bool) -> dict[str, Any]:
    with serve(config(folder, make(folder / "llama-8b-shape"), ENGINE, verify=False), folder / "run") as deployment:
        print(f"ready after {deployment.ready_s:.1f} s", flush=True)
        found = asyncio.run(measure(deployment.run, quick))
        found["ready_s"] = deployment.ready_s
    spans = [json.loads(line) for line in (folder / "run" / "traces.jsonl").read_text().splitlines()]
    found["stages"] = stages(spans)
    found["late_pieces"] = late_pieces(found["stages"])
    print("pieces, and those left after the last step:", found["late_pieces"], flush=True)
    found["transfers"] = [span["attributes"] for span in spans if span["name"] == "kv.transfer"]
    return found
