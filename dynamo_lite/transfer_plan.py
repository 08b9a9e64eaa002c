"""What `kv_transfer` means on this machine: UCX's settings, the way KV takes, and what the host lacks for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dynamo_lite.config import Config
from dynamo_lite.errors import ConfigError
from dynamo_lite.rdma import RdmaPort, chosen_port
from dynamo_lite.transports import LINK_LAYERS, Memory, Path, Transport, path_between, usable_ports

Device = Literal["cpu", "cuda", "none"]  # none: frontends and simulated engines

# What UCX may use, beside `self`. `rc` brings its own bootstrap over UD, but not UD for data, which has no RDMA.
# NIXL's UCX backend does not come up without a transport for active messages: within a host that is TCP on loopback,
# while the data goes by a faster way.
_TRANSPORTS: Mapping[Transport, tuple[str, ...]] = {
    "rdma": ("rc",),
    "roce": ("rc",),
    "tcp": ("tcp",),
    "shm": ("sm", "tcp"),
    "cuda_ipc": ("tcp",),
}
_GPU_TRANSPORTS: Mapping[Transport, tuple[str, ...]] = {
    "rdma": ("cuda_copy", "cuda_ipc"),
    "roce": ("cuda_copy", "cuda_ipc"),
    "tcp": ("cuda_copy",),
    "cuda_ipc": ("cuda_copy", "cuda_ipc"),
}
# Bytes a system call moves over TCP: with UCX's 8 and 64 KiB writes were at 0.6 of a plain socket's speed. Connecting
# to a host that is cut off must not keep everybody else waiting, which takes UCX up to two minutes.
_TCP_SETTINGS = {"UCX_TCP_TX_SEG_SIZE": "256k", "UCX_TCP_RX_SEG_SIZE": "256k", "UCX_TCP_CONN_NB": "y"}
# NIXL's UCX finds a library of the host's own for EFA, which we do not use, where there is one; that brings another
# libibverbs and libnl into the process beside NIXL's, and the process crashes when it exits.
_MODULES = {"UCX_MODULES": "^efa"}
_ONE_HOST = ("shm", "cuda_ipc")
_WORDS: Mapping[Path, str] = {"shm": "shared memory", "cuda_ipc": "CUDA IPC", "tcp": "TCP"}


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """`kv_transfer` on a host with these RDMA ports."""

    config: Config
    ports: Sequence[RdmaPort]

    @property
    def _transport(self) -> Transport:
        return self.config.kv_transfer.transport

    @property
    def _one_host(self) -> bool:
        """An embedded etcd is on loopback, so all workers are on this host."""
        return self._transport in _ONE_HOST or not self.config.etcd_endpoints

    @property
    def _chosen(self) -> tuple[RdmaPort, ...]:
        """The RDMA ports that UCX may choose from."""
        return usable_ports(self._transport, self.ports, self.config.kv_transfer.rdma_device)

    def environment(self, device: Device) -> Mapping[str, str]:
        """What UCX is told unless the user's own environment says otherwise."""
        transfer = self.config.kv_transfer
        # Without it same-host transfers between host memories fall from zero-copy to TCP emulation.
        settings = {"UCX_RNDV_THRESH": "inf", **_MODULES, **_TCP_SETTINGS, **self._patience()}
        if self._transport != "auto":
            gpu = _GPU_TRANSPORTS.get(self._transport, ()) if device == "cuda" else ()
            settings["UCX_TLS"] = ",".join((*_TRANSPORTS[self._transport], *gpu, "self"))
        if self._transport not in ("tcp", *_ONE_HOST) and transfer.rdma_device is not None:
            name = transfer.rdma_device
            settings["UCX_NET_DEVICES"] = name if ":" in name else f"{name}:1"  # UCX names ports
        elif self._transport in LINK_LAYERS:
            if self._chosen:
                settings["UCX_NET_DEVICES"] = ",".join(port.name for port in self._chosen)
        elif self._one_host:
            settings["UCX_NET_DEVICES"] = "lo"  # nobody else need reach UCX, which asks for no password
        if self._transport in ("auto", "roce"):
            if transfer.gid_index is not None:
                settings["UCX_IB_GID_INDEX"] = str(transfer.gid_index)
            if transfer.traffic_class is not None:
                settings["UCX_IB_TRAFFIC_CLASS"] = str(transfer.traffic_class)
        return settings

    def _patience(self) -> dict[str, str]:
        """How long a TCP connection may be silent: UCX gives an idle one 10 s, one with bytes under way 15 minutes."""
        silence_ms = self.config.kv_transfer.timeout_ms
        probes = f"{max(1, round(silence_ms / 1000))}s"  # the kernel counts in seconds
        return {
            "UCX_TCP_USER_TIMEOUT": f"{silence_ms}ms",
            "UCX_TCP_KEEPIDLE": probes,
            "UCX_TCP_KEEPINTVL": probes,
        }

    def ways(self, device: Device) -> str:
        """How KV gets from one worker to another, for people."""
        memory: Memory = "VRAM" if device == "cuda" else "DRAM"
        port = next(iter(self._chosen), None)
        near = self._words(path_between(self._transport, True, memory, port))
        if self._one_host:
            return f"{near} (same host)"
        far = self._words(path_between(self._transport, False, memory, port))
        return far if near == far else f"{near} (same host), {far} (between hosts)"

    def _words(self, path: Path) -> str:
        if path in _WORDS:
            return _WORDS[path]
        layer = "RoCE" if path == "roce" else "InfiniBand"
        names = [port.name.removesuffix(":1") for port in self._chosen]
        device = self.config.kv_transfer.rdma_device
        return f"RDMA over {', '.join(names) or device or 'a port of that host'} ({layer})"

    def problems(self, devices: Mapping[str, Device]) -> Iterator[ConfigError]:
        """What the file asks for and this host, or the device of one of these roles, cannot do."""
        transfer = self.config.kv_transfer
        if self._transport in (*LINK_LAYERS, "auto"):
            if transfer.rdma_device is not None:
                yield from self._wrong_device(transfer.rdma_device)
            elif self._transport in LINK_LAYERS and not self._chosen:
                layer = "active RoCE port" if self._transport == "roce" else "active InfiniBand port"
                yield ConfigError(f"this host has no {layer}", key="kv_transfer.transport", hint=self._offered)
        needed = {"cuda_ipc": "cuda", "shm": "cpu"}.get(self._transport)
        wrong = [role for role, device in devices.items() if needed not in (None, device)]
        if wrong:
            other, there = ("shm", "host") if needed == "cuda" else ("cuda_ipc", "GPU")
            message = f"{self._transport} does not reach {there} memory, where {' and '.join(wrong)} workers have KV"
            yield ConfigError(message, key="kv_transfer.transport", hint=f"use auto or {other}")

    def _wrong_device(self, name: str) -> Iterator[ConfigError]:
        port, layer = chosen_port(self.ports, name), LINK_LAYERS.get(self._transport)
        if port is None:
            message = f"this host has no RDMA device {name}"
            yield ConfigError(message, key="kv_transfer.rdma_device", hint=self._offered)
        elif layer not in (None, port.link_layer):
            fitting = "rdma" if port.link_layer == "InfiniBand" else "roce"
            message = f"transport is {self._transport}, but {port.name} is {port.kind}"
            yield ConfigError(message, key="kv_transfer.transport", hint=f"use {fitting}, or another rdma_device")
        elif not port.active:
            message = f"the RDMA port {port.name} is {port.state.lower()}"
            yield ConfigError(message, key="kv_transfer.rdma_device", hint=self._offered)

    @property
    def _offered(self) -> str:
        return f"it has {', '.join(port.text for port in self.ports) or 'none'}"

    def warnings(self) -> Iterator[str]:
        transfer = self.config.kv_transfer
        if self._transport in ("tcp", *_ONE_HOST) and transfer.rdma_device is not None:
            yield f"kv_transfer.rdma_device is not used with transport {self._transport}"
        if self._transport in _ONE_HOST and self.config.etcd_endpoints:
            yield f"with kv_transfer.transport {self._transport} workers reach only those on their own host"
        for key in ("gid_index", "traffic_class"):
            if getattr(transfer, key) is not None and self._transport not in ("auto", "roce"):
                yield f"kv_transfer.{key} is for RoCE, and not used with transport {self._transport}"
