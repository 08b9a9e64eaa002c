"""The environment variables of worker processes."""

from __future__ import annotations

from collections.abc import Mapping

from dynamo_lite.config import WorkerGroup
from dynamo_lite.plan import Plan, PlannedProcess
from dynamo_lite.transfer_plan import TransferPlan
from kvbm.seed import SEED

# Each measured: without them two CPU engines share one core, start in 20–44 s instead of 3–5 s, and compile C++ for
# half a minute at the first request that asks for logprobs.
VLLM_ON_CPU = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",
}
VLLM_ANYWHERE = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",  # the model is in a folder by now
    "TOKENIZERS_PARALLELISM": "false",
    "NIXL_LOG_LEVEL": "WARN",
}
# vLLM seeds its block hashes from it: with another one, or none, workers would hash otherwise than the router, and no
# prefix would ever be found.
HASHES = {"PYTHONHASHSEED": SEED}


def environment(plan: Plan, process: PlannedProcess, inherited: Mapping[str, str]) -> dict[str, str]:
    """`inherited` is the user's own environment: it wins over our UCX settings, the file's `env` over nearly all."""
    if process.role == "frontend" or plan.config.engine == "sim":
        return dict(inherited)
    group: WorkerGroup = getattr(plan.config.workers, process.role)
    ours = VLLM_ANYWHERE | {"OMP_NUM_THREADS": str(process.threads)}
    if process.device == "cpu":
        ours |= VLLM_ON_CPU
    else:
        ours["CUDA_VISIBLE_DEVICES"] = ",".join(plan.machine.gpus[index].address for index in process.gpus)
    ucx = TransferPlan(plan.config, plan.machine.rdma_ports).environment(process.device)
    return {**ucx, **inherited, **ours, **group.env, **HASHES}
