"""What the connectors say: to the worker process over the control channel, to each other through vLLM's step
metadata, and to a peer's mover in transfer notifications.

Ids: `request_id` is ours (the same in every process); `engine_id` is vLLM's internal one, known in the EngineCore.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec
import torch

from dynamo_lite.plane.layout import KvLayout
from dynamo_lite.plane.wire import PushTarget, RankTarget
from workers.transfer.ready import Ready
from workers.transfer.span import Span

# Keys of SamplingParams.extra_args["kv_transfer_params"], set by the worker process.
REQUEST_ID = "dynamo_lite.request_id"
REMOTE = "dynamo_lite.remote"  # decode: a remote prefill may be asked for
FIRST = "dynamo_lite.first"  # decode: the prefill worker is asked for the first token too
PREPARED = "dynamo_lite.prepared"  # decode: (transfer id, first block) of the `Prepare` that goes before it
PULL = "dynamo_lite.pull"  # decode: tokens of the prompt, in whole blocks, that candidates are asked for; not all of it
PUSH = "dynamo_lite.push"  # prefill: PushTarget, msgpack
ONBOARD = "dynamo_lite.onboard"  # (first block, slots of the host tier that hold the blocks from there on)

_ATTEMPT_BITS = 8  # of a transfer id

# ---- connector → worker process -------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First message of every connector. Rank -1 is the scheduler's; the others are workers with a transfer agent."""

    rank: int
    pid: int
    kv_blocks: int = 0
    layout: KvLayout | None = None
    device: str = ""
    backend: str = ""
    agent: bytes = b""  # the transfer agent's metadata, for other workers


class Skipped(msgspec.Struct, frozen=True, tag="skipped"):
    """The decode scheduler computes this prompt locally, because of `reason`."""

    request_id: str
    reason: str


class ReceivePlanned(msgspec.Struct, frozen=True, tag="planned"):
    """vLLM has allocated a receive's blocks, and this rank knows them."""

    request_id: str
    rank: int


class ReceiveOpened(msgspec.Struct, frozen=True, tag="opened"):
    """Staging is granted: a prefill worker may be asked to push to `target` (one message per rank)."""

    request_id: str
    transfer_id: int
    rank: int
    first_block: int
    tokens: int  # to be received, from the start of that block on
    target: RankTarget


UNWANTED = "unwanted"  # cause of a push whose receiver has turned elsewhere while the sender was silent
NO_STAGING = "no staging"  # cause of a receive that waited too long for it; the decode worker computes the prompt


class ReceiveEnded(msgspec.Struct, frozen=True, tag="received"):
    """A receive has ended on one rank. `cause` is empty when every block arrived."""

    request_id: str
    transfer_id: int
    rank: int
    cause: str = ""
    bytes: int = 0
    blocks: int = 0
    pieces: int = 0
    path: str = ""  # dynamo_lite.transports.Path
    started_ns: int = 0  # unix time of the first piece
    ended_ns: int = 0


IN_FLIGHT = "in_flight"  # cause of a push that has failed while one of its writes cannot be stopped


class PushEnded(msgspec.Struct, frozen=True, tag="pushed"):
    """A push has ended on one rank. `cause` is empty when every piece was written."""

    request_id: str
    transfer_id: int
    rank: int
    cause: str = ""
    bytes: int = 0
    pieces: int = 0
    path: str = ""  # dynamo_lite.transports.Path
    started_ns: int = 0  # unix time of the first piece
    ended_ns: int = 0
    late_pieces: int = 0  # those that were not written yet when the last step of the prompt was computed


def failure(ends: Iterable[PushEnded]) -> str:
    """Why a push over these ranks failed; empty when it did not. That one of them still writes goes before all else."""
    causes = [end.cause for end in ends if end.cause]
    return IN_FLIGHT if IN_FLIGHT in causes else next(iter(causes), "")


class Holds(msgspec.Struct, frozen=True, tag="holds"):
    """Blocks held on one rank, by reason, and staging in use; sent whenever it changes."""

    rank: int
    blocks: dict[str, int]
    staged: int = 0  # bytes


class Peers(msgspec.Struct, frozen=True, tag="peers"):
    """Workers that one rank knows of, by state ("met", "meeting", "silent"); sent whenever it changes."""

    rank: int
    workers: dict[str, int]


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """Answer to `Probe`."""

    rank: int


class Offloaded(msgspec.Struct, frozen=True, tag="offloaded"):
    """What became of blocks on their way to the host tier, on one rank: slot, full hash, and whether it is there."""

    rank: int
    blocks: tuple[tuple[int, bytes, bool], ...] = ()
    missed: int = 0  # blocks that found no slot; from the scheduler's connector, rank -1


