"""Which way KV takes between two workers. Needs neither torch nor the network: the plan and the engine both ask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from dynamo_lite.rdma import LinkLayer, RdmaPort, chosen_port

Transport = Literal["auto", "rdma", "roce", "tcp", "shm", "cuda_ipc"]  # kv_transfer.transport
Memory = Literal["DRAM", "VRAM"]
Path = Literal["shm", "cuda_ipc", "rdma", "roce", "tcp"]  # "shm": one copy by the kernel (CMA), or shared memory

LINK_LAYERS: Mapping[Transport, LinkLayer] = {"rdma": "InfiniBand", "roce": "Ethernet"}


def path_between(transport: Transport, same_host: bool, memory: Memory, rdma: RdmaPort | None) -> Path:
    """What UCX uses for a write from one worker to another, told what `transport` tells it.

    `rdma` is the port that the source uses, None where it has none. `shm` and `cuda_ipc` reach only workers on the
    same host, so for these there is no other case.
    """
    if transport == "tcp":
        return "tcp"
    if transport == "shm":
        return "shm"
    if transport == "cuda_ipc" or (same_host and memory == "VRAM"):
        return "cuda_ipc"
    if same_host and transport == "auto":
        return "shm"
    if transport == "auto" and (rdma is None or not rdma.active):
        return "tcp"
    if rdma is not None:
        return "roce" if rdma.link_layer == "Ethernet" else "rdma"
    return "roce" if transport == "roce" else "rdma"  # planned for another host


def usable_ports(transport: Transport, ports: Iterable[RdmaPort], device: str | None) -> tuple[RdmaPort, ...]:
    """Of a host's RDMA ports, those that UCX may choose from; `device` is `kv_transfer.rdma_device`."""
    if transport not in ("auto", "rdma", "roce"):
        return ()
    if device is not None:
        port = chosen_port(ports, device)
        return (port,) if port is not None else ()
    layer = LINK_LAYERS.get(transport)
    return tuple(port for port in ports if port.active and layer in (None, port.link_layer))
