"""What vLLM is started with."""

from __future__ import annotations

from typing import Any, Literal

import vllm
from vllm.config import KVEventsConfig, KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs

from dynamo_lite.config import ProcessSpec, WorkerGroup
from dynamo_lite.plane.wire import Incarnation, Role
from workers.connector.channel import WorkerEnd

_CPU_BLOCK_SIZE = 32  # vLLM's CPU attention takes multiples of 32
_CPU_KV_CACHE = 512 * 2**20


def arguments(
    spec: ProcessSpec, role: Role, workers: WorkerGroup, incarnation: Incarnation, channel: WorkerEnd, arena: str
) -> AsyncEngineArgs:
    """`arena`: path of the host tier's memory; empty without one."""
    config, transfer = spec.config, spec.config.kv_transfer
    device: Literal["cpu", "cuda"] = "cpu" if vllm.platforms.current_platform.is_cpu() else "cuda"
    host = config.kv_tiers.host
    values: dict[str, Any] = {
        "model": str(spec.model_path),
        "served_model_name": config.model_name,  # the label of vLLM's metrics
        "skip_tokenizer_init": True,  # the frontend tokenises
        "dtype": config.dtype,
        "kv_cache_dtype": config.kv_cache_dtype,
        "max_model_len": config.max_model_len,
        "tensor_parallel_size": workers.tensor_parallel,
        "max_num_seqs": workers.max_num_seqs,
        "enable_prefix_caching": True,
        "prefix_caching_hash_algo": "sha256_cbor",
        "enable_log_requests": False,
        "kv_events_config": KVEventsConfig(
            enable_kv_cache_events=True,
            publisher="zmq",
            endpoint=channel.endpoint("events"),
            replay_endpoint=channel.endpoint("replay"),
        ),
        "kv_transfer_config": KVTransferConfig(
            kv_connector="DynamoLiteConnector",
            kv_connector_module_path="workers.connector.connector",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={
                "channel": channel.path,
                "incarnation": incarnation,
                "min_remote_tokens": transfer.min_remote_tokens,
                "staging": transfer.staging_on(device),
                "piece": transfer.piece_on(device),
                "window": transfer.window,
                "threads": transfer.transport_threads,
                "transport": transfer.transport,
                "rdma_device": transfer.rdma_device,
                "verify": transfer.verify,
                "arena": arena,
                "second_use": host is not None and host.admission == "second_use",
                "timeout_s": transfer.timeout_ms / 1000,
            },
        ),
    }
    if device == "cpu":
        values |= {"enforce_eager": True, "block_size": _CPU_BLOCK_SIZE}
        values["kv_cache_memory_bytes"] = spec.kv_cache or _CPU_KV_CACHE
        if role.decodes:
            # A seeded request whose prompt is computed in parts ends vLLM's engine on CPU (0.32: "CPU Generator
            # does not use offset"). Prefill workers sample nothing that counts, so they keep computing in parts.
            values["enable_chunked_prefill"] = False
    elif spec.kv_cache:
        values["kv_cache_memory_bytes"] = spec.kv_cache
        # vLLM would else refuse to share a GPU, though with a given size it does not use this share of it.
        values["gpu_memory_utilization"] = 0.01
    if config.block_size:
        values["block_size"] = config.block_size
    return AsyncEngineArgs(**(values | workers.args))
