"""How much new KV each worker's device was given lately, so that none of them forgets sooner than others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_MOST = 0.1  # that a worker counts as having more, or less, than others: one that has just joined is not to be overrun
_RENEW = 1e100  # weights grow; beyond this all are made small again


@dataclass(slots=True, eq=False)
class Inflow:
    """Of one worker, in fillings of its device; the latest weigh most."""

    blocks: int  # of the device
    weighed: float = 0.0


class Inflows:
    """Of all workers. What was stored fades by a factor of e while each of them is filled once, on average."""

    def __init__(self) -> None:
        self._weight = 1.0  # of what is stored now

    def store(self, one: Inflow, blocks: int, everyone: Sequence[Inflow]) -> None:
        """That many were stored on one of `everyone`."""
        share = min(1.0, blocks / max(1, one.blocks))
        self._weight *= math.exp(share / len(everyone))
        one.weighed += share * self._weight
        if self._weight > _RENEW:
            for each in everyone:
                each.weighed /= self._weight
            self._weight = 1.0

    def crowding(self, some: Sequence[Inflow]) -> list[float]:
        """Of each, about 1: how much more, or less, it was given than the mean of them, in fillings."""
        mean = sum([one.weighed for one in some]) / len(some)
        return [1 + min(_MOST, max(-_MOST, (one.weighed - mean) / self._weight)) for one in some]
