"""The host tier on a GPU: whether what comes from it gives the right tokens, and what it saves.

First a small model of random weights in float32, whose tokens depend on all of the prompt; then an 8B model's shape.
The device has room for some prompts only; more of them go round, so that each has left it when it comes again.
"""

from __future__ import annotations

import asyncio
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.deployment import serve
from benchmarks.gpu.client import Client
from benchmarks.gpu.model import MAX_LENGTH, make, make_small
from benchmarks.gpu.ours import prompt
from kvbm.events import Tier

TOKENS = 24
PAUSE_S = 0.3
IDENTITY = (17, 500, 2048, 5000)
FLUSH = (5, 8000)  # prompts, tokens: more than the device holds, and with the others less than the host tier does
# Length: prompts that go round, and how often. The device holds 32,768 tokens, the host tier 57,344 beside slots ahead.
ROUNDS = {4096: (12, 2), 16384: (3, 4)}
EAGER: dict[str, Any] = {"enforce_eager": True, "max_num_batched_tokens": 4096}


def config(folder: Path, model: Path, dtype: str, kv_cache: str, engine: dict[str, Any]) -> Path:
    content = {
        "model": str(model),
        "served_model_name": model.name,
        "dtype": dtype,
        "max_model_len": MAX_LENGTH,
        "workers": {"both": {"count": 1, "max_num_seqs": 96, "kv_cache": kv_cache, "args": engine}},
        "kv_tiers": {"host": {"size": "8GiB"}},
    }
    file = folder / f"tiers-{model.name}.yaml"
    file.write_text(json.dumps(content))  # JSON is YAML
    return file


async def ask(client: Client, token_ids: list[int], salt: str, new_tokens: int) -> tuple[float, list[int], int]:
    """Seconds to the first token, the tokens, and how many of the prompt's were not computed."""
    stream = await client.send(token_ids, new_tokens, client.worker("both-0"), salt=salt)
    tokens = await stream.until_end()
    return stream.token_s[0], tokens, stream.cached_tokens


async def identity(run: dict[str, Any]) -> dict[str, Any]:
    """The same prompts three times: computed; after others have taken the device; and computed as another tenant's."""
    found: dict[str, Any] = {}
    async with Client.connect(run) as client:
        prompts = {length: prompt(length, 177) for length in IDENTITY}
        first = {length: await ask(client, one, "a", TOKENS) for length, one in prompts.items()}
        for number in range(FLUSH[0]):
            await ask(client, prompt(FLUSH[1], 300 + number), "flush", 1)
        for length, one in prompts.items():
            _, tokens, cached = await ask(client, one, "a", TOKENS)
            _, computed, none = await ask(client, one, "b", TOKENS)
            same = tokens == first[length][1] == computed
            found[str(length)] = {"same": same, "cached_tokens": cached, "cached_otherwise": none}
    print("tokens from the host tier:", found, flush=True)
    return found


async def ttft(run: dict[str, Any]) -> dict[str, Any]:
    """Seconds to the first token of prompts that are computed, and when they come again."""
    found: dict[str, Any] = {}
    async with Client.connect(run) as client:
        for number in range(3):
            await ask(client, prompt(16384, 400 + number), "warm", 1)
        await ask(client, prompt(16384, 400), "warm", 1)
        for length, (count, rounds) in ROUNDS.items():
            prompts = [prompt(length, 500 + number) for number in range(count)]
            turns = [[await ask(client, one, f"round {length}", 2) for one in prompts] for _ in range(rounds)]
            paused = []
            for number in range(count // 2):  # nothing of an earlier prompt is still on its way to the tier
                await asyncio.sleep(PAUSE_S)
                paused.append(await ask(client, prompt(length, 900 + number), "paused", 2))
            found[str(length)] = {
                "paused_s": [seconds for seconds, _, _ in paused],
                "computed_s": [seconds for seconds, _, cached in turns[0] if not cached],
                "onboarded_s": [seconds for turn in turns[1:] for seconds, _, cached in turn if cached],
                "not_onboarded": sum(not cached for turn in turns[1:] for _, _, cached in turn),
            }
            medians = {
                name: round(statistics.median(values) * 1e3, 1)
                for name, values in found[str(length)].items()
                if name.endswith("_s") and values
            }
            print(f"{length:6d} tokens, ms: {medians}", flush=True)
    return found


def spans_of(folder: Path) -> list[dict[str, Any]]:
    """What the worker said of each onboarding."""
    spans = [json.loads(line) for line in (folder / "traces.jsonl").read_text().splitlines()]
    found = [span["attributes"] for span in spans if span["name"] == "kv.onboard"]
    assert all(attributes["tier"] == Tier.HOST.value for attributes in found)
    return found


def main(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    small = config(folder, make_small(folder / "random-1b"), "float32", "4GiB", EAGER)
    with serve(small, folder / "tiers-small") as deployment:
        found["identity"] = asyncio.run(identity(deployment.run))
    engine = {"max_num_batched_tokens": 4096, "load_format": "dummy"}  # with CUDA graphs, as one serves
    large = config(folder, make(folder / "llama-8b-shape"), "bfloat16", "4GiB", engine)
    with serve(large, folder / "tiers") as deployment:
        found["ttft"] = asyncio.run(ttft(deployment.run))
    found["onboards"] = spans_of(folder / "tiers")
    return found
