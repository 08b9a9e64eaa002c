"""What a placement costs: a pure function of what is known about each worker, in predicted milliseconds.

A cost is what the request waits for, and what it takes from others: its prompt interrupts whoever is decoding beside
it, its place in the batch slows it down, and its blocks push out others that somebody may come back for.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dynamo_lite.plane.wire import Line
from kvbm.events import Tier

INTERRUPTED = 0.1  # a stream that stands still for 1 ms counts as so much of waiting for a first token
RELUCTANCE = (
    0.67  # a prompt that a prefill worker could compute is computed at once with decoding if it costs this part
)
HERE, PULL = "here", "pull"
WHERE = {Tier.HOST: "in host memory", Tier.DISK: "on disk", Tier.OBJECT: "in the object store"}


class Parts(NamedTuple):
    """Predicted milliseconds."""

    queue: float = 0.0  # for prompts, and for room, that others have before it
    prefill: float = 0.0  # computing what nobody has
    transfer: float = 0.0  # KV that another worker has, or computes
    onboard: float = 0.0  # KV from tiers
    decode: float = 0.0  # its answer in this batch rather than alone, and what its prompt takes from others there
    evict: float = 0.0  # computing again what has to make room

    @property
    def total(self) -> float:
        return sum(self)


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a worker is. Milliseconds."""

    prefill: Line  # of a prompt, per token
    step: Line  # of decoding, per sequence
    transfer: Line  # of what a prefill worker computes, per token
    pull: Line | None  # of what another one holds, per token; None: not known
    onboard: dict[Tier, Line]  # per token
    answer_tokens: float


@dataclass(slots=True)
class Worker:
    """What is known of one worker, whatever the prompt."""

    name: str
    pace: Pace
    queued_tokens: float = 0.0
    sequences: float = 0.0
    max_sequences: int = 64
    used: float = 0.0  # tokens' worth of its KV that running requests use
    capacity: float = math.inf  # in tokens
    evict_ms: float = 0.0  # what a token of KV that it stores costs others


@dataclass(slots=True)
class Prompt:
    """What one worker has of a prompt. In tokens."""

    tokens: int
    block_size: int
    held: int = 0  # of them, in any tier
    beneath: tuple[tuple[Tier, int], ...] = ()  # of the held ones, how many it has to onboard, and from which tier


class Prefill(NamedTuple):
    """A prefill worker's part in computing a prompt."""

    name: str
    queue: float  # ms
    prefill: float  # ms

    @property
    def total(self) -> float:
        return self.queue + self.prefill


class Prediction(NamedTuple):
    """Of one decode worker."""

    total: float
    parts: Parts
    way: str  # how its prompt comes to be there: "here", "pull", or the prefill worker's name


def line(pace: Line, amount: float) -> float:
    """Milliseconds; none for nothing."""
    return pace[0] + pace[1] * amount if amount > 0 else 0.0


def prefill(worker: Worker, prompt: Prompt) -> Prefill:
    """What a prefill worker, with what it has of the prompt, takes for computing it."""
    pace = worker.pace
    computing = line(pace.prefill, prompt.tokens - prompt.held) + _onboard(pace, prompt.beneath)
    return Prefill(worker.name, line(pace.prefill, worker.queued_tokens), computing)


def predict(
    worker: Worker,
    prompt: Prompt,
    remote: Prefill | None = None,
    pulled: int = 0,
    reluctance: float = RELUCTANCE,
) -> Prediction:
    """What the prompt costs on this decode worker. At least one token of it is missing there.

    `remote`: the best prefill worker for it; the prompt is computed here only for less than `reluctance` of what it
    costs there. `pulled`: tokens, more than are held here, that another worker has.
    """
    pace = worker.pace
    missing = prompt.tokens - prompt.held
    others = worker.sequences
    queue = line(pace.prefill, worker.queued_tokens) + _room(worker, prompt.tokens)
    onboard = _onboard(pace, prompt.beneath) if prompt.beneath else 0.0
    decode = pace.answer_tokens * pace.step[1] * others * (1 + INTERRUPTED)
    evict = worker.evict_ms * missing
    computing = line(pace.prefill, missing)
    best = Parts(queue, computing, 0.0, onboard, decode + INTERRUPTED * others * computing, evict)
    total, way = sum(best), HERE
    if pulled > prompt.held and pace.pull is not None:
        rest = line(pace.prefill, prompt.tokens - pulled)
        moved = line(pace.pull, pulled - prompt.held)
        parts = Parts(queue, rest, moved, onboard, decode + INTERRUPTED * others * rest, evict)
        if (ms := sum(parts)) < total:
            best, total, way = parts, ms, PULL
    if remote is not None:
        moved = line(pace.transfer, missing)
        waited = _room(worker, prompt.tokens) + remote.queue
        parts = Parts(waited, remote.prefill, moved, onboard, decode, evict)
        ms = sum(parts)
        if (way == HERE and reluctance * ms <= total) or ms < total:
            best, total, way = parts, ms, remote.name
    return Prediction(total, best, way)


def _room(worker: Worker, tokens: int) -> float:
    """Until there is a place in the batch, and KV, for one more: as long as those that are there take to end."""
    pace = worker.pace
    lasts = pace.answer_tokens * (pace.step[0] + pace.step[1] * worker.sequences)
    excess = max(0.0, (worker.sequences + 1 - worker.max_sequences) / worker.max_sequences)
    crowded = max(0.0, (worker.used + tokens - worker.capacity) / worker.capacity)
    return lasts * max(excess, crowded)


def _onboard(pace: Pace, beneath: Sequence[tuple[Tier, int]]) -> float:
    return sum(line(pace.onboard[tier], tokens) for tier, tokens in beneath)


def cheapest(costs: Sequence[float], turn: int) -> int:
    """The position of the lowest cost; equal ones take turns, so that ties spread."""
    lowest = min(costs)
    tied = [position for position, value in enumerate(costs) if value <= lowest]
    return tied[turn % len(tied)]


def softmax(costs: Sequence[float], temperature: float, rng: random.Random) -> int:
    """A position: one that costs `temperature` × the mean more than the lowest is taken 1/e times as often."""
    lowest, mean = min(costs), sum(costs) / len(costs)
    if not 0 < mean < math.inf:
        return rng.randrange(len(costs))
    weights = [math.exp((lowest - cost) / (temperature * mean)) for cost in costs]
    return rng.choices(range(len(costs)), weights)[0]
