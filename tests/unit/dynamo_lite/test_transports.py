from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_lite import transports
from dynamo_lite.rdma import RdmaPort, chosen_port, rdma_ports
from dynamo_lite.transports import Transport, path_between, usable_ports
from tests.sysfs import add_port

INFINIBAND = RdmaPort("mlx5_0", 1, "InfiniBand", "ACTIVE")
ROCE = RdmaPort("mlx5_1", 1, "Ethernet", "ACTIVE")
DOWN = RdmaPort("mlx5_2", 1, "InfiniBand", "DOWN")


@pytest.mark.parametrize(
    ("same_host", "memory", "rdma", "path"),
    [
        (True, "DRAM", None, "shm"),
        (True, "VRAM", None, "cuda_ipc"),
        (True, "DRAM", INFINIBAND, "shm"),
        (False, "DRAM", None, "tcp"),
        (False, "VRAM", None, "tcp"),
        (False, "VRAM", DOWN, "tcp"),
        (False, "VRAM", INFINIBAND, "rdma"),
        (False, "DRAM", ROCE, "roce"),
    ],
)
def test_left_to_ucx_kv_takes_the_fastest_way_there_is(
    same_host: bool, memory: transports.Memory, rdma: RdmaPort | None, path: transports.Path
) -> None:
    assert path_between("auto", same_host, memory, rdma) == path


@pytest.mark.parametrize("same_host", [True, False])
def test_tcp_is_tcp_even_on_one_host(same_host: bool) -> None:
    assert path_between("tcp", same_host, "VRAM", INFINIBAND) == "tcp"


@pytest.mark.parametrize(
    ("transport", "rdma", "path"), [("rdma", INFINIBAND, "rdma"), ("roce", ROCE, "roce"), ("roce", None, "roce")]
)
def test_rdma_asked_for_carries_host_memory_on_one_host_too(
    transport: Transport, rdma: RdmaPort | None, path: transports.Path
) -> None:
    assert path_between(transport, True, "DRAM", rdma) == path
    assert path_between(transport, False, "VRAM", rdma) == path
    assert path_between(transport, True, "VRAM", rdma) == "cuda_ipc"


def test_the_ways_within_a_host_are_taken_as_asked_for() -> None:
    assert path_between("shm", True, "DRAM", INFINIBAND) == "shm"
    assert path_between("cuda_ipc", True, "VRAM", None) == "cuda_ipc"


def test_ports_are_read_with_their_link_layer_and_state(tmp_path: Path) -> None:
    add_port(tmp_path, "mlx5_1", link_layer="Ethernet")
    add_port(tmp_path, "mlx5_0", port=2, state="1: DOWN")
    add_port(tmp_path, "mlx5_0")
    ports = rdma_ports(tmp_path)
    assert [port.text for port in ports] == [
        "mlx5_0:1 (InfiniBand, active)",
        "mlx5_0:2 (InfiniBand, down)",
        "mlx5_1:1 (RoCE, active)",
    ]


def test_a_host_without_rdma_has_no_ports(tmp_path: Path) -> None:
    assert rdma_ports(tmp_path / "infiniband") == ()


def test_a_device_that_vanishes_while_it_is_read_is_left_out(tmp_path: Path) -> None:
    add_port(tmp_path, "mlx5_0")
    (tmp_path / "mlx5_0" / "ports" / "1" / "state").unlink()
    assert rdma_ports(tmp_path) == ()


def test_a_device_means_its_first_port_unless_it_names_another() -> None:
    second = RdmaPort("mlx5_0", 2, "InfiniBand", "DOWN")
    ports = (INFINIBAND, second)
    assert chosen_port(ports, "mlx5_0") == INFINIBAND
    assert chosen_port(ports, "mlx5_0:2") == second
    assert chosen_port(ports, "mlx5_7") is None


def test_without_a_name_every_active_port_of_the_transports_kind_may_be_used() -> None:
    ports = (INFINIBAND, ROCE, DOWN)
    assert usable_ports("auto", ports, None) == (INFINIBAND, ROCE)
    assert usable_ports("rdma", ports, None) == (INFINIBAND,)
    assert usable_ports("roce", ports, None) == (ROCE,)
    assert usable_ports("roce", ports, "mlx5_2") == (DOWN,)
    assert usable_ports("tcp", ports, None) == ()