class SlotsWanted(msgspec.Struct, frozen=True, tag="wanted"):
    """From the scheduler's connector: a prompt has come that will complete that many more blocks than it has slots."""

    count: int


class Onboarded(msgspec.Struct, frozen=True, tag="onboarded"):
    """An onboarding has ended on one rank, and reads no slot any more. `cause` is empty when all it was to is here."""

    request_id: str
    rank: int
    cause: str = ""
    blocks: int = 0
    bytes: int = 0
    started_ns: int = 0  # unix time of the first copy
    ended_ns: int = 0


Report = (
    Hello | Skipped | ReceivePlanned | ReceiveOpened | ReceiveEnded | PushEnded | Holds | Peers | Alive
    | Offloaded | SlotsWanted | Onboarded
)  # fmt: skip

# ---- worker process → connector -------------------------------------------------------------------------------


class Prepare(msgspec.Struct, frozen=True, tag="prepare"):
    """Grant staging to a request that is about to be given to the engine: a prefill worker can then be asked at once.

    Its `ReceivePlan` follows, under the same transfer id, unless vLLM turns out to need none; then `GiveUp` does.
    """

    request_id: str
    transfer_id: int
    first_block: int
    tokens: int  # as in `ReceiveOpened`


class Reopen(msgspec.Struct, frozen=True, tag="reopen"):
    """The attempt failed; quarantine its staging and open another for the next candidate."""

    request_id: str
    transfer_id: int


class GiveUp(msgspec.Struct, frozen=True, tag="give_up"):
    """No candidate is left, or none is wanted; hand the request back to the scheduler, once it plans it."""

    request_id: str
    transfer_id: int


class FirstToken(msgspec.Struct, frozen=True, tag="first_token"):
    """The prefill worker's token after the prompt; the client has it. None: there is none, and none will come.

    To the scheduler's connector too. A receive of a request with FIRST does not end, for vLLM, before this came.
    """

    request_id: str
    token_id: int | None


class Settle(msgspec.Struct, frozen=True, tag="settle"):
    """What became of the worker that was asked to push under this id.

    `closed`: it has said, or its death says, that it will write nothing more; its staging may be used again.
    Otherwise that is unknown until `PeerGone(peer)` or its own `Closed`.
    """

    transfer_id: int
    peer: str  # incarnation
    closed: bool


class PeerGone(msgspec.Struct, frozen=True, tag="peer_gone"):
    """That prefill worker's process no longer exists: nothing of it can arrive any more."""

    incarnation: str


class Meet(msgspec.Struct, frozen=True, tag="meet"):
    """KV may be exchanged with that worker: greet its agents before a request needs them. Idempotent."""

    incarnation: str
    agents: tuple[bytes, ...]  # metadata, by rank


class StopPush(msgspec.Struct, frozen=True, tag="stop_push"):
    """The decode worker does not want this push any more."""

    request_id: str


class Probe(msgspec.Struct, frozen=True, tag="probe"):
    """Answer with `Alive`, from the thread that does the work. To the scheduler's connector too."""


class GrantSlots(msgspec.Struct, frozen=True, tag="slots"):
    """To the scheduler's connector: slots of the host tier that it may have filled, each once."""

    slots: tuple[int, ...]


class TierChanged(msgspec.Struct, frozen=True, tag="tier"):
    """To the scheduler's connector: full hashes of blocks that are in the tiers now, or are there no more."""

    stored: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()


class OnboardChecked(msgspec.Struct, frozen=True, tag="checked"):
    """The first `blocks` blocks that this request is to onboard are what was stored.

    The next one is not, if there is one, unless `more` are still to be checked: then another word follows.
    """

    request_id: str
    blocks: int
    more: bool = False


class OnboardOver(msgspec.Struct, frozen=True, tag="onboard_over"):
    """The request has ended: its slots are about to be used for something else. Answered with `Onboarded`."""

    request_id: str


Command = (
    Prepare | Reopen | GiveUp | FirstToken | Settle | PeerGone | Meet | StopPush | Probe
    | GrantSlots | TierChanged | OnboardChecked | OnboardOver
)  # fmt: skip
TO_SCHEDULER = (Probe, FirstToken, GrantSlots, TierChanged)  # its connector is told as well, and first
NOT_TO_RANKS = (GrantSlots, TierChanged)

# ---- mover → mover, in transfer notifications ------------------------------------------------------------------


