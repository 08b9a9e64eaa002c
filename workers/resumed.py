"""What a real engine cannot take over of a sequence that another one has begun."""

from __future__ import annotations

_ODD, _SEEDS = 0x9E3779B97F4A7C15, 1 << 63


def seed_after(seed: int | None, resumed: int) -> int | None:
    """An engine counts a seed's random numbers from its own start, so after `resumed` tokens another seed is used.

    It is always the same for this seed and so many tokens. With the old one the random numbers of the first tokens
    would be drawn once more.
    """
    return seed if seed is None or not resumed else (seed + resumed * _ODD) % _SEEDS
