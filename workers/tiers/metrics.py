"""How long the tiers take; what they hold and do is in the worker's own metrics."""

from __future__ import annotations

from prometheus_client import Histogram

from kvbm.events import Tier

# Twice as long at each step: quantiles are then right to a factor of 1.4 from 0.25 ms to 8 s.
_SECONDS = Histogram(
    "kv_tier_seconds", "Of one request's blocks from the host tier, else of one batch, by operation (read, write)",
    ["tier", "operation"], buckets=tuple(0.00025 * 2**step for step in range(16)),
)  # fmt: skip


def observe(tier: Tier, operation: str, seconds: float) -> None:
    _SECONDS.labels(tier.value, operation).observe(seconds)
