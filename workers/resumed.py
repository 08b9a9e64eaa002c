"""What a real engine takes for the prompt of a sequence that another one has begun, though it was generated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from dynamo_lite.plane.wire import Sampling

_ODD, _SEEDS = 0x9E3779B97F4A7C15, 1 << 63


def carried(sampling: Sampling, history: Sequence[int]) -> Sampling:
    """For a sequence that goes on after `history`, which the engine will count as part of the prompt.

    Seed: an engine counts random numbers from its own start, so another seed is used, always the same one after so
    many tokens; with the old one the numbers of the first tokens would be drawn again. Penalties on output: what they
    take off the tokens of `history` becomes a bias. That is exact for the frequency; a token that is said again after
    the cut is penalised for its presence a second time.
    """
    if not history:
        return sampling
    seed, bias = sampling.seed, dict(sampling.logit_bias or {})
    if seed is not None:
        seed = (seed + len(history) * _ODD) % _SEEDS
    if sampling.frequency_penalty or sampling.presence_penalty:
        for token_id, count in Counter(history).items():
            taken = sampling.frequency_penalty * count + sampling.presence_penalty
            bias[token_id] = bias.get(token_id, 0.0) - taken
    return msgspec.structs.replace(sampling, seed=seed, logit_bias=bias or None)
