"""One simulated request, from its arrival to its last token."""

from __future__ import annotations

import asyncio
from typing import Protocol

from dynamo_lite.router.placement import Placement
from kvbm.hashing import HashedPrompt
from workers.simulate.figures import Answer, Gaps
from workers.simulate.trace import Request
from workers.simulate.worker import PlannedSequence, SimWorker


class Book(Protocol):
    """Where what was seen is kept."""

    gaps: Gaps

    def answered(self, answer: Answer) -> None: ...


class Call:
    """What a client sees; the owner of the sequence on the worker that decodes."""

    def __init__(self, book: Book, request: Request, placement: Placement) -> None:
        self._book, self._request, self._placement = book, request, placement
        self._booked = placement.booked()
        self._arrived = asyncio.get_running_loop().time()
        self._count, self._found = 0, 0  # tokens
        self._first_at = self._last_at = 0.0

    def begin(self, sequence: PlannedSequence, worker: SimWorker) -> None:
        self._booked.__enter__()  # left when the last token has come, which no block of code waits for
        worker.place(sequence)

    def first_token(self, at: float, found: int, here: int) -> None:
        """Of the prompt `found` tokens had their KV anywhere, and `here` on the worker that decodes."""
        self._found, self._count = found, 1
        self._first_at = self._last_at = at
        self._placement.observed(here)

    def tokens(self, sequence: PlannedSequence, count: int, first_at: float, at: float) -> None:
        if self._count:
            self._book.gaps.add(first_at - self._last_at, 1)
            self._count += count
        else:
            self.first_token(first_at, sequence.cached or 0, sequence.cached or 0)
            self._count = count
        if count > 1:
            self._book.gaps.add((at - first_at) / (count - 1), count - 1)
        self._last_at = at

    def ended(self, sequence: PlannedSequence, at: float) -> None:
        self._booked.__exit__(None, None, None)
        gap = (at - self._first_at) / (self._count - 1) if self._count > 1 else 0.0
        self._book.answered(
            Answer(
                self._arrived, sequence.prompt_len, self._found, self._count, self._first_at - self._arrived, gap, at
            )
        )


class RemotePrefill:
    """A prompt that another worker computes for the one that decodes; the owner of the sequence there.

    The first token is chosen there and told at once. Then the KV moves, one prompt after another over the link of the
    worker that has computed it.
    """

    def __init__(
        self, call: Call, prompt: HashedPrompt, decode: SimWorker, prefill: SimWorker, sequence: PlannedSequence
    ) -> None:
        """It begins at once. `sequence` waits for it, on the worker that decodes."""
        self._call, self._sequence, self._decode, self._prefill = call, sequence, decode, prefill
        here = (sequence.cached or 0) // decode.block_size
        self._blocks = -(-sequence.prompt_len // decode.block_size) - here

        decode.held += self._blocks
        prefill.place(PlannedSequence(prompt, 0, self, None))

    def tokens(self, sequence: PlannedSequence, count: int, first_at: float, at: float) -> None:
        raise AssertionError("a prompt is computed, and that is all")

    def ended(self, sequence: PlannedSequence, at: float) -> None:
        """It is computed."""
        here = self._sequence.cached or 0
        self._call.first_token(at, max(here, sequence.cached or 0), here)
        self._prefill.held += self._blocks
        asyncio.get_running_loop().call_at(self._prefill.link.book(self._blocks), self._moved, sequence)

    def _moved(self, sequence: PlannedSequence) -> None:
        self._prefill.held -= self._blocks
        self._decode.held -= self._blocks
        self._prefill.remove(sequence)
        self._sequence.given_first_token()
        if self._sequence.length < self._sequence.longest:
            self._decode.received(self._sequence)
        else:
            self._decode.remove(self._sequence)
            self._call.ended(self._sequence, asyncio.get_running_loop().time())
