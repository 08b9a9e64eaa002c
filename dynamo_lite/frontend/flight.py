"""One prompt at one worker, and what another worker needs to go on with it."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

from dynamo_lite.errors import DynamoError, WorkerLost
from dynamo_lite.plane.wire import Incarnation, RequestId, Resumed
from dynamo_lite.router.placement import Placement

if TYPE_CHECKING:
    from dynamo_lite.frontend.generate import Call

DEATHS = 2  # a sequence that two workers died of, at the same token, is not given to a third
ATTEMPTS = 10  # in all


class Attempts:
    """How often one prompt may be placed again.

    A prompt that kills workers must not go through all of them, and one whose workers die, freeze or leave for reasons
    of their own must not suffer. The first kills the next one at the same token.
    """

    def __init__(self) -> None:
        self._deaths = self._failures = 0

    def failed(self, error: DynamoError, *, progressed: bool) -> bool:
        """Whether there may be another one. `progressed`: the failed attempt had given a token."""
        self._failures += 1
        if progressed:
            self._deaths = 0
        self._deaths += isinstance(error, WorkerLost) and error.how == "died"
        return self._deaths < DEATHS and self._failures < ATTEMPTS


class Story:
    """What the client has of one prompt's sequences; it outlives the flights."""

    __slots__ = ("attempts", "begun", "cached_told", "heard", "open")

    def __init__(self, n: int) -> None:
        self.open: dict[int, list[int]] = {index: [] for index in range(n)}  # tokens of each that goes on
        self.begun = False  # there are tokens: another attempt from the start might say something else
        self.cached_told = False
        self.heard = 0.0  # when the last token came, on the event loop's clock
        self.attempts = Attempts()

    @property
    def longest(self) -> list[int]:
        return max(self.open.values(), key=len, default=[])

    def resumed(self) -> tuple[Resumed, ...]:
        """For the worker that goes on; empty where it is to begin."""
        return tuple(Resumed(index, tokens) for index, tokens in self.open.items()) if self.begun else ()

    def take_full(self, max_tokens: int) -> list[int]:
        """Sequences whose last token has come, though not the word that it was the last: they are over."""
        full = [index for index, tokens in self.open.items() if len(tokens) >= max_tokens]
        for index in full:
            del self.open[index]
        return full


class Flight:
    """One prompt at one worker."""

    __slots__ = (
        "abandoned", "asked_to_move", "booking", "call", "cause", "former",
        "id", "news", "placement", "prompt", "story", "worker",
    )  # fmt: skip

    def __init__(self, call: Call, prompt: int, placement: Placement, story: Story) -> None:
        # A new id at every attempt: what a worker given up still sends belongs to nobody.
        self.id = RequestId(os.urandom(16).hex())
        self.call, self.prompt, self.story = call, prompt, story
        self.placement, self.worker = placement, placement.decode
        self.news = False  # a token came
        self.cause = ""  # of its coming after another flight, which had begun; empty once it has a token
        self.former: tuple[Incarnation, RequestId] | None = None  # where its KV waits to be taken from
        self.abandoned = False  # no other worker is to be tried
        self.asked_to_move = False
        self.booking = ExitStack()

    @property
    def open(self) -> dict[int, list[int]]:
        return self.story.open
