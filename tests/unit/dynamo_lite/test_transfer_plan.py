from __future__ import annotations

from typing import Any

import pytest

from dynamo_lite.config import Config
from dynamo_lite.rdma import RdmaPort
from dynamo_lite.transfer_plan import Device, TransferPlan

ALWAYS = {
    "UCX_RNDV_THRESH": "inf",
    "UCX_MODULES": "^efa",
    "UCX_TCP_TX_SEG_SIZE": "256k",
    "UCX_TCP_RX_SEG_SIZE": "256k",
    "UCX_TCP_CONN_NB": "y",
    "UCX_TCP_USER_TIMEOUT": "2000ms",
    "UCX_TCP_KEEPIDLE": "2s",
    "UCX_TCP_KEEPINTVL": "2s",
}
INFINIBAND = RdmaPort("mlx5_0", 1, "InfiniBand", "ACTIVE")
ROCE = RdmaPort("mlx5_1", 1, "Ethernet", "ACTIVE")
DOWN = RdmaPort("mlx5_2", 1, "InfiniBand", "DOWN")
SPREAD = {"endpoints": ["http://a:2379"]}  # workers may be on several hosts


def plan(*ports: RdmaPort, spread: bool = False, **transfer: Any) -> TransferPlan:
    return TransferPlan(Config.model_validate({"kv_transfer": transfer, "etcd": SPREAD if spread else {}}), ports)


def problems(made: TransferPlan, device: Device = "cuda") -> list[tuple[str, str]]:
    """Key and sentence of each."""
    return [(error.key, str(error)) for error in made.problems({"prefill": device, "decode": device})]


def test_left_alone_ucx_chooses_and_stays_on_loopback_where_all_workers_are_on_this_host() -> None:
    assert plan().environment("cpu") == {**ALWAYS, "UCX_NET_DEVICES": "lo"}
    assert plan(spread=True).environment("cpu") == ALWAYS


def test_a_tcp_connection_may_be_silent_for_as_long_as_a_transfer() -> None:
    found = plan(timeout_ms=300).environment("cpu")
    assert found["UCX_TCP_USER_TIMEOUT"] == "300ms"
    assert found["UCX_TCP_KEEPIDLE"] == "1s", "the kernel counts in seconds"


def test_the_rdma_device_becomes_a_ucx_port() -> None:
    assert plan(rdma_device="mlx5_0").environment("cpu")["UCX_NET_DEVICES"] == "mlx5_0:1"
    assert plan(rdma_device="mlx5_0:2").environment("cpu")["UCX_NET_DEVICES"] == "mlx5_0:2"


@pytest.mark.parametrize("transport", ["rdma", "roce"])
def test_rdma_asked_for_leaves_ucx_no_way_over_tcp(transport: str) -> None:
    made = plan(INFINIBAND, ROCE, transport=transport, spread=True)
    assert made.environment("cpu")["UCX_TLS"] == "rc,self"
    assert made.environment("cuda")["UCX_TLS"] == "rc,cuda_copy,cuda_ipc,self"
    assert made.environment("cpu")["UCX_NET_DEVICES"] == {"rdma": "mlx5_0:1", "roce": "mlx5_1:1"}[transport]


def test_rdma_without_a_device_may_use_every_active_port_of_its_kind() -> None:
    second = RdmaPort("mlx5_3", 1, "InfiniBand", "ACTIVE")
    made = plan(INFINIBAND, ROCE, DOWN, second, transport="rdma", spread=True)
    assert made.environment("cuda")["UCX_NET_DEVICES"] == "mlx5_0:1,mlx5_3:1"


def test_roce_has_its_gid_and_its_traffic_class() -> None:
    made = plan(ROCE, transport="roce", gid_index=3, traffic_class=106)
    assert made.environment("cpu").items() >= {"UCX_IB_GID_INDEX": "3", "UCX_IB_TRAFFIC_CLASS": "106"}.items()
    assert list(made.warnings()) == []


def test_settings_of_another_transport_are_not_used_and_a_warning() -> None:
    made = plan(INFINIBAND, transport="tcp", rdma_device="mlx5_0", gid_index=3, spread=True)
    assert made.environment("cpu") == {**ALWAYS, "UCX_TLS": "tcp,self"}
    assert list(made.warnings()) == [
        "kv_transfer.rdma_device is not used with transport tcp",
        "kv_transfer.gid_index is for RoCE, and not used with transport tcp",
    ]


@pytest.mark.parametrize(("transport", "device"), [("shm", "cpu"), ("cuda_ipc", "cuda")])
def test_the_ways_within_a_host_keep_ucx_on_loopback(transport: str, device: Device) -> None:
    made = plan(transport=transport, spread=True)
    assert made.environment(device)["UCX_NET_DEVICES"] == "lo"
    assert "tcp" in made.environment(device)["UCX_TLS"].split(",")
    assert problems(made, device) == []
    assert list(made.warnings()) == [
        f"with kv_transfer.transport {transport} workers reach only those on their own host"
    ]


