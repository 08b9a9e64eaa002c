"""What the mover's thread sleeps on: other threads' word, and its engine's."""

from __future__ import annotations

import os
import select
import time
from typing import Protocol

_SHORT_S = 0.001  # poll(2) counts in milliseconds


class HasFileno(Protocol):
    """Something that is readable now and then."""

    def fileno(self) -> int: ...


class Wake:
    """`ring` from any thread ends the owner's `wait`, also the next one when it is not waiting."""

    def __init__(self, other: HasFileno) -> None:
        """`other`: ends a wait as well while it is readable."""
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._bell, select.POLLIN)
        self._poll.register(other, select.POLLIN)

    def ring(self) -> None:
        os.eventfd_write(self._bell, 1)

    def wait(self, seconds: float | None) -> None:
        """At most that long; less than a millisecond is slept through whatever happens."""
        if seconds is not None and seconds < _SHORT_S:
            time.sleep(seconds)
        elif any(found == self._bell for found, _ in self._poll.poll(None if seconds is None else seconds * 1000)):
            os.eventfd_read(self._bell)

    def close(self) -> None:
        """Nobody rings any more."""
        os.close(self._bell)
