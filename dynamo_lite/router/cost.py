"""What a placement costs: a pure function of what is known about each worker, in predicted milliseconds.

A cost is what the request waits for, and what it takes from others. Computing a prompt takes from others in two ways:
whoever is decoding beside it stands still, and the time is lost for all that come later, as is the room that its KV
takes a second time where another worker holds it. On a fleet that has time to spare this shows in no wait, and a cost
that looked at waits alone would compute anew what it could find: hence work weighs more than waiting, within limits.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dynamo_lite.plane.wire import Line
from kvbm.events import Tier

WORK = 30.0  # so many milliseconds of one request's waiting are worth one of a worker's computing
INTERRUPTED = 0.05  # a stream that stands still for 1 ms counts as so much of waiting for a first token
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
    work: float = 0.0  # computing, once more, by what it weighs
    late: float = 0.0  # the part of the queue that is beyond all patience, likewise

    @property
    def wait(self) -> float:
        """Until the first token."""
        return self.queue + self.prefill + self.transfer + self.onboard


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
    crowding: float = 1.0  # above 1: was given more KV lately than others, so that what is there is forgotten sooner


@dataclass(frozen=True, slots=True)
class Policy:
    """What is decided by people."""

    reluctance: float = RELUCTANCE  # 0: never computed beside decoding where a prefill worker could
    patience_ms: float = 3000.0  # how much longer than elsewhere a request may wait for work to be saved


DEFAULT = Policy()


@dataclass(slots=True)
class Prompt:
    """What one worker has of a prompt. In tokens."""

    tokens: int
    block_size: int
    held: int = 0  # of them, in any tier
    beneath: tuple[tuple[Tier, int], ...] = ()  # of the held ones, how many it has to onboard, and from which tier


class Usual(NamedTuple):
    """Of all workers that could have the prompt."""

    shortest: float  # milliseconds that it would wait where it would wait least
    token_ms: float  # computing one token, on a worker as most are: work weighs the same wherever it is done


class Prefill(NamedTuple):
    """A prefill worker's part in computing a prompt. Milliseconds."""

    name: str
    queue: float
    prefill: float
    onboard: float
    work: float
    late: float

    @property
    def total(self) -> float:
        return self.queue + self.prefill + self.onboard + self.work + self.late


class Prediction(NamedTuple):
    """Of one decode worker."""

    total: float
    parts: Parts
    way: str  # how its prompt comes to be there: "here", "pull", or the prefill worker's name


def line(pace: Line, amount: float) -> float:
    """Milliseconds; none for nothing."""
    return pace[0] + pace[1] * amount if amount > 0 else 0.0


def waiting(worker: Worker, tokens: int) -> float:
    """Milliseconds until a prompt of so many can be begun with."""
    queue = line(worker.pace.prefill, worker.queued_tokens)
    if worker.sequences < worker.max_sequences and worker.used + tokens <= worker.capacity:
        return queue
    return queue + _room(worker, tokens)


def prefill(worker: Worker, prompt: Prompt, usual: Usual, policy: Policy = DEFAULT) -> Prefill:
    """What a prefill worker, with what it has of the prompt, takes for computing it. `usual`: of prefill workers."""
    pace, missing = worker.pace, prompt.tokens - prompt.held
    queue, onboard = line(pace.prefill, worker.queued_tokens), _onboard(pace, prompt.beneath)
    work, late = WORK * usual.token_ms * missing, _late(queue, usual, policy)
    return Prefill(worker.name, queue, line(pace.prefill, missing), onboard, work, late)


def predict(
    worker: Worker, prompt: Prompt, usual: Usual, remote: Prefill | None = None, pulled: int = 0,
    policy: Policy = DEFAULT,
) -> Prediction:  # fmt: skip
    """What the prompt costs on this decode worker. At least one token of it is missing there.

    `remote`: the best prefill worker for it. `pulled`: tokens, more than are held here, that another worker has.
    """
    pace, others = worker.pace, worker.sequences
    missing = prompt.tokens - prompt.held
    queue = waiting(worker, prompt.tokens)
    work = WORK * usual.token_ms * (1 + worker.crowding) / 2
    late = _late(queue, usual, policy) if queue > policy.patience_ms else 0.0
    onboard = _onboard(pace, prompt.beneath) if prompt.beneath else 0.0
    decode = pace.answer_tokens * pace.step[1] * others * (1 + INTERRUPTED)
    computing = line(pace.prefill, missing)
    best = Parts(queue, computing, 0.0, onboard, decode + INTERRUPTED * others * computing, work * missing, late)
    total, way = sum(best), HERE
    if pulled > prompt.held and pace.pull is not None:
        rest = line(pace.prefill, prompt.tokens - pulled)
        moved = line(pace.pull, pulled - prompt.held)
        parts = Parts(
            queue, rest, moved, onboard, decode + INTERRUPTED * others * rest, work * (prompt.tokens - pulled), late
        )
        if (ms := sum(parts)) < total:
            best, total, way = parts, ms, PULL
    if remote is not None:
        moved, room = line(pace.transfer, missing), queue - line(pace.prefill, worker.queued_tokens)
        parts = Parts(
            room + remote.queue, remote.prefill, moved, onboard + remote.onboard, decode, remote.work,
            remote.late,
        )  # fmt: skip
        ms = sum(parts)
        wait = ms - parts.work - parts.late
        reluctant = ms - (1 - policy.reluctance) * wait
        if ms < total or (way == HERE and reluctant <= total):
            best, total, way = parts, ms, remote.name
    return Prediction(total, best, way)


def _late(queue: float, usual: Usual, policy: Policy) -> float:
    return WORK * max(0.0, queue - usual.shortest - policy.patience_ms)


def _room(worker: Worker, tokens: int) -> float:
    """Until there is a place in the batch, and KV, for one more: a part of what those that are there take to end."""
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
