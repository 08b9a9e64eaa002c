from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dynamo_lite.config import Config
from dynamo_lite.config_file import load_config
from dynamo_lite.errors import ConfigError
from dynamo_lite.machine import Gpu, Machine
from dynamo_lite.model_shape import ModelShape
from dynamo_lite.plan import Plan, resolve
from dynamo_lite.plan_text import describe

GIB = 2**30
LAPTOP = Machine(cores=8, memory=16 * GIB, free_memory=12 * GIB, vllm_build="cpu")
H100 = tuple(Gpu(str(index), "NVIDIA H100 80GB HBM3", 80 * GIB) for index in range(4))
GPU_HOST = Machine(cores=64, memory=512 * GIB, free_memory=500 * GIB, gpus=H100, vllm_build="cuda")
SMALL = ModelShape(weights=269 * 10**6, dtype="bfloat16", layers=30, kv_heads=3, head_dim=64, max_length=8192)
CONFIGS = Path(__file__).parents[3] / "configs"


def plan(machine: Machine = LAPTOP, shape: ModelShape | None = SMALL, **settings: Any) -> Plan:
    return resolve(Config.model_validate(settings), machine=machine, shape=shape, cache=Path("/cache"))


def names(made: Plan) -> list[str]:
    return [process.name for process in made.processes]


def test_the_default_is_one_frontend_one_prefill_and_one_decode_worker_on_cpu() -> None:
    made = plan()
    assert names(made) == ["frontend-0", "prefill-0", "decode-0"]
    assert {process.device for process in made.processes[1:]} == {"cpu"}
    assert made.missing == ()
    assert made.warnings == ()
    assert made.frontend == "http://127.0.0.1:8000"
    assert made.state_dir == Path("/cache/state/default")


def test_cores_are_shared_evenly_by_cpu_workers_unless_set() -> None:
    made = plan(workers={"prefill": {"count": 2}, "decode": {"count": 1, "threads": 5}})
    assert [process.threads for process in made.processes[1:]] == [2, 2, 5]
    crowded = plan(machine=replace(LAPTOP, cores=1))
    assert [process.threads for process in crowded.processes[1:]] == [1, 1]


def test_more_threads_than_cores_is_a_warning() -> None:
    made = plan(workers={"decode": {"threads": 9}})
    assert "workers use 9 threads on 8 cores" in made.warnings


def test_memory_counts_weights_kv_staging_and_overhead() -> None:
    memory = plan(dtype="float32").processes[1].memory
    assert memory.weights == 2 * SMALL.weights
    assert memory.kv == 512 * 2**20
    assert memory.staging == 2 * 64 * 2**20  # one for each direction
    assert memory.total == memory.weights + memory.kv + memory.staging + memory.overhead


def test_memory_that_does_not_fit_the_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs 2\d\.\d GiB of memory, this machine has 16\.0 GiB") as caught:
        plan(workers={"prefill": {}, "decode": {"kv_cache": "20GiB"}})
    assert caught.value.key == "workers.decode.kv_cache"


def test_memory_that_is_taken_by_others_now_is_a_warning() -> None:
    made = plan(machine=replace(LAPTOP, free_memory=GIB))
    assert any("only 1.0 GiB is free now" in warning for warning in made.warnings)


def test_kv_memory_too_small_for_one_request_is_refused_with_what_it_takes() -> None:
    with pytest.raises(ConfigError, match=r"holds 1456 tokens, fewer than one request of max_model_len 2048") as caught:
        plan(max_model_len=2048, workers={"decode": {"kv_cache": "32MiB"}})
    assert "at least 45 MiB" in caught.value.hint


def test_a_piece_larger_than_staging_is_refused() -> None:
    with pytest.raises(ConfigError, match="piece"):
        plan(kv_transfer={"staging": "1MiB", "piece": "2MiB"})


def test_auto_takes_gpus_where_there_are_some() -> None:
    made = plan(machine=GPU_HOST, workers={"prefill": {"tensor_parallel": 2}, "decode": {"tensor_parallel": 2}})
    assert [process.gpus for process in made.processes[1:]] == [(0, 1), (2, 3)]
    assert {process.device for process in made.processes[1:]} == {"cuda"}


def test_auto_stays_on_cpu_when_the_cpu_build_of_vllm_is_installed() -> None:
    made = plan(machine=replace(GPU_HOST, vllm_build="cpu"))
    assert {process.device for process in made.processes[1:]} == {"cpu"}
    assert made.missing == ()


