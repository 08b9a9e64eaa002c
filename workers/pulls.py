"""Whether a worker takes the prefix of a prompt from another one that holds it, and how long that may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvbm.policy import PullCost, PullForecast

REFUSALS = ("not held", "busy")  # causes with which a holder declines, having done nothing
_LEAST_PATIENCE_S = 0.1


@dataclass(frozen=True, slots=True)
class Pull:
    """What could be pulled for one prompt, and whether it is to be."""

    tokens: int  # of the prompt: where what is pulled ends, and a block
    forecast: PullForecast
    chosen: bool
    patience_s: float | None  # after which computing is begun instead; None: the request's deadline


@dataclass(frozen=True, slots=True)
class Pulls:
    """How this worker decides."""

    mode: Literal["auto", "always", "never"]
    least_tokens: int  # fewer are not worth asking for
    block_size: int  # tokens
    block_bytes: int  # over all ranks
    silence_s: float
    cost: PullCost

    def weigh(self, held: int, prompt_tokens: int, here: int, *, remote: bool, leaving: bool = False) -> Pull | None:
        """None where there is too little to pull: of the prompt another worker holds `held` tokens, this one `here`.

        `remote`: a prefill worker could be asked for the whole prompt instead. `leaving`: the holder has generated the
        sequence until now. Several such come at once, and computing them all would hold up what runs here.
        """
        end = min(held, prompt_tokens - 1) // self.block_size * self.block_size
        tokens = end - here
        if self.mode == "never" or tokens < self.least_tokens:
            return None
        size = tokens // self.block_size * self.block_bytes
        forecast = self.cost.forecast(size, tokens, prompt_tokens - end, remote=remote)
        if leaving or self.mode == "always":
            return Pull(end, forecast, True, None)
        return Pull(end, forecast, forecast.pull, self._patience_s(forecast))

    def _patience_s(self, forecast: PullForecast) -> float:
        """As long as the other way takes: then a holder that is busy or slow costs no more than that once again."""
        otherwise_s = forecast.otherwise_s
        return self.silence_s if otherwise_s is None else max(_LEAST_PATIENCE_S, otherwise_s)
