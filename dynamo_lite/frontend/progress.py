"""What has been generated for one HTTP request so far: its choices, counts and timings."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter
from typing import Any

from dynamo_lite.frontend import metrics
from dynamo_lite.frontend.answer import usage
from dynamo_lite.frontend.choices import Choice, Piece
from dynamo_lite.frontend.metrics import ModelMetrics
from dynamo_lite.frontend.tokens import Vocabulary
from dynamo_lite.frontend.work import Work
from dynamo_lite.plane.wire import Delta


class Progress:
    """Turns deltas into pieces and keeps the books."""

    def __init__(self, work: Work, vocabulary: Vocabulary, series: ModelMetrics, started: float) -> None:
        self._work, self._vocabulary, self._series, self._started = work, vocabulary, series, started
        self._choices = [
            Choice(prompt * work.n + index, vocabulary, task.token_ids, work, task.sampling.min_tokens)
            for prompt, task in enumerate(work.tasks)
            for index in range(work.n)
        ]
        self._last_token = [0.0] * len(self._choices)
        self._cached = [0] * len(work.tasks)
        self.first_token_s: float | None = None
        series.prompt_tokens.inc(work.prompt_tokens)

    def echo(self) -> Iterator[Piece]:
        """The prompts as text, where the request asks for them; for max_tokens 0 they are all there is."""
        if not self._work.echo:
            return
        for choice in self._choices:
            task = self._work.tasks[choice.index // self._work.n]
            if task.sampling.max_tokens == 0:
                choice.finish = "length"
            yield Piece(choice.index, self._vocabulary.text(task.token_ids), finish=choice.finish)

    def take(self, prompt: int, delta: Delta) -> tuple[Piece | None, bool]:
        """The piece, and whether a stop string has just ended a sequence that its worker would continue."""
        choice = self._choices[prompt * self._work.n + delta.index]
        if delta.cached_tokens is not None:
            self._cached[prompt] = delta.cached_tokens
        if choice.finish is not None:
            return None, False
        before = choice.tokens
        piece = choice.push(delta)
        if choice.tokens > before:
            self._time(choice.index, choice.tokens - before)
        return piece, choice.stopped and delta.finish is None

    def _time(self, index: int, count: int) -> None:
        now, last = perf_counter(), self._last_token[index]
        if self.first_token_s is None:
            self.first_token_s = now - self._started
            self._series.first_token.observe(self.first_token_s)
        elif last:
            self._series.inter_token.observe((now - last) / count)
        self._last_token[index] = now

    def finish(self) -> None:
        """Record the totals, once, however the request ended."""
        self._series.generation_tokens.inc(self.generated)
        metrics.CACHED_TOKENS.inc(self.cached)
        if all(choice.finish is not None for choice in self._choices):
            self._series.whole.observe(perf_counter() - self._started)

    @property
    def generated(self) -> int:
        return sum(choice.tokens for choice in self._choices)

    @property
    def cached(self) -> int:
        return sum(self._cached)

    @property
    def finish_reasons(self) -> list[str]:
        return [choice.finish or "error" for choice in self._choices]

    @property
    def usage(self) -> dict[str, Any]:
        return usage(self._work.prompt_tokens, self.generated, self.cached)
