"""When blocks may be read, and which layers of them: CUDA runs behind the CPU, so a planned step is not yet a computed
one.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

_JOIN_S = 5.0


class Ready:
    """A point in the engine's work after which the blocks it computed may be read."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(blocking=True) if device.type == "cuda" else None
        self._passed = self._event is None
        if self._event is not None:
            self._event.record()

    @property
    def passed(self) -> bool:
        if not self._passed and self._event is not None:
            self._passed = self._event.query()
        return self._passed

    def wait(self) -> None:
        """Sleep until it has passed, without the interpreter."""
        if self._event is not None:
            self._event.synchronize()

    def before(self, stream: torch.cuda.Stream) -> None:
        """What is put on `stream` from now on happens after this point."""
        if self._event is not None and not self.passed:
            stream.wait_event(self._event)


class StepReady:
    """How many layers of the blocks that a step computes may be read: it computes them one after the other."""

    def __init__(self, layers: int) -> None:
        """`layers` of the model."""
        self.layers = layers
        self._points: deque[tuple[int, Ready]] = deque()
        self._readable = 0

    @classmethod
    def whole(cls, layers: int, ready: Ready) -> StepReady:
        """Of a step of which nothing may be read before all of it."""
        step = cls(layers)
        step.reach(layers, ready)
        return step

    def reach(self, layers: int, ready: Ready) -> None:
        """The first `layers` layers may be read after that point. By the thread that computes, in order."""
        self._points.append((layers, ready))

    @property
    def readable(self) -> int:
        """Of the first layers. For the one thread that reads the blocks."""
        while self._points and self._points[0][1].passed:
            self._readable, _ = self._points.popleft()
        return self._readable

    @property
    def over(self) -> bool:
        """Whether all layers may be read."""
        return self.readable == self.layers


class Waitable(Protocol):
    """A point in what a GPU does."""

    def wait(self) -> object:
        """Sleep until it has passed, without the interpreter."""
        ...


class ReadyWatch:
    """A thread that says when points have passed. Asking again and again would slow down whoever computes."""

    def __init__(self, passed: Callable[[], None]) -> None:
        """`passed` is called on that thread."""
        self._passed = passed
        self._points: queue.SimpleQueue[Waitable | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._live, name="dynamo-lite-ready", daemon=True)
        self._thread.start()

    def watch(self, point: Waitable) -> None:
        """In the order in which they will pass. From any thread."""
        self._points.put(point)

    def close(self) -> None:
        self._points.put(None)
        self._thread.join(_JOIN_S)

    def _live(self) -> None:
        while (point := self._points.get()) is not None:
            try:
                point.wait()
            finally:
                self._passed()  # also of a failed GPU, which whoever copies is told as an error
