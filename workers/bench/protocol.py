"""What the benchmark's parent asks of its two processes, and what they answer: msgpack over a socket."""

from __future__ import annotations

import msgspec

from dynamo_lite.plane.wire import PushTarget
from dynamo_lite.rdma import RdmaPort
from dynamo_lite.transports import Transport


class KvShape(msgspec.Struct, frozen=True):
    """The KV of one rank, as vLLM has it on CUDA: a tensor `[blocks, 2, tokens, heads, values]` of bf16 per layer."""

    layers: int
    blocks: int
    tokens: int
    heads: int
    values: int

    @property
    def row_bytes(self) -> int:
        """Of one block in one layer."""
        return 2 * self.tokens * self.heads * self.values * 2

    @property
    def block_bytes(self) -> int:
        return self.layers * self.row_bytes

    @property
    def bytes(self) -> int:
        return self.blocks * self.block_bytes


class Wires(msgspec.Struct, frozen=True):
    """How the two processes reach each other."""

    transport: Transport
    device: str  # "cpu", "cuda"
    rdma: RdmaPort | None = None


# ---- movers ---------------------------------------------------------------------------------------------------


class OpenMover(msgspec.Struct, frozen=True, tag="open_mover"):
    """Make KV memory of a known content, and a mover over it. Answer: Done."""

    case: str
    wires: Wires
    kv: KvShape
    staging: int
    piece: int
    window: int


class Receive(msgspec.Struct, frozen=True, tag="receive"):
    """Plan a receive into these blocks. Answer: Opened."""

    case: str
    transfer_id: int
    block_ids: list[int]


class Push(msgspec.Struct, frozen=True, tag="push"):
    """Plan a push of these blocks. Answer: Moment, of the plan, once the push has ended."""

    case: str
    target: PushTarget
    block_ids: list[int]


class Received(msgspec.Struct, frozen=True, tag="received"):
    """Answer, once the last planned receive has ended: Arrival."""

    case: str


class Compare(msgspec.Struct, frozen=True, tag="compare"):
    """Raise unless these blocks hold what those of the sender do. Answer: Done."""

    case: str
    block_ids: list[int]
    senders: list[int]


# ---- engines, without gather and scatter ----------------------------------------------------------------------


class OpenEngine(msgspec.Struct, frozen=True, tag="open_engine"):
    """An engine with `size` bytes of registered memory. Answer: Agent."""

    wires: Wires
    size: int


class Write(msgspec.Struct, frozen=True, tag="write"):
    """Write `count` × `size` bytes to the peer, `in_flight` at a time, a notification each. Answer: Wrote."""

    peer: Agent
    count: int
    size: int
    in_flight: int


class Collect(msgspec.Struct, frozen=True, tag="collect"):
    """Take that many notifications. Answer: Moment, of the last one."""

    count: int


# ---- what the machine can do ----------------------------------------------------------------------------------


class Copy(msgspec.Struct, frozen=True, tag="copy"):
    """Copy that many bytes from one warm buffer to another. Answer: Took."""

    size: int
    device: str


class Listen(msgspec.Struct, frozen=True, tag="listen"):
    """Accept one TCP connection on loopback, later. Answer: Port."""


class Connect(msgspec.Struct, frozen=True, tag="connect"):
    """Answer: Done."""

    port: int


class Stream(msgspec.Struct, frozen=True, tag="stream"):
    """Send that many bytes through the TCP connection, or receive them. Answer: Moment, of begin or end."""

    size: int


class Work(msgspec.Struct, frozen=True, tag="work"):
    """Answer: Worked."""


Command = (
    OpenMover
    | Receive
    | Push
    | Received
    | Compare
    | OpenEngine
    | Write
    | Collect
    | Copy
    | Listen
    | Connect
    | Stream
    | Work
)

# ---- answers --------------------------------------------------------------------------------------------------


class Done(msgspec.Struct, frozen=True, tag="done"):
    pass


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """It could not be done; the process goes on."""

    why: str


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    target: PushTarget


class Arrival(msgspec.Struct, frozen=True, tag="arrival"):
    at: float  # time.monotonic(), one clock for all processes of a host
    path: str
    pieces: int


class Moment(msgspec.Struct, frozen=True, tag="moment"):
    at: float


class Agent(msgspec.Struct, frozen=True, tag="agent"):
    metadata: bytes
    address: int
    size: int
    device: int
    memory: str


class Wrote(msgspec.Struct, frozen=True, tag="wrote"):
    began: float
    each_s: list[float]  # post to done
    path: str


class Took(msgspec.Struct, frozen=True, tag="took"):
    seconds: float


class Port(msgspec.Struct, frozen=True, tag="port"):
    number: int


class Worked(msgspec.Struct, frozen=True, tag="worked"):
    """Processor time since this process began, and the time now."""

    cpu_s: float
    at: float


Answer = Done | Failed | Opened | Arrival | Moment | Agent | Wrote | Took | Port | Worked
