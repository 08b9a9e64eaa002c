"""The class that vLLM loads by `kv_connector_module_path`: hands each call to the scheduler's or the worker's half.

One connector serves vLLM 0.26–0.33: it uses `get_finished` (not `get_transfer_results`) and no method that changed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from dynamo_lite.processes import die_with_parent
from dynamo_lite.rdma import rdma_ports
from dynamo_lite.transports import usable_ports
from workers.connector.channel import ConnectorEnd
from workers.connector.hashes import name_salts
from workers.connector.offload_plan import OffloadPlans
from workers.connector.protocol import (
    Alive,
    Command,
    FirstToken,
    GrantSlots,
    Hello,
    Probe,
    StepPlan,
    TierChanged,
)
from workers.connector.scheduler import SchedulerSide
from workers.connector.settings import MoverSettings
from workers.connector.worker import WorkerSide
from workers.transfer.fabric import Fabric
from workers.transfer.layout import ModelKv


@dataclass
class StepMetadata(KVConnectorMetadata):
    """A step's plan in the wrapper that vLLM passes from scheduler to workers."""

    plan: StepPlan = field(default_factory=StepPlan)


def _model_kv(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> ModelKv:
    cache_dtype: str = vllm_config.cache_config.cache_dtype
    return ModelKv(
        kv_heads=vllm_config.model_config.get_total_num_kv_heads(),
        tensor_parallel=vllm_config.parallel_config.tensor_parallel_size,
        key_size=kv_cache_config.kv_cache_groups[0].kv_cache_spec.head_size,
        dtype=cache_dtype if cache_dtype.startswith("fp8") else "",
    )


class DynamoLiteConnector(KVConnectorBase_V1, SupportsHMA):
    """vLLM's `KVConnectorBase_V1`, for models with one KV cache group."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if len(kv_cache_config.kv_cache_groups) != 1:
            raise ValueError("models with several KV cache groups (hybrid attention) cannot be served apart yet")
        die_with_parent()  # this process is vLLM's; it must not outlive the worker process
        extra: dict[str, Any] = vllm_config.kv_transfer_config.kv_connector_extra_config
        channel = ConnectorEnd(extra["channel"])
        self._blocks: int = kv_cache_config.num_blocks
        self._kv_cache_dtype: str = vllm_config.cache_config.cache_dtype
        self._model_kv = _model_kv(vllm_config, kv_cache_config)
        self._scheduler: SchedulerSide | None = None
        self._offloads: OffloadPlans | None = None
        self._worker: WorkerSide | None = None
        self._channel = channel
        if role is KVConnectorRole.SCHEDULER:
            name_salts()
            block_size = vllm_config.cache_config.block_size
            self._offloads = OffloadPlans(block_size, extra["second_use"]) if extra["arena"] else None
            self._scheduler = SchedulerSide(block_size, extra["min_remote_tokens"], channel.report, self._offloads)
            channel.listen(self._told, lambda: None)
            channel.report(Hello(rank=-1, pid=os.getpid()))
        else:
            rank = get_tensor_model_parallel_rank()
            settings = MoverSettings(
                rank, extra["staging"], extra["piece"], extra["window"], extra["timeout_s"], extra["verify"],
                extra["arena"], vllm_config.parallel_config.tensor_parallel_size,
            )  # fmt: skip
            ports = usable_ports(extra["transport"], rdma_ports(), extra["rdma_device"])
            rdma = ports[0] if ports else None
            name = f"{extra['incarnation']}:{rank}"
            engine = partial(Fabric, name, extra["threads"], extra["transport"], rdma)
            self._worker = WorkerSide(settings, engine, channel)

    # ---- scheduler ----

    def _told(self, command: Command) -> None:
        """By the worker process, on the channel's thread. Probes may be answered between any two steps."""
        if isinstance(command, FirstToken):
            self._schedules.first_token(command)
        elif isinstance(command, Probe):
            self._channel.report(Alive(-1))
        elif isinstance(command, GrantSlots) and self._offloads is not None:
            self._offloads.granted(command)
        elif isinstance(command, TierChanged) and self._offloads is not None:
            self._offloads.changed(command)

    @property
    def _schedules(self) -> SchedulerSide:
        assert self._scheduler is not None, "called on a worker's connector"
        return self._scheduler

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        self._schedules.arrived(request)  # here, as vLLM 0.26 has no hook for a new request
        tokens = self._schedules.external_tokens(request, num_computed_tokens)
        return tokens, tokens > 0

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self._schedules.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepMetadata:
        return StepMetadata(self._schedules.plan(scheduler_output))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self._schedules.received(connector_output.finished_recving or ())

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self._schedules.finished(request), None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._schedules.finished(request), None

    # ---- worker ----

    @property
    def _works(self) -> WorkerSide:
        assert self._worker is not None, "called on the scheduler's connector"
        return self._worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        model, cache = self._model_kv, next(iter(kv_caches.values()))
        if cache.device.type == "cpu":
            from workers.connector.packing import packing  # noqa: PLC0415  # CUDA builds have no CPU attention

            model = packing(cache, self._kv_cache_dtype, model)
        self._works.register(kv_caches, self._blocks, model, self._told_apart(kv_caches))

    def _told_apart(self, kv_caches: dict[str, torch.Tensor]) -> list[str]:
        """The layers, if each has KV of its own and is called once in a step, for all of its tokens; else none."""
        alone = len({cache.data_ptr() for cache in kv_caches.values()}) == len(kv_caches)
        config = self._vllm_config
        once = config.speculative_config is None and not config.parallel_config.use_ubatching
        return list(kv_caches) if alone and once else []

    def bind_connector_metadata(self, connector_metadata: StepMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._works.bind(connector_metadata.plan)

    def handle_preemptions(self, kv_connector_metadata: StepMetadata) -> None:
        self._works.before_forward(kv_connector_metadata.plan)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        return  # receives were opened when the step's plan came

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        self._works.computed(layer_name)

    def wait_for_save(self) -> None:
        self._works.after_forward()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        ended = self._works.ended(finished_req_ids)
        return ended.sent or None, ended.received or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._works.take_invalid_blocks()

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
        else:
            self._channel.close()
