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
        """One sentence: "prefix 12/20 blocks on decode-0; 14 ms (queue 2, prefill 12), next decode-1 with 31 ms"."""
        workers, chosen = self.workers, self.chosen
        name, prediction = workers[chosen].name, self.predictions[chosen]
        match self.mode:
            case "round_robin" | "random":
                return f"{self.mode.replace('_', ' ')} over {len(workers)}: {name}"
            case "least_loaded":
                return f"least loaded: {name}; {_parts(prediction)}{self._next()}"
            case "kv":
                way = "" if prediction.way == HERE else f", {_way(prediction.way)}"
                return f"{self._prefix()}{way}; {_parts(prediction)}{self._next()}"

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

    def _next(self) -> str:
        others = [position for position in range(len(self.workers)) if position != self.chosen]
        if not others:
            return ""
        best = min(others, key=lambda position: self.predictions[position].total)
        return f", {self.workers[best].name} {_ms(self.predictions[best].total)}"


def _parts(prediction: Prediction) -> str:
    """ "14 ms (queue 2, prefill 12)"."""
    shown = [f"{name} {_number(ms)}" for name, ms in prediction.parts._asdict().items() if ms >= 0.05]
    return _ms(prediction.total) + (f" ({', '.join(shown)})" if len(shown) > 1 else f" ({shown[0]})" if shown else "")


def _way(way: str) -> str:
    return "the rest pulled" if way == PULL else f"computed by {way}"


def _ms(value: float) -> str:
    return f"{_number(value)} ms"


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"
