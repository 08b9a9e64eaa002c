"""Prefill and decode with other tensor parallelism, on two GPUs that their ranks share: the tokens must be the same.

In float32, with a small model of random weights, whose tokens depend on all of the prompt, and checksums of all pieces.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from benchmarks.deployment import serve
from benchmarks.gpu.client import Client
from benchmarks.gpu.model import MAX_LENGTH, make_small
from benchmarks.gpu.ours import prompt

TOKENS = 24
LENGTHS = (1, 15, 16, 17, 500, 2048, 4096, 5000, 9000)
PAIRS = ((2, 1), (1, 2))  # tensor parallelism of prefill and decode
ENGINE: dict[str, Any] = {"enforce_eager": True, "max_num_batched_tokens": 2048, "disable_custom_all_reduce": True}
WITHOUT_MULTICAST = {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "NCCL_NVLS_ENABLE": "0"}


def config(folder: Path, model: Path, prefill: int, decode: int) -> Path:
    worker = {"count": 1, "max_num_seqs": 16, "kv_cache": "4GiB", "args": ENGINE, "env": WITHOUT_MULTICAST}
    content = {
        "model": str(model),
        "served_model_name": model.name,
        "dtype": "float32",
        "max_model_len": MAX_LENGTH,
        "workers": {
            "prefill": {**worker, "tensor_parallel": prefill},
            "decode": {**worker, "tensor_parallel": decode},
        },
        "kv_transfer": {"verify": True},
    }
    file = folder / f"unequal-{prefill}-{decode}.yaml"
    file.write_text(json.dumps(content))  # JSON is YAML
    return file


async def tokens_of(run: dict[str, Any]) -> dict[str, dict[str, list[int]]]:
    """Of each prompt, prefilled by the prefill worker, and computed by the decode worker alone."""
    found: dict[str, dict[str, list[int]]] = {"remote": {}, "local": {}}
    async with Client.connect(run) as client:
        worker, prefill = client.worker("decode-0"), client.worker("prefill-0")
        for length in LENGTHS:
            for way, helpers in (("remote", (prefill,)), ("local", ())):
                stream = await client.send(prompt(length, 77), TOKENS, worker, *helpers)
                found[way][str(length)] = await stream.until_end()
    return found


def transfers_of(folder: Path) -> list[dict[str, Any]]:
    spans = [json.loads(line) for line in (folder / "traces.jsonl").read_text().splitlines()]
    return [span["attributes"] for span in spans if span["name"] == "kv.transfer"]


def main(folder: Path) -> dict[str, Any]:
    """The reference is what a decode worker of one rank computes alone."""
    model = make_small(folder / "random-1b")
    found: dict[str, Any] = {}
    for prefill, decode in PAIRS:
        own = folder / f"unequal-{prefill}-{decode}"
        with serve(config(folder, model, prefill, decode), own) as deployment:
            tokens = asyncio.run(tokens_of(deployment.run))
        found[f"{prefill} to {decode}"] = {"tokens": tokens, "transfers": transfers_of(own)}
    reference = found["2 to 1"]["tokens"]["local"]
    for name, one in found.items():
        one["same"] = {way: tokens == reference for way, tokens in one["tokens"].items()}
        print(name, one["same"], len({token for each in reference.values() for token in each}), flush=True)
    return found
