"""Whether to read a prefix from a tier, to pull it from another worker, or to compute it again, from what each has
taken lately.

Only what the ways do not share is compared: each of them waits for the engine's next step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_DECAY = 0.8  # of what was measured before, at each new measurement
_LEAST_TOKENS = 64  # shorter prompts say little about the speed of computing long ones
_REFUSALS = 32  # after so many in a row reading is measured anew


@dataclass(frozen=True, slots=True)
class Forecast:
    """Seconds; None where nothing was measured yet."""

    onboard_s: float | None
    compute_s: float | None

    @property
    def onboard(self) -> bool:
        """Unless computing is known to be faster: reading once is how that becomes known."""
        return self.onboard_s is None or self.compute_s is None or self.onboard_s <= self.compute_s


@dataclass(slots=True)
class _Speed:
    """Seconds for an amount, of which large ones count for more than small ones."""

    seconds: float = 0.0
    amount: float = 0.0

    def add(self, amount: float, seconds: float) -> None:
        self.seconds = self.seconds * _DECAY + seconds
        self.amount = self.amount * _DECAY + amount

    def for_(self, amount: float) -> float | None:
        return amount * self.seconds / self.amount if self.amount else None


@dataclass(slots=True)
class OnboardCost:
    """What was measured on this worker."""

    _onboard: _Speed = field(default_factory=_Speed)
    _compute: _Speed = field(default_factory=_Speed)
    _refused: int = 0

    def onboarded(self, size: int, seconds: float) -> None:
        """Checking and copying a prefix of `size` bytes took that long."""
        if size > 0:
            self._onboard.add(size, seconds)

    def computed(self, tokens: int, seconds: float) -> None:
        """That many tokens of a prompt were computed in that time."""
        if tokens >= _LEAST_TOKENS and seconds > 0:
            self._compute.add(tokens, seconds)

    def forecast(self, size: int, tokens: int) -> Forecast:
        """For a prefix of that many bytes in a tier, and tokens to compute otherwise."""
        if self._refused >= _REFUSALS:
            self._onboard, self._refused = _Speed(), 0
        forecast = Forecast(self._onboard.for_(size), self._compute.for_(tokens))
        self._refused = 0 if forecast.onboard else self._refused + 1
        return forecast


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

    _latency: _Speed = field(default_factory=_Speed)  # of pulls: all but moving bytes and computing the rest
    _move: _Speed = field(default_factory=_Speed)
    _compute: _Speed = field(default_factory=_Speed)
    _remote: _Speed = field(default_factory=_Speed)
    _refused: int = 0

    def pulled(self, size: int, rest: int, seconds: float, moving_s: float) -> None:
        """The first token came so long after a prefix was asked for.

        Of that its `size` bytes were under way for `moving_s`, and then the `rest` was computed, in tokens.
        """
        rest_s = self._compute.for_(rest)
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

    def forecast(self, size: int, tokens: int, rest: int, *, remote: bool) -> PullForecast:
        """For `tokens` of a prompt, `size` bytes, that another worker holds, and the `rest` that nobody has.

        `remote`: a prefill worker could be asked for all of it. Until it is known how long computing takes here, the
        rest is taken to be as fast as there.
        """
        if self._refused >= _REFUSALS:
            self._latency, self._move, self._refused = _Speed(), _Speed(), 0
        compute_s, rest_s = self._compute.for_(tokens + rest), self._compute.for_(rest)
        if rest_s is None:
            rest_s = self._remote.for_(rest) or 0.0
        latency_s = self._latency.for_(1)
        pull_s = None if latency_s is None else latency_s + (self._move.for_(size) or 0.0) + rest_s
        remote_s = self._remote.for_(tokens + rest) if remote else None
        forecast = PullForecast(pull_s, rest_s, compute_s, remote_s)
        self._refused = 0 if forecast.pull else self._refused + 1
        return forecast
