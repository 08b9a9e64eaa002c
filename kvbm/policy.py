"""Whether to read a prefix from the tiers, to pull it from another worker, or to compute it again, from what each has
taken lately.

Only what the ways do not share is compared: each of them waits for the engine's next step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvbm.events import Tier

_DECAY = 0.8  # of what was measured before, at each new measurement
_LEAST_TOKENS = 64  # shorter prompts say little about the speed of computing long ones
_REACH = 4  # times the largest amount that was measured
_REFUSALS = 32  # after so many in a row a little is read, to see whether it is still slow
_TRIAL = 4  # blocks
_RARER = 5  # times that trials in a row may become half as frequent
_FIRST = 64  # blocks of a tier beneath host memory, of whose speed nothing is known
_FASTER = 0.5  # of what was predicted: then what was measured before is of another time


@dataclass(frozen=True, slots=True)
class Part:
    """Some blocks of a prefix, one after another, that lie in one tier."""

    tier: Tier
    blocks: int
    queued: int = 0  # bytes that the tier is to move before them


@dataclass(frozen=True, slots=True)
class Forecast:
    """For a prefix: how much of it to read, and what both ways will take. Seconds; None: not measured yet."""

    blocks: int  # to be read; 0: computing all is faster
    onboard_s: float | None  # of these, and of computing the others
    compute_s: float | None  # of computing all

    @property
    def onboard(self) -> bool:
        return self.blocks > 0


@dataclass(slots=True)
class Line:
    """Seconds for an amount: a latency and a rate, fitted to what was measured lately by least squares.

    Measurements of about one size say nothing of the latency; then the time is in proportion to the amount. And what
    was measured of small amounts only says nothing of large ones.
    """

    weight: float = 0.0
    amount: float = 0.0
    seconds: float = 0.0
    squares: float = 0.0  # of the amounts
    products: float = 0.0  # amount × seconds
    largest: float = 0.0  # amount
    reach: float = _REACH  # times that, of which something is known

    def add(self, amount: float, seconds: float) -> None:
        predicted = self.seconds_for(amount)
        if predicted is not None and seconds < _FASTER * predicted:
            self.weight = self.amount = self.seconds = self.squares = self.products = self.largest = 0.0
        for name, value in (
            ("weight", 1.0), ("amount", amount), ("seconds", seconds),
            ("squares", amount * amount), ("products", amount * seconds),
        ):  # fmt: skip
            setattr(self, name, getattr(self, name) * _DECAY + value)
        self.largest = max(self.largest, amount)

    def seconds_for(self, amount: float, before: float = 0.0) -> float | None:
        """For that amount, with another one `before` it. None where nothing of about that amount was measured yet."""
        if amount > self.reach * self.largest or (fitted := self.fit) is None:
            return None
        latency, rate = fitted
        return latency + rate * (amount + before)

    @property
    def fit(self) -> tuple[float, float] | None:
        """The latency, and seconds for each of the amount; None before anything was measured."""
        if not self.amount:
            return None
        mean, mean_s = self.amount / self.weight, self.seconds / self.weight
        spread = self.squares / self.weight - mean * mean
        rate, latency = mean_s / mean, 0.0
        if spread > 0.01 * mean * mean:
            slope = (self.products / self.weight - mean * mean_s) / spread
            # A latency below nothing, or bytes that cost nothing, are noise: the proportion is the better guess.
            if 0 < slope < rate:
                rate, latency = slope, mean_s - slope * mean
        return latency, rate

    def least_for(self, amount: float, before: float = 0.0) -> float:
        """The same, or less where that is not known: more takes no shorter than less."""
        return self.seconds_for(min(amount, self.reach * self.largest), before) or 0.0


def _computing() -> Line:
    """Of many tokens it takes in proportion to what few take, at least."""
    return Line(reach=math.inf)


@dataclass(slots=True)
class OnboardCost:
    """What was measured on this worker."""

    _copy: Line = field(default_factory=Line)  # bytes from host memory to the device
    _reads: dict[Tier, Line] = field(default_factory=dict)  # bytes from a tier beneath to host memory
    _compute: Line = field(default_factory=_computing)  # tokens
    _refused: int = 0
    _trials: int = 0  # since reading last was the faster way

    def onboarded(self, size: int, seconds: float) -> None:
        """Checking `size` bytes of a prefix in host memory, and copying them to the device, took that long."""
        if size > 0:
            self._copy.add(size, seconds)

    def read(self, tier: Tier, size: int, seconds: float) -> None:
        """Reading that many bytes from a tier beneath took that long, what was queued before them included in both."""
        if size > 0:
            self._reads.setdefault(tier, Line()).add(size, seconds)

    def computed(self, tokens: int, seconds: float) -> None:
        """That many tokens of a prompt were computed in that time."""
        if tokens >= _LEAST_TOKENS and seconds > 0:
            self._compute.add(tokens, seconds)

    @property
    def onboarding(self) -> dict[Tier, tuple[float, float]]:
        """By tier what bringing blocks from there to the device takes: seconds, and seconds for each byte.

        Tiers of which nothing was measured are left out.
        """
        found: dict[Tier, tuple[float, float]] = {}
        copy = self._copy.fit
        if copy is not None:
            found[Tier.HOST] = copy
        for tier, line in self._reads.items():
            if (read := line.fit) is not None:
                latency, rate = copy or (0.0, 0.0)
                found[tier] = (read[0] + latency, read[1] + rate)
        return found

    def forecast(self, parts: Sequence[Part], block_bytes: int, block_size: int) -> Forecast:
        """For a prefix whose parts, in its order, lie in these tiers: its leading parts are read, the rest computed.

        What has not been measured is read: once is how its time becomes known.
        """
        every = sum(part.blocks for part in parts)
        compute_s = self._compute.seconds_for(every * block_size)
        best, blocks = Forecast(0, compute_s, compute_s), 0
        for count, part in enumerate(parts, 1):
            read_s, known = self._read_s(parts[:count], block_bytes)
            before, blocks = blocks, blocks + part.blocks
            rest_s = self._compute.seconds_for((every - blocks) * block_size) if blocks < every else 0.0
            slower = rest_s is not None and best.onboard_s is not None and read_s + rest_s > best.onboard_s
            if slower and known:
                continue
            if slower:  # at best
                break
            if known and rest_s is not None and compute_s is not None:
                best = Forecast(blocks, read_s + rest_s, compute_s)
            elif known or part.tier is Tier.HOST:
                best = Forecast(blocks, None, compute_s)
            else:
                best = Forecast(before + min(part.blocks, self._reach(part.tier, block_bytes)), None, compute_s)
                break
        return self._or_trial(best, every)

    def _or_trial(self, best: Forecast, every: int) -> Forecast:
        """A few blocks once in a while where reading is slower: it may not be for ever."""
        if best.onboard:
            self._refused = self._trials = 0
            return best
        self._refused += 1
        if self._refused <= _REFUSALS << min(self._trials, _RARER):
            return best
        self._refused, self._trials = 0, self._trials + 1
        return Forecast(min(_TRIAL, every), best.onboard_s, best.compute_s)

    def _reach(self, tier: Tier, block_bytes: int) -> int:
        """Blocks of the tier that are read at once to find out how long that takes."""
        return max(_FIRST, int(_REACH * self._reads.get(tier, Line()).largest) // block_bytes)

    def _read_s(self, parts: Sequence[Part], block_bytes: int) -> tuple[float, bool]:
        """Until all of these are on the device, and whether that is known; if not, it is so long at least.

        Tiers are read side by side, and what has come is copied meanwhile.
        """
        copied = sum(part.blocks for part in parts) * block_bytes
        copy_s, known = self._copy.least_for(copied), self._copy.seconds_for(copied) is not None
        reads: dict[Tier, float] = {}
        for part in parts:
            if part.tier is Tier.HOST:
                continue
            line, size = self._reads.get(part.tier, Line()), part.blocks * block_bytes
            queued = part.queued if part.tier not in reads else 0
            known &= line.seconds_for(size) is not None
            reads[part.tier] = reads.get(part.tier, 0.0) + line.least_for(size, queued)
        return copy_s + max(reads.values(), default=0.0), known


@dataclass(frozen=True, slots=True)
class PullForecast:
    """Seconds until the first token; None where nothing was measured yet, or where there is no such way."""

    pull_s: float | None  # what another worker holds of it, and the rest computed here
    rest_s: float  # of that, the rest, as far as is known
    compute_s: float | None  # all of it here
    remote_s: float | None  # all of it by a prefill worker

    @property
    def otherwise_s(self) -> float | None:
        """The best way but pulling."""
        return min((way for way in (self.compute_s, self.remote_s) if way is not None), default=None)

    @property
    def pull(self) -> bool:
        """Unless another way is known to be faster: pulling once is how that becomes known."""
        otherwise = self.otherwise_s
        return otherwise is None or (self.rest_s if self.pull_s is None else self.pull_s) <= otherwise


@dataclass(slots=True)
class PullCost:
    """What prompts have taken on one worker, by where their KV came from."""

    _latency: Line = field(default_factory=Line)  # of pulls: all but moving bytes and computing the rest
    _move: Line = field(default_factory=Line)
    _compute: Line = field(default_factory=_computing)
    _remote: Line = field(default_factory=_computing)
    _refused: int = 0

    def pulled(self, size: int, rest: int, seconds: float, moving_s: float) -> None:
        """The first token came so long after a prefix was asked for.

        Of that its `size` bytes were under way for `moving_s`, and then the `rest` was computed, in tokens.
        """
        rest_s = self._compute.seconds_for(rest)
        if rest_s is None and rest >= _LEAST_TOKENS:
            return  # how much of it was the pull's cannot be told yet
        self._move.add(size, moving_s)
        self._latency.add(1, max(0.0, seconds - moving_s - (rest_s or 0.0)))

    def pull_failed(self, seconds: float) -> None:
        """It was waited for in vain."""
        self._latency.add(1, seconds)

    def computed(self, tokens: int, seconds: float) -> None:
        """That many tokens of a prompt were computed here in that time."""
        if tokens >= _LEAST_TOKENS and seconds > 0:
            self._compute.add(tokens, seconds)

    def prefilled(self, tokens: int, seconds: float) -> None:
        """The first token came so long after a prefill worker was asked for that many of the prompt's."""
        if tokens >= _LEAST_TOKENS and seconds > 0:
            self._remote.add(tokens, seconds)

    @property
    def computing(self) -> tuple[float, float] | None:
        """Seconds that computing a prompt here takes, and seconds for each token; None: not measured yet."""
        return self._compute.fit

    @property
    def pulling(self) -> tuple[float, float] | None:
        """Seconds that a pull takes, and seconds for each byte; None: not measured yet."""
        latency, move = self._latency.fit, self._move.fit
        return None if latency is None or move is None else (sum(latency) + move[0], move[1])

    def forecast(self, size: int, tokens: int, rest: int, *, remote: bool) -> PullForecast:
        """For `tokens` of a prompt, `size` bytes, that another worker holds, and the `rest` that nobody has.

        `remote`: a prefill worker could be asked for all of it. Until it is known how long computing takes here, the
        rest is taken to be as fast as there.
        """
        if self._refused >= _REFUSALS:
            self._latency, self._move, self._refused = Line(), Line(), 0
        compute_s, rest_s = self._compute.seconds_for(tokens + rest), self._compute.seconds_for(rest)
        if rest_s is None:
            rest_s = self._remote.seconds_for(rest) or 0.0
        latency_s = self._latency.seconds_for(1)
        pull_s = None if latency_s is None else latency_s + (self._move.seconds_for(size) or 0.0) + rest_s
        remote_s = self._remote.seconds_for(tokens + rest) if remote else None
        forecast = PullForecast(pull_s, rest_s, compute_s, remote_s)
        self._refused = 0 if forecast.pull else self._refused + 1
        return forecast
