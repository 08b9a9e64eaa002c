"""Why a request went where it went: in a sentence, and in full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_lite.config import RouterMode
from dynamo_lite.plane.route_wire import RouteCandidate
from dynamo_lite.router.cost import HERE, PULL, WHERE, Prediction, Prompt, Worker


@dataclass(frozen=True, slots=True)
class Considered:
    """Everything that one decision was made from, one entry each a decode worker that was possible."""

    mode: RouterMode
    workers: Sequence[Worker]
    prompts: Sequence[Prompt]
    predictions: Sequence[Prediction]
    chosen: int

    def candidates(self) -> tuple[RouteCandidate, ...]:
        """The cheapest first."""
        order = sorted(range(len(self.workers)), key=lambda position: self.predictions[position].total)
        return tuple(map(self._candidate, order))

    def _candidate(self, position: int) -> RouteCandidate:
        worker, prompt, prediction = self.workers[position], self.prompts[position], self.predictions[position]
        return RouteCandidate(
            worker.name, prediction.total, prediction.parts._asdict(), prediction.way, prompt.held,
            round(worker.queued_tokens), round(worker.sequences),
        )  # fmt: skip

    def reason(self) -> str:
        """One sentence: "prefix 12/20 blocks on d0; first token in 14 ms (queue 2, prefill 12); cost 374, d1 931"."""
        workers, chosen = self.workers, self.chosen
        name, prediction = workers[chosen].name, self.predictions[chosen]
        match self.mode:
            case "round_robin" | "random":
                return f"{self.mode.replace('_', ' ')} over {len(workers)}: {name}"
            case "least_loaded":
                return f"least loaded: {name}; {_waits(prediction)}; {self._costs()}"
            case "kv":
                way = "" if prediction.way == HERE else f", {_way(prediction.way)}"
                return f"{self._prefix()}{way}; {_waits(prediction)}; {self._costs()}"

    def _prefix(self) -> str:
        prompt, name = self.prompts[self.chosen], self.workers[self.chosen].name
        size = prompt.block_size
        blocks = -(-prompt.tokens // size)
        if prompt.held:
            tiers = ", ".join(f"{count // size} {WHERE[tier]}" for tier, count in prompt.beneath)
            sentence = f"prefix {prompt.held // size}/{blocks} blocks{f' ({tiers})' if tiers else ''} on {name}"
        else:
            sentence = f"no prefix of {blocks} blocks on {name}"
        longest = max(range(len(self.prompts)), key=lambda position: self.prompts[position].held)
        more = self.prompts[longest]
        if more.held > prompt.held:
            sentence += f", though {self.workers[longest].name} has {more.held // more.block_size}"
        return sentence

    def _costs(self) -> str:
        """Of the chosen worker, and of the cheapest other one."""
        own = f"cost {_number(self.predictions[self.chosen].total)}"
        others = [position for position in range(len(self.workers)) if position != self.chosen]
        if not others:
            return own
        best = min(others, key=lambda position: self.predictions[position].total)
        return f"{own}, {self.workers[best].name} {_number(self.predictions[best].total)}"


def _waits(prediction: Prediction) -> str:
    """ "first token in 14 ms (queue 2, prefill 12)"."""
    parts = prediction.parts
    named = (
        ("queue", parts.queue),
        ("prefill", parts.prefill),
        ("transfer", parts.transfer),
        ("onboard", parts.onboard),
    )
    shown = ", ".join(f"{name} {_number(ms)}" for name, ms in named if ms >= 0.05)
    return f"first token in {_number(parts.wait)} ms" + (f" ({shown})" if shown else "")


def _way(way: str) -> str:
    return "the rest pulled" if way == PULL else f"computed by {way}"


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"
