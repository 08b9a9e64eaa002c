"""vLLM's per-step statistics, kept as the few numbers a load report needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats


@dataclass(slots=True)
class EngineStats:
    """As of the engine's last step."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0  # of 1
    prefilled: Callable[[int, float], None] | None = None  # told of each prompt: tokens computed for it, seconds
    stepped: Callable[[int, float], None] | None = None  # of each step without prompts: its batch, seconds


class LoadLogger(StatLoggerBase):  # type: ignore[misc]  # vLLM is not followed by mypy
    """Called by AsyncLLM after every step."""

    def __init__(self, stats: EngineStats) -> None:
        self._stats = stats
        self._last: float | None = None  # when the step before ended; None: the engine was idle since

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is not None:
            self._stats.running = scheduler_stats.num_running_reqs
            skipped = getattr(scheduler_stats, "num_skipped_waiting_reqs", 0)  # e.g. waiting for remote KV
            self._stats.waiting = scheduler_stats.num_waiting_reqs + skipped
            self._stats.kv_usage = scheduler_stats.kv_cache_usage
        if iteration_stats is not None:
            self._note_step(iteration_stats)
        if iteration_stats is not None and self._stats.prefilled is not None:
            for request in iteration_stats.finished_requests:
                cached = getattr(request, "num_cached_tokens", 0)
                self._stats.prefilled(request.num_prompt_tokens - cached, request.prefill_time)

    def _note_step(self, iteration: IterationStats) -> None:
        now, tokens = time.monotonic(), iteration.num_generation_tokens
        prompts = getattr(iteration, "num_prompt_tokens", 0)
        if self._last is not None and tokens and not prompts and self._stats.stepped is not None:
            self._stats.stepped(tokens, now - self._last)
        self._last = now if self._stats.running else None

    def log_engine_initialized(self) -> None:
        return


def stat_logger(stats: EngineStats) -> Callable[[VllmConfig, int], StatLoggerBase]:
    """What AsyncLLM wants: a factory called with its configuration and the engine's index."""

    def make(config: VllmConfig, index: int = 0) -> StatLoggerBase:
        return LoadLogger(stats)

    return make
