"""One sequence of the answer: from token deltas to text, stop strings and a finish reason."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from dynamo_lite.errors import WorkerError
from dynamo_lite.frontend.stops import StopMatcher
from dynamo_lite.frontend.tokens import Vocabulary
from dynamo_lite.frontend.work import Work
from dynamo_lite.plane.wire import Delta, TokenLogprob


class Piece(msgspec.Struct, frozen=True):  # made for every token; a frozen dataclass takes five times as long
    """What became known of a choice: text to show, scored tokens, and, at the end, why it ended."""

    index: int
    text: str
    logprobs: list[TokenLogprob] | None = None
    finish: str | None = None


class Choice:
    """Feeds on the deltas of one sequence. `stopped`: a stop string ended it, the worker must be told."""

    def __init__(self, index: int, vocabulary: Vocabulary, prompt: Sequence[int], work: Work, min_tokens: int) -> None:
        self.index = index
        self.tokens = 0  # generated, the one that ended it included
        self.finish: str | None = None
        self._detokeniser = vocabulary.detokeniser(prompt)
        self._matcher = StopMatcher(work.stops)
        self._scored = work.logprobs is not None
        self._min_tokens = min_tokens

    @property
    def stopped(self) -> bool:
        return self._matcher.matched is not None

    def push(self, delta: Delta) -> Piece:
        """Raises WorkerError when the engine gave the sequence up."""
        shown: list[str] = []
        count = len(delta.token_ids)
        silent_end = delta.stop_token is not None and count > 0 and delta.token_ids[-1] == delta.stop_token
        taken = 0
        for token_id in delta.token_ids[: count - silent_end]:
            taken += 1
            self._show(self._detokeniser.push(token_id), shown, self.tokens + taken)
            if self.stopped:
                break
        logprobs = delta.logprobs[:taken] if self._scored and delta.logprobs else None
        if not self.stopped:
            taken += silent_end
            if delta.finish is not None:
                self._end(delta.finish, shown)
        if self.stopped:
            self.finish = "stop"
        self.tokens += taken
        return Piece(self.index, "".join(shown), logprobs, self.finish)

    def _show(self, text: str, shown: list[str], position: int) -> None:
        # As in vLLM, a stop string does not count while it lies within the tokens that min_tokens demands.
        shown.append(text if position <= self._min_tokens else self._matcher.push(text))

    def _end(self, finish: str, shown: list[str]) -> None:
        if finish not in ("stop", "length"):
            raise WorkerError(f"the engine ended the sequence with '{finish}'")
        self.finish = finish
        self._show(self._detokeniser.finish(), shown, self._min_tokens + 1)
        if not self.stopped:
            shown.append(self._matcher.finish())
