"""The RDMA ports of this host, as the kernel tells of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

INFINIBAND = Path("/sys/class/infiniband")
LinkLayer = Literal["InfiniBand", "Ethernet"]


@dataclass(frozen=True, slots=True)
class RdmaPort:
    """One port of an RDMA device."""

    device: str  # "mlx5_0"
    port: int
    link_layer: LinkLayer  # over Ethernet it is RoCE
    state: str  # "ACTIVE", "DOWN", …

    @property
    def name(self) -> str:
        """As UCX names it."""
        return f"{self.device}:{self.port}"

    @property
    def active(self) -> bool:
        return self.state == "ACTIVE"

    @property
    def kind(self) -> str:
        """Of the network, as people call it."""
        return "RoCE" if self.link_layer == "Ethernet" else "InfiniBand"

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.name} ({self.kind}, {self.state.lower()})"


def rdma_ports(infiniband: Path = INFINIBAND) -> tuple[RdmaPort, ...]:
    """All ports, by device and number; none where the kernel has no RDMA."""
    found = []
    for folder in infiniband.glob("*/ports/*"):
        try:
            layer = (folder / "link_layer").read_text().strip()
            state = (folder / "state").read_text().strip()  # "4: ACTIVE"
        except OSError:
            continue  # the device was taken away this moment
        state = re.sub(r"^\d+:\s*", "", state)
        link_layer: LinkLayer = "Ethernet" if layer == "Ethernet" else "InfiniBand"
        found.append(RdmaPort(folder.parts[-3], int(folder.name), link_layer, state))
    return tuple(sorted(found, key=lambda port: (port.device, port.port)))


def chosen_port(ports: Iterable[RdmaPort], device: str) -> RdmaPort | None:
    """The one that `kv_transfer.rdma_device` names: "mlx5_0" (its port 1), "mlx5_0:2"."""
    name = device if ":" in device else f"{device}:1"
    return next((port for port in ports if port.name == name), None)
