from __future__ import annotations

from typing import Any

from dynamo_lite.config import Config
from dynamo_lite.environment import environment
from dynamo_lite.machine import Gpu, Machine
from dynamo_lite.plan import Plan, resolve
from kvbm.seed import SEED

GIB = 2**30


def plan(build: str = "cpu", gpus: tuple[Gpu, ...] = (), **settings: Any) -> Plan:
    machine = Machine(cores=8, memory=64 * GIB, free_memory=64 * GIB, gpus=gpus, vllm_build=build)
    return resolve(Config.model_validate(settings), machine=machine)


def of(made: Plan, name: str, inherited: dict[str, str] | None = None) -> dict[str, str]:
    process = next(process for process in made.processes if process.name == name)
    return environment(made, process, inherited or {})


def test_cpu_workers_get_their_threads_and_what_vllm_needs_on_cpu() -> None:
    found = of(plan(), "decode-0", {"PATH": "/bin", "OMP_NUM_THREADS": "99"})
    assert found["OMP_NUM_THREADS"] == "4"
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert found["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert found["TORCHDYNAMO_DISABLE"] == "1"
    assert found["HF_HUB_OFFLINE"] == "1"
    assert found["PATH"] == "/bin"


def test_the_users_own_ucx_settings_win() -> None:
    made = plan(build="cpu", kv_transfer={"rdma_device": "mlx5_0"})
    assert of(made, "decode-0")["UCX_NET_DEVICES"] == "mlx5_0:1"
    assert of(made, "decode-0")["UCX_RNDV_THRESH"] == "inf"
    mine = of(made, "decode-0", {"UCX_NET_DEVICES": "eth0", "UCX_RNDV_THRESH": "8k"})
    assert (mine["UCX_NET_DEVICES"], mine["UCX_RNDV_THRESH"]) == ("eth0", "8k")


def test_the_files_env_wins_over_everything() -> None:
    made = plan(workers={"decode": {"env": {"OMP_NUM_THREADS": "3", "UCX_LOG_LEVEL": "info"}}})
    found = of(made, "decode-0", {"UCX_LOG_LEVEL": "error"})
    assert (found["OMP_NUM_THREADS"], found["UCX_LOG_LEVEL"]) == ("3", "info")


def test_gpu_workers_see_only_their_gpus() -> None:
    gpus = tuple(Gpu(address, "H100", 80 * GIB) for address in ("2", "3", "5"))
    made = plan("cuda", gpus, workers={"prefill": {}, "decode": {"tensor_parallel": 2}})
    assert of(made, "prefill-0")["CUDA_VISIBLE_DEVICES"] == "2"
    assert of(made, "decode-0")["CUDA_VISIBLE_DEVICES"] == "3,5"
    assert "TORCHDYNAMO_DISABLE" not in of(made, "decode-0")


def test_frontends_and_simulated_workers_get_the_environment_as_it_is() -> None:
    assert of(plan(), "frontend-0", {"A": "b"}) == {"A": "b"}
    assert of(plan(engine="sim"), "decode-0", {"A": "b"}) == {"A": "b"}


def test_every_engine_hashes_blocks_as_the_router_does_whatever_the_user_s_shell_or_file_says() -> None:
    assert of(plan(), "decode-0", {})["PYTHONHASHSEED"] == SEED
    made = plan(workers={"both": {"env": {"PYTHONHASHSEED": "8"}}})
    assert of(made, "both-0", {"PYTHONHASHSEED": "7"})["PYTHONHASHSEED"] == SEED