def test_workers_share_a_gpu_only_with_an_explicit_kv_size() -> None:
    one_gpu = replace(GPU_HOST, gpus=H100[:1])
    shared = plan(machine=one_gpu, workers={"prefill": {"kv_cache": "8GiB"}, "decode": {"kv_cache": "8GiB"}})
    assert [process.gpus for process in shared.processes[1:]] == [(0,), (0,)]
    assert shared.missing == ()
    assert "share GPUs" in " ".join(shared.warnings)
    greedy = plan(machine=one_gpu)
    assert greedy.missing == ("2 GPUs (this host has 1)",)


def test_what_does_not_fit_the_named_gpu_is_refused() -> None:
    big = replace(SMALL, weights=140 * GIB)
    with pytest.raises(ConfigError, match=r"decode workers need 142\.0 GiB on each GPU, which has 80\.0 GiB"):
        plan(shape=big, workers={"decode": {"gpu_type": "a100_80g"}})
    split = plan(machine=GPU_HOST, shape=big, workers={"decode": {"gpu_type": "a100_80g", "tensor_parallel": 2}})
    assert split.missing == ()


def test_the_reference_file_on_a_laptop_is_planned_and_told_what_the_host_lacks() -> None:
    made = resolve(load_config(CONFIGS / "dynamo.yaml"), machine=LAPTOP, shape=SMALL, cache=Path("/cache"))
    assert made.missing == ("32 GPUs (this host has none)", "the cuda build of vLLM")
    assert made.etcd == "http://coordination-node:5557"
    text = describe(made)
    assert "prefill-0…3 (TP 4) → decode-0…7 (TP 2)" in text
    assert "this host cannot serve it: this host has no RDMA device mlx5_0 (it has none)" in text
    assert "this host cannot serve it; it lacks 32 GPUs" in text


def test_workers_that_cannot_exchange_kv_are_a_warning() -> None:
    made = plan(machine=GPU_HOST, workers={"prefill": {}, "decode": {"gpu_type": "cpu"}})
    assert made.transfers[0].via == "none: KV on cuda cannot be used on cpu"
    assert any("compute every prompt themselves" in warning for warning in made.warnings)


def test_workers_that_decode_may_pull_from_all_others_and_from_each_other() -> None:
    workers = {"prefill": {}, "decode": {"count": 2}}
    made = plan(workers=workers)
    ways = [(path.source, path.target) for path in made.transfers]
    assert ways == [("prefill-0", "decode-0…1"), ("decode-0…1", "decode-0…1")]
    assert len(plan(workers=workers, kv_transfer={"pull": "never"}).transfers) == 1
    assert plan(workers={"both": {}}).transfers == ()


def test_decode_without_prefill_is_a_warning() -> None:
    made = plan(workers={"decode": {}})
    assert any("no prefill workers" in warning for warning in made.warnings)


def test_a_frontend_open_to_the_network_is_a_warning() -> None:
    made = plan(frontend={"host": "::"})
    assert made.frontend == "http://[::]:8000"
    assert "the frontend listens on :: and asks for no password" in made.warnings


def test_the_simulated_engine_needs_neither_vllm_nor_weights_nor_gpus() -> None:
    made = plan(
        machine=replace(LAPTOP, vllm_build=None),
        shape=None,
        engine="sim",
        kv_transfer={"rdma_device": "mlx5_0", "transport": "rdma"},
        workers={"prefill": {"gpu_type": "h100", "count": 2}, "decode": {}},
    )
    assert (made.missing, made.problems, made.warnings) == ((), (), ())
    assert made.transfers[0].via == "simulated"
    assert "4096 simulated blocks on each of 3 workers" in describe(made)


def test_simulated_tiers_take_no_memory_and_an_object_tier_is_not_shared() -> None:
    tiers = {"host": {"size": "900GiB"}, "object": {"url": "s3://bucket/prefix"}}
    made = plan(shape=None, engine="sim", kv_tiers=tiers)
    (warning,) = made.warnings
    assert "each has an object tier for itself" in warning
    assert "  host    simulated\n  object  simulated\n" in describe(made)


def test_without_any_vllm_the_host_lacks_it() -> None:
    assert plan(machine=replace(LAPTOP, vllm_build=None)).missing == ("vLLM (install the extra 'cpu' or 'cuda')",)


def test_a_model_not_here_yet_is_a_warning() -> None:
    assert any("not here yet" in warning for warning in plan(shape=None).warnings)
