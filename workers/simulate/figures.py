"""What users of a simulated deployment would have seen, and how busy its workers were."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from workers.engine import TierLoad

_BINS = 400  # to a factor of e: a gap is known to an eighth of a percent


@dataclass(slots=True)
class Gaps:
    """Times between tokens, of which there are too many to keep."""

    count: int = 0
    _bins: dict[int, int] = field(default_factory=dict)

    def add(self, seconds: float, count: int) -> None:
        self.count += count
        place = round(math.log(seconds) * _BINS) if seconds > 0 else -1_000_000
        self._bins[place] = self._bins.get(place, 0) + count

    def percentile(self, percent: float) -> float:
        """Seconds; 0 without any gap."""
        left = self.count * percent / 100
        for place in sorted(self._bins):
            left -= self._bins[place]
            if left <= 0:
                return math.exp(place / _BINS) if place > -1_000_000 else 0.0
        return 0.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request. Seconds."""

    at_s: float  # it came
    prompt_tokens: int
    found_tokens: int  # of them, those whose KV was there
    answer_tokens: int
    ttft_s: float
    gap_s: float  # between its tokens, on average; 0 for an answer of one
    ended_s: float


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request is to be served within. Seconds."""

    ttft_s: float
    itl_s: float

    def met(self, answer: Answer) -> bool:
        return answer.ttft_s <= self.ttft_s and answer.gap_s <= self.itl_s


@dataclass(frozen=True, slots=True)
class WorkerFigures:
    """One worker's part."""

    name: str
    requests: int
    placed_tokens: int
    computed_tokens: int
    generated_tokens: int
    busy_s: float
    preempted: int
    tiers: tuple[TierLoad, ...]


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one simulation. Seconds."""

    requests: int
    refused: int  # too long for a worker
    hit_rate: float  # blocks of prompts that were not computed, of all, those that are cut off included
    ttft_p50_s: float
    ttft_p99_s: float
    ttft_mean_s: float
    itl_p50_s: float
    itl_p99_s: float
    met: int  # requests within both objectives
    goodput: float  # of these, in each second and on each GPU
    sent_spread: float  # prompt tokens sent to the busiest worker that decodes, over the mean
    computed_spread: float  # likewise, computed, of those that do
    busy: float  # part of the time that workers computed something
    duration_s: float  # from the first request to the last token
    workers: tuple[WorkerFigures, ...]


def percentile(values: Iterable[float], percent: float) -> float:
    """Between the nearest values in a straight line; 0 without any."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Sequence[float]) -> float:
    """The largest over the mean."""
    total = sum(values)
    return max(values) * len(values) / total if total else 1.0


def figures(
    answers: Sequence[Answer], refused: int, gaps: Gaps, workers: Sequence[WorkerFigures], slo: Slo, *,
    block: int, gpus: int,
) -> Figures:  # fmt: skip
    """`block`: tokens."""
    ttft = [answer.ttft_s for answer in answers]
    duration = max((answer.ended_s for answer in answers), default=0.0) - min(
        (answer.at_s for answer in answers), default=0.0
    )
    blocks = sum(-(-answer.prompt_tokens // block) for answer in answers)
    met = sum(map(slo.met, answers))
    sent = [worker.placed_tokens for worker in workers if not worker.name.startswith("prefill")]
    apart = [worker.computed_tokens for worker in workers if worker.name.startswith("prefill")]
    busy = sum(worker.busy_s for worker in workers)
    return Figures(
        requests=len(answers),
        refused=refused,
        hit_rate=sum(answer.found_tokens for answer in answers) / block / max(1, blocks),
        ttft_p50_s=percentile(ttft, 50),
        ttft_p99_s=percentile(ttft, 99),
        ttft_mean_s=sum(ttft) / max(1, len(ttft)),
        itl_p50_s=gaps.percentile(50),
        itl_p99_s=gaps.percentile(99),
        met=met,
        goodput=met / duration / gpus if duration else 0.0,
        sent_spread=spread(sent),
        computed_spread=spread(apart or [worker.computed_tokens for worker in workers]),
        busy=busy / duration / len(workers) if duration else 0.0,
        duration_s=duration,
        workers=tuple(workers),
    )
