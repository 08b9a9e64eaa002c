"""What a placement costs: a pure function of what is known about each worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_lite import config
from kvbm.events import Tier

_WHERE = {Tier.HOST: "in host memory", Tier.DISK: "on disk", Tier.OBJECT: "in the object store"}


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is known of one decode worker for one prompt."""

    name: str
    prompt_blocks: int
    overlap_blocks: int  # of them, those it holds
    busy_blocks: float  # of the requests it works on or has queued
    beneath: tuple[tuple[Tier, int], ...] = ()  # of the overlap, how many it has to onboard first, and from which tier

    @property
    def tier_blocks(self) -> int:
        return sum(count for _, count in self.beneath)


def score(candidate: Candidate, weights: config.Router) -> float:
    """Lower is better. The unit is the work of one block."""
    match weights.mode:
        case "kv":
            missing = candidate.prompt_blocks - candidate.overlap_blocks + onboarding(candidate.beneath, weights)
            return weights.overlap_weight * missing + weights.load_weight * candidate.busy_blocks
        case "least_loaded":
            return candidate.busy_blocks
        case "round_robin":
            return 0.0


def onboarding(beneath: Sequence[tuple[Tier, int]], weights: config.Router) -> float:
    """What these blocks of tiers cost, in blocks that have to be computed."""
    parts: dict[Tier, float] = {
        Tier.HOST: weights.tier_weights.host,
        Tier.DISK: weights.tier_weights.disk,
        Tier.OBJECT: weights.tier_weights.object,
    }
    return sum(parts[tier] * count for tier, count in beneath)


def cheapest(scores: Sequence[float], turn: int) -> int:
    """The position of the lowest score; equal ones take turns, so that ties spread."""
    lowest = min(scores)
    tied = [position for position, value in enumerate(scores) if value == lowest]
    return tied[turn % len(tied)]


def reason(candidates: Sequence[Candidate], chosen: int, weights: config.Router) -> str:
    """The decision in one sentence: "prefix 12/20 blocks on decode-0; load 3.0 vs 5.0"."""
    winner = candidates[chosen]
    others = [other for position, other in enumerate(candidates) if position != chosen]
    if weights.mode == "round_robin":
        return f"round robin over {len(candidates)}: {winner.name}"
    load = f"load {winner.busy_blocks:.1f}"
    if others:
        load += f" vs {min(other.busy_blocks for other in others):.1f}"
    if weights.mode == "least_loaded":
        return f"least loaded: {winner.name}; {load}"
    if winner.overlap_blocks:
        tiers = ", ".join(f"{count} {_WHERE[tier]}" for tier, count in winner.beneath)
        tier = f" ({tiers})" if tiers else ""
        prefix = f"prefix {winner.overlap_blocks}/{winner.prompt_blocks} blocks{tier} on {winner.name}"
    else:
        prefix = f"no prefix of {winner.prompt_blocks} blocks on {winner.name}"
    longest = max(others, key=lambda other: other.overlap_blocks, default=None)
    if longest is not None and longest.overlap_blocks > winner.overlap_blocks:
        prefix += f", though {longest.name} has {longest.overlap_blocks} at load {longest.busy_blocks:.1f}"
    return f"{prefix}; {load}"
