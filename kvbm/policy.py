"""Whether to read a prefix from a tier or to compute it again, from what both have taken lately.

Only what the two do not share is compared: both wait for the engine's next step.
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
