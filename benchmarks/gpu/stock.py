"""Stock vLLM with its NixlConnector: a prefill and a decode engine in two processes, by vLLM's own API.

They share one GPU, or have one each.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import statistics
import time
from contextlib import ExitStack, closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.model import MAX_LENGTH, make
from benchmarks.gpu.ours import CUDA_GRAPHS, LENGTHS, prompt

START_S = 240.0
REQUEST_S = 60.0


def engine(role: str, model: str, port: int, gpu: int, pipe: Connection) -> None:
    """A process: serves `(token_ids, new tokens, kv_transfer_params)` with `(seconds, tokens, params)`."""
    os.setpgrp()  # vLLM's own processes do not end with this one: all of them are killed as a group
    os.environ |= {
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port), "UCX_RNDV_THRESH": "inf", "CUDA_VISIBLE_DEVICES": str(gpu)
    }  # fmt: skip
    from vllm import LLM, SamplingParams  # noqa: PLC0415  # after the environment
    from vllm.config import KVTransferConfig  # noqa: PLC0415

    llm = LLM(
        model=model, load_format="dummy", dtype="bfloat16", max_model_len=MAX_LENGTH, max_num_seqs=96,
        skip_tokenizer_init=True, compilation_config=CUDA_GRAPHS, max_num_batched_tokens=4096,
        kv_cache_memory_bytes=(8 if role == "prefill" else 20) * 2**30, enable_prefix_caching=True,
        gpu_memory_utilization=0.01,  # of no effect with a given size, but vLLM would refuse to share the GPU
        kv_transfer_config=KVTransferConfig(kv_connector="NixlConnector", kv_role="kv_both"),
    )  # fmt: skip
    pipe.send("ready")
    while True:
        token_ids, new_tokens, params = pipe.recv()
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        if params:
            sampling.extra_args = {"kv_transfer_params": params}
        started = time.perf_counter()
        (answer,) = llm.generate({"prompt_token_ids": token_ids}, sampling, use_tqdm=False)
        pipe.send((time.perf_counter() - started, list(answer.outputs[0].token_ids), answer.kv_transfer_params))


class Engine:
    """One of the two."""

    def __init__(self, role: str, model: str, port: int, gpu: int) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=engine, args=(role, model, port, gpu, theirs), name=role)
        self._process.start()

    def take(self, seconds: float) -> Any:
        if not self._pipe.poll(seconds):
            raise TimeoutError(f"{self._process.name} does not answer")
        return self._pipe.recv()

    def ask(self, token_ids: list[int], new_tokens: int, params: dict[str, Any] | None = None) -> Any:
        self._pipe.send((token_ids, new_tokens, params))
        return self.take(REQUEST_S)

    def close(self) -> None:
        """Asked nicely, it would wait for connections that nobody closes."""
        with suppress(ProcessLookupError):  # it has not become a group yet, or has ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join(10)


def main(folder: Path, quick: bool) -> dict[str, Any]:
    """Seconds to the first token: prefill and transfer (`remote_s`), and computed by the decode engine (`local_s`)."""
    model = str(make(folder / "model"))
    started = time.perf_counter()
    with ExitStack() as engines:
        first = engines.enter_context(closing(Engine("prefill", model, 5701, 0)))
        first.take(START_S)  # one after the other: vLLM measures free memory while it starts
        second = engines.enter_context(closing(Engine("decode", model, 5801, torch.cuda.device_count() - 1)))
        second.take(START_S)
        found: dict[str, Any] = {"ready_s": time.perf_counter() - started}
        for length in LENGTHS[:3] if quick else LENGTHS:
            found[str(length)] = compare(first, second, length, 2 if quick else 5)
    return found


def compare(first: Engine, second: Engine, length: int, rounds: int) -> dict[str, Any]:
    remote, local, prefills = [], [], []
    for turn in range(rounds + 1):
        token_ids = prompt(length, 5000 + 2 * turn)
        asked = {"do_remote_decode": True, "do_remote_prefill": False}
        prefill_s, _, params = first.ask(token_ids, 1, asked)
        decode_s, _, _ = second.ask(token_ids, 1, params)
        prefills.append(prefill_s)
        remote.append(prefill_s + decode_s)
        local.append(second.ask(prompt(length, 5001 + 2 * turn), 1)[0])
    print(
        f"stock {length:6d} tokens: remote {statistics.median(remote[1:]) * 1e3:7.1f} ms, "
        f"local {statistics.median(local[1:]) * 1e3:7.1f} ms", flush=True,
    )  # fmt: skip
    return {"remote_s": remote[1:], "local_s": local[1:], "prefill_s": prefills[1:]}
