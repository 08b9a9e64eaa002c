"""An event loop whose clock jumps to the next timer whenever nothing is left to do now.

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(main())

An hour of simulated work takes as long as its computing does, and is the same every time. Nothing outside the process
is waited for: there are no sockets, threads or processes in virtual time.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Starts at 0 s."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_NeverSleeping(self._jump))

    def time(self) -> float:
        return self._now

    def _jump(self, seconds: float) -> None:
        self._now += seconds


class _NeverSleeping(selectors.SelectSelector):
    """The loop asks it to sleep until the next timer is due; it sets the clock forward instead."""

    def __init__(self, jump: Callable[[float], None]) -> None:
        super().__init__()
        self._jump = jump

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Raises RuntimeError when everybody waits for somebody else."""
        if timeout is None:
            raise RuntimeError("nothing is left that could ever happen")
        if timeout > 0:
            self._jump(timeout)
        return []
