"""What a worker needs of an engine. `vllm_engine` and `sim_engine` implement it; `worker` uses nothing else.

An engine owns sequences and blocks. It knows nothing of NATS, etcd or HTTP: a decode engine that wants a remote
prefill calls the `RemotePrefill` it was given, after it has allocated the destination blocks.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from dynamo_lite.plane.kv_wire import KvAsk, KvTold
from dynamo_lite.plane.wire import Fingerprint, PushTarget, Rates, RequestId, Sampling, TokenLogprob
from kvbm.events import KvEvent, Tier
from kvbm.policy import PullCost


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is, known once it has started."""

    fingerprint: Fingerprint
    kv_blocks: int
    max_model_len: int  # tokens
    max_num_seqs: int
    agents: tuple[bytes, ...] = ()  # metadata of its transfer agents, by rank, for `meet`


BACKEND = "nixl/UCX"  # the transfer engine of real workers, on traces


@dataclass(frozen=True, slots=True)
class TransferReport:
    """One finished transfer, for the `kv.transfer` span and the metrics."""

    bytes: int
    blocks: int
    pieces: int
    path: str  # dynamo_lite.transports.Path, or "sim"
    started_ns: int  # unix time of the first piece
    ended_ns: int
    late_pieces: int = 0  # not written yet when the last step of the prompt was computed; only the sender knows


class RemotePrefill(Protocol):
    """The worker's side of a remote prefill, handed to the engine with a job."""

    def plan(self, here: int) -> int:
        """Up to which token of the prompt candidates are to be asked, `here` tokens of it being on this worker.

        That is the prompt's end; or less, where another worker holds a prefix up to there and pulling it is the best
        way. Then that worker is the first candidate, none chooses a first token, and the engine computes the rest.
        To be called once, before the first `ask`. There may be no candidate, before it and after it.
        """
        ...

    async def ask(self, target: PushTarget, first_token: Callable[[int], None] | None = None) -> int:
        """Have the next candidate compute the prompt and push it to `target`.

        `first_token` is called with the token that it chose to follow the prompt, at the latest before this returns.
        It is not called where the candidate has not chosen one.

        Returns the tokens that worker had cached, once it says everything was pushed. Raises PrefillFailed when
        this attempt failed (the engine may open a new target and ask again while `more` is true). Unless the cause
        is "silent", "gone" or "protocol", the candidate itself has said so, and writes nothing more to the target.
        """
        ...

    def stop(self) -> None:
        """The result of `ask` is not wanted any more: it then ends soon, with PrefillFailed("cancelled")."""
        ...

    @property
    def asked(self) -> str:
        """Incarnation of the candidate asked last."""
        ...

    @property
    def more(self) -> bool:
        """Whether another candidate is left."""
        ...

    def skipped(self, reason: str) -> None:
        """The engine computes locally and never asks; `reason` is recorded on the trace ("prefix hit", "short")."""
        ...

    def failed(self, cause: str) -> None:
        """The attempt failed on this side, after `ask` had returned: "corrupt", "lost"."""
        ...

    def transferred(self, report: TransferReport) -> None:
        """All blocks of the attempt arrived and are usable."""
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """One sequence to generate."""

    request_id: RequestId
    token_ids: list[int]
    sampling: Sampling
    cache_salt: str | None = None
    remote: RemotePrefill | None = None
    trace_headers: dict[str, str] = field(default_factory=dict)
    held_tokens: int = 0  # of the prompt, on this worker, as the router believes; for the load report alone
    alone: bool = True  # no other sequence waits for this one's KV, so a token may come before that is here
    resumed: int = 0  # the last so many of `token_ids` were generated, elsewhere, and `sampling` is for the rest

    @property
    def history(self) -> list[int]:
        return self.token_ids[len(self.token_ids) - self.resumed :]


class Output(msgspec.Struct, frozen=True):  # made for every token; a frozen dataclass takes five times as long
    """New tokens of one sequence; the last has `finish`."""

    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish: str | None = None  # "stop" | "length" | "abort"
    stop_token: int | None = None
    cached_tokens: int | None = None  # on the first output: prompt tokens found in this engine's own KV


