"""The configuration: small frozen models, one default each. `config_file` reads them from YAML.

Below the CLI nothing reads the environment; what a process needs, it gets from here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

from dynamo_lite.transports import Transport

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(value: object) -> object:
    """`512MiB`, `1.5 GB`, `4096` → bytes; anything else is left for pydantic to refuse."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower().removesuffix("b").strip()
    number = text.rstrip("kmgti")
    unit = text[len(number) :]
    try:
        return int(float(number) * UNITS[unit])
    except (KeyError, ValueError):
        raise ValueError(f"'{value}' is not a size; write for example 512MiB or 4GB") from None


def check_address(value: str, schemes: tuple[str, ...]) -> str:
    """`scheme://host:port`, refused with a sentence otherwise."""
    written = " or ".join(f"{scheme}://host:port" for scheme in schemes)
    try:
        parts = urlsplit(value)
        valid = parts.scheme in schemes and bool(parts.hostname) and parts.port is not None
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"'{value}' is not an address; write {written}")
    return value


def one_or_several(value: object) -> object:
    """A single text where a list may be given; pydantic refuses anything else."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
Port = Annotated[int, Field(ge=0, le=65535)]
MetadataAddress = Annotated[str, AfterValidator(lambda value: check_address(value, ("tcp", "http", "https")))]
EtcdUrl = Annotated[str, AfterValidator(lambda value: check_address(value, ("http", "https")))]
NatsUrl = Annotated[str, AfterValidator(lambda value: check_address(value, ("nats", "tls")))]


class Model(BaseModel, frozen=True, extra="forbid", defer_build=True):
    """Base of all configuration models: immutable, unknown keys refused."""


class KvTransfer(Model):
    """How KV moves between workers."""

    backend: Literal["nixl"] = "nixl"
    metadata_server: Annotated[tuple[MetadataAddress, ...], BeforeValidator(one_or_several)] = ()  # independent etcds
    transport: Transport = "auto"
    rdma_device: str | None = None  # e.g. mlx5_0; becomes UCX_NET_DEVICES
    gid_index: Annotated[int, Field(ge=0, le=255)] | None = None  # of a RoCE port
    traffic_class: Annotated[int, Field(ge=0, le=255)] | None = None  # of RoCE packets
    transport_threads: Annotated[int, Field(ge=1, le=64)] = 1
    timeout_ms: Annotated[int, Field(gt=0)] = 2000  # longest silence of a prefill worker before the next is tried
    staging: Bytes | None = None  # registered memory per worker and rank for pieces in flight, each direction
    piece: Bytes | None = None  # largest piece of one write
    window: Annotated[int, Field(ge=1, le=64)] = 4  # pieces in flight per transfer
    verify: bool = False  # checksum every piece, end to end
    min_remote_tokens: Annotated[int, Field(ge=1)] = 64  # shorter uncached remainders are computed by the decode worker
    pull: Literal["auto", "always", "never"] = "auto"  # prefixes that other workers hold; auto: where predicted fastest

    def staging_on(self, device: Literal["cpu", "cuda"]) -> int:
        """Bytes in each direction: by default room for some pieces."""
        return self.staging if self.staging is not None else _STAGING[device]

    def piece_on(self, device: Literal["cpu", "cuda"]) -> int:
        """Bytes. A GPU moves large pieces only: at 2 MiB each, an H100 reached an eighth of its speed at 512 MiB."""
        return self.piece if self.piece is not None else min(_PIECE[device], self.staging_on(device))


_STAGING = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
_PIECE = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}


Admission = Literal["always", "second_use"]  # second_use: what no second request has stays out
Share = Annotated[float, Field(gt=0, le=1)]


class HostTier(Model):
    """KV blocks in host memory, for those that the device has no room for any more. Every tier below is behind it."""

    size: Bytes  # per worker
    admission: Admission = "always"
    eviction: Literal["lru", "fifo"] = "lru"


class StorageTier(Model):
    """What the tiers beneath host memory have in common: blocks get there from host memory, some time later."""

    admission: Admission = "always"
    flush_interval_ms: Annotated[int, Field(ge=0)] = 500  # how long a block may wait for others to be written with
    watermark: Share = 0.25  # of host memory waiting to be written: then it is written at once
    timeout_ms: Annotated[int, Field(gt=0)] = 2000  # longest wait of a request for it, and of a write for an answer


class DiskTier(StorageTier):
    """KV blocks in a file on a local or mounted volume."""

    path: Path  # a folder; each worker makes one of its own in it
    size: Bytes  # per worker
    eviction: Literal["lru", "fifo"] = "lru"


class ObjectTier(StorageTier):
    """KV blocks in an S3-compatible store, shared by all workers of the same model and layout, in any cluster."""

    # Prompts come faster than a store takes them, and most are never seen again.
    admission: Admission = "second_use"
    url: Annotated[str, Field(pattern=r"^s3://[^/]+")]  # s3://bucket/prefix
    endpoint: str | None = None  # http(s)://host:port; default: AWS
    region: str = "us-east-1"
    access_key_id: str | None = Field(default=None, repr=False)  # default: the environment's, or the host's role's
    secret_access_key: str | None = Field(default=None, repr=False)
    refresh_s: Annotated[float, Field(gt=0)] = 60.0  # how often it is listed for what others have stored


class KvTiers(Model):
    """Where KV goes beneath the device."""

    host: HostTier | None = None
    disk: DiskTier | None = None
    object: ObjectTier | None = None

    @model_validator(mode="after")
    def _all_is_behind_host_memory(self) -> KvTiers:
        if self.host is None and (self.disk or self.object):
            raise ValueError("disk and object tiers need 'host': blocks get there through it, and come back through it")
        return self


class WorkerGroup(Model):
    """Workers of one role."""

    count: Annotated[int, Field(ge=0, le=1024)] = 1
    gpu_type: str = "auto"  # "cpu", "auto" (CUDA where present), or a name for the plan such as h100_sxm5
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    kv_cache: Bytes | None = None  # device KV per worker; default: 512MiB on CPU, vLLM's choice on GPU
    max_num_seqs: Annotated[int, Field(ge=1)] = 64
    threads: Annotated[int, Field(ge=1)] | None = None  # CPU threads per worker; default: the cores shared evenly
    spot_notice_file: Path | None = None  # once it is there, the machine is about to be taken away: drain
    args: dict[str, Any] = {}  # passed to vLLM's AsyncEngineArgs
    env: dict[str, str] = {}


class Workers(Model):
    """Either prefill and decode (apart), or both (aggregated)."""

    prefill: WorkerGroup | None = None
    decode: WorkerGroup | None = None
    both: WorkerGroup | None = None

    @model_validator(mode="after")
    def _some_worker_decodes(self) -> Workers:
        if not any(group is not None and group.count for group in (self.decode, self.both)):
            raise ValueError("workers needs at least one 'decode' (with 'prefill') or 'both' worker")
        return self


class Frontend(Model):
    """The OpenAI HTTP frontend."""

    host: str = "127.0.0.1"
    port: Port = 8000
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    max_body: Bytes = 16 * 2**20
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    chat_template: Path | None = None  # a Jinja file that replaces the model's own


RouterMode = Literal["kv", "least_loaded", "round_robin", "random"]
_WEIGHTS = ("overlap_weight", "load_weight", "tier_weights")


class Router(Model):
    """Where requests go: to the worker with the lowest predicted cost, in milliseconds."""

    mode: RouterMode = "kv"
    temperature: Annotated[float, Field(ge=0)] = 0.0
    patience_ms: Annotated[float, Field(ge=0)] = 3000.0
    remote_prefill: Literal["auto", "always"] = "auto"
    prefill_candidates: Annotated[int, Field(ge=1, le=16)] = 3
    index_memory: Annotated[Bytes, Field(ge=2**20)] = 2 * 2**30  # a router's index takes no more
    self_test: bool = True

    @model_validator(mode="before")
    @classmethod
    def _no_weights(cls, given: object) -> object:
        for name in _WEIGHTS:
            if isinstance(given, dict) and name in given:
                raise ValueError(f"'{name}' is no more: costs are milliseconds now, learnt from the workers. Remove it")
        return given


class TraceExport(Model):
    """Where spans go: a JSON-lines file, or an OTLP endpoint."""

    file: Path | None = None
    otlp: str | None = None  # http://host:4318 or grpc://host:4317
    sample: Annotated[float, Field(ge=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _one_destination(self) -> TraceExport:
        if self.file is not None and self.otlp is not None:
            raise ValueError("give 'file' or 'otlp', not both")
        return self


class Telemetry(Model):
    traces: TraceExport = TraceExport()
    metrics: bool = True
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class Nats(Model):
    """An existing NATS server; without `url` one is embedded on loopback."""

    url: NatsUrl | None = None
    user: str | None = None
    password: str | None = None
    token: str | None = None


class Etcd(Model):
    """An existing etcd; without `endpoints` (or kv_transfer.metadata_server) one is embedded on loopback."""

    endpoints: tuple[EtcdUrl, ...] = ()  # http(s)://host:port
    user: str | None = None
    password: str | None = None
    ca_cert: Path | None = None
    lease_ttl_s: Annotated[int, Field(ge=1, le=300)] = 5


class Sim(Model):
    """Pace of the simulated engine (`engine: sim`)."""

    block_size: Annotated[int, Field(ge=1)] = 16
    kv_blocks: Annotated[int, Field(ge=8)] = 4096
    kv_bytes_per_token: Annotated[int, Field(ge=1)] | None = None  # `dynamo-lite simulate`; default: the model's
    prefill_step_ms: Annotated[float, Field(ge=0)] = 0.0  # of a step that computes part of a prompt
    prefill_ms_per_token: Annotated[float, Field(ge=0)] = 0.02
    prefill_context_ms: Annotated[float, Field(ge=0)] = 0.0  # of a token, for every 1,000 before it in its prompt
    decode_step_ms: Annotated[float, Field(ge=0)] = 5.0
    decode_ms_per_sequence: Annotated[float, Field(ge=0)] = 0.0
    decode_context_ms: Annotated[float, Field(ge=0)] = 0.0  # of a sequence, for every 1,000 of its tokens
    transfer_ms_per_block: Annotated[float, Field(ge=0)] = 0.05
    host_ms_per_block: Annotated[float, Field(ge=0)] = 0.02
    disk_ms_per_block: Annotated[float, Field(ge=0)] = 0.1
    object_ms_per_block: Annotated[float, Field(ge=0)] = 0.4
    object_latency_ms: Annotated[float, Field(ge=0)] = 30.0
    max_num_batched_tokens: Annotated[int, Field(ge=1)] = 8192
    steps_at_once: Annotated[int, Field(ge=1)] = 1  # decode steps simulated as one; a request that comes ends them


class Config(Model):
    """One deployment."""

    model: str = "smollm2-135m-instruct"  # the embedded model, a Hugging Face id, or a folder
    served_model_name: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    kv_cache_dtype: str = "auto"
    max_model_len: Annotated[int, Field(ge=16)] | None = None
    block_size: Annotated[int, Field(ge=1)] | None = None  # tokens a KV block; default 32 on CPU, 16 on GPU
    engine: Literal["vllm", "sim"] = "vllm"
    namespace: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = "default"
    state_dir: Path | None = None  # default: <user cache>/dynamo-lite/state/<namespace>
    workers: Workers = Workers(prefill=WorkerGroup(), decode=WorkerGroup())
    frontend: Frontend = Frontend()
    router: Router = Router()
    kv_transfer: KvTransfer = KvTransfer()
    kv_tiers: KvTiers = KvTiers()
    telemetry: Telemetry = Telemetry()
    nats: Nats = Nats()
    etcd: Etcd = Etcd()
    sim: Sim = Sim()

    @property
    def model_name(self) -> str:
        """The name clients use."""
        return self.served_model_name or self.model

    @property
    def etcd_endpoints(self) -> tuple[str, ...]:
        """Existing etcd endpoints; empty when one is to be embedded."""
        servers = self.kv_transfer.metadata_server
        return self.etcd.endpoints or tuple(server.replace("tcp:", "http:", 1) for server in servers)

    @property
    def etcds_are_independent(self) -> bool:
        """Several metadata servers know nothing of each other; several endpoints of etcd are one cluster."""
        return not self.etcd.endpoints and len(self.kv_transfer.metadata_server) > 1


class NatsAddress(Model):
    """How a process reaches NATS, resolved."""

    url: str
    user: str | None = None
    password: str | None = None
    token: str | None = None


class EtcdAddress(Model):
    """How a process reaches etcd, resolved."""

    endpoints: tuple[str, ...]
    independent: bool = False  # each endpoint is a server of its own, not a member of one cluster
    user: str | None = None
    password: str | None = None
    ca_cert: Path | None = None
    lease_ttl_s: int = 5


class ProcessSpec(Model):
    """Everything one child process needs; the supervisor writes it to a 0600 file and passes the path."""

    config: Config
    role: Literal["frontend", "prefill", "decode", "both"]
    name: str  # "decode-0"
    model_path: Path  # folder with config.json, tokenizer.json and, for vLLM, weights
    nats: NatsAddress
    etcd: EtcdAddress
    state_dir: Path  # sockets and other run-time files of this process go here
    threads: int = 1
    kv_cache: int | None = None  # bytes
    embedded: bool = False  # NATS and etcd are ours
    listen_fd: int | None = None  # frontends: an inherited listening socket
