"""How long a worker's device keeps KV that nobody comes back for, from how fast new KV takes its place."""

from __future__ import annotations

import math
from collections import deque

_MARKS = 64  # of what the device holds at once: finer is not remembered


class Churn:
    """Of one worker's device."""

    __slots__ = ("_capacity", "_marks", "_stored")

    def __init__(self, capacity: int) -> None:
        """In blocks."""
        self._capacity = max(1, capacity)
        self._stored = 0  # since the beginning
        self._marks: deque[tuple[int, float]] = deque()  # how many were stored by when, the oldest first

    def store(self, blocks: int, now: float) -> None:
        """So many were stored that were not there before."""
        self._stored += blocks
        if not self._marks or self._stored - self._marks[-1][0] >= self._capacity / _MARKS:
            self._marks.append((self._stored, now))
        while len(self._marks) > 1 and self._marks[1][0] <= self._stored - self._capacity:
            self._marks.popleft()

    def age(self, now: float) -> float:
        """Seconds in which the device was filled once; infinite while it has room yet."""
        if self._stored < self._capacity:
            return math.inf
        return max(1e-3, now - self._marks[0][1])