@pytest.mark.parametrize(
    ("made", "device", "ways"),
    [
        (plan(), "cpu", "shared memory (same host)"),
        (plan(), "cuda", "CUDA IPC (same host)"),
        (plan(INFINIBAND), "cpu", "shared memory (same host)"),
        (plan(spread=True), "cpu", "shared memory (same host), TCP (between hosts)"),
        (
            plan(INFINIBAND, spread=True),
            "cpu",
            "shared memory (same host), RDMA over mlx5_0 (InfiniBand) (between hosts)",
        ),
        (plan(transport="tcp", spread=True), "cuda", "TCP"),
        (plan(transport="tcp"), "cpu", "TCP (same host)"),
        (plan(INFINIBAND, transport="rdma", spread=True), "cpu", "RDMA over mlx5_0 (InfiniBand)"),
        (plan(ROCE, transport="roce", spread=True), "cpu", "RDMA over mlx5_1 (RoCE)"),
        (plan(transport="rdma", rdma_device="mlx5_9", spread=True), "cpu", "RDMA over mlx5_9 (InfiniBand)"),
        (plan(transport="roce", spread=True), "cpu", "RDMA over a port of that host (RoCE)"),
        (plan(transport="cuda_ipc", spread=True), "cuda", "CUDA IPC (same host)"),
    ],
)
def test_the_way_kv_takes_is_told_in_words(made: TransferPlan, device: Device, ways: str) -> None:
    assert made.ways(device) == ways


@pytest.mark.parametrize(
    ("made", "key", "sentence"),
    [
        (plan(transport="rdma"), "transport", "this host has no active InfiniBand port (it has none)"),
        (
            plan(INFINIBAND, DOWN, transport="roce"),
            "transport",
            "this host has no active RoCE port (it has mlx5_0:1 (InfiniBand, active), mlx5_2:1 (InfiniBand, down))",
        ),
        (
            plan(INFINIBAND, rdma_device="mlx5_9"),
            "rdma_device",
            "this host has no RDMA device mlx5_9 (it has mlx5_0:1 (InfiniBand, active))",
        ),
        (
            plan(INFINIBAND, transport="roce", rdma_device="mlx5_0"),
            "transport",
            "transport is roce, but mlx5_0:1 is InfiniBand (use rdma, or another rdma_device)",
        ),
        (
            plan(ROCE, transport="rdma", rdma_device="mlx5_1"),
            "transport",
            "transport is rdma, but mlx5_1:1 is RoCE (use roce, or another rdma_device)",
        ),
        (
            plan(DOWN, rdma_device="mlx5_2"),
            "rdma_device",
            "the RDMA port mlx5_2:1 is down (it has mlx5_2:1 (InfiniBand, down))",
        ),
    ],
)
def test_rdma_that_is_asked_for_and_cannot_be_had_is_a_problem(made: TransferPlan, key: str, sentence: str) -> None:
    assert problems(made) == [(f"kv_transfer.{key}", sentence)]


@pytest.mark.parametrize(
    ("transport", "device", "sentence"),
    [
        (
            "cuda_ipc",
            "cpu",
            "cuda_ipc does not reach host memory, where prefill and decode workers have KV (use auto or shm)",
        ),
        (
            "shm",
            "cuda",
            "shm does not reach GPU memory, where prefill and decode workers have KV (use auto or cuda_ipc)",
        ),
    ],
)
def test_a_way_that_does_not_reach_the_workers_memory_is_a_problem(
    transport: str, device: Device, sentence: str
) -> None:
    assert problems(plan(transport=transport), device) == [("kv_transfer.transport", sentence)]


@pytest.mark.parametrize("made", [plan(), plan(INFINIBAND, rdma_device="mlx5_0"), plan(ROCE, transport="roce")])
def test_what_can_be_had_is_no_problem(made: TransferPlan) -> None:
    assert problems(made) == []


def test_etcd_endpoints_win_over_the_metadata_server() -> None:
    config = Config.model_validate({"kv_transfer": {"metadata_server": "tcp://node:5557"}})
    assert config.etcd_endpoints == ("http://node:5557",)
    both = config.model_copy(update={"etcd": config.etcd.model_copy(update={"endpoints": ("http://a:2379",)})})
    assert both.etcd_endpoints == ("http://a:2379",)
    assert Config().etcd_endpoints == ()


def test_several_metadata_servers_are_independent_and_several_endpoints_of_etcd_one_cluster() -> None:
    apart = Config.model_validate({"kv_transfer": {"metadata_server": ("tcp://a:5557", "tcp://b:5557")}})
    assert apart.etcd_endpoints == ("http://a:5557", "http://b:5557")
    assert apart.etcds_are_independent
    cluster = Config.model_validate({"etcd": {"endpoints": ("http://a:2379", "http://b:2379")}})
    assert not cluster.etcds_are_independent
