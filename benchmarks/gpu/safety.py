"""Whether remote prefills on a GPU give the right tokens, also when the prefill worker is frozen or killed.

With a small model of random weights, whose tokens depend on all of the prompt, and a checksum of every piece.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.deployment import serve
from benchmarks.gpu.client import Client
from benchmarks.gpu.model import make_small
from benchmarks.gpu.ours import CUDA_GRAPHS, config, prompt

TOKENS = 24
LENGTHS = (1, 15, 16, 17, 500, 2048, 4096, 5000, 9000, 16000)


async def identity(client: Client) -> dict[str, Any]:
    """Whether the tokens after a remote prefill are those after a local one."""
    worker, prefill = client.worker("decode-0"), client.worker("prefill-0")
    same, seen = {}, set()
    for length in LENGTHS:
        token_ids = prompt(length, 77)
        remote = await (await client.send(token_ids, TOKENS, worker, prefill)).until_end()
        local = await (await client.send(token_ids, TOKENS, worker)).until_end()
        same[str(length)] = remote == local
        seen |= set(remote)
    print("identical:", same, "distinct tokens:", len(seen), flush=True)
    return {"same": same, "distinct_tokens": len(seen)}


async def faults(client: Client) -> dict[str, Any]:
    """The prefill worker is frozen, woken, and killed while it computes."""
    worker, prefill = client.worker("decode-0"), client.worker("prefill-0")
    found: dict[str, Any] = {}
    for name in ("freeze", "kill"):
        token_ids = prompt(16_000, 88)
        expected = await (await client.send(token_ids, TOKENS, worker)).until_end()
        stream = await client.send(token_ids, TOKENS, worker, prefill)
        await asyncio.sleep(0.15)  # into the prefill, which takes several times as long
        with stopped(prefill.pid, signal.SIGKILL if name == "kill" else signal.SIGSTOP):
            started = time.perf_counter()
            tokens = await stream.until_end()
            found[name] = {"same_tokens": tokens == expected, "seconds": time.perf_counter() - started}
        if name == "freeze":
            await asyncio.sleep(3)
            again = await client.send(token_ids, TOKENS, worker, prefill)
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


async def measure(run: dict[str, Any]) -> dict[str, Any]:
    async with Client.connect(run) as client:
        return {"identity": await identity(client), "faults": await faults(client)}


def main(folder: Path) -> dict[str, Any]:
    engine = {"compilation_config": CUDA_GRAPHS, "max_num_batched_tokens": 2048}
    with serve(config(folder, make_small(folder / "random-1b"), engine, verify=True), folder / "safety") as deployment:
        return asyncio.run(measure(deployment.run))
