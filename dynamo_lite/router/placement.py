"""One decision of the router."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

from dynamo_lite.plane.wire import Holder, Incarnation, InstanceRecord
from dynamo_lite.router import metrics
from dynamo_lite.router.bookings import BookingLedger
from dynamo_lite.router.explain import Considered


@dataclass(eq=False)
class Placement:
    """Where one request goes, and why."""

    decode: InstanceRecord
    prefill: tuple[InstanceRecord, ...]  # candidates, best first; empty: the decode worker computes
    overlap_blocks: int
    prompt_blocks: int
    holder: Holder | None  # has more of the prompt than the decode worker
    considered: Considered
    computes: Incarnation  # who is first asked to compute the prompt
    missing_tokens: int  # of the prompt, there
    at: float  # by the roster's clock
    _ledger: BookingLedger
    found_tokens: int | None = None  # of the prompt, on the decode worker, as that said itself
    _computed: Callable[[], None] = field(default=lambda: None)

    @cached_property
    def reason(self) -> str:
        """In one sentence."""
        return self.considered.reason()

    @property
    def prompt_tokens(self) -> int:
        return self.considered.prompts[self.considered.chosen].tokens

    @property
    def held_tokens(self) -> int:
        """Of the prompt, on the decode worker, as far as is known here."""
        return self.considered.prompts[self.considered.chosen].held

    @property
    def scores(self) -> dict[str, float]:
        """By worker name, in predicted milliseconds; lower is better."""
        considered = self.considered
        pairs = zip(considered.workers, considered.predictions, strict=True)
        return {worker.name: prediction.total for worker, prediction in pairs}

    @property
    def parts(self) -> dict[str, float]:
        """Of the cost of the chosen worker, in milliseconds."""
        return self.considered.predictions[self.considered.chosen].parts._asdict()

    @contextmanager
    def booked(self) -> Iterator[None]:
        """Count the request as load of its workers while the body runs."""
        booking = self._ledger.booked(self.decode.incarnation, self.computes, self.missing_tokens, self.prompt_blocks)
        with booking as self._computed:
            yield

    def observed(self, cached_tokens: int) -> None:
        """The first token came: the prompt is computed, and this much of it was on the decode worker."""
        self._computed()
        self.found_tokens = cached_tokens
        actual = cached_tokens // self.decode.fingerprint.block_size
        metrics.PREDICTED_BLOCKS.inc(self.overlap_blocks)
        metrics.ACTUAL_BLOCKS.inc(actual)
        metrics.MISPREDICTED_BLOCKS.set(self.overlap_blocks - actual)
