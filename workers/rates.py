"""What a worker tells routers of its speed: what things have taken here lately."""

from __future__ import annotations

from dataclasses import dataclass, field

from dynamo_lite.plane.wire import Line, Rates
from kvbm.policy import OnboardCost, PullCost

_DECAY = 0.98  # of what was measured before, at each new step or answer
_SPREAD = 0.01  # of the mean squared: batches of about one size say nothing of how their size matters


@dataclass(slots=True)
class Steps:
    """Seconds of a decode step by the size of its batch, fitted by least squares."""

    _weight: float = 0.0
    _size: float = 0.0
    _seconds: float = 0.0
    _squares: float = 0.0
    _products: float = 0.0

    def took(self, batch: int, seconds: float) -> None:
        """One step in which that many sequences got a token each, and no prompt was computed."""
        self._weight = self._weight * _DECAY + 1
        self._size = self._size * _DECAY + batch
        self._seconds = self._seconds * _DECAY + seconds
        self._squares = self._squares * _DECAY + batch * batch
        self._products = self._products * _DECAY + batch * seconds

    @property
    def fit(self) -> tuple[float, float] | None:
        """Seconds, and seconds for each sequence; None before the first."""
        if not self._weight:
            return None
        size, seconds = self._size / self._weight, self._seconds / self._weight
        spread = self._squares / self._weight - size * size
        if spread <= _SPREAD * size * size:
            return seconds, 0.0
        slope = (self._products / self._weight - size * seconds) / spread
        slope = min(max(0.0, slope), seconds / size)  # more sequences are no faster, and none takes less than nothing
        return seconds - slope * size, slope


@dataclass(slots=True)
class Answers:
    """How long answers are."""

    _weight: float = 0.0
    _tokens: float = 0.0

    def ended(self, tokens: int) -> None:
        self._weight = self._weight * _DECAY + 1
        self._tokens = self._tokens * _DECAY + tokens

    @property
    def mean(self) -> float | None:
        return self._tokens / self._weight if self._weight else None


@dataclass(slots=True)
class Speeds:
    """Everything that was measured on one engine. The costs belong to whoever decides by them."""

    cost: PullCost
    block_size: int  # tokens
    block_bytes: int  # over all ranks
    onboarding: OnboardCost | None = None
    steps: Steps = field(default_factory=Steps)
    answers: Answers = field(default_factory=Answers)

    def rates(self) -> Rates:
        """As they are reported."""
        token_bytes = self.block_bytes / self.block_size
        tiers = self.onboarding.onboarding if self.onboarding is not None else {}
        return Rates(
            prefill=_ms(self.cost.computing),
            step=_ms(self.steps.fit),
            pull=_ms(self.cost.pulling, token_bytes),
            onboard={tier: line for tier, fit in tiers.items() if (line := _ms(fit, token_bytes)) is not None},
            answer_tokens=self.answers.mean,
        )


def _ms(fit: tuple[float, float] | None, units: float = 1.0) -> Line | None:
    """`units`: of what was measured, in one of what is reported."""
    return None if fit is None else (1000 * fit[0], 1000 * fit[1] * units)


class Queue:
    """Prompts that are to be computed here, by request."""

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}

    @property
    def tokens(self) -> int:
        return sum(self._tokens.values())

    def add(self, request_id: str, tokens: int) -> None:
        """So many of its tokens are missing."""
        self._tokens[request_id] = tokens

    def done(self, request_id: str) -> None:
        """It has its first token, or has ended. Idempotent."""
        self._tokens.pop(request_id, None)