@dataclass(frozen=True, slots=True)
class PrefillJob:
    """A prompt to compute and push."""

    request_id: RequestId
    token_ids: list[int]
    target: PushTarget
    cache_salt: str | None = None
    timeout_s: float = 600.0
    sampling: Sampling | None = None  # how to choose the token after it
    first_token: Callable[[int], None] | None = None  # called with that token, long before the push has ended
    only_held: bool = False  # a pull: to be refused ("not held", "busy") where a block would have to be computed
    leaving: bool = False  # of a sequence that was generated here until now: not refused for being busy


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt that was computed and pushed."""

    cached_tokens: int  # of the prompt, found in the prefill worker's own KV
    transfer: TransferReport
    first_token: int | None = None  # where it was asked for


@dataclass(frozen=True, slots=True)
class TierLoad:
    """One tier beneath the device. Blocks are counted since the start."""

    tier: Tier
    used_bytes: int
    size_bytes: int  # 0: without a limit of ours
    hits: int  # blocks that were looked for here, and found
    misses: int
    offloaded: int  # blocks that came here
    onboarded: int  # blocks that went back: from the host tier to the device, from others to host memory
    evicted: int
    missed: int  # given up on their way here
    corrupt: int  # dropped, as their content was not what was stored
    waiting: int = 0  # to be written here
    on: bool = True  # it works
    blocks: int = 0  # that can be found here


@dataclass(frozen=True, slots=True)
class EngineLoad:
    running: int
    waiting: int
    kv_used_blocks: int
    kv_total_blocks: int
    held_blocks: dict[str, int] = field(default_factory=dict)  # by reason: "push", "receive", "quarantine"
    held_bytes: int = 0  # of these blocks
    staged_bytes: int = 0  # registered memory in use by pieces and grants
    peers: dict[str, int] = field(default_factory=dict)  # workers KV may be exchanged with: "met", "meeting", "silent"
    tiers: tuple[TierLoad, ...] = ()
    queued_tokens: int = 0  # of prompts, yet to be computed here
    rates: Rates = field(default_factory=Rates)


class Engine(Protocol):
    """Lifecycle: `prepare`, `start` once, then anything, then `close` once. All but `prepare` run on one event loop."""

    cost: PullCost  # told by the engine what computing takes, and by the worker what the other ways take

    def prepare(self) -> None:
        """The work that must precede the event loop, threads and sockets, since `start` may fork. Raises StartError."""
        ...

    async def start(self) -> EngineInfo:
        """Load and warm up. Raises StartError."""
        ...

    def generate(self, job: Job) -> AsyncGenerator[Output, None]:
        """Stream one sequence. Closing the generator aborts it and frees its blocks. Raises WorkerError."""
        ...

    async def prefill(self, job: PrefillJob) -> Prefilled:
        """Compute and push; returns when every piece is pushed.

        Raises PrefillFailed. Cancelling aborts it and releases its holds; when the cancelled call has ended, nothing
        more is written to the target.
        """
        ...

    def meet(self, incarnation: str, agents: tuple[bytes, ...]) -> None:
        """KV may be exchanged with that worker: make contact before a request needs it. Returns at once."""
        ...

    def peer_gone(self, incarnation: str) -> None:
        """A worker left the discovery service: nothing of it can arrive any more, its quarantine may end."""
        ...

    def kv_events(self) -> AsyncIterator[tuple[KvEvent, ...]]:
        """Events, one tuple an engine step, in order, from the engine's start; for a single consumer."""
        ...

    def snapshot(self) -> dict[Tier, tuple[int, ...]]:
        """All block hashes as of the events consumed from `kv_events` so far."""
        ...

    def load(self) -> EngineLoad: ...

    async def kv_admin(self, ask: KvAsk) -> KvTold:
        """Tell an operator of the blocks here, or act on them. Raises RequestError, WorkerError."""
        ...

    async def answering(self) -> None:
        """Returns at once while the engine's processes run, otherwise, when they are frozen, once they do again."""
        ...

    def silent_s(self) -> float:
        """How long its processes have shown no sign of life; next to nothing while they run."""
        ...

    async def failed(self) -> str:
        """Returns, with the reason, when the engine has died and cannot serve any more; otherwise never."""
        ...

    async def close(self) -> None:
        """Release everything; safe to call after a failed start."""
        ...