class Piece(msgspec.Struct, frozen=True, tag="piece", array_like=True):
    """The sender's share of a staging slot has been filled with some layers of its heads of `count` blocks of the
    receiver's.
    """

    transfer_id: int
    slot: int
    first: int  # block of the transfer
    count: int
    first_head: int  # of the model
    heads: int  # how many; they say where in the slot the share lies
    first_layer: int  # of the model
    layers: int
    agent: bytes = b""  # the sender's metadata, in its first piece of a transfer: where credits go
    checksum: int | None = None  # of the piece, with kv_transfer.verify

    @property
    def head_range(self) -> range:
        return range(self.first_head, self.first_head + self.heads)

    @property
    def layer_range(self) -> range:
        return range(self.first_layer, self.first_layer + self.layers)


class Credit(msgspec.Struct, frozen=True, tag="credit", array_like=True):
    """The addressed sender's share of the slot has been emptied and may be written again."""

    transfer_id: int
    slot: int


class Closed(msgspec.Struct, frozen=True, tag="closed", array_like=True):
    """This rank of the sender has ended the transfer early, or will not begin it, and writes nothing more."""

    transfer_id: int
    cause: str
    ranks: int  # of the sending worker: once that many have said so, it is closed


class Refused(msgspec.Struct, frozen=True, tag="refused", array_like=True):
    """The receiver wants no more of a transfer: the sender is to end it, or never to begin it, and to say `Closed`."""

    transfer_id: int
    cause: str


class Greeting(msgspec.Struct, frozen=True, tag="greeting", array_like=True):
    """First contact: what an agent sends, and how the other answers it."""

    answer: bool
    number: int  # counted by who asks; the answer repeats it
    agent: bytes = b""  # metadata of who asks: where the answer goes


Note = Piece | Credit | Closed | Refused | Greeting

# ---- scheduler → worker, through vLLM's step metadata ----------------------------------------------------------


@dataclass(slots=True)
class ReceivePlan:
    """Blocks allocated on this worker for a remote prefill. Of one that is only prepared neither ids are known."""

    engine_id: str
    request_id: str
    block_ids: list[int]  # destination, in prompt order
    first_block: int  # index in the prompt of block_ids[0]
    tokens: int  # in those blocks; the last one may be partial
    transfer_id: int  # of the first attempt; every further one adds 1. The same on all ranks
    ready: Ready | None = None  # set by the mover: the blocks may be written
    ids: torch.Tensor | None = None  # set by the mover: block_ids where the blocks are
    first_token: bool = False  # the request does not go on before it is known whether the prefill worker chose one


@dataclass(slots=True)
class PushStep:
    """Tokens of a prompt that this step finishes and that are to be pushed."""

    engine_id: str
    request_id: str
    target: PushTarget
    span: Span  # fills whole blocks of the receiver's, but for the prompt's last
    first: int  # block of the transfer, of the receiver's size, in which the span begins


@dataclass(slots=True)
class OffloadStep:
    """Blocks that this step completes, or that it found, and that are to be copied to the host tier."""

    engine_id: str
    block_ids: list[int]
    hashes: list[bytes]
    slots: list[int]  # of the host tier, one for each


@dataclass(slots=True)
class OnboardPlan:
    """Blocks allocated on this worker for what the host tier holds."""

    engine_id: str
    request_id: str
    skipped: int  # of the blocks that the worker process has pinned: found on the device after all
    block_ids: list[int]  # destination
    slots: list[int]  # source, one for each
    ready: Ready | None = None  # set by the mover: the blocks may be written


@dataclass(slots=True)
class StepPlan:
    """What one engine step asks of the mover."""

    offloads: list[OffloadStep] = field(default_factory=list)
    onboards: list[OnboardPlan] = field(default_factory=list)
    preempted_offloads: list[str] = field(default_factory=list)  # engine ids: as with pushes
    receives: list[ReceivePlan] = field(default_factory=list)
    pushes: list[PushStep] = field(default_factory=list)
    cancelled_receives: list[str] = field(default_factory=list)  # engine ids
    cancelled_pushes: list[str] = field(default_factory=list)  # engine ids: aborted, their blocks still theirs
    preempted_pushes: list[str] = field(default_factory=list)  # engine ids: their blocks are about to be overwritten
    idle: bool = False  # nothing is computed in this step


def new_transfer_id() -> int:
    """Random, with room for the attempts that follow to count up from it, within msgpack's signed 64 bits."""
    return secrets.randbits(55) << _ATTEMPT_BITS


def same_request(one: int, other: int) -> bool:
    """Whether two transfer ids are of attempts at one request."""
    return one >> _ATTEMPT_BITS == other >> _ATTEMPT_BITS
