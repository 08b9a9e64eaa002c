"""Whether remote prefills on a GPU give the right tokens, also when the prefill worker is frozen or killed.

With a small model of random weights, whose tokens depend on all of the prompt, in float32, where it does not matter in
which order numbers are added up, and with a checksum of every piece.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.deployment import serve
from benchmarks.gpu.client import Client
from benchmarks.gpu.model import make_small
from benchmarks.gpu.ours import CUDA_GRAPHS, config, prompt
from dynamo_lite.plane.wire import InstanceRecord

TOKENS = 24
PARTS = (0.1, 0.5, 0.8, 0.95)  # of the time to the first token
RESTART_S = 90.0
LENGTHS = (1, 15, 16, 17, 500, 2048, 4096, 5000, 9000, 16000)


async def identity(client: Client) -> dict[str, Any]:
    """Whether the tokens after a remote prefill are those after a local one."""
    worker, prefill = client.worker("decode-0"), client.worker("prefill-0")
    same, seen = {}, set()
    for length in LENGTHS:
        token_ids = prompt(length, 77)
        remote = await (await client.send(token_ids, TOKENS, worker, prefill)).until_end()
        # With a seed the decode worker chooses the first token as well.
        seeded = await (await client.send(token_ids, TOKENS, worker, prefill, seed=1)).until_end()
        local = await (await client.send(token_ids, TOKENS, worker)).until_end()
        same[str(length)] = remote == seeded == local
        seen |= set(remote)
    print("identical:", same, "distinct tokens:", len(seen), flush=True)
    return {"same": same, "distinct_tokens": len(seen)}


async def faults(client: Client) -> list[dict[str, Any]]:
    """The prefill worker is frozen, woken, and killed, at several moments of its work."""
    worker, token_ids = client.worker("decode-0"), prompt(16_000, 88)
    expected = await (await client.send(token_ids, TOKENS, worker)).until_end()
    found: list[dict[str, Any]] = []
    for signal_number in (signal.SIGSTOP, signal.SIGKILL):
        for part in PARTS:
            prefill = await restarted(client, worker, token_ids)
            undisturbed = await client.send(token_ids, TOKENS, worker, prefill)
            same_before = await undisturbed.until_end() == expected
            stream = await client.send(token_ids, TOKENS, worker, prefill)
            await asyncio.sleep(part * undisturbed.token_s[0])
            with stopped(prefill.pid, signal_number):
                started = time.perf_counter()
                same = await stream.until_end() == expected
            told = {"fault": signal_number.name, "part": part, "same_tokens": same, "same_before": same_before}
            found.append(told | {"seconds": time.perf_counter() - started, "undisturbed_s": undisturbed.token_s[0]})
            print(found[-1], flush=True)
    return found


async def restarted(client: Client, worker: InstanceRecord, token_ids: list[int]) -> InstanceRecord:
    """The prefill worker, once it is there and has been heard of by the decode worker."""
    async with asyncio.timeout(RESTART_S):
        while True:
            for record in client.membership.instances.values():
                if record.name == "prefill-0" and psutil.pid_exists(record.pid):
                    stream = await client.send(token_ids[:500], 1, worker, record)
                    with suppress(RuntimeError):
                        await stream.until_end()
                        return record
            await asyncio.sleep(0.5)


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
    file = config(folder, make_small(folder / "random-1b"), engine, verify=True, dtype="float32")
    with serve(file, folder / "safety") as deployment:
        return asyncio.run(measure(deployment.run))
