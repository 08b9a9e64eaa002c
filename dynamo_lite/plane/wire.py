"""Every message that crosses a process, and the NATS subjects they travel on; those of operators are in `kv_wire`.

All structs are msgpack (msgspec), frozen, and carry no KV bytes. `encode` prefixes the protocol version;
`decode` refuses any other by name. Times on the wire are durations, never wall-clock instants, so hosts need
not agree on the time.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NewType, TypeVar

import msgspec

from dynamo_lite import errors
from dynamo_lite.errors import DynamoError, ProtocolMismatch
from dynamo_lite.plane.layout import KvLayout, exchange_problem
from kvbm.events import Tier

PROTOCOL = 3  # raised with every change of a message, also of those between movers (workers/connector/protocol.py)
Scalar = str | int | float

Incarnation = NewType("Incarnation", str)  # uuid4 hex, new at every start of a worker process
FrontendId = NewType("FrontendId", str)  # uuid4 hex of one frontend process
RequestId = NewType("RequestId", str)


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"  # aggregated

    @property
    def decodes(self) -> bool:
        return self is not Role.PREFILL


class Fingerprint(msgspec.Struct, frozen=True):
    """What decides whether two workers can exchange KV."""

    model: str
    revision: str
    engine: str  # "vllm" | "sim"
    device: str  # "cpu" | "cuda" | "sim"
    layout: KvLayout

    @property
    def block_size(self) -> int:
        """Tokens."""
        return self.layout.block_size

    @property
    def block_bytes(self) -> int:
        """KV bytes of one block over all layers, per rank."""
        return self.layout.block_bytes

    def problem_with(self, prefill: Fingerprint) -> str | None:
        """A sentence, naming both sides, on why this worker cannot take KV from that one; None when it can."""
        for field in ("engine", "device", "model", "revision"):
            theirs, mine = getattr(prefill, field), getattr(self, field)
            if theirs != mine:
                return f"the prefill worker's {field} is {theirs!r}, the decode worker's {mine!r}"
        return exchange_problem(prefill.layout, self.layout)


class InstanceRecord(msgspec.Struct, frozen=True):
    """What etcd holds, under the instance's lease, about one live worker."""

    name: str  # for people, e.g. "decode-0"
    incarnation: Incarnation
    role: Role
    host: str
    pid: int
    served_model: str
    fingerprint: Fingerprint
    kv_blocks: int  # capacity of the device tier
    max_model_len: int  # tokens
    max_num_seqs: int
    metrics_url: str = ""
    agents: tuple[bytes, ...] = ()  # metadata of its transfer agents, by rank; none with the sim engine
    protocol: int = PROTOCOL


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """Engine-side sampling. Text stop strings are the frontend's; ids that end a sequence, EOS included, are here."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None  # None: off; k: the chosen token and the k likeliest
    logit_bias: dict[int, float] | None = None

    def after(self, generated: int) -> Sampling:
        """For what is left of a sequence once it has so many tokens, fewer than `max_tokens`."""
        if not generated:
            return self
        left, least = self.max_tokens - generated, max(0, self.min_tokens - generated)
        return msgspec.structs.replace(self, max_tokens=left, min_tokens=least)


class Holder(msgspec.Struct, frozen=True):
    """A worker, of any role, that holds more of a prompt than the one that it was placed on."""

    incarnation: Incarnation
    tokens: int  # of the prompt's prefix: whole blocks of the holder's, on its device or in a tier
    leaving: bool = False  # it has generated the sequence until now, and waits for its KV to be taken


class Resumed(msgspec.Struct, frozen=True):
    """A sequence that another worker has begun: the client has these tokens of it, and waits for the next."""

    index: int
    token_ids: list[int]  # after the prompt; possibly none


class GenerateRequest(msgspec.Struct, frozen=True):
    """Frontend → decode worker. The worker owns the request from here on."""

    request_id: RequestId
    frontend: FrontendId
    token_ids: list[int]
    sampling: Sampling
    n: int = 1  # sequences; sequence i uses seed + i
    resumed: tuple[Resumed, ...] = ()  # those of the n that go on; empty: all of them, from the start
    prefill: tuple[Incarnation, ...] = ()  # candidates, best first; empty: compute here
    cache_salt: str | None = None
    timeout_ms: int = 600_000  # of the whole request
    traceparent: str = ""
    route_reason: str = ""
    holder: Holder | None = None  # of whom the prefix may be pulled
    held_tokens: int = 0  # of the prompt, on this worker, as the router believes

    @property
    def histories(self) -> dict[int, list[int]]:
        """What the client has of each sequence to generate, by index."""
        if not self.resumed:
            return {index: [] for index in range(self.n)}
        return {one.index: one.token_ids for one in self.resumed}


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability (natural) of one sampled token and of the likeliest alternatives at that position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class WireError(msgspec.Struct, frozen=True):
    """A DynamoError as it travels: `exception()` at the other end is of the same class with its fields."""

    kind: str
    status: int
    message: str
    name: str = ""  # of the class in dynamo_lite.errors
    fields: dict[str, Scalar | None] = {}

    @classmethod
    def of(cls, error: Exception) -> WireError:
        """Any exception that is no DynamoError is an internal error to the other side."""
        if not isinstance(error, DynamoError):
            return cls("internal_error", 500, f"{type(error).__name__}: {error}")
        fields = {name: value for name, value in vars(error).items() if isinstance(value, Scalar | None)}
        return cls(error.kind, error.status, str(error), type(error).__name__, fields)

    def exception(self) -> DynamoError:
        """The error to raise; a class this process does not know is a plain DynamoError."""
        found = getattr(errors, self.name, None)
        kind = found if isinstance(found, type) and issubclass(found, DynamoError) else DynamoError
        error: DynamoError = kind.__new__(kind)  # past the constructors, which differ; the fields say all
        Exception.__init__(error, self.message)
        vars(error).update(self.fields)
        return error


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    """New tokens of one sequence of one request. The last one of a sequence has `finish` or `error`."""

    request_id: RequestId
    index: int = 0
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None  # one per token, when asked for
    finish: str | None = None  # "stop" | "length" | "abort"
    stop_token: int | None = None  # the id in Sampling.stop_token_ids that ended it; it is the last of token_ids
    cached_tokens: int | None = None  # on the first delta of the first sequence: prompt tokens in this worker's KV
    error: WireError | None = None


class DeltaBatch(msgspec.Struct, frozen=True):
    """All deltas of one engine step of one worker for one frontend. `seq` rises by one per worker and frontend."""

    worker: Incarnation
    seq: int
    deltas: list[Delta]


class Cancel(msgspec.Struct, frozen=True):
    """Stop a request, or only its sequence `index` (a text stop string ended it). Idempotent, never answered."""

    request_id: RequestId
    index: int | None = None
    moved: bool = False  # it goes on elsewhere, with the KV from here: stay until another Cancel says that it is there


class RankTarget(msgspec.Struct, frozen=True):
    """Where one tensor-parallel rank of the decode worker takes pieces: its agent and the granted staging slots."""

    agent: bytes  # the transfer engine's metadata; empty for the sim engine
    agent_name: str
    address: int  # of slot 0
    device: int
    memory: str  # "DRAM" | "VRAM"
    slot_bytes: int
    slots: tuple[int, ...]  # slot indices granted to this transfer, used round-robin


class PushTarget(msgspec.Struct, frozen=True):
    """What a prefill worker needs to push a prompt's KV into a decode worker, whose blocks may be of another size."""

    transfer_id: int  # random 64 bits: the hold's generation; anything under another id is ignored
    decode: Incarnation
    layout: KvLayout  # of the decode worker
    first_token: int  # of the prompt, at the start of a block of `layout`; what is before it is there already
    tokens: int  # to push, from there on: to the prompt's end, or in whole blocks to what is pulled
    ranks: tuple[RankTarget, ...]  # all of the decode worker's; none with the sim engine

    @property
    def first_block(self) -> int:
        """In blocks of the decode worker's."""
        return self.first_token // self.layout.block_size

    @property
    def num_blocks(self) -> int:
        """Blocks of the decode worker's to fill, the last one possibly in part."""
        return -(-self.tokens // self.layout.block_size)


class PrefillRequest(msgspec.Struct, frozen=True):
    """Decode worker → prefill worker, or holder of a prefix: compute what it lacks of this prompt's KV, and push it."""

    request_id: RequestId
    token_ids: list[int]  # of a pull, one more than the target takes: an engine computes at least one token
    target: PushTarget
    cache_salt: str | None = None
    timeout_ms: int = 600_000
    traceparent: str = ""
    sampling: Sampling | None = None  # how to choose the first token, if the decode worker wants it
    only_held: bool = False  # a pull: of use only if the worker has all blocks of it, and need compute but the rest
    leaving: bool = False  # a pull of a sequence that the worker has generated until now, and waits to be rid of


class FirstToken(msgspec.Struct, frozen=True):
    """Prefill worker → decode worker: what follows the prompt, as soon as it is chosen; its KV is still on the way."""

    request_id: RequestId
    token_id: int


class PrefillReply(msgspec.Struct, frozen=True):
    """Sent once the prefill worker has pushed everything, or failed."""

    cached_tokens: int = 0  # prompt tokens the prefill worker found in its own KV
    seconds: float = 0.0  # from arrival to the last piece pushed
    error: WireError | None = None  # a PrefillFailed
    traceparent: str = ""  # the prefill span, for the transfer's span to be its child
    first_token: int | None = None  # again, as a FirstToken may get lost


Line = tuple[float, float]  # milliseconds for anything at all, and for each one of what is counted


class Rates(msgspec.Struct, frozen=True, omit_defaults=True):
    """What things have taken at a worker lately, in milliseconds; None: not measured yet."""

    prefill: Line | None = None  # computing a prompt, per token
    step: Line | None = None  # of decoding, per sequence
    pull: Line | None = None  # from another worker, per token
    onboard: dict[Tier, Line] = {}  # from a tier beneath the device, per token
    answer_tokens: float | None = None  # of a sequence


class LoadReport(msgspec.Struct, frozen=True):
    """A worker's load, published a few times a second and after every change of `running` to or from zero."""

    worker: Incarnation
    seq: int
    running: int  # sequences
    waiting: int
    kv_used_blocks: int
    kv_total_blocks: int
    held_blocks: int = 0
    kv_seq: int = 0  # last KV event batch published: lets a router notice a lost last batch
    prefills: int = 0  # prefill requests served since start
    draining: bool = False
    queued_tokens: int = 0  # of prompts, yet to be computed here; what is known to be cached does not count
    rates: Rates = Rates()


class Pong(msgspec.Struct, frozen=True):
    """Answer to a ping: the worker's event loop runs."""

    worker: Incarnation
    engine_silent_s: float = 0.0  # since its engine's processes last showed that they run


class Empty(msgspec.Struct, frozen=True):
    """A message that needs no content."""


T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()
_decoders: dict[type, msgspec.msgpack.Decoder[object]] = {}
_HEAD = bytes([PROTOCOL])


def encode(message: msgspec.Struct) -> bytes:
    return _HEAD + _encoder.encode(message)


def decode(data: bytes, kind: type[T]) -> T:
    """Raises ProtocolMismatch when the version differs or the content is not a `kind`."""
    if not data or data[0] != PROTOCOL:
        found = data[0] if data else "an empty message"
        raise ProtocolMismatch(f"protocol {found} received for {kind.__name__}; this process speaks {PROTOCOL}")
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    try:
        return decoder.decode(memoryview(data)[1:])  # type: ignore[return-value]  # the cache is keyed by the type
    except msgspec.MsgspecError as error:
        raise ProtocolMismatch(f"not a valid {kind.__name__}: {error}") from error


class Subjects:
    """NATS subjects of one deployment; `namespace` keeps deployments on a shared NATS apart.

    Worker subjects are keyed by incarnation, so a message for a dead process can never reach its successor
    and "no responders" means that very process is gone.
    """

    def __init__(self, namespace: str) -> None:
        self.root = f"dl.{namespace}"

    def generate(self, worker: Incarnation) -> str:
        """GenerateRequest, no reply but the deltas; its reply subject is `undelivered(...)`."""
        return f"{self.root}.w.{worker}.generate"

    def cancel(self, worker: Incarnation) -> str:
        """Cancel, published; idempotent; also for prefill requests."""
        return f"{self.root}.w.{worker}.cancel"

    def prefill(self, worker: Incarnation) -> str:
        """PrefillRequest → PrefillReply."""
        return f"{self.root}.w.{worker}.prefill"

    def first_token(self, worker: Incarnation) -> str:
        """FirstToken, published to a decode worker."""
        return f"{self.root}.w.{worker}.first"

    def ping(self, worker: Incarnation) -> str:
        """Empty → Pong."""
        return f"{self.root}.w.{worker}.ping"

    def snapshot(self, worker: Incarnation) -> str:
        """Empty → KvSnapshot (the bus splits what is over NATS's payload limit)."""
        return f"{self.root}.w.{worker}.snapshot"

    def kv_admin(self, worker: Incarnation) -> str:
        """`kv_wire.KvRequest` → KvAnswer."""
        return f"{self.root}.w.{worker}.kv"

    def drain(self, worker: Incarnation) -> str:
        """`drain_wire.Drain` → Draining."""
        return f"{self.root}.w.{worker}.drain"

    def kv_events(self, worker: str = "*") -> str:
        """KvEventBatch, published by workers."""
        return f"{self.root}.kv.{worker}"

    def load(self, worker: str = "*") -> str:
        """LoadReport, published by workers."""
        return f"{self.root}.load.{worker}"

    def bookings(self, router: str = "*") -> str:
        """`route_wire.Bookings`, published by routers to each other."""
        return f"{self.root}.bookings.{router}"

    def explain(self) -> str:
        """`route_wire.Explain`, to every frontend; those that know the request answer with an Explained."""
        return f"{self.root}.explain"

    def deltas(self, frontend: FrontendId) -> str:
        """DeltaBatch, published by workers to one frontend."""
        return f"{self.root}.f.{frontend}.deltas"

    def bounced(self, worker: Incarnation, frontend: str = "*") -> str:
        """Reply subject of `deltas`: the server answers here with "no responders" when the frontend is gone."""
        return f"{self.root}.w.{worker}.bounced.{frontend}"

    def undelivered(self, frontend: FrontendId, request_id: str = "*") -> str:
        """Reply subject of `generate`: the server answers here with "no responders" when the worker is gone."""
        return f"{self.root}.f.{frontend}.undelivered.{request_id}"

    def parse_undelivered(self, subject: str) -> tuple[FrontendId, RequestId] | None:
        """Whose `undelivered` subject this is; None when it is not one."""
        head = f"{self.root}.f."
        frontend, middle, request_id = subject.removeprefix(head).partition(".undelivered.")
        if not (subject.startswith(head) and frontend and middle and request_id):
            return None
        return FrontendId(frontend), RequestId(request_id)
